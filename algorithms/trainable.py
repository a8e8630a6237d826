"""A model in training: full weights or LoRA, in one process or spread over several.

A global batch gives the same update for any number of workers: losses are divided by the size of the global batch and
gradients are summed. Between updates MRD, stopping rule and evaluation look at the model in training itself: a whole
copy is made only for what needs merged, whole or negated weights, and let go of afterwards.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from algorithms.group import ALONE, Group
from algorithms.in_step import InStep
from algorithms.initial import in_pieces
from algorithms.measurements import weight_change
from algorithms.passes import ForwardPass, Output, decoder_layers
from algorithms.recipe import Recipe, layer_of
from scoring.abilities import tokens_to_try
from scoring.adapters import adds_a_product, has_embeddings, merged, merged_weights, shared_weights
from scoring.errors import UserError
from scoring.generation import shares_prefixes
from scoring.load import load_adapted
from scoring.logprob import scored_logprobs
from scoring.recompute import layers_that_recompute
from scoring.replica import differentiates_on_the_way
from scoring.sample_gradients import log_abs_logprob, per_sample_gradient_norms
from scoring.samples import Batch, Sample, collate
from scoring.settings import named
from scoring.updates import OptimizerName, make_optimizer

# What AdamW keeps of each weight.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# They look at a matrix as a whole, or have kernels for plain tensors alone.
OF_WHOLE_WEIGHTS: tuple[OptimizerName, ...] = ("adafactor", "adamw-8bit")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2022) on all linear layers except the head, or on those that match `targets`."""

    rank: int
    alpha: int
    targets: str | None = None


@dataclass(frozen=True)
class Continued:
    """The adapter in a folder, of whatever kind, which is trained further."""

    folder: str


