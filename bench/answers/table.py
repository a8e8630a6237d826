"""Answers side by side: evaluations, runs and score files, joined by sample if they belong together.

evaluation.parquet ...     questions, truths and answers; the metrics of each answer
run/ ...                   the algorithm's name, MA before and after, updates until forgotten, MRD if it was measured
scores.parquet ...         MRD and forecast
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from typing_extensions import TypedDict

from bench.files.score_file import Scores
from bench.jobs.evaluation_answers import Answers, EvaluationAnswers, is_evaluation, read_answers, run_folder_of
from bench.jobs.run_folder import UnlearnResult, read_run
from bench.metrics.table import MODEL, ORIGINAL, RETAIN_ONLY
from bench.tasks.datasets import find_task, is_data_file
from scoring.errors import UserError
from scoring.files import shown
from scoring.reading import check_columns, shaped

Role = Literal["before", "after", "retain-only"]
# An answer with at least so much of the truth counts as remembered.
REMEMBERED = 0.5
FORECAST = "flip-time"
_REFERENCES: Mapping[Role, str] = {"before": ORIGINAL, "retain-only": RETAIN_ONLY}
EXPECTED = (
    "files of `mrd-bench evaluate`, and with them folders of `mrd-bench unlearn` and files of `mrd-bench score` or "
    "`mrd-bench difficulty`"
)


@dataclass(frozen=True)
class Model:
    """A column of answers.

    Attributes:
        role: the original model's, the unlearned one's or the retain-only one's.
        name: for readers, each once.
    """

    role: Role
    name: str


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: None where the sample was not put to the model.
        rouge, ma: ROUGE-L recall and memorization accuracy; None where they were not measured.
        until: updates on the sample until it was forgotten, in the run that made the model; None: it was not, or it is
            not known.
    """

    text: str | None = None
    rouge: float | None = None
    ma: float | None = None
    until: int | None = None


@dataclass(frozen=True)
class Row:
    """A sample with all answers to it, in the order of the table's models.

    Attributes:
        question, truth: None where they are not known.
        mrd: Memory Removal Difficulty under the original model; low is hard to forget.
        forecast: of updates until it is forgotten; may be infinite.
    """

    set_name: str
    sample_id: str
    question: str | None
    truth: str | None
    answers: tuple[Answer, ...]
    mrd: float | None = None
    forecast: float | None = None


@dataclass(frozen=True)
class AnswerTable:
    """Answers side by side.

    Attributes:
        title: what was asked, in a line.
        models: at least one of them has the role "after".
        rows: set by set, in the order of the data.
        forecast: name of the forecast, such as "flip-time@0.5"; None where there is none.
        notes: what a reader must know, a line each.
    """

    title: str
    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    forecast: str | None = None
    notes: tuple[str, ...] = ()

    def place(self, role: Role) -> int | None:
        """Where the first model of a role stands."""
        return next((place for place, model in enumerate(self.models) if model.role == role), None)

    def answer(self, row: Row, role: Role) -> Answer:
        """The answer of the first model of a role; an empty one where there is none."""
        place = self.place(role)
        return Answer() if place is None else row.answers[place]

    def base(self, row: Row, model: Model, against: Literal["before", "truth"]) -> str | None:
        """The text that an answer is compared with: the truth, or for what unlearning changed, the answer before."""
        before = self.answer(row, "before").text
        return before if against == "before" and model.role == "after" and before is not None else row.truth

    def change(self, row: Row) -> float | None:
        """How much ROUGE-L the first unlearned model has lost to the original one."""
        before, after = self.answer(row, "before").rouge, self.answer(row, "after").rouge
        return None if before is None or after is None else before - after

    def is_remembered(self, row: Row) -> bool | None:
        """Whether the first unlearned model still gives the answer; None where that was not measured."""
        rouge = self.answer(row, "after").rouge
        return None if rouge is None else rouge >= REMEMBERED

    def has_changed(self, row: Row) -> bool:
        """Whether an unlearned model writes something else than the original one, or, without that, than the truth."""
        before = self.answer(row, "before").text
        base = row.truth if before is None else before
        after = [answer.text for model, answer in zip(self.models, row.answers, strict=True) if model.role == "after"]
        return any(text is not None and text != base for text in after)


# --- Reading and joining ------------------------------------------------------------------------------------


