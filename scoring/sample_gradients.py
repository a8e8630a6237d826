"""Per-sample gradient norms of a whole batch from one backward pass.

For y = W x the gradient of sample i is G_i^T A_i (A: inputs, G: gradients of the outputs, a row a token), and

    ||G_i^T A_i||_F^2 = <A_i A_i^T, G_i G_i^T>,

so its norm needs two T x T Gram matrices and never the gradient itself. The model's parameters are frozen while
this runs: the backward pass carries gradients of activations only, which costs one forward, not two.

Linear and Conv1D (with biases), embeddings (scaled and offset ones too), a head tied to the embedding (with its cross
term) and mixtures of experts have a closed form. Any other module that owns parameters (norms of every kind, routers)
is differentiated by itself: its parameters are small. A module that fits neither raises `UnsupportedModule`, and the
caller falls back to `autograd_norms`.

A model may have adapters on it that add a product to weights. The norms are then those of the merged model: the layer
below an adapter sees the merged layer's inputs and gradients of outputs, and the adapters' own parameters are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scoring.abilities import Abilities
from scoring.adapters import adapter_parameters
from scoring.experts import Seen, Tell, experts_of, spelled_out
from scoring.logprob import head_inputs, positions_at_a_time, row_by_row, scored_logprobs, token_logprobs
from scoring.precision import as_precise_as_weights
from scoring.recompute import recomputed
from scoring.samples import Batch

# (B, S) log-probs and (B, S) mask -> (B,): the scalar of each sample that is differentiated.
ScalarOfSample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# A module's forward hook: module, positional and keyword arguments, output -> the output to use instead.
ForwardHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


# Numbers of a gradient that are squared in fp64 at a time.
PIECE = 1 << 20


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
    model: PreTrainedModel,
    batch: Batch,
    scalar_of: ScalarOfSample,
    recompute: bool = False,
    on_the_way: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norms over all parameters of each sample's gradient, from one forward and one backward.

    Args:
        model: a causal LM in eval mode.
        batch: B samples.
        scalar_of: the scalar of the log-probs that is differentiated.
        recompute: keep the activations of one decoder layer at a time, and compute them twice.
        on_the_way: the weights of a module are there while the backward pass goes through it, and not at its end.

    Returns:
        norms (B,) fp64, and the log-probs (B, S) of the forward pass.

    Raises:
        UnsupportedModule: a parameter's gradient cannot be formed per sample.
    """

    def compute(rows: Batch, able: Abilities) -> tuple[torch.Tensor, torch.Tensor]:
        # Norms in the backward pass are to be as precise as in the forward one.
        with (
            as_precise_as_weights(model),
            recomputed(model) if recompute else nullcontext(),
            _Recorder(model, rows) as recorder,
            torch.enable_grad(),
        ):
            if (at_a_time := positions_at_a_time(model, rows, able)) is not None:
                logprobs = _backward_in_pieces(model, rows, scalar_of, recorder, at_a_time)
            else:
                logprobs = scored_logprobs(model, rows)
                recorder.refuse_missed()
                scalar_of(logprobs, rows.mask).sum().backward()
            if on_the_way and (late := recorder.late()):
                raise UnsupportedModule(f"{late[0]} runs more than once, or has several outputs")
            return recorder.squared_norms().sqrt().unsqueeze(1), logprobs.detach()

    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        try:
            norms, logprobs = row_by_row(model, batch, compute)
        except _Missed as missed:
            _find_owners(model, batch.rows(0, 1).to(batch.input_ids.device), missed.modules)
            norms, logprobs = row_by_row(model, batch, compute)
        return norms[:, 0], logprobs
    finally:
        for p in trained:
            p.requires_grad_(True)


