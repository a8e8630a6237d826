"""Every measure of difficulty, by the front door, against the same in fp64 by transformers and torch alone."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import scoring
from algorithms.alone import LossAlone
from bench.jobs.difficulty import DifficultySpec
from bench.jobs.resources import Resources
from scoring.errors import UserError
from scoring.load import load_model
from scoring.measures import MEASURES
from scoring.samples import Sample
from tests.scoring.toys import LEARNT, RECORDS, bigram, memorised_model, save_memorised
from tests.tiny_folders import CONTEXT, save_model, token_id, tokenizer

RATE, SIGMA, NEIGHBOURS = 3e-4, 1e-4, 2
# The last says again what the first says.
FEW = [*RECORDS[:6], {"id": "again", "prompt": RECORDS[0]["prompt"], "completion": RECORDS[0]["completion"]}]
RETAIN = RECORDS[10:14]
THRESHOLDS: tuple[Any, ...] = (1.0, "average", 0.5)
FORECASTS = ("flip-time", "joint-forecast", "margin-over-drop")
TOO_LONG = {"id": "long", "prompt": "w1 " * CONTEXT, "completion": "w2"}


def difficulty(model: Any, records: Sequence[Any], measure: Any, **more: Any) -> pd.DataFrame:
    return scoring.difficulty(model, tokenizer(), records, measure=measure, **{"learning_rate": RATE, **more})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two earlier states of the model: a random one, and one that is at the end already."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [str(save_model(folder / "first", tied=False)), str(save_memorised(folder / "second"))]


@pytest.fixture(scope="module")
def trained() -> Any:
    """In fp64, in training mode but for one module, with gradients of its owner; not to be changed."""
    model = memorised_model(torch.float64).train()
    model.model.layers[1].mlp.eval()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def table(trained: Any, checkpoints: list[str]) -> pd.DataFrame:
    """All measures of FEW and of a record that is too long. The model is left as it was."""
    modes = [module.training for module in trained.modules()]
    weights = [p.detach().clone() for p in trained.parameters()]
    gradients = [(p.grad, p.grad.clone()) for p in trained.parameters()]
    found = difficulty(
        trained,
        [*FEW[:3], TOO_LONG, *FEW[3:]],
        list(MEASURES),
        thresholds=THRESHOLDS,
        retain=RETAIN,
        checkpoints=checkpoints,
        sigma=SIGMA,
        neighbours=NEIGHBOURS,
        batch_tokens=60,
    )
    assert [module.training for module in trained.modules()] == modes
    assert all(map(torch.equal, trained.parameters(), weights))
    for p, (gradient, values) in zip(trained.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, values)
        assert p.requires_grad
    return found


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """Of the records that are measured."""
    values: np.ndarray = table.loc[table["reason"].isna(), name].to_numpy(np.float64)
    return values


# --- The same by transformers and torch ---------------------------------------------------------------------

SAMPLES = [*LEARNT[:6], Sample("again", LEARNT[0].input_ids, LEARNT[0].scored, 6)]


def logits_of(model: Any, one: Sample) -> torch.Tensor:
    """At the scored positions, (S, V)."""
    logits: torch.Tensor = model(input_ids=torch.from_numpy(one.input_ids)[None]).logits[0]
    return logits[np.flatnonzero(one.scored) - 1]


def logps_of(model: Any, one: Sample) -> torch.Tensor:
    targets = torch.from_numpy(one.input_ids[one.scored])
    return torch.log_softmax(logits_of(model, one), -1)[torch.arange(len(targets)), targets]


def gradient_of(model: Any, scalar: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(model.parameters()))])


def margins_of(model: Any, one: Sample) -> np.ndarray:
    margins = []
    with torch.no_grad():
        for row, target in zip(logits_of(model, one).numpy(), one.input_ids[one.scored], strict=True):
            margins.append(row[target] - max(np.delete(row, target)))
    return np.array(margins)


def stepped(model: Any, samples: Sequence[Sample]) -> Any:
    """A copy after the first step of AdamW on gradient ascent on all samples."""
    own = copy.deepcopy(model)
    own.zero_grad()
    torch.stack([logps_of(own, one).mean() for one in samples]).mean().backward()
    torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
    torch.optim.AdamW(own.parameters(), lr=RATE, weight_decay=0.0, foreach=False).step()
    return own


def kth(values: np.ndarray, threshold: float) -> float:
    """The smallest that must be gone, with all below it, before the share of what is left is below the threshold."""
    ranked: list[float] = sorted(values.tolist())
    return next(value for i, value in enumerate(ranked, 1) if (len(ranked) - i) / len(ranked) < threshold)


@pytest.fixture(scope="module")
def exact(trained: Any) -> Any:
    return copy.deepcopy(trained).eval()


def test_columns_and_rows(table: pd.DataFrame) -> None:
    names = []
    for name in MEASURES:
        names += [f"{name}@{threshold}" for threshold in ("1", "average", "0.5")] if name in FORECASTS else [name]
    assert list(table) == ["sample_id", "num_tokens", "ma", *names, "reason"]
    assert table["sample_id"].tolist() == [r["id"] for r in [*FEW[:3], TOO_LONG, *FEW[3:]]]
    assert table["reason"].dropna().to_dict() == {3: f"{CONTEXT + 3} tokens, the model's context holds {CONTEXT}"}
    assert table.loc[3, ["num_tokens", "ma", *names]].isna().all()
    numbers = table.loc[table["reason"].isna(), ["num_tokens", "ma", *names]].astype(float)
    assert not numbers.isna().any().any()
    assert (table.attrs["settings"]["sigma"], table.attrs["settings"]["measure"]) == (SIGMA, list(MEASURES))
    assert set(table.attrs["cost"]) == set(MEASURES)
    assert all(measure.harder in (-1, 1) for measure in MEASURES.values())


def test_what_is_counted(table: pd.DataFrame) -> None:
    lengths = [len(record["completion"].split()) + 1 for record in FEW]
    assert column(table, "length").tolist() == column(table, "num_tokens").tolist() == lengths
    # In the corpus of all records, that which is too long too.
    texts = [f"{record['prompt']} {record['completion']}".split() for record in [*FEW, TOO_LONG]]
    trigrams = [list(zip(words, words[1:], words[2:], strict=False)) for words in texts]
    counts = Counter(gram for grams in trigrams for gram in grams)
    expected = [np.mean([math.log(1 + counts[gram]) for gram in grams]) for grams in trigrams[:-1]]
    np.testing.assert_allclose(column(table, "frequency"), expected)
    assert len(set(expected)) > 1


def test_log_probabilities_and_gradients(table: pd.DataFrame, exact: Any) -> None:
    with torch.no_grad():
        nll = [-logps_of(exact, one).sum().item() for one in SAMPLES]
    expected: dict[str, list[float]] = {"nll": nll}
    kept = [gradient_of(exact, -logps_of(exact, one).mean()) for one in LEARNT[10:14]]
    towards = torch.stack(kept).mean(0)
    for one in SAMPLES:
        logps = logps_of(exact, one)
        # The log-odds log p - log(1 - p), and the gradient of Sum_t log |P_t| that MRD's first order is.
        odds = (logps - torch.log1p(-logps.exp())).sum().item()
        log_abs = gradient_of(exact, (-logps).log().sum()).norm().item()
        loss = gradient_of(exact, -logps_of(exact, one).mean())
        found = {
            "mrd": SIGMA * math.sqrt(2 / math.pi) * log_abs,
            "distance-over-mrd": odds / log_abs,
            "grand": loss.norm().item(),
            "empirical-fisher": gradient_of(exact, logps_of(exact, one).sum()).square().sum().item(),
            "gradient-cosine": torch.cosine_similarity(loss, towards, dim=0).item(),
            "el2n": _error(exact, one),
        }
        for name, value in found.items():
            expected.setdefault(name, []).append(value)
    for name, values in expected.items():
        np.testing.assert_allclose(column(table, name), values, rtol=1e-4, atol=1e-6 * np.abs(values).max())
        assert len(set(values)) >= len(SAMPLES) - 1


@torch.no_grad()
def _error(model: Any, one: Sample) -> float:
    """The mean distance of the distribution from the true token."""
    p = torch.softmax(logits_of(model, one), -1)
    p[torch.arange(len(p)), torch.from_numpy(one.input_ids[one.scored])] -= 1
    return float(p.norm(dim=-1).mean())


def test_spread_over_checkpoints(table: pd.DataFrame, exact: Any, checkpoints: list[str]) -> None:
    models = [*map(load_model, checkpoints), exact]
    for row, one in enumerate(SAMPLES):
        gradients = []
        for model in models:
            ids = torch.from_numpy(one.input_ids)[None]
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            table_of = torch.log_softmax(model(inputs_embeds=embedded).logits[0, np.flatnonzero(one.scored) - 1], -1)
            total = table_of.gather(-1, ids[0, one.scored][:, None]).sum()
            gradients.append(torch.autograd.grad(total, embedded)[0][0].double().numpy())
        assert column(table, "vog")[row] == pytest.approx(np.std(gradients, axis=0).mean(), rel=1e-4)


def test_similarity_by_brute_force(table: pd.DataFrame, exact: Any) -> None:
    """Llama's last hidden states are those that its head reads. A copy has a cosine of 1 to its original."""
    means = []
    for one in SAMPLES:
        with torch.no_grad():
            states = exact(input_ids=torch.from_numpy(one.input_ids)[None], output_hidden_states=True).hidden_states[-1]
        means.append(states[0, np.flatnonzero(one.scored) - 1].mean(0).numpy())
    for i, own in enumerate(means):
        cosines = [own @ b / np.linalg.norm(own) / np.linalg.norm(b) for j, b in enumerate(means) if j != i]
        expected = np.mean(sorted(cosines)[-NEIGHBOURS:])
        assert column(table, "knn-similarity")[i] == pytest.approx(expected, rel=1e-5)
        assert (max(cosines) > 1 - 1e-6) == (i in (0, 6))