def answer_table(paths: Sequence[str | Path]) -> AnswerTable:
    """The answers in evaluations, with what runs and score files know of the same samples.

    Args:
        paths: of evaluations, at least one; of folders of runs, and of score files.

    Raises:
        UserError: one line: a path is none of these, no evaluation is among them, or they speak of different models or
            data.
    """
    evaluations: list[EvaluationAnswers] = []
    folders: list[Path] = []
    scores: list[tuple[Path, Scores]] = []
    for path in map(Path, paths):
        if path.is_dir():
            read_run(path)
            folders.append(path)
            continue
        found = Scores.read(path, EXPECTED)
        if is_evaluation(found.spec):
            evaluations.append(read_answers(path))
        else:
            scores.append((path, found))
    if not evaluations:
        raise _no_answers(folders)
    first = evaluations[0]
    for other in evaluations[1:]:
        _check_same_data(first, other)
    of_runs = [run_folder_of(answers, folders) for answers in evaluations]
    runs = [None if folder is None else read_run(folder) for folder in of_runs]
    for folder in folders:
        if not any(run is not None and run.folder.absolute() == folder.absolute() for run in runs):
            raise UserError(f"{folder}: none of the evaluations is of this run's model; {_command(read_run(folder))}")
    for answers, run in zip(evaluations, runs, strict=True):
        if run is not None:
            _check_run(answers, run)
    measures = _measures(scores, first, [run for run in runs if run is not None])
    keys = dict.fromkeys(key for answers in evaluations for key in answers.samples)
    after = [Model("after", name) for name in _names(evaluations, runs)]
    others = {
        role: [Model(role, role)] if any(of in answers.fingerprints for answers in evaluations) else []
        for role, of in _REFERENCES.items()
    }
    models = (*others["before"], *after, *others["retain-only"])
    by_id = [_by_id(run) for run in runs]
    rows = tuple(
        _row(*key, models, [e.samples.get(key) or Answers(*key) for e in evaluations], by_id, measures)
        for key in in_order_of_sets(keys)
    )
    notes = dict.fromkeys(note for answers in evaluations for note in answers.notes)
    split = first.spec["split"] or default_split(first.spec["task"])
    title = ", ".join(filter(None, (first.spec["task_name"], split)))
    return AnswerTable(title, models, rows, measures.forecast, (*notes, *measures.notes))


def default_split(task: str) -> str | None:
    """The forget split of a task where none is named; None where the task is not to be found."""
    try:
        return find_task(task)[0].default_split
    except UserError:
        return None


def _no_answers(folders: Sequence[Path]) -> UserError:
    if folders:
        return UserError(f"{folders[0]}: a run keeps numbers and no answers; {_command(read_run(folders[0]))}")
    return UserError(f"no evaluation is among the files, and only these have answers: expected {EXPECTED}")


def _command(run: UnlearnResult) -> str:
    """What to do where a run's answers are needed."""
    spec = run.record["spec"]
    flags = {"--model": run.model, "--original": spec["model"], "--task": spec["task"]}
    flags |= {"--split": spec["forget_split"], "--selection": spec["selection"]}
    words = " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)
    return f"make them with `mrd-bench evaluate {words} --out {run.folder}.parquet`, and show that file"


