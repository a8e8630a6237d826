"""What is kept of the initial model, against the same model in fp64 on one unpadded sample at a time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.objectives import inputs_of, kl, npo, undial
from algorithms.passes import Head
from algorithms.recipe import Objectives, Recipe
from algorithms.reference import Reference, compute_reference, needed_quantities
from scoring.cluster import Footprint
from scoring.errors import UserError
from scoring.load import load_model
from scoring.pool import ReplicaPool
from scoring.samples import Sample
from scoring.work import LocalPool, ReplicaSpec
from tests.tiny_models import ARCHITECTURES, random_samples, tiny_model

LAYER, HIDDEN = 1, 32
# Answers and refusals have the same places; of the retain set only some are asked for.
SAMPLES = {
    "forget": random_samples(6, seed=1),
    "refusal": random_samples(6, seed=2, longest=9),
    "retain": [sample for sample in random_samples(12, seed=3) if sample.index in (1, 4, 5, 10)],
}
WANTED = {"forget": ("last", "layer", "nll"), "refusal": ("nll",), "retain": ("last", "layer")}
# Several batches for each role.
BATCH_TOKENS = 40


def in_fp64(model: Any, sample: Sample) -> dict[str, np.ndarray]:
    """By transformers and torch alone; the last hidden states are what the head is given."""
    exact = copy.deepcopy(model).double()
    positions = np.flatnonzero(sample.scored) - 1
    ids = torch.from_numpy(sample.input_ids)
    given = []
    exact.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        output = exact(input_ids=ids.unsqueeze(0), output_hidden_states=True)
    table = output.logits[0, positions].log_softmax(-1)
    return {
        "nll": -table.gather(-1, ids[sample.scored].unsqueeze(-1)).sum().numpy(),
        "logits": output.logits[0, positions].numpy(),
        "last": given[0].reshape(sample.length, -1)[positions].numpy(),
        "layer": output.hidden_states[LAYER][0, positions + 1].numpy(),
    }


def compute(
    model: Any, path: Path, wanted: Mapping[str, tuple[str, ...]] = WANTED, samples: Mapping = SAMPLES
) -> tuple[Reference, int]:
    forwards = compute_reference(path, samples, wanted, LAYER, LocalPool(model), BATCH_TOKENS)
    return Reference(path), forwards


def kept(reference: Reference) -> dict[str, np.ndarray]:
    """All that is asked for, read sample by sample."""
    found: dict[str, np.ndarray] = {}
    for role, quantities in WANTED.items():
        for sample in SAMPLES[role]:
            for name in quantities:
                if name == "nll":
                    found[f"{role} {name} {sample.index}"] = reference.nll(role, [sample.index]).numpy()
                else:
                    states = reference.states(role, name, [sample.index], sample.num_scored)
                    found[f"{role} {name} {sample.index}"] = states[0].numpy()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt"])
def test_against_fp64(architecture: str, tmp_path: Path):
    model = tiny_model(architecture)
    reference, _ = compute(model, tmp_path / "reference")
    for role, quantities in WANTED.items():
        for sample in SAMPLES[role]:
            want = in_fp64(model, sample)
            if "nll" in quantities:
                found = reference.nll(role, [sample.index])
                assert found.dtype == torch.float64
                assert found.item() == pytest.approx(want["nll"].item(), rel=1e-5)
            for what in {"last", "layer"} & set(quantities):
                states = reference.states(role, what, [sample.index], sample.num_scored)
                assert states.dtype == torch.float32
                np.testing.assert_allclose(states[0], want[what], atol=1e-5, rtol=1e-4)
            if "last" in quantities:
                logits = Head(model)(reference.states(role, "last", [sample.index], sample.num_scored))[0]
                np.testing.assert_allclose(logits, want["logits"], atol=5e-5, rtol=0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return compute(tiny_model(), tmp_path_factory.mktemp("reference") / "reference")[0]


def test_answers_and_refusals_are_kept_apart(reference: Reference):
    model = tiny_model()
    order = [4, 0, 4, 5]
    for role in ("forget", "refusal"):
        want = [in_fp64(model, SAMPLES[role][i])["nll"].item() for i in order]
        np.testing.assert_allclose(reference.nll(role, order), want, rtol=1e-5)
    assert (reference.nll("forget", order) - reference.nll("refusal", order)).abs().min() > 0.1


@pytest.mark.parametrize(("role", "what"), [("forget", "last"), ("forget", "layer"), ("retain", "layer")])
def test_states_are_padded_with_zeros(reference: Reference, role: str, what: str):
    chosen = [SAMPLES[role][place] for place in (2, 0, 3)]
    width = max(sample.num_scored for sample in SAMPLES[role]) + 2
    states = reference.states(role, what, [sample.index for sample in chosen], width)
    assert states.shape == (3, width, HIDDEN)
    for row, sample in zip(states, chosen, strict=True):
        assert (row[: sample.num_scored].abs().sum(-1) > 0).all()
        assert (row[sample.num_scored :] == 0).all()
        alone = reference.states(role, what, [sample.index], sample.num_scored)[0]
        torch.testing.assert_close(row[: sample.num_scored], alone, atol=0, rtol=0)


def test_forwards_are_counted(tmp_path: Path):
    model = tiny_model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    _, forwards = compute(model, tmp_path / "all")
    assert forwards == len(calls) > sum(map(len, WANTED.values()))
    before = len(calls)
    _, forwards = compute(model, tmp_path / "some", {"refusal": ("nll",)})
    assert forwards == len(calls) - before > 1


def test_folder_is_whole_or_not_there(tmp_path: Path):
    """Whenever the model fails, whether the folder was there before or not."""
    model: Any = tiny_model()
    path = tmp_path / "reference"
    left = [2]

    def fail(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise FloatingPointError("in the middle")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        compute(model, path)
    assert not path.exists()
    handle.remove()

    reference, _ = compute(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    whole = [file.read_bytes() for file in sorted(path.iterdir())]
    left[0] = 2
    model.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        compute(model, path)
    assert [file.read_bytes() for file in sorted(path.iterdir())] == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert reference.nll("forget", [0]).item() == Reference(path).nll("forget", [0]).item()


def test_folder_is_not_there_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def half(_: object, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    path = tmp_path / "reference"
    with monkeypatch.context() as patched:
        patched.setattr("scoring.tensor_folder.save_file", half)
        with pytest.raises(OSError, match="no space left"):
            compute(tiny_model(), path)
    assert not path.exists()
    reference, _ = compute(tiny_model(), path)
    assert reference.nll("forget", [0]).item() > 0


def test_pool_gives_the_same(cluster: None, model_folder: Path, tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here, forwards_here = compute(load_model(model_folder), tmp_path / "here")
    finally:
        torch.set_num_threads(threads)
    path = tmp_path / "pool"
    with ReplicaPool(ReplicaSpec(str(model_folder)), Footprint(cpus=1), 2) as pool:
        forwards = compute_reference(path, SAMPLES, WANTED, LAYER, pool, BATCH_TOKENS)
    assert forwards == forwards_here
    want, found = kept(here), kept(Reference(path))
    assert len(want) == 6 * 3 + 6 + 4 * 2
    for name in want:
        np.testing.assert_array_equal(found[name], want[name], err_msg=name)


def scaled(model: Any, factor: float) -> Any:
    """The model with its logits multiplied after the head, as Cohere's and Granite's are."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        return dataclasses.replace(output, logits=output.logits * factor)

    model.forward = forward
    return model