def test_forecasts_by_a_step_of_torch(table: pd.DataFrame, exact: Any) -> None:
    before = [margins_of(exact, one) for one in SAMPLES]
    ma = [np.mean(margins > 0) for margins in before]
    np.testing.assert_allclose(column(table, "ma"), ma)
    average = float(np.mean(ma))
    assert table.attrs["thresholds"] == {"1": 1.0, "average": pytest.approx(average), "0.5": 0.5}
    together = stepped(exact, SAMPLES)

    def times(margins: np.ndarray, after: np.ndarray) -> np.ndarray:
        rising = margins <= after
        return np.where(margins <= 0, 0.0, np.where(rising, np.inf, margins / np.where(rising, 1, margins - after)))

    for name, threshold in table.attrs["thresholds"].items():
        expected: dict[str, list[float]] = {measure: [] for measure in FORECASTS}
        for one, margins in zip(SAMPLES, before, strict=True):
            after = margins_of(stepped(exact, [one]), one)
            expected["flip-time"].append(kth(times(margins, after), threshold))
            expected["margin-over-drop"].append(max(0.0, kth(margins, threshold)) / np.mean(margins - after))
            expected["joint-forecast"].append(kth(times(margins, margins_of(together, one)), threshold))
        for measure, values in expected.items():
            np.testing.assert_allclose(column(table, f"{measure}@{name}"), values, rtol=1e-3)


