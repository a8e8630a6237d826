"""Loading a causal LM, so that what is in memory is what the folder says, and nothing else."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from scoring.abilities import abilities_of
from scoring.adapters import adapter_base, checked_merge, unknown_settings, with_adapter
from scoring.engine import Dtype
from scoring.errors import UserError, first_line
from scoring.settings import named

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Quantised weights that can be turned into plain ones while they are read, and how to ask for it.
_DEQUANTISED_AS_READ: dict[str, Callable[[], Any]] = {
    "fp8": lambda: FineGrainedFP8Config(dequantize=True),
    "mxfp4": lambda: Mxfp4Config(dequantize=True),
    "compressed-tensors": lambda: CompressedTensorsConfig(run_compressed=False),
}
# Those that can be once they are read.
_DEQUANTISED_AFTERWARDS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "torchao")

# Flags of a generation config that are about sampling.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_model(
    source: str | Path, dtype: Dtype = "float32", device: str = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """A causal LM in eval mode, from a folder or a Hugging Face id. Safetensors only; no remote code.

    A folder of an adapter gives its base model with the adapter merged. Quantised weights become plain ones.
    `loading_notes` has what was done beyond reading.

    Args:
        device: a torch device; "auto" spreads the layers over all GPUs of this process.

    Raises:
        UserError: the model cannot be loaded, or is no causal LM.
    """
    if device == "auto" and importlib.util.find_spec("accelerate") is None:
        raise UserError("a replica of several GPUs needs accelerate: pip install 'mrd-bench[trainer]'")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    name = str(source)
    notes: list[str] = []
    loaded = _read_whole(name, dtype, device, revision, notes)
    if device == "auto" and any(p.device.type != "cuda" for p in loaded.parameters()):
        raise UserError(
            f"model {name!r} does not fit into the memory of its replica's GPUs: raise {named('gpus_per_replica')}"
        )
    non_finite = next((key for key, p in loaded.named_parameters() if not p.isfinite().all()), None)
    if non_finite is not None:
        raise UserError(f"model {name!r}: weight {non_finite!r} holds NaN or infinity; it cannot be used")
    _make_savable(loaded, notes)
    model: PreTrainedModel = loaded.eval() if device == "auto" else loaded.to(device).eval()
    abilities_of(model)
    vars(model)["loading_notes"] = notes
    return model


def load_adapted(folder: str, device: str = "cpu") -> Any:
    """The base model of an adapter's folder in fp32, with the adapter on it to be trained further: a `peft.PeftModel`
    in eval mode.

    Raises:
        UserError: one of the two cannot be loaded, or they do not fit.
    """
    base = adapter_base(Path(folder))
    if base is None:
        raise UserError(f"adapter {folder!r} has no adapter_config.json: expected a folder of a PEFT adapter")
    return with_adapter(load_model(base.name, "float32", device, base.revision), Path(folder), trainable=True)


def loading_notes(model: Any) -> list[str]:
    """What was done to a model beyond reading its weights, for its reader to know."""
    return list(vars(model).get("loading_notes", ()))


def copied(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model in another number format, in eval mode on the same device."""
    twin: Any
    try:
        twin = copy.deepcopy(model)
    except RuntimeError:  # it keeps what it computed last, with the gradients' graph (RecurrentGemma)
        twin = type(model)(copy.deepcopy(model.config))
        twin.load_state_dict(model.state_dict())
        twin = twin.to(next(model.parameters()).device)
    exact: PreTrainedModel = twin.to(dtype).eval()
    return exact


