"""The real number of updates against loops of the test's own, against `algorithms.unlearn`, and the forecast of it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import algorithms
from algorithms.alone import LossAlone
from algorithms.samplers import Sampler
from algorithms.truth import AloneTask, ExtractionTask, Rule, TogetherTask
from scoring.flip_time import Forecaster
from scoring.memorization import extraction_likelihood
from scoring.replica import TransformersReplica
from scoring.samples import Batch, Sample, collate, make_batches
from scoring.updates import TrialUpdates, UpdateSettings
from tests.scoring.toys import LEARNT, RECORDS, bigram, memorised_model, sample
from tests.tiny_folders import EOS, tokenizer

RATE = 3e-4
EL_N = 3
ADAMW = UpdateSettings(learning_rate=RATE)


def alone(
    model: Any,
    samples: Sequence[Sample],
    rules: dict[str, Rule],
    update: UpdateSettings = ADAMW,
    most: int = 40,
    algorithm: str = "GA",
    **settings: float,
) -> dict[str, np.ndarray]:
    """Of one batch of these samples."""
    task = AloneTask(0, LossAlone(algorithm, settings), update, rules, most, EL_N, EOS)
    sent: AloneTask = pickle.loads(pickle.dumps(task))  # as to a replica on Ray
    return sent.do(TransformersReplica(model), [collate(samples)], {})


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_untouched(model: Any, before: Sequence[torch.Tensor]) -> None:
    assert all(map(torch.equal, weights(model), before))
    assert all(p.grad is None for p in model.parameters())


def test_rules_by_hand() -> None:
    both, ma, el = Rule(0.5, 0.2), Rule(0.5), Rule(None, 0.2)
    # MA and EL; neither may be at its threshold.
    for pair, held in (((0.4, 0.1), "111"), ((0.5, 0.1), "001"), ((0.4, 0.2), "010"), ((0.4, math.nan), "111")):
        assert "".join(str(int(rule.holds(*pair))) for rule in (both, ma, el)) == held


def test_el_of_the_initial_model() -> None:
    model = memorised_model()
    batches = make_batches([*LEARNT[:4], sample([5, 6], 4)], 60)
    found = ExtractionTask(0, EL_N, EOS).do(TransformersReplica(model), batches, {})
    el = dict(zip(found["index"].tolist(), found["el"].tolist(), strict=True))
    assert [el[i] for i in range(4)] == extraction_likelihood(model, LEARNT[:4], EL_N, EOS).tolist()
    assert math.isnan(el[4])


# --- One by one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_logits_in_plain_arithmetic(optimizer: Any) -> None:
    """The gradient of log p by the logits (z, 0) is (1 - p, p - 1): AdamW and SGD written out, number by number."""
    rate, margin, decay = (0.05, 3.0, 0.1) if optimizer == "adamw" else (0.4, 3.0, 0.0)
    z, m, v, updates = np.array([margin, 0.0]), np.zeros(2), np.zeros(2), 0
    while z[0] - z[1] > 0:
        updates += 1
        g = np.array([1.0, -1.0]) / (1 + math.exp(z[0] - z[1]))
        if optimizer == "sgd":
            z -= rate * g
        else:
            z *= 1 - rate * decay
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            z -= rate * (m / (1 - 0.9**updates)) / (np.sqrt(v / (1 - 0.999**updates)) + 1e-8)
    settings = UpdateSettings(optimizer=optimizer, learning_rate=rate, weight_decay=decay)
    model = bigram([[margin, 0.0], [7.0, 7.0]])
    found = alone(model, [sample([0, 0])], {"x": Rule(1.0)}, settings, most=1000)
    assert 10 < updates < 100
    assert found["updates@x"].tolist() == [updates]
    # The loss does not depend on row 1, but AdamW takes the decay off it too.
    idle = 7 * (1 - rate * decay) ** updates - 7
    moved = np.array([z[0] - margin, z[1], idle, idle])
    assert found["mean_abs_delta@x"].item() == pytest.approx(np.abs(moved).mean(), rel=1e-9)
    assert found["delta_norm@x"].item() == pytest.approx(np.linalg.norm(moved), rel=1e-9)
    assert model.table.tolist() == [[margin, 0.0], [7.0, 7.0]]


def own_loop(
    model: Any, one: Sample, rules: dict[str, Rule], algorithm: str, update: UpdateSettings, most: int
) -> dict[str, tuple[float, float, float]]:
    """Updates, mean |delta theta| and norm by rule: transformers, torch and formulas as printed. Leaves the model
    trained."""
    ids = torch.from_numpy(one.input_ids)[None]
    targets = torch.from_numpy(one.input_ids[one.scored])
    places = torch.from_numpy(np.flatnonzero(one.scored) - 1)
    start = weights(model)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[update.optimizer]
    optimizer = kind(model.parameters(), lr=update.learning_rate, weight_decay=update.weight_decay, foreach=False)
    first: torch.Tensor | None = None
    found: dict[str, tuple[float, float, float]] = {}
    for updates in range(most + 1):
        table = torch.log_softmax(model(input_ids=ids).logits[0, places], -1)
        logps = table[torch.arange(len(targets)), targets]
        ma = (table.argmax(-1) == targets).double().mean().item()
        el = extraction_likelihood(model, [one], EL_N, EOS).item()
        change = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)])
        for name, rule in rules.items():
            if name not in found and (rule.ma is None or ma < rule.ma) and (rule.el is None or el < rule.el):
                found[name] = (updates, change.abs().mean().item(), change.norm().item())
        if first is None:
            first = logps.detach().sum()
        ratio = torch.exp(logps.sum() - first)
        loss = logps.mean() if algorithm == "GA" else 2 / 0.5 * torch.log(1 + ratio**0.5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), update.clip_norm or math.inf)
        optimizer.step()
    return {name: found.get(name, (math.inf, math.nan, math.nan)) for name in rules}


# Plain steps of NPO get shorter as the model gets away from the initial one.
@pytest.mark.parametrize(
    ("algorithm", "update", "places"),
    [
        ("GA", UpdateSettings(learning_rate=RATE, weight_decay=0.5), (3, 16)),
        ("NPO", UpdateSettings(optimizer="sgd", learning_rate=0.001, clip_norm=None), (9,)),
    ],
    ids=["GA", "NPO"],
)
def test_against_a_plain_loop(algorithm: str, update: UpdateSettings, places: tuple[int, ...]) -> None:
    """Rules of MA, the paper's rule and EL alone; one is not reached, and one is met from the start."""
    model = memorised_model(torch.float64)
    chosen = [LEARNT[place] for place in places]
    rules = {"average": Rule(0.95), "half": Rule(0.5), "paper": Rule(0.95, 0.3), "el": Rule(None, 0.2)}
    rules |= {"never": Rule(0.0), "at once": Rule(None, 1.5)}
    before = weights(model)
    beta = {"beta": 0.5} if algorithm == "NPO" else {}
    found = alone(model, chosen, rules, update, 16, algorithm, **beta)
    assert_untouched(model, before)
    assert found["index"].tolist() == list(places)
    for row, one in enumerate(chosen):
        expected = own_loop(memorised_model(torch.float64), one, rules, algorithm, update, 16)
        for name, (updates, mean_abs, norm) in expected.items():
            assert found[f"updates@{name}"][row] == updates, (name, row)
            # Llama normalises in fp32 whatever the weights are in.
            assert found[f"mean_abs_delta@{name}"][row] == pytest.approx(mean_abs, rel=1e-4, nan_ok=True)
            assert found[f"delta_norm@{name}"][row] == pytest.approx(norm, rel=1e-4, nan_ok=True)
    for name in ("average", "half", "paper", "el"):
        assert np.isfinite(found[f"updates@{name}"]).all()
    assert np.isinf(found["updates@never"]).all()
    assert not found["updates@at once"].any()
    assert (found["updates@paper"] > found["updates@average"]).any() or algorithm == "NPO"


