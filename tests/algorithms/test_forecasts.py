"""Training by forecast: draws, groups, penalty and rewards against hand-computed numbers and fp64 references."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from algorithms.alone import LossAlone
from algorithms.corpus import Corpus, Encoder, make_corpus
from algorithms.ease import ease_of_forecasts, rewards, sha256_of_values, values_of
from algorithms.group import Group
from algorithms.hold import log_odds_gradient_norm
from algorithms.recipe import Recipe
from algorithms.samplers import Sampler
from algorithms.schedule import groups_of_samples, resolved_schedule
from algorithms.tables import tables_of
from algorithms.trainable import Trainable
from scoring.errors import UserError
from scoring.flip_time import Forecaster, Outputs, outputs_of
from scoring.load import load_model
from scoring.samples import Text, TextSet, collate
from scoring.updates import TrialUpdates, UpdateSettings
from tests.algorithms.test_unlearner import (
    CORPUS,
    FORGET,
    ROUNDING,
    Plain,
    Run,
    exact_model,
    largest_difference,
    memorised,
    plain,
    plain_training,
    recipe,
    run,
)
from tests.tiny_folders import tokenizer
from tests.tiny_models import VOCABULARY, random_samples, tiny_model

__all__ = ["memorised", "plain"]  # fixtures

SCHEDULE = {
    "by": "mrd",
    "groups": [
        {"share": 0.4, "algorithm": "GA", "forget_weight": 0.5},
        {"share": 0.3, "algorithm": "NPO", "settings": {"beta": 0.3}},
        {"share": 0.3, "algorithm": "PO", "forget_weight": 2},
    ],
}


# The loss on a sample alone


def outputs(logprobs: list[float]) -> Outputs:
    """Of one sample, whose third token is padding."""
    mask = torch.tensor([[True, True, False]])
    return Outputs(torch.zeros(1, 3, 5), torch.tensor([[*logprobs, 0.0]]), torch.tensor([[1, 2, 0]]), mask)


def test_the_loss_on_a_sample_alone() -> None:
    now, initial = outputs([-1.0, -2.0]), outputs([-0.5, -0.5])
    assert LossAlone("GA")(now, initial).tolist() == [-1.5]
    # log-ratio -3 + 1: -(2 / 0.5) log sigmoid(0.5 * 2) = 4 log(1 + e^-1)
    loss = pickle.loads(pickle.dumps(LossAlone("NPO", {"beta": 0.5})))(now, initial)
    assert loss.item() == pytest.approx(4 * math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("algorithm", ["PO", "IdkDPO", "RMU"])
def test_losses_that_take_more_than_the_sample(algorithm: str) -> None:
    with pytest.raises(
        UserError, match=f"^algorithm {algorithm} has no forecast: its objective takes .*forecast by GA"
    ):
        LossAlone(algorithm)


# Ease, rewards and groups by hand


def test_ease_and_rewards_by_hand() -> None:
    updates = np.array([4.0, 0.0, 0.2, math.inf, 10.0])
    assert ease_of_forecasts(updates).tolist() == [0.25, 2.0, 2.0, 0.0, 0.1]
    assert rewards(updates, 2).tolist() == [16.0, 0.25, 0.25, 100.0, 100.0]
    assert rewards(np.array([math.inf, math.inf]), 1).tolist() == [0.5, 0.5]


def test_groups_by_hand() -> None:
    ease = np.array([0.1, 9.0, 3.0, 3.0, 0.0, 5.0, 1.0])
    # From easy to hard: 1, 5, 2, 3, 6, 0, 4; ends at 2.8 -> 3 and 4.9 -> 5.
    assert groups_of_samples(ease, [0.4, 0.3, 0.3]) == [2, 0, 0, 1, 2, 0, 1]
    assert groups_of_samples(ease[:1], [0.6, 0.4]) == [0]


def test_defaults_of_groups_are_those_of_the_run() -> None:
    fields = {"groups": [{"share": 0.5}, {"share": 0.5, "algorithm": "ga", "forget_weight": 0}]}
    made = resolved_schedule(fields, "NPO", {"beta": 0.2}, 3.0)
    assert made.by == "flip-time"
    assert [tuple(group.values()) for group in made.groups] == [
        (0.5, "NPO", {"beta": 0.2}, 3.0),
        (0.5, "GA", {}, 0),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "flip_time"}, "weights is 'flip_time': expected mrd, flip-time, or a file of numbers"),
        ({"weights": "flip-time", "algorithm": "PO"}, "algorithm PO has no forecast"),
        ({"reward": 1.0, "algorithm": "RMU"}, "algorithm RMU has no forecast"),
        ({"reward": -1.0}, "reward is -1.0: expected a number of at least 0"),
        ({"hold_penalty": math.inf}, "hold_penalty is inf: expected a finite number"),
        ({"optimizer": "adam"}, "optimizer is 'adam': .*did you mean 'adamw'"),
        ({"schedule": "a.yaml"}, "schedule is 'a.yaml': expected a mapping with groups"),
        ({"schedule": {}}, "schedule: missing groups"),
        ({"schedule": {"groups": []}}, "schedule: groups have shares of none: expected them to add up to 1"),
        ({"schedule": {"groups": [{"share": 0.6}, {"share": 0.6}]}}, "shares 0.6, 0.6: expected them to add up to 1"),
        ({"schedule": {"groups": [{"share": 2}]}}, "schedule: groups: entry 1: share is 2: expected a number"),
        ({"schedule": {"groups": [{"share": 1, "algoritm": "GA"}]}}, "unknown field 'algoritm'.*did you mean"),
        ({"schedule": {"groups": [{"share": 1, "settings": {"beta": 1}}]}}, "unknown setting of ga 'beta'"),
        ({"schedule": {"groups": [{"share": 1, "algorithm": "RMU"}]}}, "algorithm is RMU, which trains a few layers"),
        ({"schedule": {"by": "mdr", "groups": [{"share": 1}]}}, "schedule: by is 'mdr': expected mrd, flip-time"),
        ({"schedule": SCHEDULE, "reward": 1}, "algorithm PO has no forecast"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Recipe(**{"algorithm": "GA", **fields}).resolved()
    assert "\n" not in str(caught.value)


# Files


def test_values_of_a_file(tmp_path: Path) -> None:
    lines = [f'{{"sample_id": "{s.sample_id}", "ease": {s.index}, "what": "x"}}' for s in reversed(FORGET)]
    (tmp_path / "ease.jsonl").write_text("\n".join(lines))
    ids = [sample.sample_id for sample in FORGET]
    table = pa.table({"sample_id": ids, "mrd": [1.5] * len(ids), "other": [float(i) for i in range(len(ids))]})
    pq.write_table(table, tmp_path / "scores.parquet")
    by_line, by_column = str(tmp_path / "ease.jsonl"), f"{tmp_path}/scores.parquet:other"
    for source in (by_line, by_column):
        assert values_of(source, FORGET).tolist() == list(range(len(FORGET)))
    # The same numbers are the same run, whatever file they are in.
    assert sha256_of_values(by_line) == sha256_of_values(by_column)
    assert sha256_of_values(by_line) != sha256_of_values(f"{tmp_path}/scores.parquet:mrd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "ease.jsonl does not exist: expected mrd, flip-time, or a file"),
        ("{", "cannot be read .*: expected Parquet, or a JSON object a line"),
        ('{"id": "a", "x": 1}', "has no column sample_id"),
        ('{"sample_id": "a", "x": "1"}', r"has 0 columns of numbers \(none\): expected one"),
        ('{"sample_id": "a", "x": 1, "y": 2}', r"has 2 columns of numbers \(x, y\): expected one, or .*:COLUMN"),
        ('{"sample_id": "a", "x": -1}', "x of 'a' is -1.0: expected a finite number of at least 0"),
        ('{"sample_id": "a", "x": 1}\n{"sample_id": "a", "x": 1}', "sample_id 'a' occurs twice"),
        ('{"sample_id": "a", "x": 1}', r"has no value for 7 of 7 forget samples, such as"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "ease.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        values_of(str(tmp_path / "ease.jsonl"), FORGET)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "ease.jsonl").write_text('{"sample_id": "a", "ease": 1}')
    with pytest.raises(UserError, match=r"unknown column of numbers in .* 'eas': .*did you mean 'ease'"):
        values_of(f"{tmp_path}/ease.jsonl:eas", FORGET)


def test_a_corpus_holds_what_its_files_say(tmp_path: Path) -> None:
    (tmp_path / "ease.jsonl").write_text('{"sample_id": "b", "ease": 2}\n{"sample_id": "a", "ease": 1}')
    source = str(tmp_path / "ease.jsonl")
    made = recipe("GA", weights=source, schedule={"by": source, "groups": [{"share": 1}]})
    texts = TextSet("forget", [Text(name, "w3 w4", " w5 w6") for name in "ab"])
    corpus, _ = make_corpus(made, Encoder(tokenizer(), 64, VOCABULARY), texts, None)
    assert {name: values.tolist() for name, values in corpus.values.items()} == {source: [1.0, 2.0]}


# Draws


def forecasts(model: Any, made: Recipe, threshold: float, initial: Any = None) -> np.ndarray:
    """By `scoring.flip_time`, a sample at a time; the initial model is the model itself if there is no other."""
    settings = UpdateSettings(
        optimizer=made.optimizer, learning_rate=made.learning_rate, weight_decay=0.0, clip_norm=made.clip_norm
    )
    alone = LossAlone(made.algorithm, made.settings)
    found = []
    for sample in FORGET:
        batch = collate([sample])
        with torch.no_grad():
            before = outputs_of(initial or model, batch)
        forecaster = Forecaster(
            model, TrialUpdates(model, settings), lambda now, _, before=before: alone(now, before) * made.forget_weight
        )
        found.append(forecaster.forecast([batch], [threshold])[0, 0])
    return np.array(found)


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "GA", "alpha": 1.0},
        {"algorithm": "NPO", "alpha": -1.0, "optimizer": "sgd", "learning_rate": 0.05, "settings": {"beta": 2.0}},
        {"algorithm": "GA", "order": "hard-first", "ma_threshold": 0.5, "check_every": 0},
        {"algorithm": "GA", "alpha": 1.0, "check_every": 0, "lora_rank": 2, "forget_weight": 0.1},
    ],
    ids=str,
)
def test_draws_by_forecast(memorised: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """The forecast is that of the run's own updates, to the run's own threshold; draws go by it, and it is renewed."""
    made = recipe(**{"weights": "flip-time", "refresh": 1, "learning_rate": 5e-4, **fields})
    done = run(memorised, tmp_path, made)
    history = done.history
    assert [entry["step"] for entry in history.forecasts] == [0, 3]
    assert not history.mrd
    assert history.passes["mrd"][0] == 2 * 2 * len(FORGET)
    assert history.passes["mrd"][1] == 2 * len(FORGET)
    initial = load_model(memorised)
    threshold = made.ma_threshold
    if threshold is None:
        with torch.no_grad():
            looks = [outputs_of(initial, collate([sample])) for sample in FORGET]
        threshold = float(np.mean([np.mean(look.margins()[0] > 0) for look in looks]))
    assert history.forecast_threshold == pytest.approx(threshold)
    found = np.array(history.forecasts[0]["forecast"])
    if not made.lora_rank:  # adapters start at random
        np.testing.assert_allclose(found, forecasts(initial, made, threshold), rtol=1e-4)
    assert len(set(found)) > 3
    sampler = Sampler(len(FORGET), made.order, made.alpha, made.replacement, made.seed)
    for entry in history.forecasts:
        ease = [1 / max(n, 0.5) for n in entry["forecast"]]
        sampler.set_difficulty(np.array(ease), [sample.sample_id for sample in FORGET])
        sampler.begin_epoch()
        for step in range(entry["step"], entry["step"] + 3):
            drawn = sampler.draw(step, 3, np.ones(len(FORGET), dtype=bool))
            assert done.draws[step] == [FORGET[i].sample_id for i in drawn]


def test_a_forecast_on_the_way_knows_the_initial_model(memorised: Path, tmp_path: Path) -> None:
    """NPO's gradient shrinks as it gets away from the initial model, and updates of SGD with it."""
    made = recipe("NPO", weights="flip-time", alpha=1.0, optimizer="sgd", learning_rate=1e-3, settings={"beta": 1.0})
    made = dataclasses.replace(made, refresh=1, clip_norm=None, epochs=1)
    first = run(memorised, tmp_path / "first", made)
    second = run(memorised, tmp_path / "second", dataclasses.replace(made, epochs=2))
    assert second.history.steps[2]["loss"] == first.history.steps[2]["loss"]
    entry = second.history.forecasts[1]
    assert entry["step"] == 3
    threshold = second.history.forecast_threshold
    assert threshold is not None
    initial, then = load_model(memorised), load_model(first.saved.model)
    np.testing.assert_allclose(entry["forecast"], forecasts(then, made, threshold, initial), rtol=1e-3)
    assert np.abs(np.array(entry["forecast"]) - forecasts(then, made, threshold)).max() > 0.5


