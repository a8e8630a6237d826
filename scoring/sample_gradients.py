"""Per-sample gradient norms of a whole batch from one backward pass.

For y = W x the gradient of sample i is G_i^T A_i (A: inputs, G: gradients of the outputs, a row a token), and

    ||G_i^T A_i||_F^2 = <A_i A_i^T, G_i G_i^T>,

so its norm needs two T x T Gram matrices and never the gradient itself. The model's parameters are frozen while
this runs: the backward pass carries gradients of activations only, which costs one forward, not two.

Linear and Conv1D (with biases), embeddings (scaled and offset ones too) and a head tied to the embedding (with its
cross term) have a closed form. Any other module that owns parameters (norms of every kind) is differentiated by itself,
a sample at a time under vmap: its parameters are small. A module that fits neither raises `UnsupportedModule`, and the
caller falls back to `autograd_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scoring.logprob import scored_logprobs
from scoring.samples import Batch

# (B, S) log-probs and (B, S) mask -> (B,): the scalar of each sample that is differentiated.
ScalarOfSample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# A module's forward hook: module, positional and keyword arguments, output -> the output to use instead.
ForwardHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class UnsupportedModule(TypeError):
    """A module whose per-sample gradients the batched method cannot form."""


def log_abs_logprob(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum_t log|P_t|, whose gradient is Sum_t grad P_t / P_t: the first-order term of MRD. Saturated tokens
    (P_t = 0) are left out."""
    nonzero = mask & (logprobs < 0)
    return torch.where(nonzero, logprobs, -1.0).neg().log().sum(-1)


