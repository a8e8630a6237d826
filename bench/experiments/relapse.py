"""Beyond the paper: does it stay forgotten, and which samples come back?

Each run ends with attacks on its model. Of the samples that it has forgotten, how many are known again under each
attack, beyond what the same attack gets out of a model that never knew them? And can it be told beforehand which?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from bench.experiments.experiment import Answer, Experiment, Setup
from bench.files.score_file import read_scores
from bench.files.status import FINISHED
from bench.jobs.attack import attack_spec
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.sweep_tables import SweepResult, as_table
from bench.metrics.leakage import KS
from bench.metrics.table import MODEL, ORIGINAL
from bench.report.figures import BLUE, GREEN, MUTED, ORANGE, VERMILLION, Draw, error_bars
from bench.report.words import interval_columns, listed, markdown_table, with_ci
from bench.stats.estimates import LEVEL, Estimate, over_seeds, rank_share_correlation
from bench.stats.verdicts import Claim, Interval, Verdict, bootstrapped, decide, over_runs
from scoring.errors import UserError
from scoring.files import replacing
from scoring.reading import read_parquet
from scoring.settings import Doc, Gt, Le, build, check, named
from scoring.templates import TEMPLATE_FIELDS

BACK, CORRELATION = "back", "correlation"  # effects that margins are named for
NONE = "none"
# What says that a sample is known, with its name in words; the first decides.
QUANTITIES = {"rouge_l_recall": "ROUGE-L recall", "ma": "memorization accuracy"}
# What may tell beforehand who comes back; +1 where it is expected of larger values.
PREDICTORS = {"MRD": -1, "flip time": +1, "initial NLL": -1, "updates until forgotten": +1}
UNTAUGHT = ", untaught"
COLOURS = {"MRD": VERMILLION, "flip time": BLUE, "initial NLL": GREEN, "updates until forgotten": ORANGE}
LEAKS = tuple(f"leak_{k}" for k in KS)
# Samples, and returns of samples in all runs, of which there must be so many for a correlation.
LEAST_SAMPLES, LEAST_RETURNS = 20, 20


@dataclass(frozen=True, kw_only=True)
class RelapseSpec:
    """What counts as known, and what the attacks are compared with."""

    retain_model: Annotated[
        str | None,
        Doc("never trained on the forget set, and attacked alike (default: none, and nothing is subtracted)"),
    ] = None
    known: Annotated[float, Gt(0), Le(1), Doc("a sample is known with this value or more")] = 0.5

    def checked(self) -> Self:
        """The same settings.

        Raises:
            UserError: a value that is not allowed.
        """
        check(self)
        return self


@dataclass(frozen=True)
class Sample:
    """A sample of a run, which the initial model knew.

    Attributes:
        algorithm, selection, seed: of the run.
        sample_id: its id.
        values: attack -> the value after each number of updates, in order; without attack under NONE.
        never: the same of the model that never knew it; {} where there is none.
        taught: the attacks that train on it.
        predictors: by their names; nan where there is no number.
        forgotten_at: the update at which the stopping rule held; None if it did not.
    """

    algorithm: str
    selection: str
    seed: int
    sample_id: str
    values: Mapping[str, Mapping[int | None, float]]
    never: Mapping[str, Mapping[int | None, float]]
    taught: frozenset[str]
    predictors: Mapping[str, float]
    forgotten_at: int | None

    def last(self, attack: str) -> float:
        """The value under an attack, at its end."""
        return [*self.values[attack].values()][-1]


def run(setup: Setup) -> Answer:
    spec = setup.spec(RelapseSpec, "relapse")
    sweep = setup.sweep()
    if sweep.attacks is None:
        raise UserError(f"the sweep has no {named('attack')}: expected attacks on the models of its trials")
    references = _references(setup, sweep, spec)
    margins = setup.margins(BACK, CORRELATION)
    return answer({name: samples_of(sweep, references, name, spec.known) for name in QUANTITIES}, spec, margins)


# --- Samples ------------------------------------------------------------------------------------------------


def _references(setup: Setup, sweep: SweepResult, spec: RelapseSpec) -> dict[str, pa.Table]:
    """Selection -> the table of the attacks on the model that never knew it, beside the initial model."""
    settings = setup.filled("sweep")
    base = settings["base"]
    chosen: dict[str, list[str]] = {}
    for row in read_parquet(sweep.folder / "selections.parquet", "selections of a sweep", None).to_pylist():
        chosen.setdefault(row["selection"], []).append(row["sample_id"])
    tables = {}
    setup.work.mkdir(parents=True, exist_ok=True)
    for number, (name, ids) in enumerate(chosen.items()):
        path = setup.work / f"selection-{number:04d}.txt"
        with replacing(path) as unfinished:
            unfinished.write_text("".join(f"{each}\n" for each in ids), encoding="utf-8")
        fixed = {
            "model": spec.retain_model,
            "original": base["model"],
            "task": base["task"],
            "split": base.get("forget_split"),
            "selection": str(path),
            **{name: base[name] for name in TEMPLATE_FIELDS if name in base},
        }
        with setup.section("sweep"):
            attacks = build(AttackSpec, {**settings["attack"], **fixed})
        out = path.with_suffix(".parquet")
        tables[name] = attack_spec(attacks, out, setup.resources.replicas(), progress=False).table
    return tables


Values = dict[str, dict[str, dict[int | None, float]]]


def samples_of(sweep: SweepResult, references: Mapping[str, pa.Table], quantity: str, known: float) -> list[Sample]:
    """The samples of all runs that finished which the initial model knew.

    Args:
        references: selection -> the attacks on the initial model, and on the one that never knew.
        quantity: that says what is known.
        known: see `RelapseSpec`.
    """
    assert sweep.attacks is not None
    of_trial: dict[str, Values] = {}
    taught: dict[tuple[str, str], set[str]] = {}
    for row in sweep.attacks.to_pylist():
        value = _value(row, quantity)
        if value is None:
            continue
        values = of_trial.setdefault(row["trial"], {}).setdefault(row["sample_id"], {})
        values.setdefault(row["attack"], {})[row["updates"]] = value
        if row.get("taught"):
            taught.setdefault((row["trial"], row["sample_id"]), set()).add(row["attack"])
    first = {name: _of_role(table, ORIGINAL, quantity) for name, table in references.items()}
    never = {name: _of_role(table, MODEL, quantity) for name, table in references.items()}
    difficulty = _difficulty(sweep)
    drawn = {(row["trial"], row["sample_id"]): row for row in sweep.samples.to_pylist()}
    samples = []
    for trial in sweep.trials.to_pylist():
        if trial["status"] != FINISHED:
            continue
        selection = trial["selection"]
        for sample_id, values in of_trial.get(trial["trial"], {}).items():
            if first[selection][sample_id][NONE][None] < known:
                continue
            row = drawn[trial["trial"], sample_id]
            until = row["updates_until_forgotten"]
            samples.append(
                Sample(
                    trial["algorithm"],
                    selection,
                    trial["seed"],
                    sample_id,
                    values,
                    never[selection][sample_id],
                    frozenset(taught.get((trial["trial"], sample_id), ())),
                    {**difficulty[sample_id], "updates until forgotten": math.nan if until is None else float(until)},
                    row["forgotten_at_step"],
                )
            )
    return samples


def _value(row: Mapping[str, Any], quantity: str) -> float | None:
    """What a sample is judged by under an attack: of drawn answers the best of all that were drawn."""
    leaks = [row[name] for name in LEAKS if row.get(name) is not None] if quantity == "rouge_l_recall" else []
    return leaks[-1] if leaks else row.get(quantity)


def _of_role(table: pa.Table, role: str, quantity: str) -> Values:
    rows: dict[tuple[str, str, int | None], dict[str, float]] = {}
    for row in table.to_pylist():
        if (row["level"], row["model"]) == ("sample", role):
            rows.setdefault((row["sample_id"], row["attack"], row["updates"]), {})[row["name"]] = row["value"]
    values: Values = {}
    for (sample_id, attack, updates), row in rows.items():
        if (value := _value(row, quantity)) is not None:
            values.setdefault(sample_id, {}).setdefault(attack, {})[updates] = value
    return values


def _difficulty(sweep: SweepResult) -> dict[str, dict[str, float]]:
    """Sample -> what is known of it before the run, by the names of PREDICTORS."""
    scores, _, _ = read_scores(sweep.folder / "difficulty.parquet")
    found = {
        row["sample_id"]: {
            "MRD": row["mrd"],
            "initial NLL": row["nll"] / row["num_tokens"],
            "flip time": math.nan,
        }
        for row in scores.to_pylist()
    }
    path = sweep.folder / "forecast.parquet"
    if path.is_file():
        for row in read_scores(path)[0].to_pylist():
            found[row["sample_id"]]["flip time"] = row["flip-time@average"]
    return found


# --- Who comes back -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Back:
    """How many come back under an attack.

    Attributes:
        attack: which; of one that teaches a part, of the others alone.
        of_algorithm: algorithm -> the share of its forgotten samples that are back, selection by selection.
        never: selection -> the share of the same samples that the model knows which never knew them.
        samples: how many different ones had been forgotten.
    """

    attack: str
    of_algorithm: Mapping[str, Mapping[str, float]]
    never: Mapping[str, float]
    samples: int

    def share(self, algorithm: str) -> Estimate:
        return over_seeds([*self.of_algorithm[algorithm].values()])

    def beyond(self) -> list[float]:
        """Of each selection: the mean over the algorithms, less what the model "knows" that never knew."""
        selections = dict.fromkeys(name for shares in self.of_algorithm.values() for name in shares)
        return [
            float(np.mean([shares[name] for shares in self.of_algorithm.values() if name in shares]))
            - self.never.get(name, 0.0)
            for name in selections
        ]

    def interval(self) -> Interval:
        """The mean of that over the selections. Where nothing came back anywhere, there is no spread between them: then
        the interval is that of 0 in so many samples (Clopper and Pearson 1934)."""
        beyond = self.beyond()
        if any(beyond) or not self.samples:
            return over_runs(beyond)

        def at(level: float) -> Estimate:
            most = 1 - ((1 - level) / 2) ** (1 / self.samples)
            return Estimate(0.0, -most, most)

        return at


def attacks_in(samples: Sequence[Sample]) -> list[str]:
    """The attacks, those that teach a part of the samples once for the taught and once for the others."""
    names = list(dict.fromkeys(name for sample in samples for name in sample.values if name != NONE))
    parts = {name for sample in samples for name in sample.taught}
    return [each for name in names for each in ((name, name + UNTAUGHT) if name in parts else (name,))]


def under(samples: Sequence[Sample], attack: str) -> list[tuple[Sample, str]]:
    """The samples that meet an attack, and its name among their values."""
    name = attack.removesuffix(UNTAUGHT)
    untaught = attack.endswith(UNTAUGHT)
    parts = any(name in sample.taught for sample in samples)
    return [
        (sample, name)
        for sample in samples
        if name in sample.values and (not parts or (name in sample.taught) != untaught)
    ]


def back_of(samples: Sequence[Sample], attack: str, known: float) -> Back:
    """How many of the forgotten come back under an attack.

    Args:
        samples: of all runs.
    """
    shares: dict[str, dict[str, list[float]]] = {}
    never: dict[str, list[float]] = {}
    for sample, name in under(samples, attack):
        if sample.last(NONE) >= known:
            continue
        shares.setdefault(sample.algorithm, {}).setdefault(sample.selection, []).append(
            float(sample.last(name) >= known)
        )
        if name in sample.never:
            last = [*sample.never[name].values()][-1]
            never.setdefault(sample.selection, []).append(float(last >= known))
    means = {
        algorithm: {selection: float(np.mean(values)) for selection, values in by_selection.items()}
        for algorithm, by_selection in shares.items()
    }
    forgotten = {sample.sample_id for sample, _ in under(samples, attack) if sample.last(NONE) < known}
    knows = {selection: float(np.mean(values)) for selection, values in never.items()}
    return Back(attack, means, knows, len(forgotten))


def returns_of(samples: Sequence[Sample], attack: str, known: float) -> int:
    """How often a forgotten sample comes back, over all runs."""
    return sum(sample.last(NONE) < known <= sample.last(name) for sample, name in under(samples, attack))


def relapse_rates(samples: Sequence[Sample], attack: str, known: float) -> dict[str, float]:
    """Sample -> in how many of the runs that had forgotten it it comes back, less the algorithm's own rate: what is
    left says something of the sample, and not of who forgot it."""
    returned: dict[str, list[tuple[str, float]]] = {}
    for sample, name in under(samples, attack):
        if sample.last(NONE) < known:
            returned.setdefault(sample.algorithm, []).append((sample.sample_id, float(sample.last(name) >= known)))
    beyond: dict[str, list[float]] = {}
    for of_algorithm in returned.values():
        rate = float(np.mean([back for _, back in of_algorithm]))
        for sample_id, back in of_algorithm:
            beyond.setdefault(sample_id, []).append(back - rate)
    return {sample_id: float(np.mean(values)) for sample_id, values in beyond.items()}


def predictor_of(samples: Sequence[Sample], name: str) -> dict[str, float]:
    """Sample -> what may tell whether it comes back. Updates depend on the algorithm: they are logarithms, less the
    algorithm's mean."""
    if name != "updates until forgotten":
        return {sample.sample_id: sample.predictors[name] for sample in samples}
    logs: dict[str, list[tuple[str, float]]] = {}
    for sample in samples:
        if sample.predictors[name] > 0:
            logs.setdefault(sample.algorithm, []).append((sample.sample_id, math.log(sample.predictors[name])))
    beyond: dict[str, list[float]] = {}
    for of_algorithm in logs.values():
        mean = float(np.mean([value for _, value in of_algorithm]))
        for sample_id, value in of_algorithm:
            beyond.setdefault(sample_id, []).append(value - mean)
    return {sample_id: float(np.mean(values)) for sample_id, values in beyond.items()}


