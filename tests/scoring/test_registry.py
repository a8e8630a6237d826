"""Registries: a name is given once."""

from __future__ import annotations

import pytest

from scoring.errors import UserError
from scoring.registry import Registry


def colours() -> Registry[int]:
    return Registry("colour", {"red": 1, "dark-blue": 2})


def test_entries_are_read_as_of_any_mapping() -> None:
    registry = colours()
    registry["green"] = 3
    assert list(registry) == ["red", "dark-blue", "green"]
    assert registry["green"] == 3
    assert "yellow" not in registry
    assert dict(registry) == {"red": 1, "dark-blue": 2, "green": 3}


@pytest.mark.parametrize("name", ["red", "RED", "Dark-Blue"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    registry = colours()
    message = rf"^colour '{name}': there is '{name.lower()}' already; choose another name$"
    with pytest.raises(UserError, match=message):
        registry[name] = 9
    with pytest.raises(UserError, match=message):
        registry.update({name: 9})
    assert dict(registry) == dict(colours())


@pytest.mark.parametrize("name", ["", "a,b", "a:b", "mine.yaml", "two words", "-red"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected a name of letters, digits, - and _"):
        colours()[name] = 3


def test_an_entry_can_be_taken_out_again() -> None:
    registry = colours()
    del registry["red"]
    registry["Red"] = 4
    assert registry["Red"] == 4
