"""What unlearning runs say: forgetting and keeping epoch by epoch, what they took, and MRD against it.

A run is one seed: what differs between two of them has no interval here, and the sentences claim nothing beyond it.
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
from bench.report.words import decimal, sign_verdict, with_ci
from bench.stats.estimates import Estimate, partial_spearman, spearman

# Remark 3.4 of the paper: the updates that a sample takes are inversely proportional to its MRD.
CLAIM = -1


@dataclass(frozen=True)
class DemoRun:
    """A finished run, epoch by epoch; row 0 is the initial model, and a run that ended early has fewer rows.

    Attributes:
        spec: what was run.
        record: see bench.jobs.run_folder.UnlearnResult.
        epochs, updates: (E,) made until then.
        forgotten: (E,) share of the forget set.
        forget_recall, forget_probability, retain_recall, retain_probability: (E,) ROUGE-L recall and probability of
            answers, means over the samples evaluated; nan where not measured.
        mean_abs_delta: (E,) of the weights, against the initial model.
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
        """The run that a folder holds.

        Raises:
            UserError: it holds none that is finished.
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
    def planned(self) -> int:
        """Updates, had nothing ended early."""
        return total_updates(len(self.ids), self._recipe())

    @property
    def updates_per_epoch(self) -> int:
        return updates_per_epoch(len(self.ids), self._recipe())

    @property
    def ended_early(self) -> bool:
        return self.updates[-1] < self.planned

    def _recipe(self) -> Recipe:
        """As much of it as counts updates."""
        return Recipe(**{name: self.spec[name] for name in ("algorithm", "epochs", "max_steps", "batch_size")})


def has_retain_set(runs: Iterable[DemoRun]) -> bool:
    """Whether any run measured what was kept."""
    return any(np.isfinite(run.retain_recall).any() for run in runs)


# --- What the runs did --------------------------------------------------------------------------------------


def recipe(runs: Sequence[DemoRun]) -> str:
    """How all these runs were made; they differ in algorithm and alpha alone."""
    run = runs[0]
    spec = run.spec
    thresholds = {name: math.nan if value is None else value for name, value in run.record["thresholds"].items()}
    alphas = " and ".join(f"alpha {alpha:g}" for alpha in dict.fromkeys(run.alpha for run in runs))
    text = (
        f"{_listed(dict.fromkeys(run.algorithm for run in runs))}, each at {alphas}: AdamW, learning rate "
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


def kept(runs: Sequence[DemoRun]) -> str:
    """Who kept the retain set best at the end, and who forgot most."""
    if not has_retain_set(runs):
        return "This split has no retain set: what was kept is not measured."
    least = min(round(run.forget_recall[-1], 2) for run in runs)
    most = max(round(run.retain_recall[-1], 2) for run in runs)
    keepers = [run for run in runs if round(run.retain_recall[-1], 2) == most]
    forgetters = [run for run in runs if round(run.forget_recall[-1], 2) == least]
    text = (
        f"At the end the retain set's ROUGE-L recall is highest, {most:.2f}, after {_listed(r.name for r in keepers)}, "
        f"with a forget recall of {_range(r.forget_recall[-1] for r in keepers)}. The forget recall is lowest, "
        f"{least:.2f}, after {_listed(r.name for r in forgetters)}, with a retain recall of "
        f"{_range(r.retain_recall[-1] for r in forgetters)}."
    )
    if not any(keeper is forgetter for keeper in keepers for forgetter in forgetters):
        text += " No run has both."
    return text


def saved(runs: Sequence[DemoRun]) -> list[str]:
    """Whether alpha 1 ended with fewer updates than alpha 0: a sentence for each algorithm, and one for all."""
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
            all_of_them = "" if easy.ended_early else "all "
            sentences.append(
                f"{algorithm}: {all_of_them}{easy.updates[-1]:.0f} updates at alpha 1 and at alpha 0 ({shares})."
            )
    if sentences:
        fewer, more = (sum(sign * d > 0 for d in differences) for sign in (-1, 1))
        sentences.append(
            f"Alpha 1 ended with fewer updates than alpha 0 for {fewer} of {len(differences)} algorithms, with more "
            f"for {more}. This is one run with one seed: it gives no interval, and nothing is claimed beyond it. "
            "mrd-bench benchmark unlearning runs five seeds and gives intervals."
        )
    return sentences


# --- Did MRD say it beforehand? -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """MRD before unlearning against the updates that samples took, over the forget samples of a run.

    Attributes:
        run: its name.
        samples, never: how many there are, and how many were never forgotten.
        correlation: Spearman's, of MRD with the updates until forgotten; never is one more than the largest.
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
        late = f" Never forgotten: {self.never} of {self.samples} samples." if self.never else ""
        return (
            f"{self.run}: rank correlation {with_ci(self.correlation)}: {sign_verdict(self.correlation, CLAIM)}. "
            "With length "
            f"partialled out, {with_ci(self.beyond_length)}: {sign_verdict(self.beyond_length, CLAIM)}.{late}"
        )


def predictions(runs: Iterable[DemoRun], scores: Scores) -> list[Prediction]:
    """One for each run at alpha 0, whose draws do not depend on MRD.

    Args:
        runs: any.
        scores: of the initial model: a run at alpha 0 measures none itself.
    """
    mrd_of = dict(zip(scores.ids, scores["mrd"].tolist(), strict=True))
    found = []
    for run in runs:
        if run.alpha != 0:
            continue
        places = [place for place, name in enumerate(run.ids) if name in mrd_of]
        mrd = np.array([mrd_of[run.ids[place]] for place in places])
        until, tokens = run.until_forgotten[places], run.tokens[places]
        never = np.isinf(until)
        # Censored: they would have taken longer than any other, nobody knows how long; as ranks, tied last.
        until = np.where(never, (until[~never].max() if not never.all() else 0) + 1, until)
        found.append(
            Prediction(
                run.name,
                len(places),
                int(never.sum()),
                spearman(mrd, until),
                partial_spearman(mrd, until, tokens),
            )
        )
    return found


@dataclass(frozen=True)
class Unlearning:
    """What the page shows of it.

    Attributes:
        runs: of one forget set by one recipe, differing in algorithm and alpha.
        predictions: of these.
        skipped: algorithms that were to run and need a retain set, which the split has not.
    """

    runs: Sequence[DemoRun]
    predictions: Sequence[Prediction]
    skipped: Sequence[str] = ()

    def skipped_sentence(self) -> str:
        """Why algorithms are missing; empty if none is."""
        if not self.skipped:
            return ""
        return f"{_listed(self.skipped)} {'need' if len(self.skipped) > 1 else 'needs'} a retain set: not run."


# --- Words --------------------------------------------------------------------------------------------------


def table_lines(runs: Sequence[DemoRun]) -> list[str]:
    """The end of each run for the terminal, under a head."""
    lines = [f"{'unlearning':<22}{'forget recall':>14}{'retain recall':>14}{'forgotten':>11}{'updates':>9}"]
    lines += [
        f"{run.name:<22}{decimal(run.forget_recall[-1]):>14}{decimal(run.retain_recall[-1]):>14}"
        f"{percent(run.forgotten[-1]):>11}{run.updates[-1]:>9.0f}"
        for run in runs
    ]
    return lines


def percent(share: float) -> str:
    """97.5%."""
    return f"{100 * share:.3g}%"


def _period(count: int, unit: str) -> str:
    return unit.removesuffix("s") if count == 1 else f"{count} {unit}"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _range(values: Iterable[float]) -> str:
    """0.05, or 0.05 to 0.08."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys((decimal(ordered[0]), decimal(ordered[-1]))))