def pairs_of(samples: Sequence[Sample], attack: str, predictor: str, known: float) -> tuple[np.ndarray, np.ndarray]:
    """What may tell, and how often they come back, of the samples that have both: (N,) each."""
    rates, told = relapse_rates(samples, attack, known), predictor_of(samples, predictor)
    both = [name for name in rates if math.isfinite(told.get(name, math.nan))]
    return np.array([told[name] for name in both]), np.array([rates[name] for name in both])


# --- Answer -------------------------------------------------------------------------------------------------


def answer(of_quantity: Mapping[str, Sequence[Sample]], spec: RelapseSpec, margins: Mapping[str, float]) -> Answer:
    """From the samples of all runs.

    Args:
        of_quantity: quantity of QUANTITIES -> the samples that are known by it.
        margins: the least BACK (share) and CORRELATION that matter.
    """
    first = next(iter(QUANTITIES))
    samples = of_quantity[first]
    if not any(sample.last(NONE) < spec.known for sample in samples):
        raise UserError("no run has forgotten a sample: nothing can come back; expected more updates in the sweep")
    attacks = attacks_in(samples)
    backs = {name: [back_of(of_quantity[name], each, spec.known) for each in attacks] for name in QUANTITIES}
    relations = {
        (attack, predictor): pairs_of(samples, attack, predictor, spec.known)
        for attack in attacks
        for predictor in PREDICTORS
    }
    returns = {attack: returns_of(samples, attack, spec.known) for attack in attacks}
    relations = {
        (attack, predictor): pair
        for (attack, predictor), pair in relations.items()
        if len(pair[0]) >= LEAST_SAMPLES and returns[attack] >= LEAST_RETURNS
    }
    estimates = {key: rank_share_correlation(*pair) for key, pair in relations.items()}
    decided = decide([*_claims_back(backs[first], margins[BACK]), *_claims_told(relations, margins[CORRELATION])])
    worst = max(backs[first], key=lambda back: float(np.mean(back.beyond())) if back.beyond() else -math.inf)
    sentences = [
        _headline(samples, worst, spec),
        _table(backs[first]),
        _told(estimates, attacks),
        *(_other(name, backs[name], spec) for name in list(QUANTITIES)[1:]),
        _verdicts(decided),
    ]
    tables = {
        "relapse-back": as_table([row for name in QUANTITIES for row in _back_rows(name, backs[name])]),
        "relapse-predictors": as_table(
            [
                {
                    "attack": attack,
                    "predictor": predictor,
                    "samples": len(relations[attack, predictor][0]),
                    "returns": returns[attack],
                    **interval_columns("correlation", estimate),
                }
                for (attack, predictor), estimate in estimates.items()
            ]
        ),
    }
    rows = [row for name in QUANTITIES for row in _sample_rows(name, of_quantity[name], spec.known)]
    panels = [_shares(backs[first]), _predictors(estimates, attacks)]
    return Answer(as_table(rows), panels, sentences, decided, tables=tables, inches=(15.0, 2.0 + 0.42 * len(attacks)))


