"""The demo's unlearning runs: recall epoch by epoch, the updates they took, and MRD against these.

Every run has one seed, so a difference between two runs has no interval, and the sentences claim nothing beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.recipe import Recipe, total_updates, updates_per_epoch
from bench.files.score_file import Scores
from bench.jobs.run_folder import read_run
from bench.report.words import decimal, listed, sign_verdict, with_ci
from bench.stats.estimates import Estimate, partial_spearman, spearman

# Remark 3.4 of the paper: the updates that a sample takes are inversely proportional to its MRD.
CLAIMED_SIGN = -1


@dataclass(frozen=True)
class DemoRun:
    """A finished run, epoch by epoch. Row 0 is the initial model; a run that ended early has fewer rows.

    Attributes:
        spec: what was run.
        record: see bench.jobs.run_folder.UnlearnResult.
        epochs, updates: (E,) numbers of them so far.
        forgotten: (E,) share of the forget set that is forgotten.
        forget_recall, forget_probability, retain_recall, retain_probability: (E,) ROUGE-L recall and probability of
            answers, means over the samples evaluated; nan where not measured.
        mean_abs_delta: (E,) mean change of a weight of the initial model.
        ids: of the N forget samples.
        tokens: (N,) scored tokens.
        until_forgotten: (N,) updates that drew the sample until it was forgotten; inf where it never was.
    """

    spec: Mapping[str, Any]
    record: Mapping[str, Any]
    epochs: np.ndarray
    updates: np.ndarray
    forgotten: np.ndarray
    forget_recall: np.ndarray
    forget_probability: np.ndarray
    retain_recall: np.ndarray
    retain_probability: np.ndarray
    mean_abs_delta: np.ndarray
    ids: Sequence[str]
    tokens: np.ndarray
    until_forgotten: np.ndarray

    @classmethod
    def read(cls, folder: str | Path) -> DemoRun:
        """Read the run in a folder.

        Raises:
            UserError: there is no finished run in it.
        """
        result = read_run(folder)
        rows = result.epochs.to_pylist()

        def column(name: str) -> np.ndarray:
            return np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=float)

        until = result.samples["updates_until_forgotten"].to_pylist()
        return cls(
            spec=result.record["spec"],
            record=result.record,
            epochs=column("epoch"),
            updates=column("step"),
            forgotten=column("forgotten"),
            forget_recall=column("forget_rouge_l_recall"),
            forget_probability=column("forget_probability"),
            retain_recall=column("retain_rouge_l_recall"),
            retain_probability=column("retain_probability"),
            mean_abs_delta=column("mean_abs_delta"),
            ids=result.samples["sample_id"].to_pylist(),
            tokens=result.samples["num_tokens"].to_numpy(),
            until_forgotten=np.array([math.inf if count is None else count for count in until], dtype=float),
        )

    @property
    def algorithm(self) -> str:
        return self.spec["algorithm"]

    @property
    def alpha(self) -> float:
        return self.spec["alpha"]

    @property
    def name(self) -> str:
        return f"{self.algorithm} at alpha {self.alpha:g}"

    @property
    def planned_updates(self) -> int:
        """Updates that the run makes if it does not end early."""
        return total_updates(len(self.ids), self._recipe())

    @property
    def updates_per_epoch(self) -> int:
        return updates_per_epoch(len(self.ids), self._recipe())

    @property
    def ended_early(self) -> bool:
        return self.updates[-1] < self.planned_updates

    def _recipe(self) -> Recipe:
        """The part of the recipe that determines the number of updates."""
        return Recipe(**{name: self.spec[name] for name in ("algorithm", "epochs", "max_steps", "batch_size")})


def has_retain_set(runs: Iterable[DemoRun]) -> bool:
    """Whether any run measured recall on a retain set."""
    return any(np.isfinite(run.retain_recall).any() for run in runs)


# --- What the runs did --------------------------------------------------------------------------------------


def recipe_text(runs: Sequence[DemoRun]) -> str:
    """How all these runs were made; they differ only in algorithm and alpha."""
    run = runs[0]
    spec = run.spec
    thresholds = {name: math.nan if value is None else value for name, value in run.record["thresholds"].items()}
    alphas = " and ".join(f"alpha {alpha:g}" for alpha in dict.fromkeys(run.alpha for run in runs))
    text = (
        f"{listed(dict.fromkeys(run.algorithm for run in runs))}, each at {alphas}: AdamW, learning rate "
        f"{spec['learning_rate']:g}, batches of {spec['batch_size']}, up to {spec['epochs']} epochs of "
        f"{run.updates_per_epoch} updates, seed {spec['seed']}. A batch is drawn "
        f"{'with' if spec['replacement'] else 'without'} replacement with probabilities proportional to MRD to the "
        f"power alpha: 0 is uniform, 1 prefers easy samples and measures MRD by {spec['estimator']} before the first "
        f"update and again every {_period(spec['refresh'], spec['refresh_unit'])}. A sample leaves the draw as "
        f"forgotten when its memorization accuracy is below {thresholds['ma']:.4g} and its extraction likelihood "
        f"EL_{spec['el_n']} below {thresholds['el']:.4g}, the averages of the forget set before unlearning, looked at "
        f"every {_period(spec['check_every'], spec['check_unit'])}; when all have left, the run ends early."
    )
    if thresholds["ma"] == 1:
        text += " The model knows all answers by heart, so one wrong token is enough for the first."
    return text


def best_runs_text(runs: Sequence[DemoRun]) -> str:
    """Which runs kept the retain set best at the end, and which forgot most."""
    if not has_retain_set(runs):
        return "This split has no retain set: what was kept is not measured."
    lowest_forget = min(round(run.forget_recall[-1], 2) for run in runs)
    highest_retain = max(round(run.retain_recall[-1], 2) for run in runs)
    best_keepers = [run for run in runs if round(run.retain_recall[-1], 2) == highest_retain]
    best_forgetters = [run for run in runs if round(run.forget_recall[-1], 2) == lowest_forget]
    text = (
        f"At the end the retain set's ROUGE-L recall is highest, {highest_retain:.2f}, after "
        f"{listed(run.name for run in best_keepers)}, with a forget recall of "
        f"{_range(run.forget_recall[-1] for run in best_keepers)}. The forget recall is lowest, "
        f"{lowest_forget:.2f}, after {listed(run.name for run in best_forgetters)}, with a retain recall of "
        f"{_range(run.retain_recall[-1] for run in best_forgetters)}."
    )
    if not any(keeper is forgetter for keeper in best_keepers for forgetter in best_forgetters):
        text += " No run has both."
    return text


def update_sentences(runs: Sequence[DemoRun]) -> list[str]:
    """Whether alpha 1 took fewer updates than alpha 0: a sentence for each algorithm, and one for all."""
    sentences, differences = [], []
    by_alpha = {(run.algorithm, run.alpha): run for run in runs}
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        uniform, easy = by_alpha.get((algorithm, 0.0)), by_alpha.get((algorithm, 1.0))
        if uniform is None or easy is None:
            continue
        difference = int(easy.updates[-1] - uniform.updates[-1])
        differences.append(difference)
        shares = f"forgotten: {percent(easy.forgotten[-1])} and {percent(uniform.forgotten[-1])}"
        if difference:
            sentences.append(
                f"{algorithm}: {easy.updates[-1]:.0f} updates at alpha 1, {uniform.updates[-1]:.0f} at alpha 0, "
                f"{abs(difference)} {'fewer' if difference < 0 else 'more'} ({shares})."
            )
        else:
            every = "" if easy.ended_early else "all "
            sentences.append(
                f"{algorithm}: {every}{easy.updates[-1]:.0f} updates at alpha 1 and at alpha 0 ({shares})."
            )
    if sentences:
        fewer, more = (sum(sign * d > 0 for d in differences) for sign in (-1, 1))
        sentences.append(
            f"Alpha 1 ended with fewer updates than alpha 0 for {fewer} of {len(differences)} algorithms, with more "
            f"for {more}. This is one run with one seed: it gives no interval, and nothing is claimed beyond it. "
            "mrd-bench benchmark unlearning runs five seeds and gives intervals."
        )
    return sentences


# --- Does MRD predict the updates? --------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """MRD before unlearning against the updates that samples took, over the forget samples of a run.

    Attributes:
        run: name of the run.
        samples: how many there are.
        never: how many of them were never forgotten.
        correlation: Spearman's, of MRD with the updates until forgotten; never counts as one more than the largest.
        beyond_length: the same with the number of scored tokens partialled out.
    """

    run: str
    samples: int
    never: int
    correlation: Estimate
    beyond_length: Estimate

    def sentence(self) -> str:
        if self.never == self.samples:
            return f"{self.run}: no sample was forgotten, so there is nothing to compare."
        rest = f" Never forgotten: {self.never} of {self.samples} samples." if self.never else ""
        return (
            f"{self.run}: rank correlation {with_ci(self.correlation)}: "
            f"{sign_verdict(self.correlation, CLAIMED_SIGN)}. "
            f"With length partialled out, {with_ci(self.beyond_length)}: "
            f"{sign_verdict(self.beyond_length, CLAIMED_SIGN)}.{rest}"
        )


def predictions(runs: Iterable[DemoRun], scores: Scores) -> list[Prediction]:
    """A prediction for each run at alpha 0, where the draws do not depend on MRD.

    Args:
        runs: at any alpha.
        scores: of the initial model, as a run at alpha 0 measures no MRD.
    """
    mrd_of = dict(zip(scores.ids, scores["mrd"].tolist(), strict=True))
    predicted = []
    for run in runs:
        if run.alpha != 0:
            continue
        places = [place for place, name in enumerate(run.ids) if name in mrd_of]
        mrd = np.array([mrd_of[run.ids[place]] for place in places])
        until, tokens = run.until_forgotten[places], run.tokens[places]
        never = np.isinf(until)
        # Samples never forgotten would have taken longer than all others, nobody knows how long: ranked last, tied.
        until = np.where(never, (until[~never].max() if not never.all() else 0) + 1, until)
        predicted.append(
            Prediction(
                run.name,
                len(places),
                int(never.sum()),
                spearman(mrd, until),
                partial_spearman(mrd, until, tokens),
            )
        )
    return predicted


@dataclass(frozen=True)
class Unlearning:
    """What the page shows of unlearning.

    Attributes:
        runs: of one forget set by one recipe, differing in algorithm and alpha.
        predictions: of these runs.
        skipped: algorithms that did not run, as they need a retain set and the split has none.
    """

    runs: Sequence[DemoRun]
    predictions: Sequence[Prediction]
    skipped: Sequence[str] = ()

    def skipped_sentence(self) -> str:
        """Why algorithms are missing; empty if none are."""
        if not self.skipped:
            return ""
        return f"{listed(self.skipped)} {'need' if len(self.skipped) > 1 else 'needs'} a retain set: not run."


# --- Words --------------------------------------------------------------------------------------------------


def table_lines(runs: Sequence[DemoRun]) -> list[str]:
    """A table of how each run ended, for the terminal."""
    lines = [f"{'unlearning':<22}{'forget recall':>14}{'retain recall':>14}{'forgotten':>11}{'updates':>9}"]
    lines += [
        f"{run.name:<22}{decimal(run.forget_recall[-1]):>14}{decimal(run.retain_recall[-1]):>14}"
        f"{percent(run.forgotten[-1]):>11}{run.updates[-1]:>9.0f}"
        for run in runs
    ]
    return lines


def percent(share: float) -> str:
    """A share in percent: "97.5%"."""
    return f"{100 * share:.3g}%"


def _period(count: int, unit: str) -> str:
    """Words for "every ...": (1, "epochs") is "epoch", (2, "epochs") is "2 epochs"."""
    return unit.removesuffix("s") if count == 1 else f"{count} {unit}"


def _range(values: Iterable[float]) -> str:
    """The range of values as text: "0.05 to 0.08", or "0.05" if that is all."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys((decimal(ordered[0]), decimal(ordered[-1]))))
