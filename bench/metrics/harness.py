"""lm-evaluation-harness on a pool of replicas: zero-shot accuracies and word perplexities, document by document.

The harness has the questions and says which answers count; the pool answers. Tasks whose data cannot be had are named,
with the reason, and the others are measured.
"""

from __future__ import annotations

import copy
import difflib
import logging
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.metrics.values import Missing
from bench.tasks.task import HarnessTask
from scoring.errors import UserError
from scoring.readings import Reader
from scoring.templates import Template

# The metrics of the harness's tasks that are known here.
ACCURACY, PERPLEXITY = "acc", "word_perplexity"
# The quantities that are measured by the harness.
HARNESS = ("acc", "log_likelihood", "words")
HUB_TIMEOUT_S = 5
# The line of a task file that has the name of what it defines.
NAME_LINE = re.compile(r"""^["']?(?:task|group)["']?\s*:\s*["']?([^"'\s#]+)""", re.MULTILINE)


@dataclass(frozen=True)
class HarnessScores:
    """What a model makes of the N documents of a set of tasks.

    Attributes:
        ids: "task/number of the document".
        values: (N,) fp64. "acc": whether the answer is right; "word_perplexity": log-likelihood of the document, nats.
        weights: (N,) fp64. "acc": 1; "word_perplexity": the document's words, as the task counts them.
        tasks: task -> {"version": the harness's, "n": number of its documents}.
        metric: "acc", which is sum(values) / sum(weights), or "word_perplexity", exp(-sum(values) / sum(weights)).
    """

    ids: list[str]
    values: np.ndarray
    weights: np.ndarray
    tasks: dict[str, dict[str, Any]]
    metric: str


def pool_model(
    reader: Reader, tokenizer: Any, max_length: int, add_bos_token: bool | None = None, template: Template | None = None
) -> Any:
    """A model of lm-evaluation-harness (an `lm_eval.api.model.LM`) that answers on all replicas of a pool.

    It tokenizes as the harness's own transformers model does: a context loses its trailing spaces to the
    continuation, an empty one is the BOS (else EOS) token, a long one is cut on the left; a text longer than the
    context is scored in disjoint windows.

    Args:
        reader: reads on the pool.
        tokenizer: the model's Hugging Face tokenizer.
        max_length: tokens that the model can read at once.
        add_bos_token: begin texts with the BOS token; None: as `scoring.tokens` says, the tokenizer's own way.
        template: puts the questions as conversations; None: as they stand. Texts whose words are all scored, as those
            of perplexities, have none either way.

    Raises:
        UserError: lm_eval is not installed, or the tokenizer has neither BOS nor EOS. The model's methods raise it
            where generation is not to be greedy, or a text to be scored is empty or longer than `max_length`.
    """
    _need_lm_eval()
    from bench.metrics.pool_lm import PoolLM

    return PoolLM(reader, tokenizer, max_length, add_bos_token, template)


def run_harness(
    lm: Any,
    sets: Mapping[str, Sequence[HarnessTask]],
    include_path: Path | None = None,
    limit: int | None = None,
    conversations: bool = False,
) -> dict[str, HarnessScores | Missing]:
    """Measure sets of tasks, zero-shot, all of them in one run.

    Args:
        lm: a model of the harness, see `pool_model`.
        sets: set -> its tasks, whose documents are pooled. A task is the name of a task, a group or a tag; or a
            configuration with "task": where that names a known task, the configuration changes what it has of that
            task's, any other must be complete. Its "custom_dataset" is called with keyword arguments (the
            configuration's "metadata" and "dataset_kwargs") and gives {split: `datasets.Dataset`}.
        include_path: folder of task files (YAML), which come before the harness's own of the same name.
        limit: documents of each task at most.
        conversations: put the questions through the template of `lm`.

    Returns:
        The scores of each set. A set is Missing if one of its tasks cannot be loaded or gives neither metric.

    Raises:
        UserError: lm_eval is not installed, or `include_path` is no folder.
    """
    _need_lm_eval()
    from lm_eval.evaluator import evaluate

    with _quiet(logging.ERROR), _offline_if_unreachable():
        loader = _Loader(include_path)
        loaded = {name: loader.load(tasks) for name, tasks in sets.items()}
    # By identity: two sets may give one name to different configurations.
    by_id = {str(id(task)): task for tasks in loaded.values() if isinstance(tasks, dict) for task in tasks.values()}
    documents: Mapping[str, list[dict[str, Any]]] = {}
    if by_id:
        with _quiet(logging.WARNING):
            task_dict = {"tasks": by_id, "groups": {}, "group_map": {}}
            results = evaluate(
                lm=lm,
                task_dict=task_dict,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=conversations,
            )
            documents = results["samples"]
    return {
        name: tasks if isinstance(tasks, Missing) else _scores(tasks, documents, _metric(next(iter(tasks.values()))))
        for name, tasks in loaded.items()
    }