def _claims_back(backs: Sequence[Back], margin: float) -> list[Claim]:
    return [
        Claim(
            "forgotten samples come back under attack",
            f"share of them beyond a model that never knew them, {back.attack}",
            +1,
            margin,
            back.interval(),
            len(back.beyond()),
            "selections",
            "share",
        )
        for back in backs
        if len(back.beyond()) > 1
    ]


def _claims_told(relations: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], margin: float) -> list[Claim]:
    """That what is hard to forget comes back: under the attack that trains on other samples, or else the first."""
    attacks = list(dict.fromkeys(attack for attack, _ in relations))
    chosen = next((attack for attack in attacks if attack.endswith(UNTAUGHT)), next(iter(attacks), None))
    return [
        Claim(
            "what is hard to forget comes back",
            f"rank correlation of how often a sample comes back with its {predictor}, {attack}",
            PREDICTORS[predictor],
            margin,
            bootstrapped(rank_share_correlation, *pair),
            len(pair[0]),
            "samples",
            "correlation",
            # Spearman's was meant at first. It made an order of the tiny differences between algorithms.
            exploratory=True,
        )
        for (attack, predictor), pair in relations.items()
        if attack == chosen
    ]


def _headline(samples: Sequence[Sample], worst: Back, spec: RelapseSpec) -> str:
    runs = {(sample.algorithm, sample.selection, sample.seed) for sample in samples}
    forgotten = sum(sample.last(NONE) < spec.known for sample in samples)
    beyond = worst.interval()(LEVEL)
    shares = {name: worst.share(name) for name in worst.of_algorithm}
    order = sorted(shares, key=lambda name: shares[name].value)
    return (
        f"**Most comes back under “{worst.attack}”: {with_ci(beyond)} of the forgotten samples, beyond what a model "
        f"shows that never knew them**; least of what {order[0]} had forgotten ({with_ci(shares[order[0]])}), most of "
        f"what {order[-1]} had ({with_ci(shares[order[-1]])}). {len(runs)} runs of {len(shares)} algorithms; they had "
        f"forgotten {forgotten} of {len(samples)} samples that the initial model knew (ROUGE-L recall of "
        f"{spec.known:g} or more)."
    )