def negative_log_likelihood(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum_t -P_t."""
    return -torch.where(mask, logprobs, 0.0).sum(-1)


def mean_negative_log_likelihood(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of -P_t over the scored tokens: the training loss of one sample."""
    return negative_log_likelihood(logprobs, mask) / mask.sum(-1)


def per_sample_gradient_norms(
    model: PreTrainedModel, batch: Batch, scalar_of: ScalarOfSample
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norms over all parameters of each sample's gradient, from one forward and one backward.

    Args:
        model: a causal LM in eval mode.
        batch: B samples.
        scalar_of: the scalar of the log-probs that is differentiated.

    Returns:
        norms (B,) fp64, and the log-probs (B, S) of the forward pass.

    Raises:
        UnsupportedModule: a parameter's gradient cannot be formed per sample.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with _Recorder(model, batch) as recorder, torch.enable_grad():
            logprobs = scored_logprobs(model, batch)
            scalar_of(logprobs, batch.mask).sum().backward()
        return recorder.squared_norms().sqrt(), logprobs.detach()
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def without_padding_index(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the padding token's row of an embedding has a gradient as every other row has. torch gives it
    none; but where the token occurs in a sample, perturbing its row changes the sample's log-probs."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    padding_indices = [embedding.padding_idx for embedding in embeddings]
    for embedding in embeddings:
        embedding.padding_idx = None
    try:
        yield
    finally:
        for embedding, padding_index in zip(embeddings, padding_indices, strict=True):
            embedding.padding_idx = padding_index


def autograd_norms(
    model: PreTrainedModel, batch: Batch, scalar_of: ScalarOfSample
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of `per_sample_gradient_norms` by plain autograd, for any model: B forwards and backwards."""
    parameters = list(model.parameters())
    requires_grad = [p.requires_grad for p in parameters]
    norms = torch.zeros(len(batch), dtype=torch.float64)
    logprobs = torch.zeros(batch.mask.shape, dtype=torch.float64)
    try:
        for p in parameters:
            p.requires_grad_(True)
        for row in range(len(batch)):
            single = batch.rows(row, row + 1).to(batch.input_ids.device)
            with torch.enable_grad(), without_padding_index(model):
                values = scored_logprobs(model, single)
                scalar = scalar_of(values, single.mask).sum()
                gradients = torch.autograd.grad(scalar, parameters, allow_unused=True)
            norms[row] = sum(g.double().square().sum().item() for g in gradients if g is not None) ** 0.5
            logprobs[row, : values.shape[1]] = values.detach()[0].to(logprobs)
        return norms.to(batch.input_ids.device), logprobs.to(batch.input_ids.device)
    finally:
        for p, required in zip(parameters, requires_grad, strict=True):
            p.requires_grad_(required)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32; fp64 stays. Gram matrices in bfloat16 would be too coarse for gradient norms."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Recorder:
    """Hooks every module that owns parameters; accumulates squared per-sample gradient norms in `_total`."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self._batch = batch
        self._total = torch.zeros(len(batch), dtype=torch.float64, device=batch.input_ids.device)
        self._handles: list[Any] = []
        self._seen: set[str] = set()
        # For the cross term of a tied head: the gradients of its logits at the sample's tokens, and its inputs.
        self._tied_head: tuple[torch.Tensor, torch.Tensor] | None = None
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self._tied = getattr(head, "weight", None) is embedding.weight
        self._head, self._embedding = head, embedding
        # Every parameter must have one owner, except the tied table. This is checked before any hook is set, so that
        # an error leaves the model as it was.
        self._modules: dict[str, nn.Module] = {}
        owner_of: dict[int, str] = {}
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                if id(p) in owner_of and not (self._tied and p is head.weight):
                    raise UnsupportedModule(f"{name} shares a parameter with {owner_of[id(p)]}")
                owner_of[id(p)] = name
                self._modules[name] = module

    def __enter__(self) -> _Recorder:
        self._handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def squared_norms(self) -> torch.Tensor:
        return self._total

    def _hook(self, name: str) -> ForwardHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if name in self._seen:
                raise UnsupportedModule(f"{name} ({type(module).__name__}) runs more than once in a forward pass")
            if not isinstance(output, torch.Tensor):
                raise UnsupportedModule(f"{name} ({type(module).__name__}) does not return a tensor")
            self._seen.add(name)
            if isinstance(module, nn.Embedding):
                ids, scale = _lookup(module, args, kwargs)
                output = output.detach().requires_grad_()
                self._check_rows(name, module, ids)
                output.register_hook(lambda grads: self._add_embedding(module, ids, scale, grads))
            elif not output.requires_grad:
                raise UnsupportedModule(f"{name} ({type(module).__name__}) is not downstream of an embedding")
            elif isinstance(module, nn.Linear | Conv1D):
                inputs = self._split(name, module, args[0].detach())
                output.register_hook(lambda grads: self._add_linear(module, inputs, self._split(name, module, grads)))
            else:
                rows = tuple(self._split(name, module, arg.detach()) for arg in args)
                output.register_hook(lambda grads: self._add_generic(module, rows, self._split(name, module, grads)))
            return output

        return hook

    def _check_rows(self, name: str, module: nn.Module, tensor: torch.Tensor) -> None:
        if tensor.shape[0] != len(self._batch):
            raise UnsupportedModule(
                f"{name} ({type(module).__name__}) sees a tensor of shape {tuple(tensor.shape)} in which the "
                f"{len(self._batch)} samples cannot be told apart"
            )

    def _split(self, name: str, module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
        """Put the sample dimension first: (B*T, d), as some models flatten it, becomes (B, T, d)."""
        rows, length = self._batch.input_ids.shape
        if tensor.dim() == 2 and tensor.shape[0] == rows * length and length > 1:
            tensor = tensor.reshape(rows, length, -1)
        self._check_rows(name, module, tensor)
        return tensor

    def _add(self, squared: torch.Tensor) -> None:
        """Add squared norms, (B,). They are on the device of their layer; the layers may be on several GPUs."""
        self._total += squared.to(self._total.device)

    def _add_linear(self, module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> None:
        inputs, grads = _precise(inputs.flatten(1, -2)), _precise(grads.flatten(1, -2))
        self._add(_outer_product_norms(inputs, grads))
        if module.bias is not None:
            self._add(grads.sum(1).double().square().sum(-1))
        if self._tied and module is self._head:
            ids = self._batch.input_ids.to(grads.device).unsqueeze(1).expand(-1, grads.shape[1], -1)
            self._tied_head = (grads.gather(-1, ids), inputs)

    def _add_embedding(self, module: nn.Embedding, ids: torch.Tensor, scale: torch.Tensor, grads: torch.Tensor) -> None:
        grads = _precise(grads) * scale
        # Gradients of a row that a sample uses several times add up before they are squared.
        same_row = ids.unsqueeze(1).eq(ids.unsqueeze(2)).to(grads.dtype)
        self._add((torch.bmm(grads, grads.mT) * same_row).double().sum((1, 2)))
        if self._tied and module is self._embedding:
            assert self._tied_head is not None
            gathered, hidden = self._tied_head
            hidden, gathered = hidden.to(grads.device), gathered.to(grads.device)
            self._add(2 * (gathered * torch.bmm(hidden, grads.mT)).double().sum((1, 2)))
            self._tied_head = None

    def _add_generic(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], grads: torch.Tensor) -> None:
        parameters = {n: _precise(p.detach()) for n, p in module.named_parameters(recurse=False)}

        def gradient(row: tuple[torch.Tensor, ...], grad: torch.Tensor) -> dict[str, torch.Tensor]:
            def forward(values: dict[str, torch.Tensor]) -> torch.Tensor:
                output: torch.Tensor = functional_call(module, values, tuple(x.unsqueeze(0) for x in row))
                return output

            gradients: dict[str, torch.Tensor] = vjp(forward, parameters)[1](grad.unsqueeze(0))[0]
            return gradients

        with _hooks_off(module):
            gradients = vmap(gradient)(tuple(_precise(x) for x in inputs), _precise(grads))
        for values in gradients.values():
            self._add(values.flatten(1).double().square().sum(-1))


@contextmanager
def _hooks_off(module: nn.Module) -> Iterator[None]:
    """Within the context a module is called without its forward hooks."""
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    try:
        yield
    finally:
        module._forward_hooks = hooks


def _lookup(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers and scale of an embedding look-up. Subclasses may offset the ids (OPT's positions) or scale the
    result (Gemma 3).

    Both are read off two look-ups: in a table that holds row numbers, and in a table of ones.
    """
    rows = torch.arange(module.num_embeddings, dtype=torch.float64, device=module.weight.device).unsqueeze(1)
    with _hooks_off(module):
        scale = functional_call(module, {"weight": torch.ones_like(rows)}, args, kwargs)
        scaled = functional_call(module, {"weight": rows}, args, kwargs)
    return (scaled / scale).round().long().squeeze(-1), _precise(scale.to(module.weight.dtype))


def _outer_product_norms(inputs: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """||G_i^T A_i||_F^2 for each sample. inputs (B, T, m), grads (B, T, n) -> (B,) fp64.

    Two ways to the same number, whichever multiplies less: T x T Gram matrices (T^2 (m + n) a sample), or each
    m x n gradient (T m n), a few samples at a time.
    """
    rows, length, m = inputs.shape
    n = grads.shape[-1]
    if length * (m + n) <= 2 * m * n:
        grams = torch.bmm(inputs, inputs.mT) * torch.bmm(grads, grads.mT)
        # Cancellation can leave a rounding error below zero where the true norm is zero.
        return grams.double().sum((1, 2)).clamp_min_(0.0)
    step = max(1, (1 << 24) // (m * n))
    pieces = [
        torch.bmm(grads[i : i + step].mT, inputs[i : i + step]).square().double().sum((1, 2))
        for i in range(0, rows, step)
    ]
    return torch.cat(pieces)