@pytest.mark.parametrize("place", [0, 12])
def test_against_the_unlearner(place: int) -> None:
    """A record by itself, looked at after every update, until the rule of early stopping holds."""
    run = algorithms.unlearn(
        memorised_model(),
        tokenizer(),
        [RECORDS[place]],
        algorithm="GA",
        learning_rate=RATE,
        batch_size=1,
        max_steps=40,
        check_unit="steps",
        el_n=EL_N,
        evaluate=False,
        ma_threshold=0.75,
        el_threshold=0.4,
    )
    (forgotten_at,) = run.samples["forgotten_at_step"]
    model = memorised_model()
    before = weights(model)
    found = alone(model, [LEARNT[place]], {"stop": Rule(0.75, 0.4)})
    assert_untouched(model, before)
    assert forgotten_at >= 3
    assert found["updates@stop"].item() == forgotten_at == run.record["updates"]
    last = run.epochs.iloc[-1]
    assert found["mean_abs_delta@stop"].item() == pytest.approx(last["mean_abs_delta"], rel=1e-4)
    assert found["delta_norm@stop"].item() == pytest.approx(last["delta_norm"], rel=1e-4)


def test_a_sample_does_not_see_the_others() -> None:
    model = memorised_model()
    rules = {"ma": Rule(0.7)}
    together = alone(model, LEARNT[:3], rules)
    for row in range(3):
        by_itself = alone(model, [LEARNT[row]], rules)
        for name, values in together.items():
            assert values[row] == by_itself[name].item()