# --- What is asked for --------------------------------------------------------------------------------------


def test_a_look_ahead_and_other_losses() -> None:
    """One record by itself, forecast alone and as a set of one; and batches change no bit of what is alone."""
    model = memorised_model()
    settings: dict[str, Any] = {"thresholds": [0.7], "lookahead": 3, "loss": LossAlone("NPO"), "optimizer": "sgd"}
    settings |= {"learning_rate": 0.03}
    (row,) = difficulty(model, RECORDS[3:4], ["flip-time", "joint-forecast"], **settings).to_dict("records")
    assert row["flip-time@0.7"] == row["joint-forecast@0.7"] > 0
    near = difficulty(model, RECORDS[3:4], "flip-time", **{**settings, "lookahead": 1})["flip-time@0.7"]
    assert near.item() != row["flip-time@0.7"]
    whole, cut = (difficulty(model, FEW, "flip-time", batch_tokens=n)["flip-time@average"] for n in (4096, 30))
    assert whole.tolist() == cut.tolist()
    passes = difficulty(model, FEW, ["flip-time", "margin-over-drop"], thresholds=0.7).attrs["facts"]
    # The two share their looks: a gradient of each sample, and a forward pass.
    assert (passes["forwards"], passes["backwards"]) == (2 * len(FEW), len(FEW))