def test_draws_by_a_file(memorised: Path, tmp_path: Path) -> None:
    made = recipe("GA", weights="mine.parquet:ease", order="easy-first")
    corpus = dataclasses.replace(CORPUS, values={"mine.parquet:ease": np.array([1.0, 5, 2, 7, 0, 3, 4])})
    done = run(memorised, tmp_path, made, corpus)
    assert [name for names in done.draws[:2] for name in names] == [FORGET[i].sample_id for i in (3, 1, 6, 5, 2, 0)]
    assert not done.history.mrd
    assert not done.history.forecasts
    unused = dataclasses.replace(made, order="weighted", alpha=0.0)
    assert (
        "weights mine.parquet:ease are not used"
        in run(memorised, tmp_path / "unused", unused, corpus).history.notes[-1]
    )
    weighted = dataclasses.replace(made, order="weighted", alpha=1.0)
    notes = run(memorised, tmp_path / "weighted", weighted, corpus).history.notes
    assert any("1 of 7 samples have difficulty 0 (by mine.parquet:ease)" in note for note in notes)


# The loss


def with_groups(losses: Plain, groups: list[int], made: Recipe) -> Any:
    """The mean over the drawn samples, each by the objective and strength of its group."""

    def mean(drawn: list[int], refusals: Any) -> torch.Tensor:
        terms = []
        for i in drawn:
            group = SCHEDULE["groups"][groups[i]]  # type: ignore[index]
            of_group = dataclasses.replace(losses, recipe=dataclasses.replace(made, settings=group.get("settings", {})))
            term = getattr(of_group, group["algorithm"].lower())(FORGET[i], refusals[i])
            terms.append(group.get("forget_weight", made.forget_weight) * term)
        return torch.stack(terms).mean()

    return mean


