"""Finding a model: an embedded one, a local folder or a Hugging Face id, checked before any work starts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.files.folders import RUN_MODEL, RUN_RECORD, owner_of
from scoring.adapters import adapter_base, check_adapter
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
        revision: commit of a Hugging Face id, or the revision that was asked for; None for a folder.
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
    """Resolve an embedded model (`authors`, `authors:retain90`, `novel`; trained on first use), a folder of a model, of
    an adapter or of a finished run, whose model it is, or an id, as in `org/name` or `org/name@revision`.

    Raises:
        UserError: one line that says what is missing and what to do.
    """
    family, _, kind = name.partition(":")
    if family in EMBEDDED:
        from bench.models.embedded import embedded_model

        name = str(embedded_model(kind or "full", family))
    folder = Path(name)
    if folder.is_dir():
        return _in_folder(_model_of_run(folder))
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {name!r} does not exist: expected a folder with config.json")
    identifier, _, asked = name.partition("@")
    config, tokenizer = _read(identifier, f"Hugging Face id {name!r}", asked or None)
    revision = getattr(config, "_commit_hash", None) or asked or None
    return _reference(identifier, revision, f"{identifier}@{revision}", config, tokenizer)


def _model_of_run(folder: Path) -> Path:
    """The folder of the model that a run has trained; of another folder itself.

    Raises:
        UserError: the run has not finished, or there are several.
    """
    if (folder / "config.json").is_file():
        return folder
    if (folder / RUN_RECORD).is_file() and (folder / RUN_MODEL).is_dir():
        return folder / RUN_MODEL
    if owner_of(folder) is not None:
        raise UserError(
            f"model folder {str(folder)!r} has no {RUN_RECORD}: it is a run that has not finished, or trains no "
            "model; the command that began it continues it"
        )
    runs = sorted(path.parent for path in folder.glob(f"*/{RUN_RECORD}") if (path.parent / RUN_MODEL).is_dir())
    if runs:
        raise UserError(f"model folder {str(folder)!r} holds several runs: expected one of {', '.join(map(str, runs))}")
    return folder


def _in_folder(folder: Path) -> ModelReference:
    base = adapter_base(folder)
    if base is None:
        _check_folder(folder)
        config, tokenizer = _read(str(folder), f"folder {str(folder)!r}")
        return _reference(str(folder.resolve()), None, _fingerprint(folder), config, tokenizer)
    check_adapter(folder)
    model = find_model(str(base))
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = _read_tokenizer(str(folder), f"adapter {str(folder)!r}") if has_tokenizer else model.tokenizer
    digest = hashlib.sha256(f"{model.fingerprint};{_fingerprint(folder)}".encode()).hexdigest()
    return replace(model, source=str(folder.resolve()), revision=None, fingerprint=digest, tokenizer=tokenizer)


def _reference(source: str, revision: str | None, fingerprint: str, config: Any, tokenizer: Any) -> ModelReference:
    vocabulary = config.get_text_config().vocab_size
    return ModelReference(source, revision, fingerprint, tokenizer, vocabulary, context_length(config))


def _read(source: str, shown: str, revision: str | None = None) -> tuple[Any, Any]:
    """Configuration and tokenizer."""
    from scoring.load import read_config

    return read_config(source, revision), _read_tokenizer(source, f"model {shown}", revision)


def _read_tokenizer(source: str, shown: str, revision: str | None = None) -> Any:
    """The tokenizer. What transformers warns of, such as a pattern that splits words wrongly, is passed on."""
    from transformers import AutoTokenizer

    try:
        with _warnings_of_transformers() as warned:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, revision=revision or "main")
        limit = tokenizer.model_max_length
        if not isinstance(limit, int | float):
            raise ValueError(f"model_max_length is {limit!r}, expected a number")
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(f"{shown}: tokenizer cannot be loaded: {first_line(error)}") from error
    for message in warned:
        warnings.warn(f"{shown}: tokenizer: {message}", stacklevel=3)
    return tokenizer


@contextmanager
def _warnings_of_transformers() -> Iterator[list[str]]:
    """Within the context the list takes what transformers warns of, a line each, and the terminal does not."""
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(first_line(Exception(record.getMessage())))

    logger = logging.getLogger("transformers")
    before, handlers, propagate = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Keep(logging.WARNING)], False
    transformers_logging.set_verbosity_warning()
    try:
        yield messages
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(before)
        transformers_logging.set_verbosity_error()


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
    if not _weights(folder):
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


def _weights(folder: Path) -> list[Path]:
    """The files of weights: those of the folder, and those in folders below it that its index names.

    Raises:
        UserError: the index cannot be read, or names what is no safetensors file within the folder.
    """
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{str(index)!r} is no index of weights ({first_line(error)}): expected weight_map"
            ) from error
        for name in sorted(named, key=str):
            path = folder / str(name)
            # Within the folder by name: the cache of the hub keeps its files elsewhere, behind links.
            within = folder.absolute() in Path(os.path.normpath(path.absolute())).parents
            if path.suffix != ".safetensors" or not path.is_file() or not within:
                raise UserError(f"{str(index)!r} names {str(name)!r}: expected a safetensors file within the folder")
            files.add(path)
    return sorted(files)


def _fingerprint(folder: Path) -> str:
    """The sha256 of all that a score depends on: the weights, the configuration, the tokenizer, and the tokens that end
    an answer where there are several."""
    digest = hashlib.sha256()
    patterns = ("config.json", "adapter_config.json", *TOKENIZER_FILES)
    files = {path for pattern in patterns for path in folder.glob(pattern)} | set(_weights(folder))
    for path in sorted(files):
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    try:
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        stops = None
    if isinstance(stops, list):
        digest.update(f"eos_token_id:{json.dumps(stops)};".encode())
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
