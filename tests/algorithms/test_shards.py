"""Looking at a sharded model in place, by two workers of which each goes at its own pace, against one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from transformers import LlamaForCausalLM

from algorithms.corpus import evaluation_of_answers
from algorithms.group import ALONE, Group
from algorithms.measurements import measure_mrd
from algorithms.stopping import measure_memorization
from algorithms.trainable import Lora, Trainable
from scoring.samples import collate
from tests.algorithms.test_unlearner import CORPUS, FORGET, recipe
from tests.tiny_folders import tokenizer
from tests.tiny_models import tiny_model

# What is trained, and whether head and embedding are one.
KINDS: dict[str, tuple[Any, bool]] = {"full": (None, True), "adapters": (Lora(2, 8), False)}
# An odd number: one worker has more to do than the other.
SAMPLES = FORGET[:5]


def trainable(group: Group, kind: str) -> Trainable:
    adapter, tied = KINDS[kind]
    model: Any = tiny_model("llama", tied=tied)
    return Trainable(model, group, adapter=adapter)


def looked_at(group: Group, kind: str, folder: Path) -> dict[str, Any]:
    """What looks find after each of two updates, and the weights at the end. Shards are saved after the first update,
    and another model goes on from them."""
    initial = {name: p.detach().clone() for name, p in tiny_model("llama", tied=KINDS[kind][1]).named_parameters()}
    trained = trainable(group, kind)
    found: dict[str, Any] = {}
    for turn in range(2):
        group = trained.group
        batch = collate(FORGET[5:]).to(trained.device)
        with trained.accumulating(last=True):
            trained.forward(batch, ["logprobs"])["logprobs"].sum().backward()
        trained.step(1e-3)
        with trained.differentiable_model() as seen:
            assert seen is trained.model
            at_once = trained.batched_gradients
            assert at_once == (True if group.size > 1 else None)
            mrd, _ = measure_mrd(seen, SAMPLES, recipe("GA", alpha=1.0), group, 40, at_once)
        with trained.readable_model() as seen:
            assert seen is trained.model
            look = measure_memorization(seen, SAMPLES, 3, CORPUS.eos_token_id, 40, group=group)
            answers = evaluation_of_answers(tokenizer(), {"forget": SAMPLES}, None).results(seen, group)
        found[f"mrd {turn}"], found[f"el {turn}"], found[f"ma {turn}"] = (
            mrd.tolist(),
            look.el.tolist(),
            look.ma.tolist(),
        )
        found |= {f"{name} {turn}": value for name, value in (answers | trained.weight_change(initial)).items()}
        assert all(p.grad is None for p in trained.parameters)
        if group.size > 1 and turn == 0:
            trained.save_shards(folder / "shards")
            trained = trainable(replace(group, before_meeting=lambda: None), kind)
            trained.load_shards(folder / "shards")
    with trained.whole_model() as whole:
        found["whole"] = [p.detach().norm().item() for p in whole.parameters()]
    if group.rank == 0:
        finished = trained.finished_model(folder / f"adapter {group.size}")
        assert type(finished) is LlamaForCausalLM
        found["finished"] = [p.detach().norm().item() for p in finished.parameters()]
    else:
        trained.finished_model()
    return found


def work(rank: int, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = looked_at(Group(rank, 2, "fsdp"), kind, folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_looks_at_shards_are_those_at_the_whole_model(tmp_path: Path, kind: str):
    start_processes(work, (tmp_path, kind), nprocs=2, start_method="fork")
    expected = looked_at(ALONE, kind, tmp_path)
    assert expected["delta_norm 0"] > 0
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-5, err_msg=name)
    names = [[path.name for path in sorted(tmp_path.glob(f"adapter {size}/*"))] for size in (1, 2)]
    assert (
        names[0]
        == names[1]
        == (["README.md", "adapter_config.json", "adapter_model.safetensors"] * bool(KINDS[kind][0]))
    )
    # One process goes on from what two have written.
    one = trainable(ALONE, kind)
    one.load_shards(tmp_path / "shards")
    assert {int(state["step"]) for state in one.optimizer.state.values()} == {1}
    assert len(one.optimizer.state) == len(one.parameters)
    change = one.weight_change(dict(tiny_model("llama", tied=KINDS[kind][1]).named_parameters()))
    assert change["delta_norm"] == pytest.approx(expected["delta_norm 0"], rel=1e-5)