def test_groups_of_a_schedule(plain: Path, tmp_path: Path) -> None:
    """Three objectives and strengths in one batch, with a retain term, in several micro-batches each."""
    made = recipe("GradDiff", schedule=SCHEDULE, forget_weight=0.7)
    done = run(plain, tmp_path, made, batch_tokens=60)
    mrd = np.array(done.history.mrd[0]["mrd"])
    ranks = np.argsort(np.argsort(-mrd))
    assert done.history.groups == [0 if rank < 3 else 1 if rank < 5 else 2 for rank in ranks]
    model = exact_model(plain)
    trace = plain_training(
        model, done.draws, made, forgotten=lambda losses: with_groups(losses, done.history.groups, made)
    )
    assert largest_difference(done.weights, {name: p.detach() for name, p in model.named_parameters()}) <= ROUNDING
    expected = np.array(trace.forget) + made.retain_weight * np.array(trace.retain)
    np.testing.assert_allclose([row["loss"] for row in done.history.steps], expected, rtol=1e-4)


def test_rewards(memorised: Path, tmp_path: Path) -> None:
    made = recipe("GA", reward=1.5, refresh=1, optimizer="sgd", learning_rate=0.01, forget_weight=2.0, clip_norm=None)
    done = run(memorised, tmp_path, made, batch_tokens=40)
    assert [entry["step"] for entry in done.history.forecasts] == [0, 3]
    place = {sample.sample_id: sample.index for sample in FORGET}
    model = exact_model(memorised)
    losses = Plain(model, model, made)
    parameters = list(model.parameters())
    for row in done.history.steps:
        forecast = np.array(done.history.forecasts[(row["step"] - 1) // 3]["forecast"])
        most = max(n for n in forecast if np.isfinite(n))
        drawn = [place[name] for name in row["samples"]]
        n = np.array([min(max(forecast[i], 0.5), most) ** 1.5 for i in drawn])
        weights = n / n.mean()
        assert weights.mean() == pytest.approx(1)
        terms = torch.stack([losses.ga(FORGET[i], FORGET[i]) for i in drawn])
        loss = 2.0 * (terms * torch.from_numpy(weights)).mean()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["forget_loss"] == pytest.approx(terms.mean().item(), rel=1e-4)
        with torch.no_grad():
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p -= 0.01 * gradient
    assert largest_difference(done.weights, {name: p.detach() for name, p in model.named_parameters()}) <= 1e-6


# The penalty


def norm_in_fp64(model: Any, sample: Any) -> torch.Tensor:
    """||grad Sum_t a_t|| / T of a whole sequence, by eager attention."""
    logits = model(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0]
    table = torch.softmax(logits, -1)[np.flatnonzero(sample.scored) - 1]
    targets = torch.from_numpy(sample.input_ids[sample.scored])
    p = table[torch.arange(len(targets)), targets]
    odds = torch.log(p / (1 - p)).sum()
    gradients = torch.autograd.grad(odds, list(model.parameters()), create_graph=True, allow_unused=True)
    return torch.sqrt(sum((g**2).sum() for g in gradients if g is not None)) / len(targets)


# Llama and Gemma normalise in fp32, whatever the weights are in: differences over less drown in rounding.
@pytest.mark.parametrize(
    ("architecture", "move", "tolerance"), [("gpt2", 1e-6, 1e-6), ("llama", 1e-3, 0.02), ("gemma2", 1e-3, 0.02)]
)
def test_the_gradient_of_the_penalty(architecture: str, move: float, tolerance: float) -> None:
    """fp32 against fp64; and fp64 against a central difference along a random direction."""
    # The padding token's embedding is left out of gradients by definition, and differences would have it.
    sample = next(sample for sample in random_samples(9) if 0 not in sample.input_ids)
    model: Any = tiny_model(architecture)
    parameters = list(model.parameters())
    norm = log_odds_gradient_norm(model, parameters, collate([sample]))
    found = torch.autograd.grad(norm, parameters, allow_unused=True)
    exact: Any = tiny_model(architecture).double()
    exact.set_attn_implementation("eager")
    expected_norm = norm_in_fp64(exact, sample)
    expected = torch.autograd.grad(expected_norm, list(exact.parameters()), allow_unused=True)
    assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)
    length = math.sqrt(sum(float((g**2).sum()) for g in expected if g is not None))
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            assert ours is not None
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4 * length)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in exact.parameters()]
    slope = sum(float((g * d).sum()) for g, d in zip(expected, directions, strict=True) if g is not None)
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(exact.parameters(), directions, strict=True):
                p += sign * move * d
        ends.append(norm_in_fp64(exact, sample).item())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * move), rel=tolerance)


