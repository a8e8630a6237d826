"""`scoring.score` on a loaded model: the numbers of the command line's job, in the order of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import scoring
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreSpec
from bench.jobs.score import score as score_job
from tests.tiny_folders import CONTEXT, pairs, save_model, tokenizer, write_jsonl

# Records of three layouts; three of them cannot be scored: the first, the last and one in between.
LONG = {"id": "long", "prompt": "w1 " * CONTEXT, "completion": "w2"}
EMPTY = {"id": "empty", "prompt": "w1", "completion": ""}
NOTHING = {"id": "nothing", "text": ""}
QUESTION = {"id": "question", "question": "w3 w4", "answer": "w5 w6 w7"}
GOOD = pairs(8)
RECORDS = [LONG, *GOOD[:3], EMPTY, QUESTION, *GOOD[3:], {"id": "plain", "text": "w8 w9 w10 w11"}, NOTHING]
REASONS = {
    "long": f"{CONTEXT + 3} tokens, the model's context holds {CONTEXT}",
    "empty": "empty answer",
    "nothing": "empty text",
}
NUMBERS = ["num_tokens", "tokens_saturated", "nll", "mrd", "mrd_stderr", "mrd_per_token", "draws"]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "gradient"},
        {"estimator": "monte-carlo", "draws": 12, "sigma": 1e-4, "seed": 3},
        {"estimator": "gradient", "tokens": "all", "batch_tokens": 64},
    ],
    ids=str,
)
def test_the_numbers_of_the_job_in_the_order_of_the_records(
    model_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    data = write_jsonl(tmp_path / "records.jsonl", RECORDS)
    spec = ScoreSpec(model=str(model_folder), data=str(data), **settings)
    job = score_job(spec, tmp_path / "scores.parquet", Resources(replicas=0), progress=False)
    expected = job.table.to_pandas().set_index("sample_id")

    table = scoring.score(loaded(model_folder), tokenizer(), iter(RECORDS), **settings)
    assert table["sample_id"].tolist() == [record["id"] for record in RECORDS]
    assert table.set_index("sample_id")["reason"].dropna().to_dict() == REASONS
    assert {rejected.sample_id: rejected.reason for rejected in job.rejected} == REASONS
    scored = table[table["reason"].isna()].set_index("sample_id")
    assert set(scored.index) == set(expected.index)
    for name in NUMBERS:
        assert table.loc[table["reason"].notna(), name].isna().all()
        # The same batches, so the same to the last bit.
        np.testing.assert_array_equal(
            scored[name].to_numpy(np.float64), expected.loc[scored.index, name].to_numpy(np.float64)
        )
    assert table["num_tokens"].dtype == "Int64"
    assert table.attrs["settings"]["estimator"] == settings["estimator"]
    assert table.attrs["facts"]["backwards" if settings["estimator"] == "gradient" else "forwards"] > 0


def test_plain_texts_are_numbered_and_whole_numbers_stay_whole(model_folder: Path) -> None:
    table = scoring.score(loaded(model_folder), tokenizer(), ["w1 w2 w3", "w4 w5"])
    assert table["sample_id"].tolist() == ["0", "1"]
    # All tokens but bos.
    assert table["num_tokens"].tolist() == [3, 2]
    assert table["num_tokens"].dtype == np.int64
    assert table["reason"].isna().all()


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """In training, but for one frozen part; and its dropout does not act."""
    model = loaded(save_model(tmp_path / "gpt2", "gpt2"))
    assert model.config.resid_pdrop > 0
    model.eval()
    quiet = scoring.score(model, tokenizer(), GOOD)
    model.train()
    model.transformer.h[0].eval()
    model.transformer.h[1].ln_1.weight.requires_grad_(False)
    training = {name: module.training for name, module in model.named_modules()}
    weights = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    noisy = {
        estimator: scoring.score(model, tokenizer(), GOOD, estimator=estimator, draws=3)
        for estimator in ("gradient", "monte-carlo")
    }
    np.testing.assert_array_equal(noisy["gradient"]["mrd"], quiet["mrd"])
    np.testing.assert_allclose(noisy["monte-carlo"]["nll"], quiet["nll"], rtol=1e-6)
    with pytest.raises(scoring.UserError):
        scoring.score(model.bfloat16(), tokenizer(), GOOD, estimator="monte-carlo")
    model.float()
    assert {name: module.training for name, module in model.named_modules()} == training
    for name, p in model.named_parameters():
        before, trained, gradient = weights[name]
        assert torch.equal(p, before), name
        assert (p.requires_grad, p.grad) == (trained, gradient), name


def test_other_objects_in_place_of_a_model_or_a_tokenizer(model_folder: Path) -> None:
    model, words = loaded(model_folder), tokenizer()
    for wrong, name in (("authors", "'authors'"), (None, "None"), (words, "a "), (torch.nn.Linear(1, 1), "a Linear")):
        with pytest.raises(scoring.UserError, match=rf"^model is {name}.*: expected a loaded causal LM, as [^\n]*$"):
            scoring.score(wrong, words, GOOD)
    with pytest.raises(scoring.UserError, match=r"^model is a LlamaModel, which has no language-model head: expected"):
        scoring.score(model.model, words, GOOD)
    for wrong in (None, "authors", model_folder):
        with pytest.raises(scoring.UserError, match=r"^tokenizer is .*: expected the model's, as AutoTokenizer gives$"):
            scoring.score(model, wrong, GOOD)


def test_gradients_that_are_switched_off_and_settings_that_are_left_to_the_engine(model_folder: Path) -> None:
    model = loaded(model_folder)
    expected = scoring.score(model, tokenizer(), GOOD)["mrd"]
    with torch.inference_mode():
        inside = scoring.score(model, tokenizer(), GOOD, estimator=None)["mrd"]
    np.testing.assert_array_equal(inside, expected)
    half = scoring.score(model.half(), tokenizer(), GOOD)["mrd"]
    np.testing.assert_allclose(half, expected, rtol=0.1)


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        (GOOD, {"sigma": 0}, "sigma is 0: expected a number greater than 0"),
        (GOOD, {"estimator": "montecarlo"}, r"estimator is 'montecarlo': .*; did you mean 'monte-carlo'\?"),
        (GOOD, {"estimator": "monte-carlo", "draws": 1}, "draws is 1: expected a whole number of at least 2, .*"),
        (GOOD, {"statistic": "abs_mean"}, "estimator gradient does not estimate abs_mean: .*"),
        (GOOD, {"batch_tokens": 0}, "batch_tokens is 0: expected a whole number of at least 1, or auto"),
        (
            GOOD,
            {"batch_tokens": "auto"},
            "batch_tokens is 'auto': expected a whole number of at least 1; auto is for .*",
        ),
        (
            GOOD,
            {"draws": 2.5, "estimator": "monte-carlo"},
            "draws is 2.5: expected a whole number of at least 0, or auto",
        ),
        (None, {}, "records is None: expected a list of records"),
        (["w1 \ud800"], {}, "records, record 1: half of a surrogate pair, which is no text; expected UTF-8"),
        ([*GOOD, {"reply": "w1"}], {}, "records, record 9: fields 'reply'; expected 'prompt'.*"),
        ([*GOOD, GOOD[2]], {}, "records, record 9: id 'r2' occurs twice; ids must be unique"),
        ([3], {}, "records, record 1: int; expected a mapping of fields"),
        (GOOD[0], {}, "records is one record: expected a list of them"),
        (pd.DataFrame(GOOD), {}, r"records is a DataFrame: expected a list of records; use to_dict\('records'\)"),
        (
            [EMPTY, NOTHING],
            {},
            "records: none of 2 samples can be scored; the first, 'empty': empty answer",
        ),
        ([], {}, "records: there is no record; expected at least one"),
        (
            [{"text": "w1 beyond"}],
            {"beyond": True},
            "vocabulary mismatch: the tokenizer gives token id 97, the model embeds 97; .*",
        ),
        (
            GOOD,
            {"bfloat16": True, "estimator": "monte-carlo"},
            "the perturbation does not survive bfloat16 storage: .*",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_answered_in_one_line(
    model_folder: Path, records: Any, settings: dict[str, Any], message: str
) -> None:
    settings = dict(settings)
    words = tokenizer(extra=["beyond"] if settings.pop("beyond", False) else [])
    model = loaded(model_folder, torch.bfloat16 if settings.pop("bfloat16", False) else torch.float32)
    with pytest.raises(scoring.UserError, match=rf"^{message}$"):
        scoring.score(model, words, records, **settings)
