"""What a model can be asked: found out by trying, once for each model, as the names of architectures do not tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from scoring.errors import UserError, first_line
from scoring.precision import as_precise_as_weights
from scoring.settings import named

T = TypeVar("T")
# How far logits may be apart that should be the same, relative to the largest: they are computed in other shapes.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Tokens of the rows that are tried.
SHORT, LONG = 5, 8


@dataclass(frozen=True)
class Abilities:
    """How a model can be called.

    Attributes:
        takes_positions: its forward pass takes position ids.
        head_selects: its head may be given the scored positions only.
        head_is_last: its logits are what its head gives, a linear layer, and it may be given no position at all.
        batches: rows of the same length beside a row do not change it.
        pads: rows of other lengths do not either, padded on the right.
        switch: a length beyond which positions are encoded in another way, by the longest row of a batch (LongRoPE);
            None where there is none.
    """

    takes_positions: bool
    head_selects: bool
    head_is_last: bool
    batches: bool
    pads: bool
    switch: int | None

    def alike(self, lengths: torch.Tensor) -> list[torch.Tensor]:
        """The rows that may share a batch: their numbers, a (B_i,) tensor for each batch.

        Args:
            lengths: (B,) tokens of each row. A GPU is asked for them only where they matter: it would first have to
                end what it is doing.
        """
        if not self.batches:
            kinds = torch.arange(len(lengths))
        elif not self.pads:
            kinds = lengths.cpu()
        elif self.switch is not None:
            kinds = lengths.cpu() > self.switch
        else:
            return [torch.arange(len(lengths))]
        return [torch.nonzero(kinds == kind)[:, 0] for kind in kinds.unique()]


def remembered(tried: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of a model that is computed at its first use for each, and for the model within its adapters."""
    known: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    @wraps(tried)
    def of(model: Any) -> T:
        unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
        if unwrapped not in known:
            known[unwrapped] = tried(unwrapped)
        return known[unwrapped]

    return of


@remembered
def abilities_of(model: Any) -> Abilities:
    """What a causal LM can be asked; tried at its first use.

    Raises:
        UserError: it cannot be run on tokens alone, or a token's logits depend on later tokens.
    """
    return _try(model)


def notes_on(model: Any) -> list[str]:
    """What is out of the ordinary, in words."""
    able = abilities_of(model)
    name = type(model).__name__
    notes = []
    if not able.batches:
        notes.append(f"{name}: other samples of a batch change a sample's log-probs, so each has a batch of its own")
    elif not able.pads:
        notes.append(f"{name}: padding changes its log-probs, so only samples of one length share a batch")
    if able.switch is not None:
        notes.append(f"{name}: samples of up to {able.switch} tokens and longer ones do not share a batch (LongRoPE)")
    return notes


@torch.no_grad()
def _try(model: Any) -> Abilities:
    parameters = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in parameters
    switch = _switch(model.config.get_text_config())
    usual = Abilities(takes_positions, True, False, True, True, switch)
    training = model.training
    model.eval()
    try:
        ids = tokens_to_try(model)
        try:
            whole = _logits(model, ids, takes_positions)
        except Exception as error:
            raise UserError(
                f"{type(model).__name__} cannot be run on tokens alone ({type(error).__name__}: {first_line(error)}): "
                "expected a causal language model"
            ) from error
        if not whole.isfinite().all():
            return usual  # whoever uses it will see
        _check_causal(model, ids, whole, takes_positions)
        padded = ids.clone()
        padded[0, SHORT:] = ids[0, SHORT - 1]
        alone, other = _logits(model, ids[:1, :SHORT], takes_positions), _logits(model, ids[1:], takes_positions)
        mixed = _logits(model, padded, takes_positions)
        batches = same(whole[1:], other)
        pads = batches and same(mixed[:1, :SHORT], alone) and same(mixed[1:], other)
        head_selects = _head_selects(model, ids, whole, takes_positions)
        head_is_last = head_selects and _head_is_last(model, ids, takes_positions)
        return Abilities(takes_positions, head_selects, head_is_last, batches, pads, switch)
    finally:
        model.train(training)


