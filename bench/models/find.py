"""Finding a model: an embedded one, a local folder or a Hugging Face id, checked before any work starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scoring.errors import UserError, first_line
from scoring.loaded import check_loaded
from scoring.samples import Rejected, Sample, check_tokens, context_length

EMBEDDED = ("authors", "compounds", "graded", "novel", "replies")  # the families of bench.models.embedded
# The files of tokenizers, as transformers names them; slow tokenizers have vocabularies of several kinds.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


# A model, as settings name it: see `find_model`.
ModelName = str


@dataclass(frozen=True)
class ModelReference:
    """A causal LM that was found, with its tokenizer.

    Attributes:
        source: folder or Hugging Face id, for `from_pretrained`.
        revision: commit of a Hugging Face id, None for a folder.
        fingerprint: hash of weights, configuration and tokenizer, or id@commit.
        tokenizer: the Hugging Face tokenizer.
        vocabulary: rows of the embedding.
        max_length: context length in tokens.
        loaded: the model itself, where it is in this process already; `source` is then a name for it.
    """

    source: str
    revision: str | None
    fingerprint: str
    tokenizer: Any
    vocabulary: int
    max_length: int
    loaded: Any = None


def find_model(name: str) -> ModelReference:
    """Resolve an embedded model (`authors`, `authors:retain90`, `novel`; trained on first use), a folder, or an id.

    Raises:
        UserError: one line that says what is missing and what to do.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    family, _, kind = name.partition(":")
    if family in EMBEDDED:
        from bench.models.embedded import embedded_model

        name = str(embedded_model(kind or "full", family))
    folder = Path(name)
    local = folder.is_dir()
    if local:
        _check_folder(folder)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {name!r} does not exist: expected a folder with config.json")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        noun = "folder" if local else "Hugging Face id"
        raise UserError(
            f"model {noun} {name!r}: configuration or tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    revision = None if local else getattr(config, "_commit_hash", None)
    return ModelReference(
        source=str(folder.resolve()) if local else name,
        revision=revision,
        fingerprint=_fingerprint(folder) if local else f"{name}@{revision}",
        tokenizer=tokenizer,
        vocabulary=config.get_text_config().vocab_size,
        max_length=context_length(config),
    )


def loaded_model(name: str, model: Any, tokenizer: Any) -> ModelReference:
    """The reference of a causal LM that is loaded in this process.

    Args:
        name: what to call it.
        model: a transformers model.
        tokenizer: its tokenizer.

    Raises:
        UserError: it is no causal LM, or the tokenizer is none.
    """
    check_loaded(model, tokenizer, name.removeprefix("loaded:"))
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for key, weight in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tuple(weight.shape)}:{weight.dtype};".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    vocabulary = model.config.get_text_config().vocab_size
    return ModelReference(
        name, None, digest.hexdigest(), tokenizer, vocabulary, context_length(model.config), model.eval()
    )


def absolute_model(name: str) -> str:
    """A name that means the same model in every process: of a folder its absolute path."""
    embedded = name.partition(":")[0] in EMBEDDED
    return name if embedded or not Path(name).is_dir() else str(Path(name).absolute())


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {str(folder)!r} has no config.json: expected a saved transformers model")
    if not any(folder.glob("*.safetensors")):
        pickled = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickled:
            raise UserError(
                f"model folder {str(folder)!r} has pickled weights only ({pickled[0]}), which can run code: "
                "convert them with model.save_pretrained(folder), which writes safetensors"
            )
        raise UserError(f"model folder {str(folder)!r} has no *.safetensors: expected the model's weights")
    # Slow tokenizers have files of various names; transformers knows them, and says which is missing.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise UserError(
            f"model folder {str(folder)!r} has no tokenizer (tokenizer.json): save one there with "
            "tokenizer.save_pretrained(folder)"
        )


def _fingerprint(folder: Path) -> str:
    """The sha256 of the weights, the configuration and the tokenizer: all that a score depends on."""
    digest = hashlib.sha256()
    patterns = ("config.json", "*.safetensors", *TOKENIZER_FILES)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def check_vocabulary(samples: Sequence[Sample], rejected: Sequence[Rejected], model: ModelReference, name: str) -> None:
    """Refuse samples that the model cannot take.

    Args:
        samples: of the data set `name`.
        rejected: those that were left out before, for the message where there is no other.
        model: that is to take them.
        name: of the data set.

    Raises:
        UserError: there is no sample, or one has a token that the model does not know.
    """
    largest = max((int(sample.input_ids.max()) for sample in samples), default=-1)
    check_tokens(len(samples), largest, rejected, model.vocabulary, f"the tokenizer of {model.source!r}", name)
