"""Figures 3, 4, 5 and 7: answers on tables with a known truth, the specs of both presets, and Figure 3 as a whole."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bench.experiments import fig3, fig4, fig5, fig7
from bench.experiments.experiment import Answer, Setup
from bench.experiments.reproduce import SPECS
from bench.experiments.shared.single_samples import (
    SingleSampleRun,
    agreements_of,
    count_unusable,
    single_sample_runs,
)
from bench.files.spec import read_mapping
from bench.jobs.resources import SweepResources
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.sweep_tables import as_table
from bench.jobs.unlearn import UnlearnSpec
from bench.models.find import find_model
from bench.report import figures
from bench.stats.verdicts import CONTRADICTED, HOLDS, NO_EFFECT, UNKNOWN
from bench.tasks.datasets import load_dataset
from scoring.errors import UserError
from scoring.load import load_model
from scoring.samples import collate, encode
from scoring.settings import Naming, build
from scoring.training_difficulty import el2n, grand, vog
from tests.tiny_folders import write_jsonl
from tests.tiny_tofu import pairs_of, records, taught

NAN = math.nan
MARGIN = {"correlation": 0.3}
FIG3 = MARGIN | {"difference of correlations": 0.1}


class Measured:
    """Trials and samples of a sweep, as far as answers read them."""

    def __init__(self) -> None:
        self._trials: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []

    def add(self, selection: str, mrd: float | None = 1.0, tokens: Sequence[int] = (10,), **changed: Any) -> None:
        """A trial; of a sample for each number of tokens."""
        name = f"t{len(self._trials)}"
        usual = {"ma_initial": 1.0, "el_initial": 1.0}
        own = {key: changed.pop(key, value) for key, value in usual.items()}
        row = {
            "trial": name,
            "status": "finished",
            "task": "made-up",
            "selection": selection,
            "algorithm": "GA",
            "seed": 0,
            "forget_samples": len(tokens),
            "mean_log_mrd": NAN if mrd is None else math.log(mrd),
            "updates": 10,
            "mean_abs_delta": 1e-4,
            "forgotten": 1.0,
            "ma_threshold": 1.0,
            "el_threshold": 0.8,
        }
        assert changed.keys() <= row.keys()
        self._trials.append(row | changed)
        self._samples += [
            {"trial": name, "sample_id": f"{selection}.{i}", "num_tokens": n, **own} for i, n in enumerate(tokens)
        ]

    @property
    def tables(self) -> tuple[pa.Table, pa.Table]:
        return as_table(self._trials), as_table(self._samples)


def words(answer: Answer) -> list[str]:
    """Of the verdicts, in their order."""
    return [verdict.word for verdict in answer.verdicts]


def drawn(answer: Answer, path: Path) -> None:
    """The picture can be made."""
    figures.picture(
        answer.panels, path / "picture.png", answer.inches or (5.0 * len(answer.panels), 5.0), polar=answer.polar
    )
    assert (path / "picture.png").stat().st_size > 10_000


# --- Figure 5 -----------------------------------------------------------------------------------------------


def test_runs_of_a_sample_are_averaged_over_seeds():
    sweep = Measured()
    sweep.add("a", mrd=0.5, tokens=[7], updates=10, mean_abs_delta=1e-4, seed=0)
    sweep.add("a", mrd=0.5, tokens=[7], updates=20, mean_abs_delta=3e-4, seed=1, forgotten=0.0)
    sweep.add("a", mrd=0.5, tokens=[7], updates=4, algorithm="NPO")
    first, second = single_sample_runs(*sweep.tables, "task")
    expected = SingleSampleRun("task", "GA", "a.0", 0.5, 7, 15.0, 2e-4, forgotten=False, below=False)
    for field in dataclasses.fields(SingleSampleRun):
        assert getattr(first, field.name) == pytest.approx(getattr(expected, field.name))
    assert (second.algorithm, second.updates, second.forgotten) == ("NPO", 4.0, True)


def test_runs_that_say_nothing_are_left_out_and_counted():
    sweep = Measured()
    sweep.add("a")
    sweep.add("b", mrd=None)
    sweep.add("c", status="diverged", updates=None)
    trials, samples = sweep.tables
    assert [run.sample for run in single_sample_runs(trials, samples, "task")] == ["a.0"]
    assert count_unusable(trials) == 2


@pytest.mark.parametrize(
    ("own", "thresholds", "below"),
    [
        ((0.9, 0.7), (1.0, 0.8), True),
        ((1.0, 0.7), (1.0, 0.8), False),
        ((0.9, 0.8), (1.0, 0.8), False),
        ((0.9, NAN), (1.0, 0.8), True),  # where EL is not defined MA alone decides
        ((0.9, 0.7), (None, None), False),  # its own values: nothing is below itself
    ],
)
def test_a_sample_may_be_below_both_thresholds_from_the_start(own, thresholds, below):
    sweep = Measured()
    sweep.add(
        "a", ma_initial=own[0], el_initial=own[1], ma_threshold=thresholds[0], el_threshold=thresholds[1], updates=1
    )
    (run,) = single_sample_runs(*sweep.tables, "task")
    assert run.below == below


def singles(updates: Sequence[float], mrd: Sequence[float], tokens: Sequence[int], **fields: Any) -> Measured:
    sweep = Measured()
    for number, (steps, difficulty, length) in enumerate(zip(updates, mrd, tokens, strict=True)):
        sweep.add(f"s{number}", difficulty, [length], updates=steps, mean_abs_delta=1e-5 * steps, **fields)
    return sweep


def noisy(count: int, strength: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Updates and MRD that are related by so much, and lengths that have nothing to do with either."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=count)
    updates = 20 + 4 * (strength * common + (1 - abs(strength)) * rng.normal(size=count))
    return updates, np.exp(common), rng.integers(5, 50, count).tolist()


@pytest.mark.parametrize(
    ("count", "strength", "verdict"),
    [(40, -0.8, HOLDS), (40, 0.8, CONTRADICTED), (12, -0.2, UNKNOWN), (400, 0.0, NO_EFFECT)],
)
def test_figure_5_says_whether_mrd_predicts_updates(count, strength, verdict, tmp_path):
    answer = fig5.answer({"made-up": singles(*noisy(count, strength, seed=1)).tables}, MARGIN)
    assert words(answer) == [verdict]
    assert answer.table.num_rows == count
    drawn(answer, tmp_path)


def test_too_few_samples_have_no_interval_and_no_verdict():
    answer = fig5.answer({"made-up": singles(*noisy(9, -0.9)).tables}, MARGIN)
    assert "too few samples for a CI" in answer.sentences[0]
    assert words(answer) == [UNKNOWN]
    assert "without an interval" in answer.sentences[-1]


def test_what_length_explains_is_told_apart():
    """MRD goes down with the length and updates go up with it, and that is all they have to do with each other."""
    rng = np.random.default_rng(0)
    tokens = rng.permutation(np.arange(50, 90))
    mrd, updates = 1 / (tokens + 6 * rng.normal(size=40)), tokens + 6 * rng.normal(size=40)
    answer = fig5.answer({"made-up": singles(updates, mrd, tokens.tolist()).tables}, MARGIN)
    (row,) = answer.tables["fig5-correlations"].to_pylist()
    assert row["spearman"] < -0.7
    assert abs(row["length_partialled_out"]) < 0.3
    assert row["length_alone"] > 0.8
    assert words(answer) == [HOLDS]
    (beyond_length,) = re.findall(r"length partialled out: (\S+) \[", answer.verdicts[0].claim.effect)
    assert float(beyond_length.replace("\N{MINUS SIGN}", "-")) == pytest.approx(row["length_partialled_out"], abs=0.005)


def test_samples_that_are_not_forgotten_share_the_last_rank():
    """By hand, with MRD ranks 1..10 and updates ranks 10 down to 3: the two last, at the cap, tie at 9.5, whatever
    their number of updates. d = (-8.5, -7.5, then place - rank), Spearman = Pearson of the ranks."""
    sweep = Measured()
    for place in range(10):
        kept = place < 2
        sweep.add(
            f"s{place}",
            mrd=1.0 + place,
            updates=3 if kept else 30 - place,
            forgotten=0.0 if kept else 1.0,
            tokens=[5 + place % 3],
        )
    answer = fig5.answer({"made-up": sweep.tables}, MARGIN)
    (row,) = answer.tables["fig5-correlations"].to_pylist()
    ranks = np.array([9.5, 9.5, 8, 7, 6, 5, 4, 3, 2, 1])
    assert row["spearman"] == pytest.approx(np.corrcoef(np.arange(10), ranks)[0, 1])
    assert any("2 of 10 runs ended at the cap, after 3 updates" in sentence for sentence in answer.sentences)


def test_samples_without_anything_to_forget_are_left_out():
    updates, mrd, tokens = noisy(30, -0.8)
    sweep = singles(updates, mrd, tokens)
    for number in range(10):
        sweep.add(f"easy{number}", mrd=100.0 + number, updates=1, ma_initial=0.5, el_initial=0.1)
    answer = fig5.answer({"made-up": sweep.tables}, MARGIN)
    without = fig5.answer({"made-up": singles(updates, mrd, tokens).tables}, MARGIN)
    assert answer.tables["fig5-correlations"].equals(without.tables["fig5-correlations"])
    assert any(sentence.startswith("10 of 40 runs are left out") for sentence in answer.sentences)


def test_algorithms_agree_over_the_samples_of_both():
    sweep = Measured()
    for place in range(12):
        sweep.add(f"s{place}", mrd=1.0 + place, updates=place, algorithm="GA")
        if place < 11:
            sweep.add(f"s{place}", mrd=1.0 + place, updates=100 - place, algorithm="NPO")
    runs = single_sample_runs(*sweep.tables, "task")
    of_ga, of_npo = agreements_of(runs, "updates")["task", "GA", "NPO"]
    assert of_ga.tolist() == list(range(11))
    assert of_npo.tolist() == list(range(100, 89, -1))
    answer = fig5.answer({"made-up": sweep.tables}, MARGIN)
    # Claims about MRD are made of the first algorithm alone: GA, with MRD going up with the updates.
    assert words(answer) == [CONTRADICTED, CONTRADICTED]
    assert answer.verdicts[1].claim.effect == "rank correlation of the updates, made-up, GA and NPO"


# --- Figure 4 -----------------------------------------------------------------------------------------------


def spread_of(*changes: Sequence[float]) -> fig4.Spread:
    """Of composites, their changes by seed."""
    count = len(changes)
    names = tuple(f"c{n}" for n in range(count))
    return fig4.Spread("GA", names, np.array(changes), np.zeros(count), np.zeros(count), np.ones(count, dtype=bool))


def test_variation_is_what_composites_differ_by_beyond_the_seed():
    """Means 1 and 3, no noise: sqrt(2) / 2. Means 2 and 3, variance 1/2, and seeds that explain 2 / 2: nothing is
    left. Means 2 and 6, variance 8, of which seeds explain 2 / 2: sqrt(7) / 4."""
    assert spread_of([1, 1], [3, 3]).variation().value == pytest.approx(math.sqrt(2) / 2)
    assert spread_of([1, 3], [2, 4]).variation().value == 0
    assert spread_of([1, 3], [5, 7]).variation().value == pytest.approx(math.sqrt(7) / 4)
    assert spread_of([1.0], [3.0]).variation().value == pytest.approx(math.sqrt(2) / 2)


def test_the_share_of_composites_in_the_variance_of_a_run():
    """Between 7, within 2."""
    assert spread_of([1, 3], [5, 7]).composite_share().value == pytest.approx(7 / 9)
    assert spread_of([1, 3], [2, 4]).composite_share().value == 0
    assert math.isnan(spread_of([1.0], [5.0]).composite_share().value)


@pytest.mark.parametrize(("seeds", "noise"), [(2, 0.05), (1, 0.0)])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_of_the_variation_hold_the_truth(seeds, noise, skewed):
    """Of 400 simulated sets of 24 composites, 95 % +- 1.1 %; a bootstrap holds it in 88 to 90 %."""
    held = 0
    for number in range(400):
        rng = np.random.default_rng(number)
        own = (rng.gamma(3, size=(24, 1)) - 3) / math.sqrt(3) if skewed else rng.normal(size=(24, 1))
        found = spread_of(*(1 + 0.1 * own + noise * rng.normal(size=(24, seeds)))).variation()
        held += found.low <= 0.1 <= found.high
    assert 0.92 <= held / 400 <= 0.985


def test_the_ratio_of_percentiles():
    """Of 1 to 11 the 10th percentile is 2 and the 90th is 10."""
    found = spread_of(*([float(n), float(n)] for n in range(1, 12))).percentile_ratio()
    assert found.value == pytest.approx(5)
    assert found.low < 5 < found.high


def composites(spread: float, noise: float, count: int = 30, seeds: int = 2, slope: float = 0.0) -> Measured:
    """Two algorithms on composites whose changes differ by `spread`, in units of the mean, and by the seed's noise;
    MRD follows them with that slope."""
    rng = np.random.default_rng(5)
    own = rng.normal(size=count)
    sweep = Measured()
    for algorithm in ("GA", "NPO"):
        for number in range(count):
            for seed in range(seeds):
                sweep.add(
                    f"c{number}",
                    mrd=math.exp(slope * own[number] + 0.01 * rng.normal()) if not seed else 1.0,
                    tokens=rng.integers(10, 40, 3).tolist(),
                    mean_abs_delta=1e-3 * (1 + spread * own[number] + noise * rng.normal()),
                    algorithm=algorithm,
                    seed=seed,
                )
    return sweep


@pytest.mark.parametrize(
    ("spread", "noise", "seeds", "verdict"),
    [
        (0.25, 0.05, 2, HOLDS),
        (0.02, 0.02, 2, CONTRADICTED),
        (0.0, 0.15, 2, CONTRADICTED),  # all of it is noise
        (0.1, 0.02, 2, UNKNOWN),
        (0.25, 0.05, 1, UNKNOWN),  # might be noise
    ],
)
def test_figure_4_says_whether_difficulty_is_unequal(spread, noise, seeds, verdict, tmp_path):
    answer = fig4.answer(*composites(spread, noise, seeds=seeds).tables, {"variation": 0})
    assert words(answer) == [verdict] * 2  # of the two algorithms
    assert answer.polar
    assert len(answer.panels) == 2
    assert answer.table.num_rows == 60 * seeds
    drawn(answer, tmp_path)


def test_figure_4_compares_algorithms():
    (found,) = fig4.agreements_of(fig4.spreads_of(*composites(0.25, 0.02).tables)).values()
    assert found.low > 0.8


def test_a_composite_has_the_tokens_of_all_its_samples():
    sweep = Measured()
    sweep.add("a", tokens=[3, 4, 4], mean_abs_delta=1e-4)
    sweep.add("b", tokens=[9], mean_abs_delta=2e-4, forgotten=0.5)
    (spread,) = fig4.spreads_of(*sweep.tables)
    assert spread.tokens.tolist() == [11, 9]
    assert spread.difficulties.tolist() == [1e-4, math.inf]


def test_composites_that_lack_a_seed_are_left_out():
    sweep = composites(0.25, 0.05, count=12)
    sweep.add("c12", mean_abs_delta=5e-3, seed=0)
    sweep.add("c12", mean_abs_delta=None, seed=1, status="diverged")
    answer = fig4.answer(*sweep.tables, {"variation": 0})
    assert "c12" not in answer.table["composite"].to_pylist()
    assert any("2 of 50 trials are left out" in sentence for sentence in answer.sentences)


def test_one_composite_is_nothing_to_compare():
    sweep = Measured()
    sweep.add("a")
    with pytest.raises(UserError, match="no algorithm has two composites"):
        fig4.answer(*sweep.tables, {"variation": 0})


# --- Figure 3 -----------------------------------------------------------------------------------------------


def test_a_group_has_the_means_of_its_samples():
    sweep = Measured()
    sweep.add("g0", tokens=[4, 8], mean_abs_delta=1e-4, updates=6, seed=0)
    sweep.add("g0", tokens=[4, 8], mean_abs_delta=2e-4, updates=8, seed=1, forgotten=0.5)
    sweep.add("g1", tokens=[4], status="diverged", mean_abs_delta=None)
    sweep.add("g2", tokens=[4], ma_initial=0.5, el_initial=0.1, updates=1)  # nothing to forget
    selections = as_table(
        [
            {"selection": "g0", "sample_id": "a", "mrd": 1.0},
            {"selection": "g0", "sample_id": "b", "mrd": None},
            {"selection": "g1", "sample_id": "a", "mrd": 1.0},
        ]
    )
    metrics = as_table(
        [
            {"sample_id": "a", "num_tokens": 4, "grand": 1.0, "el2n": 0.5, "vog": 2.0},
            {"sample_id": "b", "num_tokens": 8, "grand": 3.0, "el2n": 0.1, "vog": 6.0},
        ]
    )
    (row,) = fig3.groups_of(*sweep.tables, selections, metrics).to_pylist()
    assert row == {
        "group": "g0",
        "samples": 2,
        "mean_abs_delta": pytest.approx(1.5e-4),
        "updates": 7.0,
        "forgotten": False,
        "num_tokens": 6.0,
        "grand": 2.0,
        "el2n": pytest.approx(0.3),
        "vog": 4.0,
        "mrd": 1.0,
    }


def grouped(**noise: float) -> pa.Table:
    """25 groups; each metric is the difficulty, turned where low means hard, with so much noise."""
    rng = np.random.default_rng(3)
    hard = np.linspace(1, 2, 25)
    signs = {"mrd": -1, "grand": 1, "el2n": 1, "vog": 1}
    values = {name: 10 + signs[name] * (hard + noise[name] * rng.normal(size=25)) for name in signs if name in noise}
    return pa.table(
        {
            "group": [f"g{n}" for n in range(25)],
            "samples": [4] * 25,
            "mean_abs_delta": 1e-4 * hard,
            "forgotten": [True] * 25,
            "num_tokens": rng.uniform(20, 40, 25),
            **values,
        }
    )


CLEAR, HIDDEN = 0.05, 20.0


def test_metrics_are_turned_so_that_plus_one_is_the_true_order():
    found = {each.metric.column: each for each in fig3.orderings(grouped(mrd=0, grand=0, el2n=CLEAR, vog=HIDDEN))}
    assert found["mrd"].correlation.value == pytest.approx(1)
    assert found["grand"].correlation.value == pytest.approx(1)
    assert found["mrd"].ranks.tolist() == found["grand"].ranks.tolist() == list(range(1, 26))
    assert found["mrd"].mrd_ahead is None
    assert found["grand"].mrd_ahead.value == pytest.approx(0)
    assert found["vog"].mrd_ahead.low > 0


def test_a_metric_that_orders_the_other_way_round_orders_as_well():
    table = grouped(mrd=CLEAR, grand=CLEAR)
    table = table.set_column(table.column_names.index("grand"), "grand", pa.array(-table["grand"].to_numpy()))
    found = fig3.orderings(table)[1]
    assert found.correlation.value < -0.9
    assert abs(found.mrd_ahead.value) < 0.1


@pytest.mark.parametrize(
    ("noise", "ours", "others"),
    [
        ({"mrd": CLEAR, "grand": HIDDEN, "el2n": HIDDEN, "vog": HIDDEN}, HOLDS, [HOLDS] * 3),
        ({"mrd": HIDDEN, "grand": CLEAR, "el2n": CLEAR, "vog": CLEAR}, UNKNOWN, [CONTRADICTED] * 3),
        ({"mrd": CLEAR, "grand": HIDDEN, "el2n": CLEAR, "vog": HIDDEN}, HOLDS, [HOLDS, NO_EFFECT, HOLDS]),
    ],
)
def test_figure_3_says_who_follows_the_difficulty(noise, ours, others, tmp_path):
    answer = fig3.answer(grouped(**noise), FIG3)
    assert words(answer) == [ours, *others]
    assert answer.table["rank_difficulty"].to_pylist() == list(range(1, 26))
    assert [row["metric"] for row in answer.tables["fig3-correlations"].to_pylist()] == ["MRD", "GraNd", "EL2N", "VoG"]
    drawn(answer, tmp_path)


@pytest.mark.slow
def test_chance_does_not_contradict_that_mrd_is_ahead():
    """Where nothing orders the groups, the size of the other correlation is above MRD's by chance: in 7 of 100 cases
    surely so by the interval of their difference alone."""
    said = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        table = grouped()
        for name in ("mrd", "grand"):
            table = table.append_column(name, pa.array(rng.normal(size=25)))
        said.append(words(fig3.answer(table, FIG3))[1])
    assert said.count(CONTRADICTED) <= 2
    assert said.count(HOLDS) <= 2


def test_mrd_that_orders_backwards_contradicts_the_claim():
    table = grouped(mrd=CLEAR, grand=HIDDEN)
    table = table.set_column(table.column_names.index("mrd"), "mrd", pa.array(-table["mrd"].to_numpy()))
    answer = fig3.answer(table, FIG3)
    assert words(answer)[0] == CONTRADICTED
    assert any("VoG is left out" in sentence for sentence in answer.sentences)


def test_groups_that_are_not_forgotten_are_the_hardest():
    table = grouped(mrd=0, grand=0)
    table = table.set_column(table.column_names.index("forgotten"), "forgotten", pa.array([False, *[True] * 23, False]))
    answer = fig3.answer(table, FIG3)
    assert answer.table["rank_difficulty"].to_pylist() == [24.5, *range(1, 24), 24.5]
    assert any("2 of 25 groups were not wholly forgotten" in sentence for sentence in answer.sentences)


def test_epochs_are_for_models_that_can_be_trained_again(model_folder, data_file, tmp_path):
    setup = Setup("fig3", {}, Naming(), tmp_path, tmp_path, SweepResources())
    with pytest.raises(UserError, match=r"epochs has 2: .* is not an embedded model"):
        fig3.measure(setup, fig3.Fig3Spec(epochs=[2]), {"model": str(model_folder), "task": str(data_file)})


# --- Figure 7 -----------------------------------------------------------------------------------------------


def test_a_text_that_the_context_does_not_hold_is_refused_first(model_folder, data_file, tmp_path):
    values = {
        "texts": {"task": str(data_file), "levels": {"short": 1, "endless": 12}, "count": 2},
        "sweep": {"base": {"model": str(model_folder), "algorithm": "GA", "evaluate": False}},
    }
    with pytest.raises(UserError, match=r"levels\['endless'\]: 'r0\+11' has \d+ tokens, the model's context holds 64"):
        fig7.run(Setup("fig7", values, Naming(), tmp_path, tmp_path / "trials", SweepResources(), progress=False))


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (3, r"count is 14: \d+ records of graded/holdout give 13 texts for 'own'; lower it"),
        ("paragraph", "unknown split of task 'graded' 'paragraph': .*mean 'paragraphs'"),
    ],
)
def test_levels_that_the_task_does_not_have(level, message, model_folder, tmp_path):
    values = {
        "texts": {"task": "graded", "split": "holdout", "levels": {"own": level}, "count": 14},
        "sweep": {"base": {"model": str(model_folder), "algorithm": "GA", "evaluate": False}},
    }
    with pytest.raises(UserError, match=message):
        fig7.run(Setup("fig7", values, Naming(), tmp_path, tmp_path / "trials", SweepResources(), progress=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": {}}, "levels is empty"),
        ({"count": 0}, "count is 0: expected a whole number of at least 1"),
        ({"levels": {"sentence": 0}}, r"levels\['sentence'\] is 0: expected a whole number of at least 1"),
    ],
)
def test_levels_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(fig7.Fig7Spec(task="authors", levels={"sentence": 1}, count=3), **change).checked()


def levels(**strength: float) -> Mapping[str, tuple[pa.Table, pa.Table]]:
    return {
        level: singles(*noisy(40 if abs(own) > 0.5 else 12, own, seed=number)).tables
        for number, (level, own) in enumerate(strength.items())
    }


@pytest.mark.parametrize(
    ("strength", "verdict"),
    [
        ({"sentence": -0.8, "paragraph": -0.8}, [HOLDS, HOLDS]),
        ({"sentence": -0.8, "paragraph": 0.8, "long": -0.2}, [HOLDS, CONTRADICTED, UNKNOWN]),
    ],
)
def test_figure_7_says_at_which_levels_mrd_orders_texts(strength, verdict, tmp_path):
    records_of = {"sentence": 1, "paragraph": 5, "long": 15}
    answer = fig7.answer(levels(**strength), records_of, 256, MARGIN)
    assert words(answer) == verdict
    assert len(answer.panels) == len(strength)
    assert set(answer.table["level"].to_pylist()) == set(strength)
    drawn(answer, tmp_path)


# --- Specs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["demo", "decide", "paper"])
@pytest.mark.parametrize(
    ("name", "sweeps", "others"),
    [
        ("fig3", ["sweep"], {"metrics": fig3.Fig3Spec}),
        ("fig4", ["sweep"], {}),
        ("fig5", ["tofu", "wmdp"], {}),
        ("fig7", ["sweep"], {"texts": fig7.Fig7Spec}),
    ],
)
def test_specs_parse_and_check(name: str, sweeps: list[str], others: dict[str, type], preset: str) -> None:
    values = read_mapping(SPECS / f"{name}.yaml")[0][preset]
    assert {*sweeps, *others} <= set(values)
    for key, kind in others.items():
        build(kind, values[key])
    for key in sweeps:
        spec = build(SweepSpec, values[key]).checked()
        run = {"workers": 0, "task": "authors"} | spec.base | {field: own[0] for field, own in spec.vary.items()}
        checked = build(UnlearnSpec, run).checked()
        # All of them ask what it takes to forget, by a rule that is the same for all.
        assert checked.early_stopping
        assert checked.check_every
        assert spec.thresholds == "split"


# --- From end to end ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figure_3_from_end_to_end(tmp_path):
    """On a tiny model that was taught its records, with a shorter teaching as its checkpoint: the metrics are those
    that plain calls give, MRD orders with an interval, and a second start measures nothing."""
    known = records("forget")[:12]
    data = write_jsonl(tmp_path / "data.jsonl", [{key: r[key] for key in ("id", "question", "answer")} for r in known])
    earlier, model = (taught(tmp_path / name, pairs_of(*known), n) for name, n in (("earlier", 15), ("model", 60)))
    base = {"model": str(model), "task": str(data), "algorithm": "GA", "max_steps": 60, "learning_rate": 1e-3}
    base |= {"el_n": 1, "replacement": False, "check_unit": "steps", "evaluate": False}
    values = {
        "sweep": {
            "base": base,
            "selections": [{"kind": "random", "size": 2, "count": 10}],
            "thresholds": "split",
        },
        "metrics": {"checkpoints": [str(earlier)], "batch_tokens": 64},
        "margins": FIG3,
    }
    work, spread = tmp_path / "work", SweepResources(concurrent=0)
    work.mkdir()
    setup = Setup("fig3", values, Naming(), work, tmp_path / "trials", spread, progress=False)
    answer = fig3.run(setup)

    assert answer.table.num_rows == 10
    assert min(answer.table["mean_abs_delta"].to_pylist()) > 0
    assert all("95 % CI" in sentence for sentence in answer.sentences[:3])
    found = fig3.measure(setup, setup.spec(fig3.Fig3Spec, "metrics"), base)
    reference = find_model(str(model))
    samples, _ = encode(load_dataset(str(data)).texts, reference.tokenizer, reference.max_length)
    batch, plain = collate(samples), load_model(model)
    for name, score in (
        ("grand", grand(plain, batch)),
        ("el2n", el2n(plain, batch)),
        ("vog", vog([load_model(earlier), plain], batch)),
    ):
        assert found["sample_id"].to_pylist() == [sample.sample_id for sample in samples]
        np.testing.assert_allclose(found[name].to_numpy(), score.numpy(), rtol=1e-4)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    again = fig3.run(setup)
    assert again.table.equals(answer.table)
    assert again.sentences == answer.sentences
    changed = [path for path in before if path.stat().st_mtime_ns != before[path]]
    assert not changed