def _backward_in_pieces(
    model: PreTrainedModel, batch: Batch, scalar_of: ScalarOfSample, recorder: _Recorder, at_a_time: int
) -> torch.Tensor:
    """The backward pass of a batch whose logits are too many to exist together: head and loss of a few samples after
    the others, forward and back, and then the rest of the model in one go. Gives the log-probs, (B, S)."""
    head: Any = model.get_output_embeddings()
    with recorder.leaving_out(getattr(head, "base_layer", head)):  # of a head that has an adapter
        hidden = head_inputs(model, batch)
    recorder.refuse_missed()
    top = hidden.detach().requires_grad_()
    step = max(1, at_a_time // batch.targets.shape[1])
    pieces = []
    for first in range(0, len(batch), step):
        rows = slice(first, first + step)
        with recorder.only(rows):
            logprobs = token_logprobs(head(top[rows]), batch.targets[rows]).masked_fill(~batch.mask[rows], 0.0)
            scalar_of(logprobs, batch.mask[rows]).sum().backward()
        pieces.append(logprobs.detach())
    hidden.backward(top.grad)
    return torch.cat(pieces)


class _Missed(UnsupportedModule):
    """Modules own parameters, and did not run in a forward pass: either something else multiplies by their weights, as
    the mixers of Mamba do, or nothing does."""

    def __init__(self, modules: Sequence[str]) -> None:
        super().__init__(f"{modules[0]} owns parameters and does not run")
        self.modules = modules


# For each model whose modules do not all run: who uses the parameters of those that do not; None where nobody does.
_BYPASSED: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def _find_owners(model: PreTrainedModel, single: Batch, missed: Sequence[str]) -> None:
    """Fill `_BYPASSED` for a model whose parameters are frozen."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in model.named_modules()
    ]
    parameters = {name: list(model.get_submodule(name).parameters(recurse=False)) for name in missed}
    try:
        for p in chain.from_iterable(parameters.values()):
            p.requires_grad_(True)
        with torch.enable_grad():
            total = scored_logprobs(model, single).sum()
        everything = [p for own in parameters.values() for p in own]
        found = torch.autograd.grad(total, everything, allow_unused=True) if total.requires_grad else [None]
    finally:
        for p in chain.from_iterable(parameters.values()):
            p.requires_grad_(False)
        for handle in handles:
            handle.remove()
    used = {id(p) for p, gradient in zip(everything, found, strict=False) if gradient is not None}
    owners: dict[str, str | None] = {}
    for name, own in parameters.items():
        if not any(id(p) in used for p in own):
            owners[name] = None
            continue
        above = name
        while above and above not in ran:
            above = above.rpartition(".")[0]
        if not above:
            raise UnsupportedModule(f"{name} owns parameters that are used elsewhere")
        owners[name] = above
    _BYPASSED[model] = {**_BYPASSED.get(model, {}), **owners}


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
    """The results of `per_sample_gradient_norms` by plain autograd, for any model: B forwards and backwards. A
    gradient is let go of as soon as it is known: all of them would be as large as the model."""
    everything, left_out = list(model.parameters()), adapter_parameters(model)
    before = [(p.requires_grad, p.grad) for p in everything]
    parameters = [p for p in everything if id(p) not in left_out]
    norms = torch.zeros(len(batch), dtype=torch.float64)
    logprobs = torch.zeros(batch.mask.shape, dtype=torch.float64)
    squares = [0.0] * len(parameters)

    def take(number: int, p: torch.Tensor) -> None:
        assert p.grad is not None
        squares[number] = sum(piece.double().square().sum().item() for piece in p.grad.flatten().split(PIECE))
        p.grad = None

    handles = []
    try:
        for p in everything:
            p.grad = None
            p.requires_grad_(id(p) not in left_out)
        handles = [p.register_post_accumulate_grad_hook(partial(take, number)) for number, p in enumerate(parameters)]
        for row in range(len(batch)):
            squares[:] = [0.0] * len(parameters)
            single = batch.rows(row, row + 1).to(batch.input_ids.device)
            with torch.enable_grad(), without_padding_index(model):
                values = scored_logprobs(model, single)
                scalar_of(values, single.mask).sum().backward()
            norms[row] = sum(squares) ** 0.5
            logprobs[row, : values.shape[1]] = values.detach()[0].to(logprobs)
        return norms.to(batch.input_ids.device), logprobs.to(batch.input_ids.device)
    finally:
        for handle in handles:
            handle.remove()
        for p, (required, gradient) in zip(everything, before, strict=True):
            p.requires_grad_(required)
            p.grad = gradient


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32; fp64 stays. Gram matrices in bfloat16 would be too coarse for gradient norms."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass
class _Call:
    """A call of a module in the forward pass, and the gradients of its outputs as they arrive in the backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: dict[int, torch.Tensor]


class _Recorder:
    """Hooks every module that owns parameters; accumulates squared per-sample gradient norms in `_total`."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self._batch = batch
        self._total = torch.zeros(len(batch), dtype=torch.float64, device=batch.input_ids.device)
        self._open = ExitStack()
        self._calls: dict[str, list[_Call]] = {}
        self._ran: set[str] = set()
        # The rows of the batch that modules see now.
        self._rows = slice(None)
        self._left_out: nn.Module | None = None
        # For the cross term of a tied head, a few rows after the others: the gradients of its logits at the sample's
        # tokens, and its inputs.
        self._tied_head: list[tuple[torch.Tensor, torch.Tensor]] = []
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self._tied = getattr(head, "weight", None) is embedding.weight
        self._head, self._embedding = head, embedding
        self._experts = experts_of(model)
        self._bypassed = _BYPASSED.get(model, {})
        # Every parameter must have one owner, except the tied table. This is checked before any hook is set, so that
        # an error leaves the model as it was.
        self._modules: dict[str, nn.Module] = {}
        # The names of the parameters of each, within it.
        self._owned: dict[str, list[str]] = {}
        owner_of: dict[int, str] = {}
        left_out = adapter_parameters(model)
        for name, module in model.named_modules():
            for own, p in module.named_parameters(recurse=False):
                if id(p) in left_out:
                    continue
                if id(p) in owner_of and not (self._tied and p is head.weight):
                    raise UnsupportedModule(f"{name} shares a parameter with {owner_of[id(p)]}")
                owner_of[id(p)] = name
                owner = self._bypassed.get(name, name)
                if owner is None:
                    continue
                self._modules[owner] = model.get_submodule(owner)
                self._owned.setdefault(owner, []).append(f"{name}.{own}".removeprefix(f"{owner}."))

    def __enter__(self) -> _Recorder:
        self._open.enter_context(spelled_out(self._experts, self._expert_teller))
        for name, module in self._modules.items():
            if name not in self._experts:
                handle = module.register_forward_hook(self._hook(name), with_kwargs=True)
                self._open.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextmanager
    def leaving_out(self, module: nn.Module) -> Iterator[None]:
        """Within the context calls of a module do not count."""
        self._left_out = module
        try:
            yield
        finally:
            self._left_out = None

    @contextmanager
    def only(self, rows: slice) -> Iterator[None]:
        """Within the context modules are called and differentiated for these rows of the batch."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = slice(None)

    def refuse_missed(self) -> None:
        """After a forward pass.

        Raises:
            _Missed: modules own parameters and did not run in it.
        """
        if missed := [name for name in self._modules if name not in self._ran and name not in self._experts]:
            raise _Missed(missed)

    def late(self) -> list[str]:
        """Modules whose own weights are still needed at the end of the backward pass."""
        known = (nn.Embedding, nn.Linear, Conv1D)
        return [name for name in self._calls if not isinstance(self._modules[name], known)]

    def squared_norms(self) -> torch.Tensor:
        """(B,), after the backward pass."""
        for name in list(self._calls):
            self._finish(name)
        return self._total

    def _hook(self, name: str) -> ForwardHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self._ran.add(name)
            # Without gradients it runs for the first time of two: its activations will be recomputed.
            if module is self._left_out or not torch.is_grad_enabled():
                return output
            call = _Call(args, kwargs, {})
            if isinstance(module, nn.Embedding):
                output = output.detach().requires_grad_()
            elif type(output) in (tuple, list):
                # One may have been computed from another: the gradient of an alias is that of its use elsewhere alone.
                output = type(output)(x.view_as(x) if isinstance(x, torch.Tensor) else x for x in output)
            outputs = output if isinstance(output, tuple | list) else (output,)
            differentiable = [
                place for place, x in enumerate(outputs) if isinstance(x, torch.Tensor) and x.requires_grad
            ]
            if not differentiable:
                raise UnsupportedModule(f"{name} ({type(module).__name__}) is not downstream of an embedding")
            self._calls.setdefault(name, []).append(call)
            for place in differentiable:
                outputs[place].register_hook(partial(self._arrived, name, call, place, len(differentiable) == 1))
            return output

        return hook

    def _arrived(self, name: str, call: _Call, place: int, only: bool, grads: torch.Tensor) -> None:
        """Take the gradients of an output. A module that ran once and has one output is done with; others wait for the
        end of the backward pass."""
        call.grads[place] = grads
        if only and len(self._calls[name]) == 1:
            self._finish(name)

    def _finish(self, name: str) -> None:
        module = self._modules[name]
        calls = [call for call in self._calls.pop(name) if call.grads]
        if not calls:
            return
        if isinstance(module, nn.Embedding):
            looked_up = [_lookup(module, call.args, call.kwargs) for call in calls]
            for ids, _ in looked_up:
                self._check_rows(name, module, ids)
            self._add_embedding(
                module,
                torch.cat([ids.flatten(1) for ids, _ in looked_up], dim=1),
                torch.cat(
                    [
                        _precise(call.grads[0]).flatten(1, -2) * scale.flatten(1, -2)
                        for call, (_, scale) in zip(calls, looked_up, strict=True)
                    ],
                    dim=1,
                ),
            )
        elif getattr(type(module), "forward", None) in (nn.Linear.forward, Conv1D.forward):  # routers may be more
            inputs = [self._split(name, module, call.args[0].detach()).flatten(1, -2) for call in calls]
            grads = [self._split(name, module, call.grads[0]).flatten(1, -2) for call in calls]
            self._add_linear(module, _precise(torch.cat(inputs, dim=1)), _precise(torch.cat(grads, dim=1)))
        else:
            self._add_generic(name, module, calls)

    @property
    def _ids(self) -> torch.Tensor:
        """The tokens that modules see now, (B, T)."""
        return self._batch.input_ids[self._rows]

    def _check_rows(self, name: str, module: nn.Module, tensor: torch.Tensor) -> None:
        if tensor.shape[0] != len(self._ids):
            raise UnsupportedModule(
                f"{name} ({type(module).__name__}) sees a tensor of shape {tuple(tensor.shape)} in which the "
                f"{len(self._ids)} samples cannot be told apart"
            )

    def _split(self, name: str, module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
        """Put the sample dimension first: (B*T, d) or (B*T*heads, d), as some models flatten, becomes (B, ..., d)."""
        rows, length = self._ids.shape
        if tensor.dim() == 2 and tensor.shape[0] % (rows * length) == 0 and length > 1:
            tensor = tensor.reshape(rows, tensor.shape[0] // rows, -1)
        self._check_rows(name, module, tensor)
        return tensor

    def _add(self, squared: torch.Tensor) -> None:
        """Add squared norms, (B,). They are on the device of their layer; the layers may be on several GPUs."""
        self._total[self._rows] += squared.to(self._total.device)

    def _add_linear(self, module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> None:
        self._add(_outer_product_norms(inputs, grads))
        if module.bias is not None:
            self._add(grads.sum(1).double().square().sum(-1))
        if self._tied and module is self._head:
            ids = self._ids.to(grads.device).unsqueeze(1).expand(-1, grads.shape[1], -1)
            self._tied_head.append((grads.gather(-1, ids), inputs))

    def _add_embedding(self, module: nn.Embedding, ids: torch.Tensor, grads: torch.Tensor) -> None:
        # Gradients of a row that a sample uses several times add up before they are squared.
        same_row = ids.unsqueeze(1).eq(ids.unsqueeze(2)).to(grads.dtype)
        self._add((torch.bmm(grads, grads.mT) * same_row).double().sum((1, 2)))
        if self._tied and module is self._embedding:
            gathered, hidden = (torch.cat(parts).to(grads.device) for parts in zip(*self._tied_head, strict=True))
            self._add(2 * (gathered * torch.bmm(hidden, grads.mT)).double().sum((1, 2)))
            self._tied_head = []

    # --- Experts: each is a linear layer over the tokens that were routed to it -----------------------------------

    def _expert_teller(self, name: str, module: nn.Module) -> Tell:
        rows, length = self._batch.input_ids.shape
        told: set[tuple[str, int]] = set()

        def tell(seen: Seen) -> None:
            if (seen.weight, seen.number) in told or seen.tokens != rows * length:
                raise UnsupportedModule(f"{name} ({type(module).__name__}) runs more than once in a forward pass")
            told.add((seen.weight, seen.number))
            seen.outputs.register_hook(partial(self._add_expert, seen, bool(module.has_bias)))

        return tell

    def _add_expert(self, seen: Seen, has_bias: bool, grads: torch.Tensor) -> None:
        rows, length = self._batch.input_ids.shape
        sample = seen.places // length
        counts = torch.bincount(sample, minlength=rows)
        # The tokens of a sample are neighbours. Padded with zeros, which add nothing.
        slot = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]

        def padded(values: torch.Tensor) -> torch.Tensor:
            table = values.new_zeros(rows, int(counts.max()), values.shape[-1])
            table[sample, slot] = values
            return _precise(table)

        by_sample = padded(grads)
        self._add(_outer_product_norms(padded(seen.inputs.detach()), by_sample))
        if has_bias:
            self._add(by_sample.sum(1).double().square().sum(-1))

    # --- Any other module that owns parameters ----------------------------------------------------------------------

    def _add_generic(self, name: str, module: nn.Module, calls: Sequence[_Call]) -> None:
        parameters = {n: _precise(module.get_parameter(n).detach()) for n in self._owned[name]}
        sums: dict[str, torch.Tensor] = {}
        for call in calls:
            for key, gradients in self._gradients_of(name, module, parameters, call).items():
                sums[key] = sums[key] + gradients if key in sums else gradients
        for gradients in sums.values():
            self._add(gradients.flatten(1).double().square().sum(-1))

    def _gradients_of(
        self, name: str, module: nn.Module, parameters: dict[str, torch.Tensor], call: _Call
    ) -> dict[str, torch.Tensor]:
        """The gradients of the module's own parameters, a row a sample: of all samples at once where torch can do that,
        else of one after the other."""
        places, grads = zip(*call.grads.items(), strict=True)
        grads = tuple(_precise(self._split(name, module, grad)) for grad in grads)

        def outputs(
            values: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[torch.Tensor, ...]:
            output = functional_call(module, values, args, kwargs)
            return tuple((output if isinstance(output, tuple | list) else (output,))[place] for place in places)

        with _hooks_off(module):
            # An argument in which samples cannot be told apart, a keyword, a branch on a value: torch goes row by row.
            with suppress(Exception):
                return self._gradients_at_once(name, module, parameters, call, grads, outputs)
            found = [
                self._gradient_of_row(row, parameters, outputs, call, [grad[row : row + 1] for grad in grads])
                for row in range(len(self._batch))
            ]
        return {key: torch.stack([gradients[key] for gradients in found]) for key in parameters}

    def _gradients_at_once(
        self,
        name: str,
        module: nn.Module,
        parameters: dict[str, torch.Tensor],
        call: _Call,
        grads: tuple[torch.Tensor, ...],
        outputs: Callable[..., tuple[torch.Tensor, ...]],
    ) -> dict[str, torch.Tensor]:
        if call.kwargs:
            raise UnsupportedModule(f"{name} takes keywords")
        rows = tuple(_precise(self._split(name, module, arg.detach())) for arg in call.args)

        def gradient(row: tuple[torch.Tensor, ...], grad: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
            # As the module was called: (T, d) where it sees tokens without samples.
            one = tuple(
                x if arg.dim() < split.dim() else x.unsqueeze(0)
                for x, arg, split in zip(row, call.args, rows, strict=True)
            )
            found, pull_back = vjp(lambda values: outputs(values, one, {}), parameters)[:2]
            shaped = tuple(g.reshape(x.shape) for g, x in zip(grad, found, strict=True))
            gradients: dict[str, torch.Tensor] = pull_back(shaped)[0]
            return gradients

        result: dict[str, torch.Tensor] = vmap(gradient)(rows, grads)
        return result

    def _gradient_of_row(
        self,
        row: int,
        parameters: dict[str, torch.Tensor],
        outputs: Callable[..., tuple[torch.Tensor, ...]],
        call: _Call,
        grads: Sequence[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        count, length = self._batch.input_ids.shape

        def of_row(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                value = value.detach()
                if value.dim() and (value.shape[0] == count or value.shape[0] % (count * length) == 0):
                    share = value.shape[0] // count
                    value = value[row * share : (row + 1) * share]
                return _precise(value) if value.is_floating_point() else value
            return type(value)(of_row(part) for part in value) if type(value) in (tuple, list) else value

        with torch.enable_grad():
            values = {key: p.clone().requires_grad_() for key, p in parameters.items()}
            found = outputs(values, of_row(call.args), {key: of_row(arg) for key, arg in call.kwargs.items()})
            shaped = [grad.reshape(x.shape) for grad, x in zip(grads, found, strict=True)]
            gradients = torch.autograd.grad(found, list(values.values()), shaped, allow_unused=True)
        return {
            key: torch.zeros_like(values[key]) if gradient is None else gradient
            for key, gradient in zip(values, gradients, strict=True)
        }


@contextmanager
def _hooks_off(module: nn.Module) -> Iterator[None]:
    """Within the context a module and those in it are called without their forward hooks."""
    hooks = {part: part._forward_hooks for part in module.modules()}
    for part in hooks:
        part._forward_hooks = type(part._forward_hooks)()
    try:
        yield
    finally:
        for part, own in hooks.items():
            part._forward_hooks = own


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
