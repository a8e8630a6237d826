"""A model under training: full weights or LoRA, in one process or spread over several.

One global batch gives the same update for any number of workers: losses are divided by the size of the global batch
and gradients are summed. What looks at the model between updates (MRD, stopping, evaluation, checkpoints) gets a
plain transformers model with whole weights, whatever the training is spread over.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from algorithms.passes import Passes, decoder_layers
from scoring.errors import UserError
from scoring.samples import Batch

STRATEGIES = ("ddp", "fsdp")
T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2022) on all linear layers but the head, or on those that `targets` names."""

    rank: int
    alpha: int
    targets: str | None = None


@dataclass(frozen=True)
class Group:
    """This process among its fellows; the default is one that works alone."""

    rank: int = 0
    size: int = 1
    strategy: str = "ddp"

    def gathered(self, mine: Mapping[int, T]) -> dict[int, T]:
        """The union of all workers' results."""
        if self.size == 1:
            return dict(mine)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, dict(mine))
        return {key: value for part in parts for key, value in part.items()}

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all workers are here."""
        if self.size > 1:
            dist.barrier()


class Trainable:
    """Weights, optimizer and how they are spread.

    Args:
        model: the initial model in fp32, on this worker's device; it is taken over, not copied.
        group: this worker.
        lora: adapters instead of full weights.
        trainable: regular expression searched in parameter names: only matching ones are trained.
        layer: see Passes.
        learning_rate, weight_decay: of AdamW.
        bfloat16: forward and backward by autocast; weights, gradients and optimizer stay in fp32.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of the adapters' initial values.

    Raises:
        UserError: no parameter matches `trainable`, or the adapters cannot be put on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group: Group = Group(),
        *,
        lora: Lora | None = None,
        trainable: str | None = None,
        layer: int | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        bfloat16: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        self.group = group
        self.device = next(model.parameters()).device
        self._bfloat16 = bfloat16
        self._adapted: Any = _with_adapters(model, lora, seed) if lora else None
        self.model: PreTrainedModel = model if self._adapted is None else self._adapted.get_base_model()
        if trainable is not None:
            _freeze_all_but(self.model, trainable)
        sharded = group.size > 1 and group.strategy == "fsdp"
        # Holds whole weights for those who look at the model: adapters merged, shards put together.
        self._whole: Any = copy.deepcopy(self._adapted or self.model).cpu() if lora or sharded else None
        self._recomputing = _checkpoint_activations(self.model) if gradient_checkpointing else []
        passes = Passes(self.model, layer)
        self._passes: nn.Module = passes
        if sharded:
            for block in decoder_layers(self.model):
                fully_shard(block)
            fully_shard(self.model)
        elif group.size > 1:
            # The layers above `layer` take no part in a pass that ends there.
            self._passes = DistributedDataParallel(
                passes,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=layer is not None,
            )
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=learning_rate, weight_decay=weight_decay, fused=True
        )

    def forward(self, batch: Batch, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """See Passes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            return self._passes(batch.to(self.device), wanted)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around one forward and backward: workers exchange gradients in the last one of a step only."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        quiet = isinstance(self._passes, DistributedDataParallel) and not last
        with self._passes.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            yield

    def clip(self, most: float | None) -> float:
        """Scale the gradient down to norm `most`; the norm before that, over all workers."""
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), torch.inf if most is None else most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, learning_rate: float) -> None:
        """One update of AdamW; gradients are cleared."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def is_finite(self) -> bool:
        """Whether all trained weights are numbers, on all workers; they call it together."""
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self._parameters.values())
        broken = torch.stack([(~w.detach().isfinite()).any() for w in local]).any().to(torch.int32)
        return not self.group.summed(broken).item()

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model with whole weights, in eval mode; all workers enter together.

        A copy where the weights are sharded or adapters have to be merged, and the model itself elsewhere.
        """
        if self._whole is None:
            # Recomputation goes without the cache that decoding needs.
            for layer in self._recomputing:
                layer.training = False
            try:
                yield self.model
            finally:
                for layer in self._recomputing:
                    layer.training = True
            return
        whole = self._whole
        (whole.get_base_model() if self._adapted is not None else whole).load_state_dict(
            _on_cpu(self.model.state_dict())
        )
        if self._adapted is not None:
            whole = copy.deepcopy(whole).merge_and_unload()
        try:
            yield whole.to(self.device)
        finally:
            whole.to("cpu")

    def state(self) -> dict[str, torch.Tensor]:
        """What `plain` does not tell of the training: optimizer moments, and adapters; whole, on the CPU. All workers
        call it together."""
        found: dict[str, Any] = {
            f"optimizer.{name}.{key}": value
            for name, p in self._parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        if self._adapted is not None:
            found |= {f"adapter.{name}": p for name, p in self._parameters.items()}
        return {name: value.contiguous().clone() for name, value in _on_cpu(found).items()}

    def restore(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a checkpoint.

        Args:
            weights: the model's trainable weights by name; not used for adapters.
            state: what `state` gave.
        """
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(_like(state[f"adapter.{name}"] if self._adapted is not None else weights[name], p))
        for name, p in self._parameters.items():
            moments = {key: state.get(f"optimizer.{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if moments["step"] is not None:
                self.optimizer.state[p] = {
                    # The counter is a number of its own, on the device where fused AdamW keeps it.
                    key: value.to(self.device) if key == "step" else _like(value, p)
                    for key, value in moments.items()
                    if value is not None
                }


def _on_cpu(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, put together one after the other: a device need not hold them all."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu() for name, t in tensors.items()}


def _like(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor in the shape that a parameter has on this worker."""
    value = value.to(p.device, p.dtype)
    return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value.clone()


def _freeze_all_but(model: PreTrainedModel, pattern: str) -> None:
    try:
        matching = [name for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"trainable: {pattern!r} is not a regular expression: {error}") from error
    if not matching:
        some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise UserError(f"trainable: {pattern!r} matches no parameter of the model; its names look like {some}")
    for name, p in model.named_parameters():
        p.requires_grad_(name in matching)


def _with_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs the package peft: pip install 'mrd-bench[lora]'") from None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"LoRA: {str(error).splitlines()[0]}; lora_targets is a regular expression") from error


def _checkpoint_activations(model: PreTrainedModel) -> list[nn.Module]:
    """Recompute the decoder layers' activations in the backward pass; the layers.

    transformers does so in training mode only, which would also switch dropout on; so the layers alone are set to
    it, and not the modules inside them.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    for layer in layers:
        layer.training = True
        if isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0  # type: ignore[assignment]
    return layers
