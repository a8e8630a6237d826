"""The content of a result store on the terminal and as CSV, JSON or LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bench.files.status import FINISHED
from bench.results.store import PARTITIONS, SCHEMAS, Results, Skipped
from scoring.errors import UserError, unknown_name
from scoring.reading import parse_json, shaped

FORMATS = ("csv", "json", "latex")
MOST_SKIPPED = 20  # skipped files that are named on the terminal


# What is read of the tables for a list of them: of some nothing but whether they can be opened.
LISTED: dict[str, list[str]] = {
    "runs": ["algorithm", "selection", "seed", "status"],
    "samples": [],
    "scores": ["sample_id"],
    "answers": [],
}


def list_lines(results: Results) -> list[str]:
    """A line for each task and experiment.

    Args:
        results: with the columns of LISTED, or more.
    """
    runs = {tuple(row[name] for name in PARTITIONS): row for row in _counted(results.runs)}
    scores = results.scores.select(list(PARTITIONS))
    scored = Counter(zip(*(scores[name].to_pylist() for name in PARTITIONS), strict=True))
    lines = [
        f"{'task':<12}{'experiment':<20}{'runs':>6}{'failed':>8}{'selections':>12}{'seeds':>7}{'scores':>8}  algorithms"
    ]
    for task, experiment in sorted({*runs, *scored}):
        counted = runs.get((task, experiment), {})
        names = ("count_all", "failed_sum", "selection_count_distinct", "seed_count_distinct")
        counts = [*(counted.get(name, 0) for name in names), scored[task, experiment]]
        widths = (6, 8, 12, 7, 8)
        numbers = "".join(f"{count:>{width}}" for count, width in zip(counts, widths, strict=True))
        algorithms = ", ".join(sorted(str(name) for name in counted.get("algorithm_distinct", ())))
        lines.append(f"{task:<12}{experiment:<20}{numbers}  {algorithms}")
    return lines


def _counted(runs: pa.Table) -> list[dict[str, Any]]:
    """Of each task and experiment its runs, those that did not finish, and which algorithms, selections and seeds."""
    failed = pc.fill_null(pc.not_equal(runs["status"], FINISHED), True)
    table = pa.table(
        {name: runs[name].cast(pa.string()) for name in PARTITIONS}
        | {name: runs[name] for name in ("algorithm", "selection", "seed")}
        | {"failed": failed}
    )
    everyone = pc.CountOptions(mode="all")
    rows: list[dict[str, Any]] = (
        table.group_by(list(PARTITIONS))
        .aggregate(
            [
                ([], "count_all"),
                ("failed", "sum"),
                ("selection", "count_distinct", everyone),
                ("seed", "count_distinct", everyone),
                ("algorithm", "distinct", everyone),
            ]
        )
        .to_pylist()
    )
    return rows


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """A line for each file that was not read."""
    lines = [f"skipped {file.path}: {file.reason}" for file in skipped[:MOST_SKIPPED]]
    return lines + ([f"skipped {len(skipped) - MOST_SKIPPED} more"] if len(skipped) > MOST_SKIPPED else [])


def run_lines(results: Results, run: str) -> list[str]:
    """All that is known about a run.

    Args:
        run: its hash, or the beginning of it.

    Raises:
        UserError: no hash begins so, or several do.
    """
    rows = results.runs.filter(pc.starts_with(results.runs["run"], run)).to_pylist()
    if not rows:
        raise UserError(f"run {run!r} is not there; expected the hash of a run, or how it begins (see results export)")
    if len(hashes := sorted({row["run"] for row in rows})) > 1:
        raise UserError(f"run {run!r} is the beginning of {len(hashes)}: {', '.join(hashes[:5])}; give more of it")
    row = rows[0]
    metrics, spec = dict(row.pop("metrics") or ()), _object(row, "spec")
    packages = _object(row, "packages")
    lines = [f"{name:<22}{_cell(value)}" for name, value in row.items()]
    lines.append(f"{'packages':<22}{', '.join(f'{name} {version}' for name, version in packages.items())}")
    lines += ["metrics", *(f"  {name:<30}{_cell(value)}" for name, value in metrics.items())]
    lines += ["spec", *(f"  {name:<30}{json.dumps(value)}" for name, value in spec.items())]
    samples = results.samples.filter(pc.equal(results.samples["run"], row["run"])).to_pylist()
    seen: set[str] = set()
    mrd_of = {
        score["sample_id"]: score["mrd"]
        for score in results.scores.select(["sample_id", "mrd", "model_fingerprint"]).to_pylist()
        if score["model_fingerprint"] == row["model_fingerprint"]
    }
    lines.append(f"{'sample':<30}{'tokens':>8}{'MRD':>12}{'updates':>9}{'until forgotten':>17}")
    for sample in samples:
        if sample["sample_id"] not in seen:  # a run of two experiments has its samples twice
            seen.add(sample["sample_id"])
            mrd = mrd_of.get(sample["sample_id"], sample["mrd_initial"])
            numbers = [sample["num_tokens"], mrd, sample["updates"], sample["updates_until_forgotten"]]
            cells = zip(map(_cell, numbers), (8, 12, 9, 17), strict=True)
            lines.append(f"{sample['sample_id']:<30}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    return lines


def _object(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The JSON object of a column, which leaves the row."""
    where, expected = f"run {row['run']!r}: {column}", "a JSON object, as `mrd-bench results add` writes it"
    found: dict[str, Any] = shaped(
        parse_json(row.pop(column) or "{}", where, expected), dict[str, Any], where, expected
    )
    return found


def exported(results: Results, table: str, form: str) -> str:
    """A table as text; in the table of runs every metric is a column.

    Args:
        table: "runs", "samples", "scores" or "answers".
        form: one of FORMATS.

    Raises:
        UserError: there is no such table or format.
    """
    tables = {name: getattr(results, name) for name in SCHEMAS}
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
    """The rows of a table, with a column for each metric."""
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
    """A LaTeX table of these columns, with the letters escaped that mean something to LaTeX."""

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