def in_order_of_sets(keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The forget set first, then as they come."""
    keys = list(keys)
    order = {name: n for n, name in enumerate(dict.fromkeys(["forget", *(name for name, _ in keys)]))}
    return sorted(keys, key=lambda key: order[key[0]])


def _check_same_data(one: EvaluationAnswers, other: EvaluationAnswers) -> None:
    """Refuse evaluations of other models before, other gold standards or other samples."""
    for role in (ORIGINAL, RETAIN_ONLY):
        prints = [answers.fingerprints.get(role) for answers in (one, other)]
        if None not in prints and prints[0] != prints[1]:
            raise UserError(
                f"{shown(one.path)} and {shown(other.path)} have different {role} models "
                f"({', '.join(_short(each) for each in prints)}): expected evaluations with the same one"
            )
    for name, digest in one.spec["sets_sha256"].items():
        of_other = other.spec["sets_sha256"].get(name)
        if digest and of_other and digest != of_other:
            raise UserError(
                f"{shown(one.path)} and {shown(other.path)} are of different data (the {name} set, "
                f"{_short(digest)} and {_short(of_other)}): expected evaluations of the same task, split and samples"
            )


def _short(digest: str | None) -> str:
    return str(digest).rpartition("@")[2][:8]


def _check_run(answers: EvaluationAnswers, run: UnlearnResult) -> None:
    """Refuse a run that began with another model than the original, or forgot other samples."""
    spec, original = run.record["spec"], answers.fingerprints.get(ORIGINAL)
    if not is_data_file(spec["task"]) and (task := find_task(spec["task"])[0].name) != answers.spec["task_name"]:
        raise UserError(
            f"{run.folder} is of task {task!r} and {shown(answers.path)} of {answers.spec['task_name']!r}: expected an "
            "evaluation of what was forgotten"
        )
    if original is not None and original != spec["model_fingerprint"]:
        raise UserError(
            f"{run.folder} began with another model ({_short(spec['model_fingerprint'])}) than the original of "
            f"{shown(answers.path)} ({_short(original)}): evaluate it with --original {spec['model']}"
        )
    if not set(run.samples["sample_id"].to_pylist()) & set(answers.forget_ids):
        raise UserError(
            f"{run.folder} and the forget set of {shown(answers.path)} have no sample in common: expected the split "
            "that was forgotten"
        )


def _names(evaluations: Sequence[EvaluationAnswers], runs: Sequence[UnlearnResult | None]) -> list[str]:
    """Of the models that have forgotten: the algorithm where the run is known, else the file's name; each once."""
    names = [
        answers.path.stem if run is None else run.record["spec"]["algorithm"]
        for answers, run in zip(evaluations, runs, strict=True)
    ]
    times = Counter(names)
    stems = [answers.path.stem for answers in evaluations]
    names = [f"{name} ({stem})" if times[name] > 1 else name for name, stem in zip(names, stems, strict=True)]
    return [f"{name} #{names[:n].count(name) + 1}" if name in names[:n] else name for n, name in enumerate(names)]


_OF_RUN = pa.schema(
    [("sample_id", pa.string()), ("updates_until_forgotten", pa.int64())]
    + [(name, pa.float64()) for name in ("ma_initial", "ma_last", "mrd_initial")]
)


def _by_id(run: UnlearnResult | None) -> dict[str, dict[str, Any]]:
    """What a run knows of its samples, by id; early versions lack some of it."""
    if run is None:
        return {}
    schema = pa.schema([field for field in _OF_RUN if field.name in run.samples.column_names])
    check_columns(run.samples, schema, str(run.folder / "samples.parquet"), "what `mrd-bench unlearn` writes")
    return {row["sample_id"]: row for row in run.samples.select(schema.names).cast(schema).to_pylist()}


def _row(
    set_name: str,
    sample_id: str,
    models: Sequence[Model],
    found: Sequence[Answers],
    runs: Sequence[Mapping[str, Mapping[str, Any]]],
    measures: _Measures,
) -> Row:
    """A sample, joined.

    Args:
        found: the sample in each evaluation.
        runs: of each evaluation, rows of the run's forget samples by id.
    """
    forgotten = set_name == "forget"
    of_runs = [rows.get(sample_id, {}) if forgotten else {} for rows in runs]
    ma_initial = _first(row.get("ma_initial") for row in of_runs)
    afters = iter(zip(found, of_runs, strict=True))
    answers = []
    for model in models:
        if model.role == "after":
            sample, of_run = next(afters)
            ma = _first([sample.ma.get(MODEL), of_run.get("ma_last")])
            until = of_run.get("updates_until_forgotten")
            answers.append(Answer(sample.texts.get(MODEL), sample.rouge.get(MODEL), ma, until))
        else:
            role = _REFERENCES[model.role]
            text, rouge, ma = (
                _first(by_role.get(role) for by_role in of_all)
                for of_all in zip(*((each.texts, each.rouge, each.ma) for each in found), strict=True)
            )
            answers.append(Answer(text, rouge, ma_initial if ma is None and model.role == "before" else ma))
    return Row(
        set_name,
        sample_id,
        _first(sample.question for sample in found),
        _first(sample.truth for sample in found),
        tuple(answers),
        _first([measures.mrd.get(sample_id), *(row.get("mrd_initial") for row in of_runs)]) if forgotten else None,
        measures.forecasts.get(sample_id) if forgotten else None,
    )


def _first(values: Iterable[Any]) -> Any:
    """The first that is known."""
    return next((value for value in values if value is not None), None)


# --- Score files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measures:
    """What score files say of the forget samples, by id."""

    mrd: Mapping[str, float]
    forecasts: Mapping[str, float]
    forecast: str | None
    notes: tuple[str, ...]


_COUNTED = (
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("num_tokens", pa.int64(), nullable=False),
)


class _ScoredBy(TypedDict):
    """What is needed of the spec of a score file."""

    data: str
    split: str | None
    data_sha256: str
    model_fingerprint: str


def _measures(
    files: Sequence[tuple[Path, Scores]], answers: EvaluationAnswers, runs: Sequence[UnlearnResult]
) -> _Measures:
    mrd: dict[str, float] = {}
    forecasts: dict[str, float] = {}
    forecast = None
    notes = []
    for path, scores in files:
        columns = scores.table.column_names
        own = next((name for name in columns if name.partition("@")[0] == FORECAST), None)
        if "sample_id" not in columns or ("mrd" not in columns and own is None):
            raise UserError(f"{shown(path)} has neither MRD nor a forecast of samples: expected {EXPECTED}")
        expected = "what `mrd-bench score` or `mrd-bench difficulty` writes"
        shaped(scores.spec, _ScoredBy, str(path), expected)
        numbers = [(name, pa.float64()) for name in ("mrd", own) if name in columns]
        check_columns(scores.table, pa.schema([*_COUNTED, *numbers]), str(path), expected)
        notes += _check_scores(path, scores, answers, runs)
        if "mrd" in columns:
            mrd = _numbers(scores, "mrd") | mrd
        if own is not None and forecast in (None, own):
            forecast, forecasts = own, _numbers(scores, own) | forecasts
    return _Measures(mrd, forecasts, forecast, tuple(notes))


def _numbers(scores: Scores, column: str) -> dict[str, float]:
    ids, values = scores.table["sample_id"].cast(pa.string()), scores.table[column].cast(pa.float64())
    known = zip(ids.to_pylist(), values.to_pylist(), strict=True)
    return {name: value for name, value in known if value is not None and not math.isnan(value)}


def _check_scores(path: Path, scores: Scores, answers: EvaluationAnswers, runs: Sequence[UnlearnResult]) -> list[str]:
    """Refuse scores of another model than the original one, or of other data; what is to be said if that cannot be
    told."""
    spec = scores.spec
    known = [(shown(answers.path), answers.fingerprints.get(ORIGINAL))]
    known += [(str(run.folder), run.record["spec"]["model_fingerprint"]) for run in runs]
    for where, original in known:
        if original is not None and original != spec["model_fingerprint"]:
            raise UserError(
                f"{shown(path)} is of another model ({_short(spec['model_fingerprint'])}) than the original of {where} "
                f"({_short(original)}): expected scores under the model before unlearning"
            )
    if not set(scores.ids) & set(answers.forget_ids):
        raise UserError(
            f"{shown(path)} and the forget set of {shown(answers.path)} have no sample in common: expected scores of "
            "the split that was forgotten"
        )
    tokens = dict(zip(scores.ids, scores.table["num_tokens"].to_pylist(), strict=True))
    for run in runs:
        of_run = run.record["spec"]
        same_split = _split(spec["data"], spec["split"]) == _split(of_run["task"], of_run["forget_split"])
        other = same_split and not of_run["selection"] and spec["data_sha256"] != of_run["forget_sha256"]
        counted = zip(run.samples["sample_id"].to_pylist(), run.samples["num_tokens"].to_pylist(), strict=True)
        if other or any(tokens.get(name, count) != count for name, count in counted):
            raise UserError(
                f"{shown(path)} and {run.folder} are of different data ({_short(spec['data_sha256'])} and "
                f"{_short(of_run['forget_sha256'])}): expected scores of the samples that were forgotten"
            )
    if all(original is None for _, original in known):
        return [f"{shown(path)}: whether it is of the original model is not known; evaluate with --original to tell"]
    return []


def _split(source: str, split: str | None) -> tuple[str, str | None]:
    """A data set, its split named."""
    return source, split if split is not None or is_data_file(source) else default_split(source)
