"""The part of the vLLM replica inside vLLM's worker processes: it moves the weights and reads log-probs exactly.

vLLM imports it in every worker before the model is built (`worker_extension_cls`). Two things here could silently give
wrong numbers, so each has its check:

    Weights.  vLLM fuses, splits and repacks parameters. So noise is made for the parameters of the Hugging Face
              model, by their names, and goes through the engine's own loader, as a checkpoint would. After every change
              each parameter of the engine must differ from its base, and after restoring none may.
    Log-probs. vLLM returns log_softmax, whose absolute error of 1e-7 exceeds the log-prob of a confident token, and
              forms logits at every token of a prompt. Here only the hidden states at scored positions go through the
              head, and the target's log-prob is computed from raw logits as everywhere else. A position that no step of
              the engine has come by is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import vllm._custom_ops
from safetensors import safe_open

from scoring.logprob import token_logprobs
from scoring.perturbation import fill_gaussian_, squared_distance

# Otherwise the CPU backend packs linear weights for oneDNN and leaves empty parameters, which no loader can write to.
vllm._custom_ops._supports_onednn = False

# The entry of a request's `extra_args` that says which row of which batch it reads.
ROW = "mrd_bench_row"
# Logits computed at a time, rows times vocabulary.
LOGITS = 1 << 25
# Base weights that stay on a GPU, as a share of the memory that its engine may use. The engine leaves more than twice
# as much (`scoring.vllm_replica.GPU_MEMORY`), which scoring needs as well.
KEPT = 0.08


class WorkerExtension:
    """Methods that vLLM adds to its worker; called by name through `collective_rpc`."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    _files: dict[str, Any]
    _kept: dict[str, torch.Tensor]
    _base_fingerprints: dict[str, int]
    _batch: int
    _positions: np.ndarray
    _targets: np.ndarray
    _found: list[tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]]

    def keep_base(self, files: dict[str, str]) -> list[str]:
        """Load the base weights, and score the requests of `ask` from now on.

        Args:
            files: the safetensors file of each parameter of the Hugging Face model. The files stay mapped and are not
                copied, so that all replicas of a node share them.

        Returns:
            The names of the engine's empty parameters: none, unless it has packed its weights away.
        """
        # TF32 keeps 10 bits: a perturbation of 1e-5 on a weight of 0.02 would not reach the product.
        torch.set_float32_matmul_precision("highest")
        opened = {path: safe_open(path, framework="pt", device="cpu") for path in sorted(set(files.values()))}
        self._files = {name: opened[path] for name, path in files.items()}
        self._kept = {}
        # Called after every step with the hidden states of its tokens. The replica asks for no log-probs of vLLM's own.
        assert hasattr(self.model_runner, "_get_prompt_logprobs_dict"), "another model runner of vLLM"
        self.model_runner._get_prompt_logprobs_dict = self._score_step
        self._write(self._bases())
        self._base_fingerprints = self._fingerprints()
        return [name for name, p in self.model_runner.model.named_parameters() if p.numel() == 0]

    def ask(self, batch: int, positions: np.ndarray, targets: np.ndarray) -> None:
        """Say what to score of the requests that follow.

        Args:
            batch: its number; requests that name another one are not scored.
            positions: (B, S) int64, as in `Batch`; -1 at padding.
            targets: (B, S) int64.
        """
        self._batch, self._positions, self._targets = batch, positions, targets
        self._found = []

    def scores(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What the requests since `ask` gave: log-probs, (B, S) fp32 in nats, NaN where no step of the engine came by;
        and whether each target is the most likely token, (B, S) bool. None in a worker that sees no logits."""
        if not self._found:
            return None
        logprobs = np.full(self._targets.shape, np.nan, dtype=np.float32)
        hits = np.zeros(self._targets.shape, dtype=bool)
        for rows, columns, values, firsts in self._found:
            logprobs[rows, columns], hits[rows, columns] = values.cpu().numpy(), firsts.cpu().numpy()
        self._found = []
        return logprobs, hits

    @torch.no_grad()
    def _score_step(self, hidden: torch.Tensor, scheduled: dict[str, int]) -> dict[str, Any]:
        """Score what a step of the engine has read.

        A prompt may be read in several steps, and again from its start if the engine ran out of room for it: then the
        later values count.

        Args:
            hidden: (T, d), of all tokens of the step.
            scheduled: tokens of each request in this step.

        Returns:
            No log-probs, for vLLM.
        """
        runner = self.model_runner
        rows, columns, places = [], [], []
        for request_id, count in scheduled.items():
            request = runner.requests[request_id]
            batch, row = (request.sampling_params.extra_args or {}).get(ROW, (None, None))
            if row is None or batch != self._batch:
                continue
            ahead = self._positions[row] - request.num_computed_tokens
            (of_row,) = np.nonzero((self._positions[row] >= 0) & (ahead >= 0) & (ahead < count))
            start = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]
            rows.append(np.full(len(of_row), row))
            columns.append(of_row)
            places.append(start + ahead[of_row])
        if not rows:
            return {}
        row_of, column_of, place_of = (np.concatenate(parts) for parts in (rows, columns, places))
        wanted = torch.from_numpy(place_of).to(hidden.device)
        targets = torch.from_numpy(self._targets[row_of, column_of]).to(hidden.device)
        piece = max(1, LOGITS // runner.model_config.get_vocab_size())
        for first in range(0, len(wanted), piece):
            part = slice(first, first + piece)
            # Of a vocabulary that is split over workers, all of them compute, and not all get, the logits.
            logits = runner.model.compute_logits(hidden[wanted[part]])
            if logits is not None:
                logprobs = token_logprobs(logits, targets[part])
                self._found.append((row_of[part], column_of[part], logprobs, logits.argmax(-1) == targets[part]))
        return {}

    def perturb(self, sigma: float, seed: int, draw: int, sign: int, measure: bool) -> tuple[list[str], float, int]:
        """theta <- base + delta_k, or base - delta_k for the delta that storage kept.

        Args:
            sign: 1 or -1.
            measure: whether to measure how much of the noise storage kept.

        Returns:
            The names of the engine's parameters that did not move; and, if measured, the sum of squares of
            stored(theta + delta) - theta over all weights and their number, else 0 and 0.
        """
        squares, count = 0.0, 0

        def moved() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal squares, count
            for name, base in self._bases():
                live = fill_gaussian_(torch.empty_like(base), sigma, seed, draw, name).add_(base)
                if measure:
                    squares += squared_distance(live, base)
                    count += live.numel()
                # See scoring.perturbation.Perturbation.mirror.
                yield name, live if sign > 0 else live.neg_().add_(base, alpha=2)

        self._write(moved())
        unmoved = [name for name, value in self._fingerprints().items() if value == self._base_fingerprints[name]]
        return unmoved, squares, count

    def restore(self) -> list[str]:
        """theta <- base.

        Returns:
            The names of the engine's parameters that are not bitwise their base again.
        """
        self._write(self._bases())
        return [name for name, value in self._fingerprints().items() if value != self._base_fingerprints[name]]

    def _bases(self) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = self.model_runner.model_config.dtype
        for name, file in self._files.items():
            base = self._kept.get(name)
            if base is None:
                base = file.get_tensor(name).to(device=self.device, dtype=dtype)
                if self._may_keep(base):
                    self._kept[name] = base
            yield name, base

    def _may_keep(self, base: torch.Tensor) -> bool:
        """Whether a base weight stays on the GPU as far as there is room: it would be sent there for every draw. The
        memory of a CPU has the file's already."""
        if self.device.type != "cuda":
            return False
        memory = torch.cuda.get_device_properties(self.device).total_memory
        share: float = self.vllm_config.cache_config.gpu_memory_utilization
        return sum(kept.nbytes for kept in self._kept.values()) + base.nbytes <= KEPT * share * memory

    @torch.no_grad()
    def _write(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.model_runner.model.load_weights(weights)
        # A loader may skip parameters at the end; the iterator is exhausted so that all of them are measured.
        for _ in weights:
            pass

    def _fingerprints(self) -> dict[str, int]:
        """A fingerprint of the bits of each parameter of the engine."""
        model = self.model_runner.model
        return {name: int(torch.hash_tensor(p.detach()).view(torch.int64)) for name, p in model.named_parameters()}