class Trainable:
    """Weights and optimizer, spread over the workers.

    Args:
        model: the initial model in fp32, on this worker's device; it is trained in place, not copied.
        group: this worker.
        adapter: adapters are trained, instead of full weights. One that is continued is in `model` already, merged.
        trainable: regular expression searched in parameter names: only matching ones are trained.
        layer: see `ForwardPass`.
        optimizer, learning_rate, weight_decay: see `scoring.updates`.
        bfloat16: compute forward and backward by autocast; weights, gradients and optimizer stay in fp32.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: seed of the adapters' initial values.
        negation: s: everybody else sees initial - s (trained - initial) of the weights, a task vector taken away
            (Ilharco et al. 2023); 0: what is trained.
        initial: the initial weights by name, of which rows are taken; for a negation.

    Raises:
        UserError: no parameter matches `trainable`, the adapters cannot be put on, or the optimizer does not work on
            shards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group: Group = ALONE,
        *,
        adapter: Lora | Continued | None = None,
        trainable: str | None = None,
        layer: int | None = None,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        bfloat16: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        negation: float = 0.0,
        initial: Mapping[str, Any] | None = None,
    ) -> None:
        self.group = group
        self._negation = negation
        self._initial = initial or {}
        self.device = next(model.parameters()).device
        self._bfloat16 = bfloat16
        self._adapted: Any = None
        self._adapter_has_embeddings = False
        if isinstance(adapter, Continued):
            self._adapted = load_adapted(adapter.folder, str(self.device))
            self._adapter_has_embeddings = has_embeddings(self._adapted, Path(adapter.folder))
        elif adapter is not None:
            self._adapted = _with_adapters(model, adapter, seed)
        self.model: PreTrainedModel = model if self._adapted is None else self._adapted.get_base_model()
        if trainable is not None:
            _freeze_all_but(self.model, trainable)
        sharded = group.size > 1 and group.strategy == "fsdp"
        # Whether gradients and changes of the merged weights are to be had from the model as it is.
        self._reads_in_place = self._adapted is None or adds_a_product(self._adapted)
        # The model without its weights, to put shards together in.
        self._skeleton: Any = None
        self._in_step: InStep | None = None
        # Of a sharded model that is differentiated in place: what is known of it, as nobody can try it then.
        self.batched_gradients: bool | None = None
        if sharded:
            self._skeleton = _copied(self._adapted or self.model, _on_meta)
            self._find_out_before_sharding()
        self._recomputing = _checkpoint_activations(self.model) if gradient_checkpointing else []
        forward_pass = ForwardPass(self.model, layer)
        self._forward: nn.Module = forward_pass
        if sharded:
            # Said, because torch would take the machine's GPUs also for workers that are on its CPU.
            mesh = init_device_mesh(self.device.type, (group.size,))
            for block in decoder_layers(self.model):
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self._in_step = InStep(self.model, self.device)
            self.group = replace(group, before_meeting=self._in_step.catch_up)
        elif group.size > 1:
            # The layers above `layer` take no part in a pass that ends there.
            self._forward = DistributedDataParallel(
                forward_pass,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=layer is not None,
            )
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if optimizer in OF_WHOLE_WEIGHTS:
            self.refuse_shards("optimizer", optimizer)
        self.optimizer = make_optimizer(self._parameters.values(), optimizer, learning_rate, weight_decay)

    def forward(self, batch: Batch, names: Sequence[Output]) -> dict[str, torch.Tensor]:
        """The named outputs for a batch; see `ForwardPass`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            outputs: dict[str, torch.Tensor] = self._forward(batch.to(self.device), names)
        return outputs

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """The context of one forward and backward: workers with whole gradients exchange them in the last one of a step
        alone. Those of shards exchange them in each: until then they would have to keep whole ones."""
        keeps_gradients = isinstance(self._forward, DistributedDataParallel) and not last
        with self._forward.no_sync() if keeps_gradients else nullcontext():  # type: ignore[operator]
            yield

    def add_gradients(self, terms: Iterator[torch.Tensor]) -> float:
        """Add the gradients of scalars to those of this update, and give their sum.

        Args:
            terms: this worker's share of them; the sum over all workers counts.
        """
        parameters = self.parameters
        total, sums = torch.zeros((), device=self.device), [torch.zeros_like(p) for p in parameters]
        for term in terms:
            for own, gradient in zip(sums, torch.autograd.grad(term, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    own += gradient
            total += term.detach()
        for p, gradient in zip(parameters, sums, strict=True):
            self.group.summed(gradient)
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return float(self.group.summed(total))

    def clip(self, max_norm: float | None) -> float:
        """Scale the gradient down to the norm `max_norm`; returns the norm before that, over all workers."""
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), torch.inf if max_norm is None else max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, learning_rate: float) -> None:
        """Make one update and clear the gradients."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def is_finite(self) -> bool:
        """Whether all trained weights are finite on all workers, which call it together."""
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self._parameters.values())
        has_non_finite = torch.stack([(~w.detach().isfinite()).any() for w in local]).any().to(torch.int32)
        return not self.group.summed(has_non_finite).item()

    @contextmanager
    def whole_model(self) -> Iterator[PreTrainedModel]:
        """Gives the model with whole weights, in eval mode; all workers enter together.

        It is a copy, made now, if the weights are sharded, adapters have to be merged or the change is negated, else
        the model itself.
        """
        if self._adapted is None and self._skeleton is None and not self._negation:
            with self.model_itself() as model:
                yield model
            return
        yield self._whole_copy().to(self.device)

    def _whole_copy(self) -> Any:
        whole: Any
        if self._skeleton is None:
            whole = copy.deepcopy(self._adapted or self.model)
        else:
            whole = self._put_together(lambda p: p)
        if self._adapted is not None:
            whole = merged(whole)
        self._negate(whole)
        return whole

    def _put_together(self, kept: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """A copy of the sharded model with what is kept of each whole weight; all workers call it together."""
        weights = dict((self._adapted or self.model).named_parameters())
        names = {id(p): name for name, p in self._skeleton.named_parameters()}
        return _copied(self._skeleton, lambda p: kept(_whole(weights[names[id(p)]])))

    @torch.no_grad()
    def _negate(self, whole: nn.Module) -> None:
        if self._negation:
            for name, p in whole.named_parameters():
                for rows, initial in in_pieces(p, 0, self._initial[name]):
                    initial = initial.to(rows.device)
                    rows.copy_(initial - self._negation * (rows - initial))

    @contextmanager
    def readable_model(self) -> Iterator[PreTrainedModel]:
        """Gives a model in eval mode for forward passes: the one in training, adapters, shards and all, unless its
        change is negated; all workers enter together, and then each makes passes as it likes."""
        if self._negation:
            with self.whole_model() as model:
                yield model
            return
        with self._in_step_by(self._idle_forward), torch.no_grad(), self.model_itself() as model:
            yield model

    @contextmanager
    def differentiable_model(self) -> Iterator[PreTrainedModel]:
        """The same for the norms of gradients with respect to the whole weights; see `batched_gradients`."""
        if self._negation or not self._reads_in_place or (self._in_step and not self.batched_gradients):
            with self.whole_model() as model:
                yield model
            return
        with self._frozen_shards(), self._in_step_by(self._idle_gradient), self.model_itself() as model:
            yield model

    # --- Looking at shards --------------------------------------------------------------------------------------

    def _find_out_before_sharding(self) -> None:
        """Try what is tried at first use, while workers need not do it together."""
        shares_prefixes(self.model)
        self.batched_gradients = self._reads_in_place and differentiates_on_the_way(self.model)
        tokens = tokens_to_try(self.model)[0, :3].cpu().numpy()
        self._idle_sample = Sample("", tokens, np.array([False, False, True]), 0)

    @contextmanager
    def _in_step_by(self, idle_pass: Callable[[], Any]) -> Iterator[None]:
        if self._in_step is None:
            yield
            return
        try:
            with self._in_step.passes(idle_pass):
                yield
        finally:
            # Where no backward pass follows, the weights outside the layers would stay as they are now.
            cast(FSDPModule, self.model).reshard()

    def _idle_forward(self) -> None:
        scored_logprobs(self.model, collate([self._idle_sample]).to(self.device))

    def _idle_gradient(self) -> None:
        per_sample_gradient_norms(self.model, collate([self._idle_sample]).to(self.device), log_abs_logprob)

    @contextmanager
    def _frozen_shards(self) -> Iterator[None]:
        """Within the context no weight needs a gradient, so that none is computed, kept or exchanged."""
        if self._in_step is None:
            yield
            return
        self._need_gradients(False)
        yield
        self._need_gradients(True)  # not after an error: the others would not be here

    def _need_gradients(self, needed: bool) -> None:
        # Shards are one thing, and what is put together of them for a pass another, which is made once and kept.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                self._set_requires_grad(needed)
                module.reshard()
        self._set_requires_grad(needed)

    def _set_requires_grad(self, needed: bool) -> None:
        for name, p in self.model.named_parameters():
            if name in self._parameters:
                p.requires_grad_(needed)

    def weight_change(self, initial: Mapping[str, Any]) -> dict[str, float | None]:
        """How far the whole weights are from the initial ones, see `weight_change`; all workers call it together."""
        if self._negation or not self._reads_in_place:
            with self.whole_model() as model:
                return weight_change(model.named_parameters(), initial, self.group)
        return weight_change(self._merged_weights(), initial, self.group)

    def _merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._in_step is None or self._adapted is None:
            yield from merged_weights(self.model)
            return
        # What is merged has to be whole: a layer at a time.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                yield from merged_weights(self.model, lambda p: not isinstance(p, DTensor))
                module.reshard()

    @contextmanager
    def model_itself(self) -> Iterator[PreTrainedModel]:
        """Gives the model in training, adapters and all, in eval mode."""
        # Layers that recompute activations cannot use the cache that decoding needs.
        for layer in self._recomputing:
            layer.training = False
        try:
            yield self.model
        finally:
            for layer in self._recomputing:
                layer.training = True

    def refuse_shards(self, setting: str, value: str = "") -> None:
        """For a setting, or a value of one, that needs whole weights in training.

        Raises:
            UserError: they are sharded.
        """
        if isinstance(self.model, FSDPModule):
            name = f"{named(setting)} {value}".rstrip()
            raise UserError(f"{name} needs whole weights, and strategy fsdp shards them: use strategy ddp")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self._parameters.values())

    def finished_model(self, adapter: Path | None = None) -> PreTrainedModel:
        """The model with whole weights, to keep when the training is over: what was trained is used up, adapters are
        merged in place. Of shards it is put together on the first worker's CPU; the others, which call it too, get a
        model without weights.

        Args:
            adapter: a folder to which the adapter is written, if there is one; None: nowhere.
        """
        adapted, whole = self._adapted, self.model
        if self._skeleton is not None:
            self.optimizer.state.clear()  # its moments have the room that the whole weights need
            gathered = self._put_together(lambda p: p.cpu() if self.group.rank == 0 else _on_meta(p))
            adapted, whole = (None, gathered) if adapted is None else (gathered, gathered)
        if self.group.rank == 0 or self._skeleton is None:
            if adapted is not None and adapter is not None and not self._negation:
                self._save(adapted, adapter)
            whole = whole if adapted is None else merged(adapted)
            self._negate(whole)
        for layer in self._recomputing:
            layer.training = False
        self.model = whole
        self._adapted, self._skeleton, self._recomputing, self._negation = None, None, [], 0.0
        return self.model

    @property
    def keeps_own_weights(self) -> bool:
        """Whether the trained weights are in `state`, since they do not follow from those of the whole model."""
        return self._adapted is not None or bool(self._negation)

    def state(self) -> dict[str, torch.Tensor]:
        """The state of the training that the whole model lacks: optimizer moments, and adapters or weights whose change
        is negated, as whole tensors on the CPU, which may be those in training. All workers call it together."""
        tensors: dict[str, Any] = {
            f"optimizer.{name}.{key}": value
            for name, p in self._parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        # Counters of updates may be plain whole numbers.
        tensors = {name: torch.tensor(value) if isinstance(value, int) else value for name, value in tensors.items()}
        if self.keeps_own_weights:
            tensors |= {f"trained.{name}": p for name, p in self._parameters.items()}
        return _without_sharing({name: _whole(value).cpu().contiguous() for name, value in tensors.items()})

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT keeps it; nothing where there is none, or where its negated change is what others
        see."""
        if self._adapted is not None and not self._negation:
            self._save(self._adapted, folder)

    def _save(self, adapted: Any, folder: Path) -> None:
        unfinished = folder.with_name(f".{folder.name}.tmp")
        adapted.save_pretrained(unfinished, save_embedding_layers=self._adapter_has_embeddings)
        unfinished.rename(folder)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed twice in training, and can be so when gradients are measured."""
        return bool(self._recomputing) and not self.is_sharded

    @property
    def is_sharded(self) -> bool:
        """Whether each worker has a shard of the weights, and saves that."""
        return self._skeleton is not None

    def save_shards(self, folder: Path) -> None:
        """Write what is trained and the optimizer's moments; each worker, which all call it, writes its shards."""
        tensors = {f"trained.{name}": p.detach() for name, p in self._parameters.items()} | {
            f"optimizer.{name}.{key}": value
            for name, p in self._parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        save_sharded(tensors, checkpoint_id=folder)

    def load_shards(self, folder: Path) -> None:
        """Continue from what any number of workers have written; each worker reads what it has of it."""
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self._parameters.items():
            tensors[f"trained.{name}"] = p.detach()
            moments = {
                key: torch.zeros((), device=self.device) if key == "step" else torch.zeros_like(p).detach()
                for key in MOMENTS
                if f"optimizer.{name}.{key}" in saved
            }
            if moments:
                self.optimizer.state[p] = moments
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
        load_sharded(tensors, checkpoint_id=folder, no_dist=True)

    def restore(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a checkpoint.

        Args:
            weights: the model's trainable weights by name; not used if `keeps_own_weights`.
            state: a result of `state`.
        """
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(_like(state[f"trained.{name}"] if self.keeps_own_weights else weights[name], p))
        for full_name, value in state.items():
            kind, _, rest = full_name.partition(".")
            if kind == "optimizer":
                name, _, key = rest.rpartition(".")
                p = self._parameters[name]
                self.optimizer.state[p][key] = self._restored(value, p)

    def _restored(self, value: torch.Tensor, p: nn.Parameter) -> torch.Tensor | int:
        """A part of a parameter's optimizer state, as the optimizer keeps it."""
        if value.dim():
            return _like(value, p)
        # Fused AdamW keeps its counter on the device of the weights.
        return value.to(self.device) if value.is_floating_point() else int(value)


def _without_sharing(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, with copies of those that are in the memory of an earlier one, which no file would take: one table of
    the values of 8 bits serves all moments."""
    found: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return found


def _whole(p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, put together if it is sharded."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def _copied(model: nn.Module, value_of: Callable[[nn.Parameter], torch.Tensor]) -> Any:
    """A copy of a model with other tensors in its parameters; those that are shared stay shared."""
    others = {id(p): nn.Parameter(value_of(p), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(others))


def _on_meta(p: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(p, device="meta")


def _like(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, or this worker's shard of it, as a parameter has it on this worker."""
    value = value.to(p.device)
    return distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value.clone()


def _freeze_all_but(model: PreTrainedModel, pattern: str) -> None:
    try:
        matching = [name for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"trainable: {pattern!r} is not a regular expression: {error}") from error
    if not matching:
        first_names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise UserError(f"trainable: {pattern!r} matches no parameter of the model; its names look like {first_names}")
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
        revision=getattr(model.config, "_commit_hash", None),  # of the base, for whoever loads the adapter
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, config)
        except (ValueError, re.error) as error:
            raise UserError(f"LoRA: {str(error).splitlines()[0]}; lora_targets is a regular expression") from error
    for (first, *_), (second, *_) in shared_weights(adapted):
        one, other = (name.removesuffix(".base_layer") for name in (first, second))
        raise UserError(
            f"LoRA: {one} and {other} share their weights, and adapters would change them differently: give "
            f"{named('lora_targets')} that match neither"
        )
    return adapted


def _checkpoint_activations(model: PreTrainedModel) -> list[nn.Module]:
    """Recompute the decoder layers' activations in the backward pass; returns the layers.

    transformers recomputes in training mode only, which would also switch dropout on. So only the layers are put in
    training mode, not the modules inside them.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = layers_that_recompute(model)
    for layer in layers:
        layer.training = True
        if isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0
    return layers


def trainable_for(
    recipe: Recipe,
    model: PreTrainedModel,
    group: Group,
    gradient_checkpointing: bool = False,
    continued: str | None = None,
    initial: Mapping[str, Any] | None = None,
) -> Trainable:
    """The initial model, made ready for training by a resolved recipe.

    Args:
        continued: the folder of an adapter, merged into `model`, which alone is trained further.
        initial: the initial weights by name, see `Trainable`.
    """
    layer = layer_of(recipe, model.config)
    pattern = recipe.trainable
    if pattern is None and layer is not None and not recipe.lora_rank and not continued:
        # RMU moves the layer and the two before it: their numbers stand between dots, counted from 0.
        pattern = r"\.(" + "|".join(str(i) for i in range(max(0, layer - 3), layer)) + r")\."
    adapter: Lora | Continued | None = Continued(continued) if continued else None
    if recipe.lora_rank:
        adapter = Lora(recipe.lora_rank, recipe.lora_alpha or 0, recipe.lora_targets)
    return Trainable(
        model,
        group,
        adapter=adapter,
        trainable=pattern,
        layer=layer,
        optimizer=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        bfloat16=recipe.dtype == "bfloat16",
        gradient_checkpointing=gradient_checkpointing,
        seed=recipe.seed,
        negation=recipe.negation or 0.0,
        initial=initial,
    )
