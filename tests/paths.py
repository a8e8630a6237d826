"""Where things are that tests look at."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Real data with licences of their own, which are not part of the project: tests that need them skip without them.
SHARED = ROOT.parent / "shared" / "data"
