"""What a run is known by: the hash of its spec."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from scoring.plugins import loaded_plugins
from scoring.settings import settings_of


def identity_fields(spec: Any, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a spec that are in its identity.

    The number of tokens in a batch changes nothing but the rounding. Where it is the default, which depends on the
    device, it counts as the one default that there was once.

    A field that specs had none of once is named in the spec's ADDED_LATER, and is left out while it has its default: so
    what was run before there was such a field has the same identity as ever.

    Args:
        left_out: fields that never are in it.
    """
    defaults = {
        setting.name: setting.default for setting in settings_of(type(spec)) if setting.name in spec.ADDED_LATER
    }
    fields = {
        name: value
        for name, value in dataclasses.asdict(spec).items()
        if name not in left_out and not (name in defaults and value == defaults[name])
    }
    if "batch_tokens" in fields and fields["batch_tokens"] is None:
        from scoring.samples import BATCH_TOKENS  # with PyTorch, which a list of results has no use for

        fields["batch_tokens"] = BATCH_TOKENS
    return fields


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
    keys = dict.fromkeys([*identity, *other])
    return ", ".join(key for key in keys if other.get(key) != identity.get(key) and key != "spec_hash")