def _table(backs: Sequence[Back]) -> str:
    algorithms = list(dict.fromkeys(name for back in backs for name in back.of_algorithm))
    rows = []
    for back in backs:
        row = [back.attack]
        row += [with_ci(back.share(name)) if name in back.of_algorithm else "–" for name in algorithms]
        row.append(with_ci(over_seeds([*back.never.values()])) if back.never else "–")
        row.append(with_ci(back.interval()(LEVEL)))
        rows.append(row)
    head = ["attack", *algorithms, "never knew them", "beyond"]
    return (
        "Share of the forgotten samples that are known again, mean over the draws (95 % CI); “never knew them” is the "
        "retain-only model under the same attack, on the same samples:\n\n" + markdown_table(head, rows)
    )


def _told(of_attack: Mapping[tuple[str, str], Estimate], attacks: Sequence[str]) -> str:
    rows = [
        [
            attack,
            *(with_ci(of_attack[attack, predictor]) for predictor in PREDICTORS if (attack, predictor) in of_attack),
        ]
        for attack in attacks
        if any((attack, predictor) in of_attack for predictor in PREDICTORS)
    ]
    told = [name for name in PREDICTORS if any((attack, name) in of_attack for attack in attacks)]
    return (
        "Who comes back: correlation, over samples, of their ranks by what is known beforehand with how often they "
        f"come back beyond their algorithm's rate; of attacks under which samples came back {LEAST_RETURNS} times or "
        "more:\n\n" + markdown_table(["attack", *told], rows)
    )


