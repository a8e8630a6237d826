"""The outcome of a run on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from bench.files.status import FINISHED
from bench.tasks.sources import SUFFIXES
from scoring.files import shown

if TYPE_CHECKING:  # what is summed up: who prints scores does not wait for what trains models
    import pyarrow as pa

    from bench.jobs.requests import RequestsResult
    from bench.jobs.run_folder import UnlearnResult
    from bench.jobs.score import ScoreResult
    from bench.jobs.sweep_tables import SweepResult
    from bench.jobs.train import TrainResult

SHOWN = 5
# Above this share a standard error no longer says how far a score is off.
ROUNDING_SHOWN = 0.1


def print_summary(result: ScoreResult) -> None:
    """Counts, the hardest and the easiest samples, and everything that a reader must know to trust them."""
    table, facts = result.table, result.facts
    mrd = table["mrd"].to_numpy()
    order = np.argsort(mrd, kind="stable")
    print(f"{len(mrd)} samples scored in {result.seconds:.1f} s, {len(result.rejected)} rejected -> {result.path}")
    print(f"MRD: median {np.median(mrd):.4g}, range {mrd.min():.4g} to {mrd.max():.4g}")
    draws = table["draws"].to_numpy()
    if draws.any():
        relative = np.median(table["mrd_stderr"].to_numpy() / mrd)
        print(f"relative standard error: median {relative:.2%} with {'/'.join(map(str, np.unique(draws)))} draws")
    else:
        print("closed form: no draws, no sampling error")
    shown = min(SHOWN, max(1, len(order) // 2))
    print(f"{'sample':<24}{'tokens':>7}{'nll':>10}{'mrd':>12}{'± stderr':>12}")
    for title, rows in (("hardest to forget (lowest MRD)", order[:shown]), ("easiest", order[: -shown - 1 : -1])):
        print(f"- {title}")
        for row in rows.tolist():
            record = {key: table[key][row].as_py() for key in ("sample_id", "num_tokens", "nll", "mrd", "mrd_stderr")}
            print(
                f"{record['sample_id'][:23]:<24}{record['num_tokens']:>7}{record['nll']:>10.4g}"
                f"{record['mrd']:>12.4g}{record['mrd_stderr']:>12.2g}"
            )
    if facts["perturbation_survival"] is not None:
        print(f"perturbation survival: {facts['perturbation_survival']:.4f} (1 = the noise survived storage)")
    if facts["gradient_error"] is not None:
        print(f"largest relative error of gradient norms against fp32: {facts['gradient_error']:.2%}")
    if (share := facts.get("rounding_share")) is not None:
        print(f"rounding of log-probs: {share:.1%} of the scores (medians)", end="")
        print("; take --estimator curvature, a larger --sigma or --dtype float64" if share > ROUNDING_SHOWN else "")
    saturated = int(np.sum(table["tokens_saturated"].to_numpy()))
    if saturated:
        print(f"{saturated} scored tokens have probability exactly 1 and are left out of the sums")
    for note in facts["notes"]:
        print(f"note: {note}")
    for rejected in result.rejected:
        print(f"rejected {rejected.sample_id!r}: {rejected.reason}")


def print_unlearning(result: UnlearnResult) -> None:
    """What was forgotten and what was kept, epoch by epoch, and what it cost."""
    spec, epochs = result.record["spec"], result.epochs.to_pylist()
    columns = ["epoch", "step", "forget_loss", "retain_loss", "forgotten", *_answers(result.epochs), "mean_abs_delta"]
    _print_epochs(epochs, columns)
    updates = np.array([n for n in result.samples["updates_until_forgotten"].to_pylist() if n is not None])
    text = f"{spec['algorithm']}, alpha {spec['alpha']:g}: {result.record['updates']} updates"
    if thresholds := result.record["thresholds"]:
        rule = f"MA below {_short(thresholds['ma'])}"
        if thresholds["el"] is not None:
            rule += f", EL below {_short(thresholds['el'])}"
        text += f"; {len(updates)} of {result.samples.num_rows} samples forgotten ({rule})"
    print(text + (f", after {np.median(updates):g} draws in the median" if len(updates) else ""))
    if still := _still_answered(result):
        print(f"what the model still answers: {still}")
    seconds, passes = result.record["seconds"], result.record["passes"]
    _print_seconds(seconds, passes)
    _print_remarks(result.record)
    print(f"model  {result.model}\ntables {result.folder}/*.parquet")


def print_requests(result: RequestsResult) -> None:
    """What each request scores after each, and which of them come back."""
    from bench.jobs.requests import MEASURED

    rows = result.means()
    print("".join(f"{name:>16}" for name in ("after request", "scored", "samples", *MEASURED)))
    for row in rows:
        scored = row["name"] if row["request"] is None else f"{row['request']} {row['name']}"
        values = (str(row["after"]), scored, str(row["samples"]), *(_short(row[name]) for name in MEASURED))
        print("".join(f"{value:>16}" for value in values))
    at_once = {row["request"]: row for row in rows if row["request"] == row["after"]}
    last = {row["request"]: row for row in rows if row["after"] == len(result.runs) and row["request"]}
    for number in range(1, len(result.runs)):
        before, now = at_once[number]["ma"], last[number]["ma"]
        back = result.came_back(number)
        print(
            f"request {number} ({last[number]['name']}): MA {_short(before)} when it was carried out, {_short(now)} "
            f"after the last; {len(back)} of its {last[number]['samples']} samples came back"
            + (f": {', '.join(back[:5])}{', ...' if len(back) > 5 else ''}" if back else "")
        )
    _print_remarks(result.record)
    runs = ", ".join(run.folder.name for run in result.runs)
    print(f"model  {result.model}\nruns   {result.folder}/: {runs}\ntables {result.folder}/requests.parquet")


def print_training(result: TrainResult) -> None:
    """How well the data are known, epoch by epoch, why it stopped, and what can be done with the model."""
    from algorithms.target import TRAINED_MA
    from bench.files.folders import ORIGINAL, RETAIN_ONLY
    from bench.jobs.train import ending

    pair = [(ORIGINAL, result), (RETAIN_ONLY, result.retain_only)] if result.retain_only else [("", result)]
    for name, one in pair:
        assert one is not None
        spec = one.record["spec"]
        what = f"{one.samples.num_rows} samples of {spec['task']}" + (f" {spec['split']}" if spec["split"] else "")
        print(f"{name + ': ' if name else ''}{what}{' less ' + spec['minus'] if spec['minus'] else ''}")
        ma = [TRAINED_MA] if TRAINED_MA in one.epochs.column_names else []
        _print_epochs(one.epochs.to_pylist(), ["epoch", "step", "loss", *ma, *_answers(one.epochs), "mean_abs_delta"])
        print(ending(one))
        _print_seconds(one.record["seconds"], {})
        _print_remarks(one.record)
        print(f"model  {one.model}\ntables {one.folder}/*.parquet")
    print("\n".join(("next", *(f"  {command}" for command in _next_commands(result)))))


def _next_commands(result: TrainResult) -> list[str]:
    """What a user would do with the models: score, unlearn, evaluate."""
    from bench.tasks.datasets import find_task, is_data_file

    model, other, spec = shown(result.folder), result.retain_only, result.record["spec"]
    task, forget = spec["task"], other.record["spec"]["minus"] if other else None
    retained: Mapping[str, str] = {} if is_data_file(task) else find_task(task)[0].retain_of
    of_unlearning, of_others = ["--task", task], [task]
    if forget in retained:
        of_unlearning, of_others = [*of_unlearning, "--forget-split", forget], [*of_others, "--split", forget]
    elif forget is not None and forget.endswith(SUFFIXES):
        of_unlearning, of_others, retained = ["--task", forget], [forget], {}
    elif forget is not None:
        of_unlearning, retained = [*of_unlearning, "--selection", forget], {}
    algorithm = "NPO-GradDiff" if retained else "NPO"  # the latter needs no retain set
    commands = [
        ["score", "--model", model, "--data", *of_others, "--out", "scores.parquet"],
        ["unlearn", "--model", model, *of_unlearning, "--algorithm", algorithm, "--out", "runs/npo"],
    ]
    if other and forget in retained:
        models = ["--model", "runs/npo", "--original", model, "--retain-model", shown(other.folder)]
        commands.append(["evaluate", *models, "--task", *of_others, "--out", "npo.parquet"])
    return [shlex.join(["mrd-bench", *command]) for command in commands]


def _answers(epochs: pa.Table) -> list[str]:
    """The columns that say what a model answers."""
    return [name for name in epochs.column_names if name.endswith(("rouge_l_recall", "probability"))]


def _print_epochs(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A line an epoch."""
    for name in columns:
        title = name.replace("_rouge_l_recall", " RL").replace("_probability", " prob").replace("_ma", " MA")
        print(f"{title.replace('left_out', 'left-out'):>15}", end="")
    print()
    for row in rows:
        print("".join(f"{_short(row[name]):>15}" for name in columns))


