"""The outcome of attacks on the terminal."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from bench.attacks import FAMILIES
from bench.jobs.attack import AttackResult
from bench.jobs.attack_table import UNTAUGHT
from bench.metrics import METRICS
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY

ROLES = (ORIGINAL, MODEL, RETAIN_ONLY)


def print_attacks(result: AttackResult) -> None:
    """A line for each attack: the first metric of each model, and what the model knows beyond the retain-only one."""
    rows = result.table.filter(pc.not_equal(result.table["level"], "sample")).to_pylist()
    metrics = result.record["metrics"]
    cells = {(row["level"], row["attack"], row["updates"], row["model"], row["name"]): row for row in rows}
    roles = [role for role in ROLES if any(row["model"] == role for row in rows)]
    lines = list(
        dict.fromkeys((row["family"], row["attack"], row["updates"]) for row in rows if row["level"] == "metric")
    )
    for name in metrics[:1]:
        extra = [f"{MODEL} - {RETAIN_ONLY}"] if RETAIN_ONLY in roles else []
        print(f"{name} {'↑' if METRICS[name].higher_is_better else '↓'} under attack")
        print(f"{'':<46}" + "".join(f"{column:>25}" for column in (*roles, *extra)))
        for family in ("none", *FAMILIES):
            for of, attack, updates in lines:
                if of != family or ("metric", attack, updates, MODEL, name) not in cells:
                    continue
                if cells["metric", attack, updates, MODEL, name]["missing"]:
                    continue
                title = attack + (f" @ {updates}" if updates is not None else "")
                texts = [_cell(cells.get(("metric", attack, updates, role, name))) for role in roles]
                texts += [_cell(cells.get(("difference", attack, updates, pair, name))) for pair in extra]
                print(f"{title:<46}" + "".join(f"{text:>25}" for text in texts))
    for attack, of_leak in _leaks(rows).items():
        print(f"\n{attack}, of the model{' and the retain-only one' if RETAIN_ONLY in roles else ''}")
        for name, by_role in of_leak.items():
            print(f"{name:<46}" + "".join(f"{_cell(by_role.get(role)):>25}" for role in roles))
    print("\nthe attack under which most is known")
    for role in roles:
        for name in metrics:
            row = next((r for r in rows if (r["level"], r["model"], r["name"]) == ("worst", role, name)), None)
            if row:
                at = f" @ {row['updates']}" if row["updates"] is not None else ""
                print(f"{role:<14}{name:<22}{_cell(row):>25}  {row['attack']}{at}")
    halves = [row for row in rows if row["level"] == "half" and not row["attack"].endswith(UNTAUGHT)]
    for row in halves:
        if row["model"] == MODEL and row["name"] == metrics[0]:
            when = row["missing"] or f"{_cell(row)} updates"
            print(f"{row['attack']}: half of what was lost is back: {when}")
    missing = {(row["attack"], row["missing"]) for row in rows if row["level"] == "metric" and row["missing"]}
    for attack, reason in sorted(missing):
        print(f"missing {attack}: {reason}")
    print(f"brackets: 95 % intervals, bootstrap over samples -> {result.path}")


def _leaks(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Attack -> leak@k -> role -> row."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        if row["level"] == "metric" and row["name"].startswith("leak_at_"):
            found.setdefault(row["attack"], {}).setdefault(row["name"], {})[row["model"]] = row
    return found


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    return f"{row['value']:.3f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")
