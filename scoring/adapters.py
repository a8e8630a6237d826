"""Folders of adapters (LoRA and the like), which name the model that they are for."""

from __future__ import annotations

import json
from pathlib import Path

from scoring.errors import UserError, first_line


def adapter_base(folder: Path) -> str | None:
    """The base model that the adapter in a folder names; None if the folder holds no adapter alone.

    Raises:
        UserError: the folder has a model and an adapter, or the adapter names no base that can be found.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(
            f"model folder {str(folder)!r} has full weights and an adapter (adapter_config.json), which transformers "
            "would attach: move one of the two to a folder of its own"
        )
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {first_line(error)}; expected a JSON object") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{str(file)!r} has no base_model_name_or_path: expected the model that the adapter is for")
    if (folder / base).is_dir():
        return str((folder / base).resolve())
    if base.startswith((".", "/", "~")) and not Path(base).is_dir():
        raise UserError(
            f"adapter {str(folder)!r} is for the model {base!r}, which does not exist: mend its path in {file.name}"
        )
    return base