def test_training_with_the_penalty(plain: Path, tmp_path: Path) -> None:
    """In several micro-batches, with a retain term, and with activations that are recomputed."""
    made = recipe("GradDiff", hold_penalty=0.2, optimizer="sgd", learning_rate=0.01, clip_norm=None)
    done = run(plain, tmp_path, made, batch_tokens=40)

    def forgotten(losses: Plain) -> Any:
        def mean(drawn: list[int], _: Any) -> torch.Tensor:
            terms = [losses.ga(FORGET[i], FORGET[i]) + 0.2 * norm_in_fp64(losses.model, FORGET[i]) for i in drawn]
            return torch.stack(terms).mean()

        return mean

    model = exact_model(plain)
    model.set_attn_implementation("eager")
    trace = plain_training(model, done.draws, made, forgotten=forgotten)
    assert largest_difference(done.weights, {name: p.detach() for name, p in model.named_parameters()}) <= 2e-6
    rows = done.history.steps
    np.testing.assert_allclose([row["loss"] for row in rows], np.array(trace.forget) + trace.retain, rtol=1e-4)
    np.testing.assert_allclose([row["gradient_norm"] for row in rows], trace.norm, rtol=1e-4)
    recomputed = run(plain, tmp_path / "recomputed", made, batch_tokens=40, gradient_checkpointing=True)
    assert largest_difference(recomputed.weights, done.weights) <= 1e-7


