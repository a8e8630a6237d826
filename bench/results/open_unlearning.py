"""Results that open-unlearning (github.com/locuslab/open-unlearning) has measured, as rows of a store.

Its evaluation leaves TOFU_EVAL.json or MUSE_EVAL.json, with a metric's value (`agg_value`) and those of its samples
(`value_by_index`), and TOFU_SUMMARY.json or MUSE_SUMMARY.json, with the values alone. Only what is the same quantity as
a metric here becomes one; see docs/sharing-results.md for what differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.files.status import FINISHED
from bench.metrics import limits_of, tofu
from scoring.answers import rouge_l_f1
from scoring.errors import UserError
from scoring.reading import read_json, shaped
from scoring.settings import named

NAME = "open-unlearning"
EXPECTED = "what open-unlearning's evaluation writes"
FILE = re.compile(r"(TOFU|MUSE)_(EVAL|SUMMARY)\.json")
# How open-unlearning names the folder of a run, and the models that it has published.
FOLDER = re.compile(
    r"(?:unlearn_)?(?:tofu|muse)_(?P<model>.+)_(?P<split>forget\d\d|News|Books)_(?P<algorithm>[^_]+)"
    r"(?:_(?P<settings>.+))?"
)
# Folders below that one, in which evaluations lie.
WITHIN = re.compile(r"evals?(_.*)?|checkpoint-\d+")
SEED = re.compile(r"(?:^|_)seed_?(\d+)(?=_|$)")


@dataclass(frozen=True)
class Said:
    """What its files do not say, as somebody says it; what is None is taken from the name of the run's folder."""

    algorithm: str | None = None
    model: str | None = None
    split: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ForeignRun:
    """A run of open-unlearning.

    Attributes:
        task: of the store.
        run: row of the table of runs, without its hash.
        sample_ids: of the forget set.
        answers: rows of the table of answers, without the run's hash.
        left_out: its metrics that are none of ours, with the reason.
    """

    task: str
    run: dict[str, Any]
    sample_ids: tuple[str, ...]
    answers: tuple[dict[str, Any], ...]
    left_out: Mapping[str, str]


def is_open_unlearning(path: Path) -> bool:
    """Whether a file has the name of one of its results."""
    return FILE.fullmatch(path.name) is not None


