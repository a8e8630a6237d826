"""What docs/models.md says of each type of model is what is measured."""

from __future__ import annotations

import pytest

from tests.model_zoo import MODEL_TYPES, findings, row
from tests.paths import ROOT

TABLE = (ROOT / "docs" / "models.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_the_table(name: str) -> None:
    measured = row(name, findings(name))
    assert "WRONG" not in measured
    assert measured in TABLE.splitlines()