def tokens_to_try(model: Any) -> torch.Tensor:
    """Two rows of tokens, (2, LONG), without the special ones, which some models treat in their own way."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    usual = [token for token in range(min(config.vocab_size, 1000)) if token not in special]
    chosen = [usual[(7 * i + 3) % len(usual)] for i in range(2 * LONG)]
    return torch.tensor(chosen, device=next(model.parameters()).device).view(2, LONG)


def _logits(model: Any, ids: torch.Tensor, takes_positions: bool) -> torch.Tensor:
    with as_precise_as_weights(model):
        output = model(input_ids=ids, use_cache=False, **positions_for(ids, takes_positions))
    logits: torch.Tensor = output.logits
    return logits


def positions_for(ids: torch.Tensor, takes_positions: bool) -> dict[str, torch.Tensor]:
    """The argument for the positions of right-padded rows: with the full batch dimension, so that learned position
    embeddings keep samples apart."""
    return {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)} if takes_positions else {}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two logits differ by no more than other shapes of the computation make them."""
    return bool((one - other).abs().max() <= TOLERANCE[one.dtype] * other.abs().max())


def _check_causal(model: Any, ids: torch.Tensor, whole: torch.Tensor, takes_positions: bool) -> None:
    changed = ids.clone()
    changed[:, SHORT:] = ids.flip(0)[:, SHORT:]
    if not same(_logits(model, changed, takes_positions)[:, :SHORT], whole[:, :SHORT]):
        raise UserError(
            f"{type(model).__name__} is not causal: a later token changes the logits of earlier ones; expected a model "
            "that reads from left to right (a BERT needs is_decoder: true in its config.json, and the training for it)"
        )


def _head_selects(model: Any, ids: torch.Tensor, whole: torch.Tensor, takes_positions: bool) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, 1:3], *args[1:]))
    try:
        few = _logits(model, ids, takes_positions)
        return few.shape == whole[:, 1:3].shape and same(few, whole[:, 1:3])
    except Exception:  # it does something with the logits that needs all of them
        return False
    finally:
        handle.remove()


def _head_is_last(model: Any, ids: torch.Tensor, takes_positions: bool) -> bool:
    head = model.get_output_embeddings()
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        return False
    given: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        logits = _logits(model, ids, takes_positions)
        if len(given) != 1 or not torch.equal(logits, given[0].to(logits.dtype)):
            return False
        nothing = head.register_forward_pre_hook(lambda _, args: (args[0][:, :0], *args[1:]))
        try:
            return _logits(model, ids, takes_positions).numel() == 0
        finally:
            nothing.remove()
    except Exception:
        return False
    finally:
        handle.remove()


def _switch(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return next(
        (
            kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            for kind in kinds
            if kind.get("rope_type") == "longrope"
        ),
        None,
    )


@torch.no_grad()
def check_fp64(model: Any) -> None:
    """See that a model in fp64 computes in fp64 from the first layer to the last: a change of 1e-11 after the embedding
    is to come out as a tenth of one of 1e-10.

    Raises:
        UserError: it rounds somewhere on the way.
    """
    ids, able = tokens_to_try(model), abilities_of(model)
    base = _logits(model, ids, able.takes_positions)
    if not base.isfinite().all():
        return

    def change(step: float) -> torch.Tensor:
        def move(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return output + step * torch.arange(output.numel(), device=output.device).view(output.shape).sin().to(
                output
            )

        handle = model.get_input_embeddings().register_forward_hook(move)
        try:
            return _logits(model, ids, able.takes_positions) - base
        finally:
            handle.remove()

    small, large = change(1e-11), change(1e-10)
    if (large - 10 * small).abs().max() > 0.01 * large.abs().max():
        raise UserError(
            f"{type(model).__name__} computes in less than fp64 with fp64 weights, so that small perturbations are "
            f"lost in rounding: use {named('estimator')} gradient or curvature, or {named('dtype')} float32"
        )