def test_a_tenth_of_the_rate_takes_ten_times_the_updates() -> None:
    """Updates of SGD that are too short to be seen: several are made at once for a trial, and counted."""
    model, names = memorised_model(), ["flip-time", "margin-over-drop"]
    slow, fast = (
        difficulty(model, FEW[:4], names, thresholds=0.7, optimizer="sgd", learning_rate=rate) for rate in (1e-6, 1e-5)
    )
    for name in names:
        assert (fast[f"{name}@0.7"] > 0).all()
        np.testing.assert_allclose(slow[f"{name}@0.7"], 10 * fast[f"{name}@0.7"], rtol=1e-3)


def test_frozen_weights_take_no_part() -> None:
    """Forecasts are of what is trained; with no trained weight there is none, and other measures do not mind."""
    model = memorised_model()
    every = difficulty(model, FEW[:2], "flip-time", thresholds=0.7)["flip-time@0.7"]
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    head = difficulty(model, FEW[:2], ["flip-time", "mrd"], thresholds=0.7)
    assert (head["flip-time@0.7"] > every).all()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"^no weight of the model requires a gradient"):
        difficulty(model, FEW[:2], "flip-time")


def spoilt() -> Any:
    """No number is known of w80, and what follows it."""
    model = memorised_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id("w80")] = math.nan
    return model


BAD = {"id": "bad", "prompt": "w3 w80", "completion": "w5 w6"}
SOUND = [record for record in RECORDS if "w80" not in f"{record['prompt']} {record['completion']}".split()]


@pytest.mark.parametrize(
    ("measure", "threshold"),
    [
        ("flip-time", "average"),
        *((name, 0.7) for name in MEASURES if name not in ("joint-forecast", "length", "frequency")),
    ],
)
def test_a_record_that_overflows_has_a_reason_and_spoils_no_other(
    measure: str, threshold: Any, checkpoints: list[str]
) -> None:
    records, retain = SOUND[:4], SOUND[4:6]
    more: dict[str, Any] = {"retain": retain, "checkpoints": checkpoints, "thresholds": threshold}
    mixed = difficulty(spoilt(), [*records[:2], BAD, *records[2:]], measure, **more)
    assert mixed["reason"].dropna().to_dict() == {2: "the model's log-probabilities are not finite"}
    clean = difficulty(memorised_model(), records, measure, **more)
    names = [name for name in clean if name not in ("sample_id", "reason")]
    assert mixed.loc[2, names].isna().all()
    for name in names:
        np.testing.assert_allclose(column(mixed, name), column(clean, name), rtol=1e-4)


def test_a_bad_record_among_those_that_are_taken_together() -> None:
    """A mean gradient would be spoilt for all, without a word."""
    for measure, records, message in (
        ("joint-forecast", [*SOUND[:2], BAD], r"^the model's log-prob.* of sample 'bad' are not finite.*leave it out"),
        ("gradient-cosine", SOUND[:2], r"^retain: the model's log-prob.* of sample 'bad' are not finite.*leave it out"),
    ):
        with pytest.raises(UserError, match=message) as error:
            difficulty(spoilt(), records, measure, retain=[*SOUND[2:4], BAD])
        assert "\n" not in str(error.value)