def _verdicts(decided: Sequence[Verdict]) -> str:
    """Verdicts on what comes back, by verdict; on what tells, one by one."""
    attacks: dict[str, list[str]] = {}
    for verdict in decided:
        if verdict.claim.unit == "selections":
            attacks.setdefault(verdict.word, []).append(verdict.claim.effect.partition(", ")[2])
    parts = [f"{word}: {listed(names)}" for word, names in attacks.items()]
    told = [
        f"{verdict.claim.effect.partition(', ')[0].rpartition('its ')[2]} {verdict.word}"
        for verdict in decided
        if verdict.claim.unit == "samples"
    ]
    text = f"That forgotten samples come back, beyond the margin: {'; '.join(parts)}."
    return text + (f" That what is hard to forget comes back: {'; '.join(told)}." if told else "")


def _other(quantity: str, backs: Sequence[Back], spec: RelapseSpec) -> str:
    parts = [
        f"{back.attack} {with_ci(back.interval()(LEVEL))}" for back in backs if back.of_algorithm and back.beyond()
    ]
    words = QUANTITIES[quantity]
    if not parts:
        return f"By {words} no run has forgotten a sample."
    return f"By {words} (known with {spec.known:g} or more), beyond the model that never knew: {listed(parts)}."


# --- Rows and pictures --------------------------------------------------------------------------------------


