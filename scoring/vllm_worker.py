"""The part of the vLLM replica inside vLLM's worker processes: it moves the weights and reads log-probs exactly.

vLLM imports it in every worker before the model is built (`worker_extension_cls`). Two things here could silently give
wrong numbers, so each has its check:

    Weights.  vLLM fuses, splits and repacks parameters. So noise is made for the parameters of the Hugging Face
              model, by their names, and goes through the engine's own loader, as a checkpoint would. After every change
              each parameter of the engine must differ from its base, and after restoring none may.
    Log-probs. vLLM returns log_softmax, whose absolute error of 1e-7 exceeds the log-prob of a confident token. The
              replica asks for raw logits, and computes the target's log-prob from them as everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import vllm._custom_ops
from safetensors import safe_open
from vllm.v1.outputs import LogprobsTensors

from scoring.logprob import token_logprobs
from scoring.perturbation import fill_gaussian_, squared_distance

# Otherwise the CPU backend packs linear weights for oneDNN and leaves empty parameters, which no loader can write to.
vllm._custom_ops._supports_onednn = False


class WorkerExtension:
    """Methods that vLLM adds to its worker; called by name through `collective_rpc`."""

    model_runner: Any
    device: torch.device
    _files: dict[str, Any]
    _base_fingerprints: dict[str, int]

    def keep_base(self, files: dict[str, str]) -> list[str]:
        """Load the base weights, and compute log-probs from logits from now on.

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
        self.model_runner.sampler.gather_logprobs = gather_logprobs
        self._write(self._bases())
        self._base_fingerprints = self._fingerprints()
        return [name for name, p in self.model_runner.model.named_parameters() if p.numel() == 0]

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
            yield name, file.get_tensor(name).to(device=self.device, dtype=dtype)

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


def gather_logprobs(logits: torch.Tensor, count: int, targets: torch.Tensor) -> LogprobsTensors:
    """Replaces vLLM's function of this name: the target's log-prob from raw logits, accurate as p -> 1.

    Args:
        logits: (T, V).
        count: number of further tokens whose log-probs are wanted; always 0.
        targets: (T,) int64.

    Returns:
        Log-probs (T, 1) and ranks (T,); the most likely token has rank 1.
    """
    assert count == 0
    target_logits = logits.gather(-1, targets.unsqueeze(-1))
    # Of equal logits the one that argmax returns has rank 1.
    is_first = logits.argmax(-1) == targets
    ranks = torch.where(is_first, 1, 1 + (logits >= target_logits).sum(-1).clamp_min(1))
    logprobs = token_logprobs(logits, targets)
    return LogprobsTensors(targets.unsqueeze(-1).int(), logprobs.unsqueeze(-1), ranks)