def _scores(tasks: Mapping[str, Any], documents: Mapping[str, list[dict[str, Any]]], metric: str) -> HarnessScores:
    ids, values, weights, versions = [], [], [], {}
    for name, task in tasks.items():
        of_task = documents[str(id(task))]
        # A task with several filters has each document once for every filter; the first is the harness's default.
        of_task = [document for document in of_task if document["filter"] == of_task[0]["filter"]]
        versions[name] = {"version": task.VERSION, "n": len(of_task)}
        for document in of_task:
            value, weight = document[metric] if metric == PERPLEXITY else (document[metric], 1)
            ids.append(f"{name}/{document['doc_id']}")
            values.append(value)
            weights.append(weight)
    return HarnessScores(ids, np.array(values, dtype=float), np.array(weights, dtype=float), versions, metric)


class _Loader:
    """Loads tasks: their configurations from the harness or a folder, their data from where these say.

    Args:
        include_path: see `run_harness`.
    """

    def __init__(self, include_path: Path | None) -> None:
        from lm_eval.tasks import TaskManager

        if include_path is not None and not include_path.is_dir():
            raise UserError(f"{str(include_path)!r} is no folder: expected one with task files (*.yaml) of lm-eval")
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        self._index = self._manager.task_index
        if include_path is not None:
            self._index_broken_files(include_path)
        for name, entry in _known_tasks().items():
            indexed = self._index.setdefault(name, entry)
            # A folder that has some tasks of a tag does not take the others out of it.
            if indexed is not entry and indexed.kind.name == entry.kind.name == "TAG":
                indexed.tags |= entry.tags
        self._loaded: list[tuple[HarnessTask, dict[str, Any]]] = []
        self._tasks_by_name: dict[str, Any] = {}

    def load(self, task_set: Sequence[HarnessTask]) -> dict[str, Any] | Missing:
        """The tasks of a set by name, or why the first that cannot be had cannot."""
        tasks: dict[str, Any] = {}
        for harness_task in task_set:
            name = harness_task if isinstance(harness_task, str) else harness_task.get("task")
            try:
                # An error names the task at fault, which may be one of a group.
                for name, task in self._load(harness_task).items():
                    if tasks.setdefault(name, task) is not task:
                        raise UserError("is in the set twice, in different configurations")
                    _check(task)
            # Configurations hold code of anyone's, and data libraries have errors of all kinds.
            except Exception as error:
                return Missing(f"lm-eval task {name!r}: {_one_line(error)}")
        metrics = {_metric(task): name for name, task in tasks.items()}
        if len(metrics) != 1:
            return Missing(f"lm-eval tasks of different metrics or none: {metrics}; expected one metric")
        return tasks

    def _load(self, harness_task: HarnessTask) -> dict[str, Any]:
        """The tasks that a name or a configuration stands for, by name."""
        for loaded, tasks in self._loaded:
            if loaded == harness_task:
                return tasks
        if isinstance(harness_task, str):
            if harness_task not in self._index:
                near = difflib.get_close_matches(harness_task, self._index, n=1)
                raise UserError("no such task, group or tag" + (f"; did you mean {near[0]!r}?" if near else ""))
            tasks = self._manager.load([harness_task])["tasks"]
            tasks = {name: self._tasks_by_name.setdefault(name, task) for name, task in tasks.items()}
        else:
            tasks = self._manager.load([self._completed(harness_task)])["tasks"]
        for task in tasks.values():
            task.set_config("num_fewshot", 0)
        self._loaded.append((harness_task, tasks))
        return tasks

    def _completed(self, changes: dict[str, Any]) -> dict[str, Any]:
        """A configuration, completed by that of the task whose name it has. The manager would not look that up."""
        from lm_eval.tasks._yaml_loader import load_yaml

        if "task" not in changes:
            raise UserError(f"a configuration without 'task', its name: it has {', '.join(changes)}")
        entry = self._index.get(changes["task"])
        if entry is not None and entry.kind.name in ("GROUP", "TAG"):
            raise UserError("is the name of several tasks: expected that of one, to change its configuration")
        # A copy: the harness changes the configuration that it gets.
        return {**(load_yaml(entry.yaml_path) if entry else {}), **copy.deepcopy(changes)}

    def _index_broken_files(self, folder: Path) -> None:
        """Index files that cannot be read by the names in them. The harness skips such files, and would take its own
        tasks of these names instead."""
        from lm_eval.tasks._index import Entry, Kind
        from lm_eval.tasks._yaml_loader import load_yaml

        for path in sorted(folder.rglob("*.yaml")):
            try:
                load_yaml(path, resolve_func=False)
            except Exception:  # whatever a YAML loader raises
                text = path.read_text(encoding="utf-8", errors="replace")
                for name in {path.stem, *NAME_LINE.findall(text)}:
                    self._index.setdefault(name, Entry(name, Kind.TASK, path))


