"""What a result store holds, on the terminal and as CSV, JSON or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from bench.files.status import FINISHED
from bench.results.store import PARTITIONS, Results, Skipped
from scoring.errors import UserError, unknown_name

FORMATS = ("csv", "json", "latex")
MANY = 20  # skipped files named on the terminal


def list_lines(results: Results) -> list[str]:
    """A line for each task and experiment."""
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    columns = ["task", "experiment", "algorithm", "selection", "seed", "status"]
    for row in results.runs.select(columns).to_pylist():
        groups[row["task"], row["experiment"]].append(row)
    scored = Counter((row["task"], row["experiment"]) for row in results.scores.select(list(PARTITIONS)).to_pylist())
    lines = [
        f"{'task':<12}{'experiment':<20}{'runs':>6}{'failed':>8}{'selections':>12}{'seeds':>7}{'scores':>8}  algorithms"
    ]
    for where in sorted({*groups, *scored}):
        own = groups[where]
        algorithms = ", ".join(dict.fromkeys(row["algorithm"] for row in own))
        counts = [len(own), sum(row["status"] != FINISHED for row in own)]
        counts += [len({row[name] for row in own}) for name in ("selection", "seed")] + [scored[where]]
        widths = (6, 8, 12, 7, 8)
        numbers = "".join(f"{count:>{width}}" for count, width in zip(counts, widths, strict=True))
        lines.append(f"{where[0]:<12}{where[1]:<20}{numbers}  {algorithms}")
    return lines


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """A line for each file that was not read."""
    lines = [f"skipped {each.path}: {each.reason}" for each in skipped[:MANY]]
    return lines + ([f"skipped {len(skipped) - MANY} more"] if len(skipped) > MANY else [])


def run_lines(results: Results, run: str) -> list[str]:
    """All that is known of a run.

    Raises:
        UserError: there is none, or several, whose hash begins so.
    """
    rows = [row for row in results.runs.to_pylist() if row["run"].startswith(run)]
    if not rows:
        raise UserError(f"run {run!r} is not there; expected the hash of a run, or how it begins (see results export)")
    if len(names := sorted({row["run"] for row in rows})) > 1:
        raise UserError(f"run {run!r} is the beginning of {len(names)}: {', '.join(names[:5])}; give more of it")
    row = rows[0]
    metrics, spec = dict(row.pop("metrics") or ()), json.loads(row.pop("spec"))
    packages = json.loads(row.pop("packages") or "{}")
    lines = [f"{name:<22}{_cell(value)}" for name, value in row.items()]
    lines.append(f"{'packages':<22}{', '.join(f'{name} {version}' for name, version in packages.items())}")
    lines += ["metrics", *(f"  {name:<30}{_cell(value)}" for name, value in metrics.items())]
    lines += ["spec", *(f"  {name:<30}{json.dumps(value)}" for name, value in spec.items())]
    samples = [each for each in results.samples.to_pylist() if each["run"] == row["run"]]
    seen: set[str] = set()
    of_model = [each for each in results.scores.to_pylist() if each["model_fingerprint"] == row["model_fingerprint"]]
    scores = {each["sample_id"]: each["mrd"] for each in of_model}
    lines.append(f"{'sample':<30}{'tokens':>8}{'MRD':>12}{'updates':>9}{'until forgotten':>17}")
    for each in samples:
        if each["sample_id"] not in seen:  # once, also of a run that two experiments have
            seen.add(each["sample_id"])
            mrd = scores.get(each["sample_id"], each["mrd_initial"])
            numbers = [each["num_tokens"], mrd, each["updates"], each["updates_until_forgotten"]]
            cells = zip(map(_cell, numbers), (8, 12, 9, 17), strict=True)
            lines.append(f"{each['sample_id']:<30}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    return lines


def exported(results: Results, table: str, form: str) -> str:
    """A table as text; metrics are columns of the runs.

    Raises:
        UserError: no such table or format.
    """
    tables = {"runs": results.runs, "samples": results.samples, "scores": results.scores}
    if table not in tables:
        raise unknown_name("table", table, tables)
    if form not in FORMATS:
        raise unknown_name("format", form, FORMATS)
    rows = flat_rows(tables[table])
    if form == "json":
        return json.dumps(rows, indent=1) + "\n"
    names = list(dict.fromkeys(name for row in rows for name in row)) or tables[table].column_names
    return _csv(names, rows) if form == "csv" else latex_table(names, rows)


def flat_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows with a column for each metric."""
    rows = table.to_pylist()
    if "metrics" not in table.column_names:
        return rows
    return [{k: v for k, v in row.items() if k != "metrics"} | dict(row["metrics"] or ()) for row in rows]


def _csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\N{MINUS SIGN}": "$-$",
    "–": "--",
    "‖": r"$\|$",
    "θ": r"$\theta$",
    "Δ": r"$\Delta$",
    "|": r"$|$",
    "\n": " ",
}


def latex_table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A LaTeX table of these columns; what LaTeX would read as its own is escaped."""

    def line(cells: Sequence[Any]) -> str:
        texts = ["".join(_ESCAPES.get(letter, letter) for letter in _cell(cell)) for cell in cells]
        return " & ".join(texts) + r" \\"

    body = [line([row.get(name) for name in names]) for row in rows]
    head = [rf"\begin{{tabular}}{{{'l' * len(names)}}}", r"\hline", line(names), r"\hline"]
    return "\n".join([*head, *body, r"\hline", r"\end{tabular}"]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