def test_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trainable(tiny_model("llama"), Group())
    trained.refuse_shards("reward")
    monkeypatch.setattr("algorithms.trainable.FSDPModule", type(trained.model))
    with pytest.raises(
        UserError, match=r"^reward needs whole weights, and strategy fsdp shards them: use strategy ddp"
    ):
        trained.refuse_shards("reward")
    with pytest.raises(UserError, match=r"^optimizer adafactor needs whole weights, and strategy fsdp shards them"):
        Trainable(tiny_model("llama"), Group(), optimizer="adafactor")


def test_what_is_recorded(memorised: Path, tmp_path: Path) -> None:
    groups = [{"share": 0.5}, {"share": 0.5, "algorithm": "NPO"}]
    made = recipe("GA", weights="flip-time", alpha=1.0, refresh=1, schedule={"by": "mrd", "groups": groups})
    done: Run = run(memorised, tmp_path, made)
    tables = tables_of(done.history, Corpus(FORGET))
    assert tables["samples"]["group"].to_pylist() == done.history.groups
    assert sorted(done.history.groups) == [0] * 4 + [1] * 3
    rows = tables["difficulty"].to_pylist()
    assert [row["step"] for row in rows] == [0] * 7 + [3] * 7
    assert [row["sample_id"] for row in rows] == [sample.sample_id for sample in FORGET] * 2
    assert [row["mrd"] for row in rows] == done.history.mrd[0]["mrd"] + [None] * 7
    assert [row["forecast"] for row in rows] == [n for entry in done.history.forecasts for n in entry["forecast"]]
