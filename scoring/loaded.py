"""What a caller in Python may give as a model and as its tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from scoring.errors import UserError


def check_loaded(model: Any, tokenizer: Any, name: str = "model") -> None:
    """Refuse what is not a loaded causal LM of transformers, or not a tokenizer.

    Args:
        model: what was given as the model; adapters around one will do.
        tokenizer: what was given as its tokenizer.
        name: name of the model's argument, for messages.

    Raises:
        UserError: one line that names the argument.
    """
    expected = "expected a loaded causal LM, as AutoModelForCausalLM.from_pretrained gives"
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise UserError(f"{name} is {_shown(model)}: {expected}")
    head = getattr(model, "get_output_embeddings", None)
    if not callable(head) or head() is None:
        raise UserError(f"{name} is a {type(model).__name__}, which has no language-model head: {expected}")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UserError(f"{name} has weights on the meta device: {expected}")
    if not hasattr(tokenizer, "bos_token_id") or not callable(tokenizer):
        raise UserError(f"tokenizer is {_shown(tokenizer)}: expected the model's, as AutoTokenizer gives")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