def read_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model; of an adapter that of its base.

    Raises:
        UserError: it cannot be read.
    """
    if base := adapter_base(Path(source)):
        return read_config(*base)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(source), revision=revision or "main", trust_remote_code=False
        )
        return config
    except Exception as error:
        raise UserError(f"model {str(source)!r}: configuration cannot be loaded: {first_line(error)}") from error


def _read_whole(name: str, dtype: Dtype, device: str, revision: str | None, notes: list[str]) -> Any:
    """What a name stands for: a model, or one with an adapter, which may itself be for such a one."""
    folder = Path(name)
    base = adapter_base(folder)
    if base is None:
        return _read(name, dtype, device, revision, notes)
    loaded = _read_whole(base.name, "float32", device, base.revision, notes)
    tied = loaded.config.tie_word_embeddings
    whole = checked_merge(with_adapter(loaded, folder), folder)
    whole.name_or_path = name
    _convert(whole, DTYPES[dtype])
    rounded = ", in float32 and rounded to bfloat16" if dtype == "bfloat16" else ""
    notes.append(f"adapter {folder.name} merged into {Path(base.name).name}{rounded}")
    if tied and not whole.config.tie_word_embeddings:
        notes.append(f"adapter {folder.name} changes head and embedding differently: they share their weights no more")
    if unknown := unknown_settings(folder):
        notes.append(f"adapter {folder.name} has settings that this PEFT leaves out: {', '.join(unknown)}")
    return whole


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Give the weights another format, as if they were read in it: without buffers, such as the frequencies of
    positions, and without what transformers keeps in fp32."""
    kept = model._keep_in_fp32_modules_strict or () if dtype == torch.bfloat16 else ()
    for name, p in model.named_parameters():
        if not any(part in name for part in kept):
            p.data = p.data.to(dtype)
    model.config.dtype = dtype


def _read(name: str, dtype: Dtype, device: str, revision: str | None, notes: list[str]) -> Any:
    config = read_config(name, revision)
    _check_layers(name, config)
    try:
        options, dequantise = _options(name, config)
        result: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
            **({"device_map": "auto"} if device == "auto" else {}),
        )
        loaded, loading = result
        if dequantise:
            loaded = loaded.dequantize().to(DTYPES[dtype])
    except (UserError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(
            f"model {name!r} needs a package that is not installed: {first_line(error)}; install it, or use a model "
            "with plain weights"
        ) from error
    except Exception as error:  # a configuration can be wrong in as many ways as there are architectures
        raise UserError(
            f"model {name!r} cannot be loaded as a causal language model: {first_line(error) or type(error).__name__}"
        ) from error
    if method := _quantised(config):
        notes.append(f"weights dequantised from {method} to {dtype}")
    _check_keys(name, loading, notes)
    return loaded


def _check_layers(name: str, config: Any) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"model {name!r}: num_hidden_layers in config.json is {layers!r}: expected at least 1")


def _quantised(config: Any) -> str | None:
    wanted = getattr(config, "quantization_config", None)
    if wanted is None:
        return None
    method = wanted.get("quant_method") if isinstance(wanted, dict) else getattr(wanted, "quant_method", None)
    return str(getattr(method, "value", method))


def _options(name: str, config: Any) -> tuple[dict[str, Any], bool]:
    """Further arguments of `from_pretrained`, and whether to dequantise what it gives."""
    # The fused attention kernels leave out the soft-capping of Gemma 2's scores: another model, silently. All others
    # choose for themselves.
    soft_cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    options: dict[str, Any] = {"attn_implementation": "eager"} if soft_cap else {}
    method = _quantised(config)
    if method is not None and method in _DEQUANTISED_AS_READ:
        options["quantization_config"] = _DEQUANTISED_AS_READ[method]()
    elif method is not None and method not in _DEQUANTISED_AFTERWARDS:
        raise UserError(
            f"model {name!r} is quantised by {method}, whose weights can be neither perturbed nor differentiated: use "
            "the model it was made from, or save a dequantised copy"
        )
    return options, method in _DEQUANTISED_AFTERWARDS


def _check_keys(name: str, loading: Any, notes: list[str]) -> None:
    """Refuse a checkpoint that lacks weights; note those that it has too many."""
    if missing := loading["missing_keys"]:
        # transformers fills missing weights with random numbers.
        raise UserError(
            f"model {name!r} has no weights for {min(missing)!r} ({len(missing)} missing): expected a complete causal "
            "language model"
        )
    if mismatched := loading.get("mismatched_keys"):
        raise UserError(f"model {name!r}: {_first(mismatched)} has another shape than config.json says")
    if unexpected := loading["unexpected_keys"]:
        notes.append(
            f"{len(unexpected)} weights of the checkpoint have no place in the model, such as {min(unexpected)!r}"
        )


def _first(keys: Any) -> str:
    first = sorted(keys)[0]
    return repr(first[0] if isinstance(first, Sequence) and not isinstance(first, str) else first)


def _make_savable(model: Any, notes: list[str]) -> None:
    """Take flags of sampling out of a greedy generation config: transformers reads such a config, and refuses to save
    it, which would come out at the first checkpoint."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        if not generation.do_sample:
            generation.update(**dict.fromkeys(SAMPLING))
            notes.append("generation_config.json asks for no sampling and has flags of sampling: they are left out")