def test_what_diverges_is_not_forgotten() -> None:
    """Steps of SGD that overflow: predictions are gone, but so is the model."""
    model = memorised_model()
    before = weights(model)
    settings = UpdateSettings(optimizer="sgd", learning_rate=1e30, clip_norm=None)
    found = alone(model, LEARNT[:1], {"ma": Rule(0.5)}, settings)
    assert found["updates@ma"].tolist() == [math.inf]
    assert np.isnan([found["mean_abs_delta@ma"], found["delta_norm@ma"]]).all()
    assert_untouched(model, before)


# --- Forecasts ----------------------------------------------------------------------------------------------


def test_the_forecast_ranks_samples_as_the_truth_does() -> None:
    """20 samples forgotten one by one. A second look on the way pays where the threshold is far."""
    model = memorised_model()
    thresholds = (1.0, 0.9, 0.7)
    before = weights(model)
    truth = alone(model, LEARNT, {str(t): Rule(t) for t in thresholds})
    forecaster = Forecaster(model, TrialUpdates(model, ADAMW), LossAlone("GA"))

    def forecasts(lookahead: int) -> np.ndarray:
        return np.array([forecaster.forecast([collate([one])], thresholds, lookahead)[0] for one in LEARNT])

    near, far = forecasts(1), forecasts(2)
    assert_untouched(model, before)
    for column, threshold in enumerate(thresholds):
        updates = truth[f"updates@{threshold}"]
        assert len(set(updates)) > 4
        assert spearmanr(far[:, column], updates).statistic > 0.85
        started = updates > 0
        assert 0.8 < np.median(far[started, column] / updates[started]) < 1.25
    ranks = [spearmanr(values[:, 2], truth["updates@0.7"]).statistic for values in (near, far)]
    assert ranks[0] < ranks[1]


# --- Together -----------------------------------------------------------------------------------------------

SEED, BATCH, UPDATES = 3, 4, 24
MA_BELOW = {"1": 1.0, "0.7": 0.7}


def together(model: Any, batches: Sequence[Batch], seed: int = SEED, algorithm: str = "NPO") -> dict[int, list[float]]:
    """Index of a sample -> the updates at which it fell below each threshold."""
    task = TogetherTask(0, seed, LossAlone(algorithm), ADAMW, MA_BELOW, UPDATES, BATCH)
    sent: TogetherTask = pickle.loads(pickle.dumps(task))
    found = sent.do(TransformersReplica(model), batches, {})
    columns = [found[f"updates@{name}"].tolist() for name in MA_BELOW]
    return {index: list(row) for index, *row in zip(found["index"].tolist(), *columns, strict=True)}


def test_together_against_a_plain_loop() -> None:
    """NPO on batches of four uniform draws with replacement; whole sequences one by one."""
    model = memorised_model()
    before = weights(model)
    batches = make_batches(LEARNT[:10], 4096)
    found = together(model, batches)
    assert_untouched(model, before)

    samples = [batch.sample(row) for batch in batches for row in range(len(batch))]
    own = memorised_model(torch.float64)
    optimizer = torch.optim.AdamW(own.parameters(), lr=RATE, weight_decay=0.0, foreach=False)
    sampler = Sampler(10, "weighted", alpha=0.0, replacement=True, seed=SEED)

    def log_probs(one: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.log_softmax(own(input_ids=torch.from_numpy(one.input_ids)[None]).logits[0], -1)
        table = table[np.flatnonzero(one.scored) - 1]
        targets = torch.from_numpy(one.input_ids[one.scored])
        return table[torch.arange(len(targets)), targets].sum(), (table.argmax(-1) == targets).double().mean()

    initial = {one.index: log_probs(one)[0].detach() for one in samples}
    expected = {one.index: [math.inf, math.inf] for one in samples}
    for updates in range(UPDATES + 1):
        for one in samples:
            ma = log_probs(one)[1].item()
            for column, threshold in enumerate(MA_BELOW.values()):
                if ma < threshold:
                    expected[one.index][column] = min(expected[one.index][column], updates)
        drawn = [samples[i] for i in sampler.draw(updates, BATCH, np.ones(10, dtype=bool))]
        ratios = torch.stack([torch.exp(log_probs(one)[0] - initial[one.index]) for one in drawn])
        optimizer.zero_grad()
        (2 / 0.1 * torch.log(1 + ratios**0.1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
    assert found == expected
    fell = [updates for row in expected.values() for updates in row]
    assert len(set(fell)) > 6
    assert 1 < min(u for u in fell if u) < UPDATES


def test_together_depends_on_the_seed_alone() -> None:
    """Neither on how samples are batched, nor on their order in the data; nor does it on a run before."""
    model = memorised_model()
    few = LEARNT[:6]
    first = together(model, make_batches(few, 4096))
    turned = [Sample(one.sample_id, one.input_ids, one.scored, 5 - one.index) for one in reversed(few)]
    assert together(model, make_batches(few, 1)) == first
    assert {5 - index: row for index, row in together(model, make_batches(turned, 40)).items()} == first
    assert together(model, make_batches(few, 4096), seed=SEED + 1) != first