def _print_seconds(seconds: Mapping[str, float], passes: Mapping[str, Sequence[int]]) -> None:
    """What the time went to."""
    parts = ", ".join(
        f"{name} {seconds[name]:.1f} s"
        + (f" ({passes[name][0]} forward, {passes[name][1]} backward)" if name in passes else "")
        for name in ("training", "mrd", "checks", "evaluation", "checkpoints")
        if name in seconds
    )
    print(parts)


def _print_remarks(record: Mapping[str, Any]) -> None:
    """What a reader must know, and the samples that were left out."""
    for note in record["notes"]:
        print(f"note: {note}")
    for rejected in record["rejected"]:
        print(f"rejected from the {rejected['set']} set, {rejected['sample_id']!r}: {rejected['reason']}")


def print_sweep(result: SweepResult) -> None:
    """How the trials ended, and what each configuration reached on average over selections and seeds."""
    trials, record = result.trials, result.record
    counts = ", ".join(f"{count} {status}" for status, count in record["counts"].items())
    print(f"{trials.num_rows} trials ({counts}) in {record['seconds']:.0f} s -> {result.folder}")
    varied = [name for name in ("arm", *record["spec"]["vary"]) if name in trials.column_names and name != "seed"]
    measured = [name for name in ("completeness", "utility", "balance", "updates") if name in trials.column_names]
    rows = trials.filter(pc.equal(trials["status"], FINISHED)).to_pylist()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in varied), []).append(row)
    titles = [*varied, "trials", *measured]
    print("".join(f"{title[:17]:>18}" for title in titles))
    for values, trials_of_values in groups.items():
        cells = [*map(str, values), str(len(trials_of_values))]
        for name in measured:
            reached = np.array([row[name] for row in trials_of_values if row[name] is not None], dtype=float)
            spread = f" ± {reached.std(ddof=1):.2g}" if len(reached) > 1 else ""
            cells.append(f"{reached.mean():.4g}{spread}" if len(reached) else "–")
        print("".join(f"{cell[:17]:>18}" for cell in cells))
    if measured:
        print("mean ± standard deviation over selections and seeds")
    for row in trials.to_pylist():
        if row["status"] != FINISHED:
            which = ", ".join(f"{name} {row[name]}" for name in varied)
            print(f"{row['status']}: {row['trial']} ({which}; {row['selection']}, seed {row['seed']}): {row['reason']}")


def _still_answered(result: UnlearnResult) -> str:
    """What is left of the forget set after the last update, beside what there was at first: whatever the stopping rule
    calls forgotten, this is what a reader would see."""
    first, last = result.epochs.to_pylist()[0], result.epochs.to_pylist()[-1]
    measured = {"ROUGE-L recall": "forget_rouge_l_recall", "probability": "forget_probability"}
    parts = [
        f"{title} {_short(last[name])}" + ("" if first[name] is None else f" ({_short(first[name])} at first)")
        for title, name in measured.items()
        if last.get(name) is not None
    ]
    was, now = (
        [value for value in result.samples[name].to_pylist() if value is not None] for name in ("ma_initial", "ma_last")
    )
    if now:
        parts.append(f"MA {_short(np.mean(now))} when last looked at ({_short(np.mean(was))} at first)")
    return ", ".join(parts)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