def _back_rows(quantity: str, backs: Sequence[Back]) -> list[dict[str, Any]]:
    rows = []
    for back in backs:
        for name in back.of_algorithm:
            rows.append(
                {
                    "quantity": quantity,
                    "attack": back.attack,
                    "algorithm": name,
                    "selections": len(back.of_algorithm[name]),
                    **interval_columns("back", back.share(name)),
                }
            )
        rows.append(
            {
                "quantity": quantity,
                "attack": back.attack,
                "algorithm": None,
                "selections": len(back.beyond()),
                **interval_columns("never_knew", over_seeds([*back.never.values()])),
                **interval_columns("beyond", back.interval()(LEVEL)),
            }
        )
    return rows


def _sample_rows(quantity: str, samples: Sequence[Sample], known: float) -> list[dict[str, Any]]:
    """A row for each sample of a run under each attack: forgotten at, and back at."""
    rows = []
    for sample in samples:
        forgotten = sample.last(NONE) < known
        for attack, values in sample.values.items():
            if attack == NONE or not forgotten:
                continue
            back = [updates for updates, value in values.items() if value >= known]
            rows.append(
                {
                    "quantity": quantity,
                    "algorithm": sample.algorithm,
                    "selection": sample.selection,
                    "seed": sample.seed,
                    "sample_id": sample.sample_id,
                    "forgotten_at": sample.forgotten_at,
                    "attack": attack,
                    "taught": attack in sample.taught,
                    "back": bool(back),
                    "back_at": back[0] if back else None,
                    **{name.replace(" ", "_").lower(): value for name, value in sample.predictors.items()},
                }
            )
    return rows


def _shares(backs: Sequence[Back]) -> Draw:
    """What comes back, attack by attack: a point an algorithm, and the model that never knew."""

    def draw(axes: Axes) -> None:
        for row, back in enumerate(backs):
            values = [back.share(name).value for name in back.of_algorithm]
            axes.plot(values, [-row] * len(values), "o", color=BLUE, alpha=0.55, label=None if row else "an algorithm")
            beyond = back.interval()(LEVEL)
            never = over_seeds([*back.never.values()]).value if back.never else 0.0
            axes.plot(never, -row, "|", color=VERMILLION, markersize=14, label=None if row else "never knew them")
            shown = Estimate(never + beyond.value, never + beyond.low, never + beyond.high)
            axes.errorbar(
                shown.value,
                -row - 0.25,
                xerr=error_bars([shown]),
                fmt="D",
                color=MUTED,
                markersize=4,
                capsize=3,
                label=None if row else "all algorithms, 95 % CI",
            )
        axes.set_yticks([-float(row) for row in range(len(backs))], [back.attack for back in backs])
        axes.set_ylim(-len(backs) + 0.3, 0.7)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("share of the forgotten samples that are known again")
        axes.legend(loc="lower right")

    return draw


def _predictors(estimates: Mapping[tuple[str, str], Estimate], attacks: Sequence[str]) -> Draw:
    """What tells beforehand who comes back."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, predictor in enumerate(PREDICTORS):
            for row, attack in enumerate(attacks):
                estimate = estimates.get((attack, predictor))
                if estimate is not None and math.isfinite(estimate.value):
                    axes.errorbar(
                        estimate.value,
                        -row + 0.3 - 0.2 * place,
                        xerr=error_bars([estimate]) if math.isfinite(estimate.low) else None,
                        fmt="o",
                        markersize=4,
                        capsize=2,
                        color=COLOURS[predictor],
                    )
            axes.plot([], [], "o", color=COLOURS[predictor], label=predictor)
        axes.set_yticks([-float(row) for row in range(len(attacks))], [""] * len(attacks))
        axes.set_ylim(-len(attacks) + 0.3, 0.7)
        axes.set_xlabel("correlation with how often a sample comes back, 95 % CI")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=4)

    return draw


EXPERIMENT = Experiment(
    "relapse",
    "which samples come back",
    "Does what was forgotten stay forgotten under attack, and can it be told beforehand which samples come back?",
    "hard samples resist unlearning (Section 3); whether they also come back is not asked there. This question goes "
    "beyond the paper.",
    run,
)
