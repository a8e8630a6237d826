"""Folders of adapters (LoRA and the like), which name the model that they are for; and their merge into it."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from scoring.errors import UserError, first_line
from scoring.reading import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# How far a merge may move log-probs in fp32: rounding gives 1e-5, and what is no merge far more.
MERGE_TOLERANCE = 1e-3


class Base(NamedTuple):
    """The model that an adapter is for: a folder, or a Hugging Face id and its revision."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def adapter_base(folder: Path) -> Base | None:
    """The base model that the adapter in a folder names; None if the folder holds no adapter alone.

    Raises:
        UserError: the folder has a model and an adapter, or the adapter names no base that can be found.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(
            f"model folder {str(folder)!r} has full weights and an adapter ({CONFIG}), which transformers "
            "would attach: move one of the two to a folder of its own"
        )
    config = _settings(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(f"{str(file)!r} has no base_model_name_or_path: expected the model that the adapter is for")
    if (folder / name).is_dir():
        return Base(str((folder / name).resolve()))
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(
            f"adapter {str(folder)!r} is for the model {name!r}, which does not exist: mend its path in {file.name}"
        )
    return Base(name, None if Path(name).is_dir() or not isinstance(revision, str) else revision or None)


def _settings(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(folder / CONFIG, dict[str, Any], "what PEFT's save_pretrained writes")
    return config


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that cannot be merged into a model, by its files alone.

    Raises:
        UserError: it has no weights, or is of another kind.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"adapter {str(folder)!r} has no {WEIGHTS}: expected the adapter's weights")
    peft, config = _peft(folder), _settings(folder)
    kind = config.get("peft_type")
    known: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise UserError(
            f"adapter {str(folder)!r} is of the kind (peft_type) {kind!r}, which PEFT {peft.__version__} does not know"
        )
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if issubclass(known, peft.PromptLearningConfig) or not hasattr(tuner, "merge_and_unload"):
        raise UserError(
            f"adapter {str(folder)!r} is of the kind {kind}, which cannot be merged into a model's weights: expected "
            "LoRA or another kind that changes weights"
        )
    if config.get("layer_replication"):
        raise UserError(
            f"adapter {str(folder)!r} repeats layers (layer_replication), which then share weights and cannot be "
            "merged: expected an adapter for the layers that the model has"
        )


def with_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """A model with the adapter of a folder on it: a `peft.PeftModel` in eval mode. `model` is changed in place; weights
    that it shares between an adapted layer and another become each one's own.

    Args:
        model: in fp32.
        trainable: the adapter's weights can be trained; no others can.

    Raises:
        UserError: the adapter cannot be merged, or it does not fit the model.
    """
    check_adapter(folder)
    peft = _peft(folder)
    try:
        # PEFT draws initial values, and warns of what is looked at here.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            # So that the adapter, once saved again, names the model by a name that is right anywhere.
            config.base_model_name_or_path = model.name_or_path or config.base_model_name_or_path
            adapted: Any = peft.PeftModel(model, config)
            # AdaLoRA counts its ranks in parameters that it does not save.
            own = {name for name, p in adapted.named_parameters() if p.requires_grad and ".ranknum" not in name}
            for name in own:
                adapted.get_parameter(name).data.fill_(torch.nan)  # the mark of what the file does not have
            loading = adapted.load_adapter(
                str(folder),
                "default",
                is_trainable=trainable,
                torch_device=str(model.device),
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
            )
    except Exception as error:  # PEFT has as many errors as ways in which an adapter can be wrong
        raise _unfit(folder, model, _reason(error)) from error
    if strange := loading.unexpected_keys:
        raise _unfit(folder, model, f"{len(strange)} of its weights have no place there, such as {min(strange)!r}")
    if missing := [name for name, p in adapted.named_parameters() if name in own and p.isnan().any()]:
        shown = min(missing).replace(".default", "")
        raise _unfit(folder, model, f"it lacks {len(missing)} weights that its {CONFIG} calls for, such as {shown!r}")
    _untie(adapted)
    return adapted.eval() if trainable else adapted.eval().requires_grad_(False)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    # torch has the mismatches of shapes below a heading.
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if lines[1:] and lines[0].endswith(":") else first_line(error)


def _unfit(folder: Path, model: Any, reason: str) -> UserError:
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return UserError(f"adapter {str(folder)!r} cannot be put on the model {name!r}: {reason}")


def unknown_settings(folder: Path) -> list[str]:
    """The settings of an adapter that the installed PEFT does not know and leaves out."""
    config = _settings(folder)
    known = inspect.signature(_peft(folder).PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]].__init__).parameters
    return sorted(name for name, value in config.items() if value and name not in known)


def has_embeddings(adapted: Any, folder: Path) -> bool:
    """Whether an adapter's file has embeddings of its model too, as PEFT saves them where they were changed."""
    own: set[str] = set(_peft(folder).get_peft_model_state_dict(adapted, save_embedding_layers=False))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return not own.issuperset(file.keys())


