"""What a run is known by: the hash of its spec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from scoring.plugins import loaded_plugins


def with_spec_hash(content: dict[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """A run's identity: its spec, with the plugins that were loaded, and the hash of all that.

    Args:
        content: the spec, with the hashes of data and weights.
        named: keys left out of the hash: a moved folder or renamed file is still the same run.
    """
    if plugins := loaded_plugins():
        content = content | {"plugins": sorted(plugin.sha256 for plugin in plugins)}
    hashed = {key: value for key, value in content.items() if key not in named}
    return content | {"spec_hash": hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]}


def differences(other: dict[str, Any], identity: dict[str, Any]) -> str:
    """What two identities differ in, for a message."""
    return ", ".join(key for key in identity if other.get(key) != identity[key] and key != "spec_hash")
