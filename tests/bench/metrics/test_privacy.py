"""Privacy metrics against scikit-learn, direct fp64 computations, autograd, and numbers worked out by hand."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from bench.metrics import METRICS, limits_of
from bench.metrics.choice import choose_metrics
from bench.metrics.membership import true_positives
from bench.metrics.quantities import KNOWMEM_TOKENS, MeasurementSetup, asked_of_a_model, measure, tokens_to_read
from bench.metrics.values import Column, Measured, Missing, Scores
from bench.tasks import TASKS
from scoring.answers import rouge_l_f1
from scoring.errors import UserError
from scoring.logprob import vocabulary_moments
from scoring.memorization import extraction_strength, min_k_plus_plus
from scoring.readings import Reader
from scoring.samples import Sample
from scoring.work import LocalPool
from tests.tiny_folders import EOS, tokenizer
from tests.tiny_models import random_samples, tiny_model


def value(name: str, columns: dict[Column, list[float]], retain_only: dict[Column, list[float]] | None = None) -> float:
    def scored(side: dict[Column, list[float]]) -> dict[Column, Scores]:
        return {key: Scores(tuple(map(str, range(len(v)))), np.array(v, dtype=float)) for key, v in side.items()}

    both = Measured(scored(columns), None if retain_only is None else scored(retain_only))
    return float(METRICS[name].statistic(both))


# --- Attacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "zlib", "min_k", "min_40", "min_k_plus_plus", "gradient_norm"])
def test_auc_and_tpr_are_those_of_scikit_learn(name: str) -> None:
    rng = np.random.default_rng(3)
    # Rounded, so that there are ties; members have the lower values, as what is known has.
    forget, negatives = rng.normal(1, 1, 150).round(1), rng.normal(2, 1, 250).round(1)
    labels, scores = [1] * 150 + [0] * 250, -np.concatenate([forget, negatives])
    columns = {("forget", name): list(forget), ("negatives", name): list(negatives)}
    assert value(f"mia_{name}_auc", columns) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert value(f"mia_{name}_tpr", columns) == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-12)


def test_tpr_with_few_others_allows_no_false_positive() -> None:
    members, others = np.array([3.0, 5.0, 5.0, 6.0]), np.array([1.0, 5.0, 2.0])
    # What equals the highest of the others is none.
    assert true_positives(members, others) == 0.25
    # Of 200 others two may be above: the third highest is the threshold. In stacks, each row by itself.
    many = np.concatenate([np.zeros(197), [4.0, 5.5, 7.0]])
    stacked = true_positives(np.stack([members, members]), np.stack([many, np.zeros(200)]))
    assert stacked.tolist() == [0.75, 1.0]


def test_reference_compares_with_the_retain_only_model() -> None:
    own = {("forget", "loss"): [1.0, 1.0, 4.0], ("negatives", "loss"): [3.0, 3.0]}
    gold = {("forget", "loss"): [3.0, 2.0, 4.0], ("negatives", "loss"): [3.0, 3.5]}
    # Losses fell by 2, 1 and 0, and by 0 and 0.5: of six pairs 4 are right and one is a tie.
    assert value("mia_reference_auc", own, gold) == pytest.approx(4.5 / 6)
    assert value("mia_reference_tpr", own, gold) == pytest.approx(2 / 3)
    assert value("mia_reference_auc", gold, gold) == 0.5


def test_priv_leak_by_hand() -> None:
    """MUSE's AUC is P(value of a forget sample > a negative's)."""
    gold = {("forget", "min_40"): [1.0, 3.0], ("negatives", "min_40"): [2.0, 2.0]}  # AUC 1/2
    known = {("forget", "min_40"): [0.1, 0.2], ("negatives", "min_40"): [2.0, 2.0]}  # 0
    driven_out = {("forget", "min_40"): [9.0, 9.0], ("negatives", "min_40"): [2.0, 2.0]}  # 1
    assert [value("priv_leak", own, gold) for own in (gold, known, driven_out)] == [0.0, -100.0, 100.0]
    assert limits_of("priv_leak") == (-100.0, math.inf)
    assert limits_of("extraction_strength") == limits_of("mia_zlib_tpr") == (0.0, 1.0)


# --- Quantities ---------------------------------------------------------------------------------------------

RECORDS = [
    {"id": "a", "question": "w1 w2", "answer": "w3 w4 w5 w6 w3 w4 w5 w6 w3 w4 w5 w6"},
    {"id": "b", "question": "w9", "answer": "w8 w70 w71"},
]
SETS = {"forget": RECORDS, "knowmem_forget": RECORDS}


def setup_of(**changed: object) -> MeasurementSetup:
    # What embeds and classifies is not asked for.
    whatever: object = None
    settings = {"min_k": 0.5, "el_n": 2, "embedder": whatever, "classifier": whatever} | changed
    return MeasurementSetup(tokenizer(), 64, None, **settings)  # type: ignore[arg-type]


def columns_of(*quantities: str, model: torch.nn.Module | None = None, **changed: object) -> dict[Column, object]:
    reader = Reader(LocalPool(model or tiny_model()), EOS)  # type: ignore[arg-type]
    return dict(measure([("forget", name) for name in quantities], SETS, reader, setup_of(**changed)))


@torch.no_grad()
def token_rows(model: torch.nn.Module, record: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer's tokens with EOS, and log-probs of the whole vocabulary at each, (n, V) fp64."""
    words = tokenizer()
    prompt = words(f"Question: {record['question']}\nAnswer:")["input_ids"]
    answer = words(record["answer"], add_special_tokens=False)["input_ids"] + [EOS]
    logits = model.double()(input_ids=torch.tensor([prompt + answer])).logits[0]
    return torch.tensor(answer), logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_quantities_by_direct_computation() -> None:
    names = ("loss", "zlib", "min_k", "min_40", "min_k_plus_plus", "extraction_strength", "exact_memorization", "ma")
    found = columns_of(*names, "gradient_norm")
    model = tiny_model()
    for row, record in enumerate(RECORDS):
        answer, rows = token_rows(model, record)
        own = rows[torch.arange(len(answer)), answer]
        loss = -own.mean().item()
        p = rows.exp()
        mean = (p * rows).sum(-1)
        deviation = ((p * rows**2).sum(-1) - mean**2).sqrt()
        standard = ((own - mean) / deviation).sort().values
        words, hits = own[:-1].sort().values, rows.argmax(-1) == answer
        expected = {
            "loss": loss,
            "zlib": loss / len(zlib.compress(record["answer"].encode())),
            "min_k": -own.sort().values[: len(own) // 2].mean().item(),
            "min_40": -words[: max(1, int(0.4 * len(words)))].mean().item(),
            "min_k_plus_plus": -standard[: len(own) // 2].mean().item(),
            "exact_memorization": hits[:-1].double().mean().item(),
            "extraction_strength": extraction_strength(hits[:-1].numpy()),
            "ma": hits.double().mean().item(),
        }
        for name, number in expected.items():
            assert found["forget", name].values[row] == pytest.approx(number, rel=1e-4), name  # type: ignore[attr-defined]
        # The gradient, by autograd of the plain loss.
        exact = tiny_model().double()
        ids = torch.cat([torch.tensor(tokenizer()(f"Question: {record['question']}\nAnswer:")["input_ids"]), answer])
        logits = exact(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits[-len(answer) :], answer).backward()
        # The embedding has a padding row, whose gradient torch leaves out; it occurs nowhere here.
        norm = math.sqrt(sum((g.grad**2).sum().item() for g in exact.parameters() if g.grad is not None))
        assert found["forget", "gradient_norm"].values[row] == pytest.approx(norm, rel=1e-4)  # type: ignore[attr-defined]


def test_moments_are_computed_where_they_are_asked_for_and_do_not_depend_on_chunks() -> None:
    samples = random_samples(6)
    reader = Reader(LocalPool(tiny_model()), EOS)  # type: ignore[arg-type]
    plain, rich = reader.likelihoods(samples), reader.likelihoods(samples, moments=True)
    for one, other in zip(plain, rich, strict=True):
        assert one.means is one.deviations is None
        assert other.means is not None
        assert other.means.shape == other.logprobs.shape
        assert np.array_equal(one.logprobs, other.logprobs)
    logits = torch.randn(2, 3, 50, dtype=torch.float64) * 3
    logits[0, 0, 7] = -torch.inf
    for found, whole in zip(vocabulary_moments(logits, chunk=7), vocabulary_moments(logits), strict=True):
        assert torch.allclose(found, whole, rtol=1e-12)
    # A half, a quarter twice, and what cannot come, in a vocabulary of one chunk.
    tokens = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    mean, deviation = vocabulary_moments(tokens)
    assert mean.item() == pytest.approx(-1.5 * math.log(2))
    assert deviation.item() == pytest.approx(math.log(2) / 2)
    # One token with all the mass has no deviation, and divides by none.
    assert math.isfinite(min_k_plus_plus(np.zeros(3), np.zeros(3), np.zeros(3)))


@pytest.mark.parametrize(
    ("hits", "strength"),
    [
        ("11111", 1.0),
        ("01111", 0.8),
        ("10111", 0.6),
        ("11101", 0.2),
        ("11110", 0.2),  # at most n - 1 tokens of prefix
        ("00000", 0.2),
        ("", 0.0),
    ],
)
def test_extraction_strength_of_hit_patterns(hits: str, strength: float) -> None:
    assert extraction_strength(np.array([hit == "1" for hit in hits], dtype=bool)) == pytest.approx(strength)


def test_what_another_engine_does_not_give_is_missing_with_a_reason() -> None:
    found = columns_of("min_k_plus_plus", "gradient_norm", "loss", engine="vllm")
    for name in ("min_k_plus_plus", "gradient_norm"):
        column = found["forget", name]
        assert isinstance(column, Missing)
        assert "engine transformers" in column.reason
    assert isinstance(found["forget", "loss"], Scores)


def test_knowledge_memorisation_ends_where_another_question_would_begin() -> None:
    (column,) = measure(
        [("knowmem_forget", "knowmem")],
        SETS,
        Reader(LocalPool(tiny_model()), EOS),
        setup_of(),  # type: ignore[arg-type]
    ).values()
    assert isinstance(column, Scores)
    assert column.texts is not None
    assert all("Question:" not in text and len(text.split()) <= KNOWMEM_TOKENS for text in column.texts)
    # F1 of words as they stand: 2 of 3 are right, 2 of 4 are written; "walks" is not "walk".
    assert rouge_l_f1(["the dog walk home"], ["the dog walks"]).tolist() == [pytest.approx(2 * 2 / (3 + 4))]


def test_costs_count_what_is_read_differentiated_and_written() -> None:
    reading = [("forget", name) for name in ("loss", "zlib", "min_k_plus_plus", "extraction_strength")]
    assert asked_of_a_model(reading, SETS) == (2, 0)
    assert asked_of_a_model([*reading, ("forget", "gradient_norm")], SETS) == (4, 0)
    assert asked_of_a_model([("knowmem_forget", "knowmem")], SETS) == (0, 2)
    tokens = sum(len(tokenizer()(f"Question: {r['question']}\nAnswer: {r['answer']}")["input_ids"]) for r in RECORDS)
    assert tokens_to_read(reading, SETS, setup_of()) == tokens
    assert tokens_to_read([("forget", "gradient_norm")], SETS, setup_of()) == 3 * (tokens + len(RECORDS))


# --- Choosing -----------------------------------------------------------------------------------------------


def test_the_group_is_what_a_task_has_the_sets_for() -> None:
    authors = TASKS["authors"]
    names = choose_metrics(authors, ["privacy", "ua"])
    assert names[0] == "ua"
    assert {"mia_zlib_tpr", "priv_leak", "extraction_strength"} < set(names)
    assert "verbmem_f" not in names
    assert not set(names[1:]) & set(authors.metrics)
    with pytest.raises(UserError, match="metric 'verbmem_f' needs verbmem of the verbmem set, which task 'authors'"):
        choose_metrics(authors, ["verbmem_f"])
    with pytest.raises(UserError, match="did you mean 'privacy'"):
        choose_metrics(authors, ["privac"])


def test_extraction_strength_of_a_memorised_string() -> None:
    """A model that writes one token after another whatever was before has all but the first of it by heart."""
    model = tiny_model(tied=False)
    record = {"id": "a", "question": "w1", "answer": " ".join(["w3"] * 20)}
    token = tokenizer()("w3", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.weight[token] = 1.0
        model.lm_head.register_parameter("bias", torch.nn.Parameter(torch.zeros(len(model.lm_head.weight))))
        model.lm_head.bias[token] = 5.0
    reader = Reader(LocalPool(model), EOS)  # type: ignore[arg-type]
    columns = measure([("forget", "extraction_strength")], {"forget": [record]}, reader, setup_of())
    assert columns["forget", "extraction_strength"].values.tolist() == [1.0]  # type: ignore[union-attr]


def test_samples_without_an_end_token_are_measured_whole() -> None:
    scores = Reader(LocalPool(tiny_model()), EOS).likelihoods(  # type: ignore[arg-type]
        samples := [
            Sample("text", np.array([1, 9, 10, 11]), np.array([False, True, True, True])),
            Sample("pair", np.array([1, 9, 10, EOS]), np.array([False, True, True, True])),
        ]
    )
    assert [len(score.hits) for score in setup_of().without_end(samples, scores)] == [3, 2]