def shared_weights(adapted: Any) -> list[list[tuple[str, nn.Module, str]]]:
    """The weights of adapted layers that other layers have too, as a head that is tied to the embedding: the name of
    each layer, its module, and the weight's name there."""
    owners = defaultdict(list)
    for name, module in adapted.get_base_model().named_modules():
        for key, p in module.named_parameters(recurse=False):
            owners[id(p)].append((name, module, key))
    return [places for places in owners.values() if len(places) > 1 and _merge_differs(adapted, places)]


def _merge_differs(adapted: Any, places: list[tuple[str, nn.Module, str]]) -> bool:
    """Whether a merge would change a shared weight for one of the layers that have it."""
    base = adapted.get_base_model()
    around = [base.get_submodule(name.rpartition(".")[0]) for name, *_ in places if name.endswith(".base_layer")]
    # Adapters of single tokens are tied as the weights are, and change them for both.
    return bool(around) and not any(getattr(layer, "tied_adapter", None) for layer in around)


def _untie(adapted: Any) -> None:
    for places in shared_weights(adapted):
        for _, module, key in places[1:]:
            setattr(module, key, nn.Parameter(getattr(module, key).detach().clone(), requires_grad=False))
        adapted.get_base_model().config.tie_word_embeddings = False


def adapter_parameters(model: nn.Module) -> set[int]:
    """The ids (`id`) of the parameters that adapters have put into a model; empty for a plain one."""
    return {
        id(p)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())
        if isinstance(part := getattr(module, name, None), nn.Module)
        for p in part.parameters()
    }


def adds_a_product(adapted: Any) -> bool:
    """Whether all that an adapter does is to add B A to weights, as LoRA does. Then the layer below it has the inputs
    and the gradients of outputs that the merged layer would have."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    plain = (peft.tuners.lora.Linear, peft.tuners.lora.Embedding)
    modules = list(adapted.modules())
    layers: list[Any] = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return not any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules) and all(
        type(layer) in plain and not layer.lora_variant and not any(layer.lora_bias.values()) for layer in layers
    )


def merged_weights(
    model: nn.Module, wanted: Callable[[torch.Tensor], bool] = lambda _: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a model will have once its adapters are merged, by the names that they will have, one after the
    other; for adapters that add a product.

    Args:
        model: within its adapters, or a plain one.
        wanted: whether the merged one is wanted, given what it is now.
    """
    own = adapter_parameters(model)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}
    for name, p in model.named_parameters():
        if id(p) in own or not wanted(p):
            continue
        layer: Any = layers.get(name.removesuffix(".base_layer.weight"))
        weight = p.detach()
        if layer is not None:
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def merged(adapted: Any) -> Any:
    """The model with its adapter merged into the weights, which all require gradients; `adapted` is used up."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return adapted.merge_and_unload().requires_grad_(True)


@torch.no_grad()
def checked_merge(adapted: Any, folder: Path) -> Any:
    """The same, tried on a few tokens.

    Args:
        adapted: in fp32 or fp64; in fewer bits rounding would hide what is wrong.
        folder: of the adapter.

    Raises:
        UserError: the adapter cannot be merged, or the merged model is another one.
    """
    base = adapted.get_base_model()
    tokens = torch.linspace(0, base.config.get_text_config().vocab_size - 1, 8, device=base.device).long()[None]
    try:
        before = base(input_ids=tokens).logits.log_softmax(-1)
        whole = merged(adapted)
        moved = (whole(input_ids=tokens).logits.log_softmax(-1) - before).abs().max().item()
    except Exception as error:
        raise UserError(f"adapter {str(folder)!r} cannot be merged into its base model: {first_line(error)}") from error
    if moved > MERGE_TOLERANCE:
        raise UserError(
            f"adapter {str(folder)!r} cannot be merged into its base model: PEFT's merge moves log-probs by {moved:.2g}"
        )
    return whole


def _peft(folder: Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"model folder {str(folder)!r} holds an adapter: pip install 'mrd-bench[lora]'") from error
    return peft