def test_unknown_change_of_logits_is_refused(tmp_path: Path):
    path = tmp_path / "reference"
    with pytest.raises(UserError, match="LlamaForCausalLM changes its logits after the output head") as caught:
        compute(scaled(tiny_model(), 0.9), path)
    assert "\n" not in str(caught.value)
    assert not path.exists()
    compute(scaled(tiny_model(), 1.0), path)


def test_unknown_change_does_not_matter_where_no_logits_are_kept(tmp_path: Path):
    model = tiny_model()
    wanted: dict[str, tuple[str, ...]] = {"forget": ("layer", "nll")}
    reference, _ = compute(scaled(tiny_model(), 0.5), tmp_path / "reference", wanted)
    for sample in SAMPLES["forget"]:
        want = in_fp64(model, sample)
        table = torch.from_numpy(want["logits"] * 0.5).log_softmax(-1)
        nll = -table[torch.arange(sample.num_scored), sample.input_ids[sample.scored]].sum()
        assert reference.nll("forget", [sample.index]).item() == pytest.approx(nll.item(), rel=1e-5)
        np.testing.assert_allclose(
            reference.states("forget", "layer", [sample.index], sample.num_scored)[0], want["layer"], atol=1e-5
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_accepted(architecture: str, tmp_path: Path):
    """Logits from the kept states, also for heads that are large enough to be capped."""
    model: Any = tiny_model(architecture)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    wanted: dict[str, tuple[str, ...]] = {"retain": ("last",)}
    reference, _ = compute(model, tmp_path / "reference", wanted)
    sample = SAMPLES["retain"][0]
    logits = Head(model)(reference.states("retain", "last", [sample.index], sample.num_scored))[0]
    want = in_fp64(model, sample)["logits"]
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ({"forget": ["logprobs", "mask"], "retain": ["logprobs", "mask"]}, {}),
        ({"forget": ["reference_nll"], "retain": ["logprobs"]}, {"forget": ("nll",)}),
        (
            {"forget": ["reference_nll", "refusal_reference_nll"], "retain": []},
            {"forget": ("nll",), "refusal": ("nll",)},
        ),
        ({"forget": ["direction", "hidden"], "retain": ["reference_hidden"]}, {"retain": ("layer",)}),
        (
            {"forget": ["reference_logits", "reference_nll"], "retain": ["reference_logits"]},
            {"forget": ("last", "nll"), "retain": ("last",)},
        ),
        ({}, {}),
    ],
)
def test_needs(objectives: dict[str, Sequence[str]], expected: dict[str, tuple[str, ...]]):
    assert needed_quantities(objectives) == expected


def test_needs_of_real_objectives():
    found = needed_quantities({"forget": inputs_of(undial), "retain": inputs_of(kl)})
    assert found == {"forget": ("last",), "retain": ("last",)}
    assert needed_quantities({"forget": inputs_of(npo), "retain": inputs_of(npo)}) == {
        "forget": ("nll",),
        "retain": ("nll",),
    }


@pytest.mark.parametrize(
    ("algorithm", "retain_term", "expected"),
    [
        ("GA", None, {}),
        ("GradDiff", None, {}),
        ("NPO", None, {"forget": ("nll",)}),
        ("PO", None, {}),
        ("IdkDPO", None, {"forget": ("nll",), "refusal": ("nll",)}),
        ("GradDiff-KL", None, {"retain": ("last",)}),
        ("UNDIAL", "kl", {"forget": ("last",), "retain": ("last",)}),
        ("RMU", None, {"retain": ("layer",)}),
        ("RMU", "none", {}),
        ("NPO", "hidden", {"forget": ("nll",), "retain": ("layer",)}),
    ],
)
def test_needs_of_algorithms(algorithm: str, retain_term: str | None, expected: dict[str, tuple[str, ...]]):
    recipe = Recipe(algorithm=algorithm, retain_term=retain_term)
    assert Objectives.of(dataclasses.replace(recipe, **recipe.resolved())).reference_quantities() == expected