def read_open_unlearning(path: Path, said: Said) -> ForeignRun:
    """A run from a file of its evaluation.

    Raises:
        UserError: one line: the file cannot be read, nothing in it is a metric of ours, or nobody says whose it is.
    """
    match = FILE.fullmatch(path.name)
    assert match is not None
    task = match[1].lower()
    measured = {
        name: _Result.of(name, value, path) for name, value in read_json(path, dict[str, Any], EXPECTED).items()
    }
    metrics, left_out = _metrics(measured, path)
    if not metrics:
        raise UserError(
            f"{path}: none of its metrics ({', '.join(measured) or 'there are none'}) is one of ours and has a value; "
            f"expected {EXPECTED}, such as forget_Q_A_Prob"
        )
    whose = _whose(path, said, task)
    identity = {
        "algorithm": whose["algorithm"],
        "settings": whose["settings"],
        "model": whose["model"],
        "model_fingerprint": f"{NAME}: {whose['model']}",
        "task": task,
        "forget_split": whose["split"],
        "selection": "all",
        "forget_sha256": f"{NAME}: {task} {whose['split']}",
        "seed": whose["seed"],
        # In which it differs from every run that was measured here.
        "evaluation": NAME,
        "measured_by": NAME,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    sets = {name: _set_of(task, name, str(whose["split"])) for name in measured}
    forget = [result for name, result in measured.items() if sets[name] == ("forget", str(whose["split"]))]
    numbers = sorted({number for result in forget for number in result.by_index})
    run = {
        "run": digest,
        "status": FINISHED,
        "algorithm": whose["algorithm"],
        "split": whose["split"],
        "selection": "all",
        "kind": "all",
        "level": "",
        "forget_samples": len(numbers) or None,
        "seed": whose["seed"],
        "metrics": sorted(metrics.items()),
        "model": whose["model"],
        "model_fingerprint": identity["model_fingerprint"],
        "data_sha256": identity["forget_sha256"],
        "spec": json.dumps(identity | {"spec_hash": digest}, sort_keys=True),
        "packages": "{}",
    }
    evaluation = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    answers = [
        {"evaluation": evaluation, "set": place[0], "sample_id": _sample_id(task, place[1], number)}
        | {"question": each.get("input"), "truth": each.get("ground_truth"), "after": each["generation"]}
        | {"rouge_after": _number(each.get("rougeL_recall"))}
        for name, result in measured.items()
        if (place := sets[name]) is not None
        for number, each in result.by_index.items()
        if isinstance(each.get("generation"), str)
    ]
    ids = tuple(_sample_id(task, str(whose["split"]), number) for number in numbers)
    return ForeignRun(task, run, ids, tuple(answers), left_out)


# --- What a file says ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """One of its metrics.

    Attributes:
        value: None where it was not formed, as forget quality is not without a retain-only model.
        by_index: what is known of each sample, by its row in the data.
    """

    value: float | None
    by_index: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, content: Any, path: Path) -> _Result:
        where = f"{path}: metric {name!r}"
        if not isinstance(content, dict):
            return cls(_number(shaped(content, float | int | None, where, "a number")))
        value = _number(shaped(content.get("agg_value"), float | int | None, where, "a number as agg_value"))
        own = shaped(content.get("value_by_index") or {}, dict[str, dict[str, Any] | None], where, "values by index")
        if bad := next((index for index in own if not index.isdecimal()), None):
            raise UserError(f"{where}: index {bad!r} is no number of a row; expected {EXPECTED}")
        return cls(value, {int(index): each for index, each in own.items() if each is not None})

    def mean_of(self, name: str, of: Callable[[np.ndarray], np.ndarray]) -> float | None:
        """The mean of a function of a value of the samples; None where they do not have it."""
        numbers = [_number(each.get(name)) for each in self.by_index.values()]
        values = np.array([number for number in numbers if number is not None])
        return float(of(values).mean()) if len(values) else None

    @property
    def rouge_l_f1(self) -> float | None:
        """Of the texts themselves, as MUSE has it."""
        texts = [(each.get("generation"), each.get("ground_truth")) for each in self.by_index.values()]
        if not texts or not all(isinstance(text, str) for pair in texts for text in pair):
            return None
        written, truth = ([str(pair[side]) for pair in texts] for side in (0, 1))
        return float(rouge_l_f1(written, truth).mean())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# Its metrics that are the same quantity under another name.
SAME = {
    "forget_Q_A_Prob": "forget_probability",
    "retain_Q_A_Prob": "retain_probability",
    "retain_Q_A_ROUGE": "retain_rr",
    "retain_Truth_Ratio": "retain_truth_ratio",
    "ra_Q_A_Prob_normalised": "real_authors_probability",
    "ra_Q_A_ROUGE": "real_authors_rr",
    "ra_Truth_Ratio": "real_authors_truth_ratio",
    "wf_Q_A_Prob_normalised": "world_facts_probability",
    "wf_Q_A_ROUGE": "world_facts_rr",
    "wf_Truth_Ratio": "world_facts_truth_ratio",
    "model_utility": "model_utility",
    "forget_quality": "forget_quality",
    "extraction_strength": "extraction_strength",
    "exact_memorization": "exact_memorization",
    "privleak": "priv_leak",
    "mia_loss": "mia_loss_auc",
    "mia_zlib": "mia_zlib_auc",
    "mia_min_k": "mia_min_40_auc",
}
# Those that are converted, from the values of their samples where it takes these.
CONVERTED: dict[str, tuple[str, Callable[[_Result], float | None]]] = {
    "forget_Q_A_ROUGE": ("rr", lambda result: None if result.value is None else 1 - result.value),
    "forget_truth_ratio": ("forget_truth_ratio", lambda result: result.mean_of("score", tofu.forget_truth_score)),
    "forget_Truth_Ratio": ("forget_truth_ratio", lambda result: result.mean_of("score", tofu.forget_truth_score)),
    "forget_verbmem_ROUGE": ("verbmem_f", lambda result: result.rouge_l_f1),
    "forget_knowmem_ROUGE": ("knowmem_f", lambda result: result.rouge_l_f1),
    "retain_knowmem_ROUGE": ("knowmem_r", lambda result: result.rouge_l_f1),
}


def _metrics(measured: Mapping[str, _Result], path: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Our metrics, and why others of its are none."""
    found: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, result in measured.items():
        ours, convert = CONVERTED.get(name, (SAME.get(name, ""), lambda result: result.value))
        if not ours:
            left_out[name] = "is none of ours"
            continue
        value = convert(result)
        if value is None:
            left_out[name] = "has no value" if result.value is None else "needs the values of its samples (*_EVAL.json)"
            continue
        least, most = limits_of(ours)
        # Its numbers are sums in single precision.
        if not least - 1e-3 <= value <= most + 1e-3:
            raise UserError(f"{path}: metric {name!r} is {value:g}: expected a number from {least:g} to {most:g}")
        found[ours] = value
    return found, left_out


# --- Whose it is --------------------------------------------------------------------------------------------


def _whose(path: Path, said: Said, task: str) -> dict[str, Any]:
    """Algorithm, model, split, seed and settings: what is said, else what the folder's name says."""
    folder = path.absolute().parent
    while WITHIN.fullmatch(folder.name):
        folder = folder.parent
    match = FOLDER.fullmatch(folder.name)
    by_name: dict[str, str | None] = dict(match.groupdict()) if match else {}
    settings = by_name.pop("settings", None) or ""
    seed = SEED.search(settings)
    found: dict[str, Any] = {
        "algorithm": said.algorithm or by_name.get("algorithm"),
        "model": said.model or by_name.get("model"),
        "split": said.split or by_name.get("split"),
    }
    if lacking := next((name for name, value in found.items() if not value), None):
        raise UserError(
            f"{path}: nothing says the {lacking}: name it as {named(lacking)}, or the folder as open-unlearning does "
            f"({task}_MODEL_{'forget10' if task == 'tofu' else 'News'}_ALGORITHM), which here is {folder.name!r}"
        )
    by_folder = int(seed[1]) if seed else 0
    return found | {
        "seed": by_folder if said.seed is None else said.seed,
        "settings": SEED.sub("", settings).strip("_"),
    }


def _set_of(task: str, metric: str, split: str) -> tuple[str, str] | None:
    """The set of a metric's samples, and what their ids begin with; None where they are of several, or unknown."""
    if task == "muse":
        sets = {
            "forget_verbmem_ROUGE": "verbmem",
            "forget_knowmem_ROUGE": "knowmem_forget",
            "retain_knowmem_ROUGE": "knowmem_retain",
        }
        return (sets[metric], sets[metric]) if metric in sets else None
    # Of paraphrased questions, and of wrong answers, there are others of the same sample.
    if "PARA" in metric or "PERT" in metric:
        return None
    if metric.startswith("forget_") or metric in ("extraction_strength", "exact_memorization"):
        return "forget", split
    prefixes = {"retain_": "retain", "ra_": "real_authors", "wf_": "world_facts"}
    name = next((name for prefix, name in prefixes.items() if metric.startswith(prefix)), None)
    return (name, name) if name else None


def _sample_id(task: str, begins: str, number: int) -> str:
    """As the task's records have it: the split and the row, which has four digits in TOFU's and five in MUSE's."""
    return f"{begins}-{number:0{5 if task == 'muse' else 4}d}"