@cache
def _known_tasks() -> Mapping[str, Any]:
    """The harness's own tasks, read once: their thousands of files take seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def _metric(task: Any) -> str:
    """Which metric a task gives. One that is aggregated in another way is another metric of the same name."""
    from lm_eval.api.metrics import mean, weighted_perplexity

    aggregations = task.aggregation()
    for name, aggregation in ((ACCURACY, mean), (PERPLEXITY, weighted_perplexity)):
        if aggregations.get(name) is aggregation:
            return name
    raise UserError(
        f"gives {', '.join(aggregations)}: expected {ACCURACY!r}, a mean over documents, or {PERPLEXITY!r} among them"
    )


def _check(task: Any) -> None:
    """Refuse a task that cannot be measured here."""
    _metric(task)
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError("runs code that a model writes; such tasks are not supported")
    if getattr(task, "MULTIMODAL", False):
        raise UserError("has images or sounds; such tasks are not supported")
    if getattr(task, "OUTPUT_TYPE", None) == "multiple_choice":
        _check_answers(task)


def _check_answers(task: Any) -> None:
    """Refuse questions whose right answer is none of their choices. The harness counts them as answered wrongly."""
    for number, document in enumerate(task.eval_docs, start=1):
        answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        choices = task.doc_to_choice(document)
        answers = answer if isinstance(answer, list) else [answer]
        if not answers or not all(_is_among(one, choices) for one in answers):
            raise UserError(
                f"question {number} has the answer {answer!r} and {len(choices)} choices: expected a number from 0 to "
                f"{len(choices) - 1}, or one of {', '.join(map(str, choices))}"
            )


def _is_among(answer: Any, choices: Sequence[Any]) -> bool:
    if isinstance(answer, str):
        return answer in choices
    try:
        return 0 <= operator.index(answer) < len(choices)
    except TypeError:
        return False


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return " ".join(f"cannot be loaded: {type(error).__name__}: {error}".split()).rstrip(": ")


def _need_lm_eval() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"this metric needs lm-evaluation-harness, which cannot be imported ({error}): "
            "pip install 'mrd-bench[harness]'"
        ) from error


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Switch to offline mode if the hub does not answer. Its library would try again for 20 seconds for every data
    set, even for those that are in the cache."""
    from datasets import config
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except Exception:  # the library's HTTP client, and so its errors, change from version to version
            constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Let the harness log from `level` on, and draw no progress bars."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from lm_eval.api import task as task_module

    logger = logging.getLogger("lm_eval")
    level_before, bar_before, without_bars = logger.level, task_module.tqdm, are_progress_bars_disabled()
    logger.setLevel(level)
    task_module.tqdm = partial(bar_before, disable=True)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level_before)
        task_module.tqdm = bar_before
        if not without_bars:
            enable_progress_bars()
