"""`algorithms.unlearn` on a loaded model: the weights and tables of the command line's job, in the records' order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import algorithms
from bench.jobs.unlearn import UnlearnSpec
from bench.jobs.unlearn import unlearn as unlearn_job
from scoring.errors import UserError
from tests.tiny_folders import pairs, tokenizer, write_jsonl

# One record of each set cannot be used.
FORGET = [
    *pairs(5),
    {"id": "empty", "prompt": "w1", "completion": ""},
    {"id": "last", "question": "w2", "answer": "w3"},
]
RETAIN = [{"id": "kept empty", "text": ""}, *pairs(5, seed=1)]
REJECTED = [
    {"set": "forget", "sample_id": "empty", "reason": "empty answer"},
    {"set": "retain", "sample_id": "kept empty", "reason": "empty text"},
]
SHORT = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "el_n": 8, "stopping": "paper", "evaluate": False}


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def timeless(table: pd.DataFrame) -> pd.DataFrame:
    return table[[name for name in table if not name.startswith("seconds")]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "recipe"),
    [
        ("GradDiff", {"alpha": 1.0, "refresh": 1, "replacement": False}),
        ("NPO-GradDiff", {"seed": 3, "evaluate": True, "evaluate_every": 2, "gradient_checkpointing": True}),
        ("IdkDPO", {}),
        ("RMU", {"layer": 1}),
        ("GradDiff", {"lora_rank": 2}),
    ],
    ids=["difficulty", "reference", "refusals", "layer", "adapters"],
)
def test_the_weights_and_tables_of_the_job(
    model_folder: Path, tmp_path: Path, algorithm: str, recipe: dict[str, Any]
) -> None:
    forget = write_jsonl(tmp_path / "forget.jsonl", FORGET)
    retain = write_jsonl(tmp_path / "retain.jsonl", RETAIN)
    fields = {**SHORT, **recipe}
    spec = UnlearnSpec(
        model=str(model_folder), task=str(forget), retain=str(retain), algorithm=algorithm, workers=0, **fields
    )
    job = unlearn_job(spec, tmp_path / "run", progress=False)

    model = loaded(model_folder)
    before = weights_of(model)
    result = algorithms.unlearn(model, tokenizer(), iter(FORGET), RETAIN, algorithm=algorithm, **fields)
    after = weights_of(result.model)
    # The head is tied to the embeddings, and stored once.
    assert_bitwise(after, load_file(str(job.model / "model.safetensors")))
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert result.model is model, "trained in place"
    assert type(result.model) is LlamaForCausalLM
    assert not result.model.training

    for name in ("steps", "epochs", "samples", "difficulty"):
        expected = pq.read_table(job.folder / f"{name}.parquet").to_pandas()
        pd.testing.assert_frame_equal(timeless(getattr(result, name)), timeless(expected), check_exact=True)
    assert result.samples["sample_id"].tolist() == ["r0", "r1", "r2", "r3", "r4", "last"]
    assert len(result.steps) == 4
    if recipe.get("alpha"):
        assert result.difficulty["step"].tolist() == [0] * 6 + [2] * 6
    assert result.record["rejected"] == job.record["rejected"] == REJECTED
    assert result.record["updates"] == 4
    assert result.record["thresholds"] == job.record["thresholds"]
    assert result.record["recipe"]["epochs"] == 2


@pytest.mark.parametrize(
    ("retain", "fields", "message"),
    [
        (RETAIN, {"epoch": 2}, r"unknown field 'epoch': expected one of algorithm, .*; did you mean 'epochs'\?"),
        (RETAIN, {"algorithm": "GradDif"}, r"algorithm is 'GradDif': expected one of .*; did you mean 'GradDiff'\?"),
        (RETAIN, {"epochs": 0}, "epochs is 0: expected a whole number of at least 1"),
        (
            None,
            {},
            "algorithm GradDiff has a retain term and there is no retain set: give retain, or take retain_term none",
        ),
        ([{"text": ""}], {}, "retain: none of 1 samples can be scored; the first, '0': empty text"),
        ([{"text": 3}], {}, "retain, record 1: field 'text' is int, expected text"),
        (RETAIN, {"layer": 3, "algorithm": "RMU"}, "layer is 3: the model has 2 decoder layers"),
        (RETAIN, {"batch_tokens": 1}, "batch_tokens is 1: expected a whole number of at least 2"),
        (RETAIN, {"evaluate_every": -1}, "evaluate_every is -1: expected a whole number of at least 0"),
        (RETAIN, {"evaluate": "no"}, "evaluate is 'no': expected .*"),
        (RETAIN, {"refusals": "refusals.txt"}, "refusals is 'refusals.txt': expected a list of answers, at least one"),
        (RETAIN, {"refusals": []}, r"refusals is \[\]: expected a list of answers, at least one"),
        (RETAIN, {"lora_rank": 2, "lora_targets": "("}, "LoRA: missing .*; lora_targets is a regular expression"),
        (RETAIN, {"trainable": "nothing"}, "trainable: 'nothing' matches no parameter .*"),
        (RETAIN, {"evaluate_samples": 0}, "evaluate_samples is 0: expected a whole number of at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_answered_in_one_line(
    model_folder: Path, retain: Any, fields: dict[str, Any], message: str
) -> None:
    """And nothing of the model has changed, its mode neither."""
    model = loaded(model_folder).train()
    before = weights_of(model)
    with pytest.raises(UserError, match=rf"^{message}$"):
        algorithms.unlearn(model, tokenizer(), FORGET, retain, **{"algorithm": "GradDiff", **fields})
    assert_bitwise(weights_of(model), before)
    assert all(module.training for module in model.modules())


def test_a_model_in_bfloat16_is_refused(model_folder: Path) -> None:
    model = loaded(model_folder, torch.bfloat16)
    before = weights_of(model)
    with pytest.raises(UserError, match=r"^model is in bfloat16: its weights must be fp32; use model.float\(\)$"):
        algorithms.unlearn(model, tokenizer(), FORGET, algorithm="GA")
    assert_bitwise(weights_of(model), before)