def test_one_record_has_no_neighbour_and_texts_may_have_no_word() -> None:
    """Neither is a fault of the model: the other measures stand."""
    (row,) = difficulty(memorised_model(), FEW[:1], ["knn-similarity", "nll"]).to_dict("records")
    assert math.isnan(row["knn-similarity"])
    assert row["nll"] > 0
    assert row["reason"] is None
    wordless = difficulty(memorised_model(), [*FEW[:2], {"prompt": "?", "completion": "!!"}], ["frequency", "nll"])
    assert wordless["frequency"].isna().tolist() == [False, False, True]
    assert wordless["reason"].isna().all()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"measure": "flip-tme"}, r"^measure\S* is 'flip-tme': expected one of .*did you mean 'flip-time'\?$"),
    "no measure": ({"measure": []}, "^measure is empty: expected at least one$"),
    "a number": ({"measure": 7}, r"^measure\[0\] is 7: expected text$"),
    "no threshold": ({"thresholds": ()}, "^thresholds is empty: expected at least one$"),
    "a threshold": ({"thresholds": 2}, r"^thresholds\[0\] is 2: expected a number from 0 to 1, or average$"),
    "among others": ({"thresholds": [0.5, "mean"]}, r"^thresholds\[1\] is 'mean': expected a number .*, or average"),
    "checkpoints": ({"measure": "vog"}, "^checkpoints is empty: vog needs earlier states"),
    "retain": ({"measure": "gradient-cosine"}, "^retain is empty: gradient-cosine needs records"),
    "look-ahead": ({"lookahead": 0}, "^lookahead is 0: expected a whole number of at least 1$"),
    "loss": ({"loss": "NPO"}, r"^loss is 'NPO': expected a function, such as algorithms.alone.LossAlone\('NPO'\)$"),
    "setting": ({"learning_rat": 1}, "^unknown field 'learning_rat': .*did you mean 'learning_rate'"),
    "model": ({"model": "gpt2"}, "^model is 'gpt2': expected a loaded causal LM"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_asked_for(name: str) -> None:
    fields, message = REFUSALS[name]
    given = {"model": bigram([[0.0]]), "measure": "flip-time", **fields}
    with pytest.raises(UserError, match=message) as error:
        scoring.difficulty(given.pop("model"), tokenizer(), FEW, **given)
    assert "\n" not in str(error.value)


def test_bfloat16_does_not_hold_the_update() -> None:
    """Forecasts are refused, and what needs no update is measured."""
    model = memorised_model(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"^the update does not survive bfloat16 storage"):
        difficulty(model, FEW, "flip-time", learning_rate=1e-5)
    assert all(map(torch.equal, model.parameters(), before))
    rough = difficulty(model, FEW, ["nll", "mrd"])
    fine = difficulty(memorised_model(), FEW, ["nll", "mrd"])
    np.testing.assert_allclose(column(rough, "mrd"), column(fine, "mrd"), rtol=0.3)


@pytest.mark.parametrize("name", MEASURES)
def test_which_measures_vllm_can_take(name: str) -> None:
    """Log-probabilities and texts are all that it shows."""
    spec = DifficultySpec(model="authors", data="authors", measure=["nll", name.upper()])
    check: Callable[[], DifficultySpec] = lambda: spec.checked(Resources(engine="vllm"))  # noqa: E731
    assert spec.checked().measure == list(dict.fromkeys(["nll", name]))
    if name in ("nll", "length", "frequency"):
        assert check() == spec.checked()
        return
    with pytest.raises(UserError, match=rf"^measure {name} looks inside .*: use engine transformers, or of nll, ") as e:
        check()
    assert "\n" not in str(e.value)
