"""TOFU's own metrics (Maini et al. 2024), from per-sample losses: of a model measured here, or of logs made elsewhere.

A *loss* is the mean NLL of an answer's tokens, in nats. All functions take arrays, and reduce only the axes that they
say, so that they serve one data set and stacks of bootstrap resamples alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from scoring.answers import mean_probability
from scoring.errors import UserError
from scoring.reading import read_json

Mean = Literal["geometric", "arithmetic"]

# Set -> its file in a TOFU log.
LOG_FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
UTILITY_SETS = ("retain", "real_authors", "world_facts")
# Sets of questions whose wrong answers are the other options. Their answers are short, and nothing is paraphrased.
OPTION_SETS = ("real_authors", "world_facts")


def option_probability(loss: np.ndarray, wrong_losses: np.ndarray) -> np.ndarray:
    """The answer's probability among its options: p(y) / (p(y) + Sum_i p(wrong_i)), p as in
    `scoring.answers.mean_probability`.

    Args:
        loss: (...,) of the true answer.
        wrong_losses: (..., W) of the W wrong options; nan where an answer has fewer.
    """
    true, wrong = mean_probability(loss), mean_probability(wrong_losses)
    return true / (true + np.nansum(wrong, -1))


def truth_ratio(paraphrased_loss: np.ndarray, wrong_losses: np.ndarray, mean: Mean = "geometric") -> np.ndarray:
    """r = mean over the wrong answers of p(wrong_i), divided by p(paraphrased answer).

    Below 1 the model prefers the truth. The mean is geometric, exp(-mean of the losses), as in the code that computes
    TOFU's Forget Quality; "arithmetic" is the mean of probabilities, as printed in the paper and as in the code that
    computes its Model Utility. The two orders of samples differ, so say which.

    Args:
        paraphrased_loss: (...,).
        wrong_losses: (..., W); nan where an answer has fewer.
        mean: over the W wrong answers.

    Returns:
        (...,), > 0.
    """
    wrong = np.asarray(wrong_losses, dtype=np.float64)
    mean_wrong = np.exp(-np.nanmean(wrong, -1)) if mean == "geometric" else np.nanmean(mean_probability(wrong), -1)
    return mean_wrong / mean_probability(paraphrased_loss)


def forget_truth_score(ratio: np.ndarray) -> np.ndarray:
    """min(r, 1/r): 1 where the model can no longer tell the truth from the wrong answers."""
    return np.minimum(ratio, 1 / ratio)


def retain_truth_score(ratio: np.ndarray) -> np.ndarray:
    """max(0, 1 - r): 1 where the model knows the truth."""
    return np.maximum(0, 1 - ratio)


def model_utility(parts: Sequence[np.ndarray | float]) -> np.ndarray:
    """The harmonic mean of probability, ROUGE-L recall and truth score on the retain set, real authors and world facts.

    Args:
        parts: nine arrays of one shape (...), each >= 0.

    Returns:
        (...,); 0 where a part is 0.
    """
    stacked = np.stack([np.asarray(part, dtype=np.float64) for part in parts])
    return np.where((stacked == 0).any(0), 0.0, stats.hmean(np.where(stacked == 0, 1.0, stacked), axis=0))


def forget_quality(ratio: np.ndarray, retain_model_ratio: np.ndarray) -> float:
    """p of the two-sided Kolmogorov-Smirnov test that the truth ratios r of the forget set, under the unlearned and
    under the retain-only model, have one distribution; high is good. (N,), (M,) -> a number in [0, 1]."""
    return float(stats.ks_2samp(ratio, retain_model_ratio).pvalue)


def ks_distance(ratio: np.ndarray, retain_model_ratio: np.ndarray) -> float:
    """The distance of that test: the largest gap between the two distribution functions."""
    return float(stats.ks_2samp(ratio, retain_model_ratio).statistic)


Logs = Mapping[str, Mapping[str, Any]]


def tofu_metrics(
    logs: Logs | str | Path, retain_logs: Logs | str | Path | None = None, mean: Mean = "geometric"
) -> dict[str, float]:
    """TOFU's metrics from per-sample logs in the layout of TOFU's evaluation.

    Args:
        logs: a JSON file (TOFU's eval_log_aggregated.json), or its contents: set -> field -> values by sample. The
            sets are `forget`, `retain`, `real_authors`, `world_facts`, or TOFU's file names for them (LOG_FILES); a
            set that is absent is left out, with the metrics that need it. Fields: `avg_gt_loss` (loss of the answer),
            `average_perturb_loss` (losses of the wrong answers, one list a sample), `avg_paraphrased_loss` (loss of
            the paraphrased answer; the answer's where absent) and `rougeL_recall`. The values of a field are a
            mapping by sample, or a list.
        retain_logs: of the retain-only model; needed for forget quality, only its forget set is used.
        mean: see `truth_ratio`; forget quality always takes the geometric one.

    Returns:
        `{set}_probability`, `{set}_rouge_l_recall`, `{set}_truth_ratio` (means over samples; the forget set's truth
        ratio by `forget_truth_score`, the others' by `retain_truth_score`), `model_utility`, `forget_quality` and
        `ks_distance`.

    Raises:
        UserError: a file cannot be read, a field is missing, or its samples are not those of the other fields.
    """
    logs, retain_logs = _read(logs), None if retain_logs is None else _read(retain_logs)
    metrics: dict[str, float] = {}
    for name, file in LOG_FILES.items():
        if name not in logs and file not in logs:
            continue
        log = _Log(name, logs)
        right, wrong = log.numbers("avg_gt_loss"), log.numbers("average_perturb_loss")
        probability = option_probability(right, wrong) if name in OPTION_SETS else mean_probability(right)
        score = forget_truth_score if name == "forget" else retain_truth_score
        metrics[f"{name}_probability"] = float(probability.mean())
        metrics[f"{name}_rouge_l_recall"] = float(log.numbers("rougeL_recall").mean())
        metrics[f"{name}_truth_ratio"] = float(score(truth_ratio(log.paraphrased(), wrong, mean)).mean())
    parts = [
        metrics[f"{name}_{part}"]
        for name in UTILITY_SETS
        for part in ("probability", "rouge_l_recall", "truth_ratio")
        if f"{name}_{part}" in metrics
    ]
    if len(parts) == 9:
        metrics["model_utility"] = float(model_utility(parts))
    if retain_logs is not None:
        forget_logs = [_Log("forget", logs), _Log("forget", retain_logs)]
        ratios = [truth_ratio(log.paraphrased(), log.numbers("average_perturb_loss")) for log in forget_logs]
        metrics["forget_quality"] = forget_quality(*ratios)
        metrics["ks_distance"] = ks_distance(*ratios)
    return metrics


def _read(logs: Logs | str | Path) -> Logs:
    if isinstance(logs, Mapping):
        return logs
    return read_json(logs, dict[str, dict[str, dict[str, Any] | list[Any]]], "a TOFU log: sets of fields of samples")


class _Log:
    """One set of a log, its fields in one order of samples."""

    def __init__(self, name: str, logs: Mapping[str, Mapping[str, Any]]) -> None:
        file = name if name in logs else LOG_FILES[name]
        if file not in logs:
            raise UserError(f"TOFU log: no {name!r} and no {file!r} among {', '.join(logs) or 'nothing'}")
        self._name, self._fields = file, logs[file]
        answer = self._field("avg_gt_loss" if "avg_gt_loss" in self._fields else "avg_paraphrased_loss")
        self._samples = list(answer)

    def _field(self, field: str) -> Mapping[str, Any]:
        if field not in self._fields:
            raise UserError(f"TOFU log {self._name!r}: no field {field!r}; found {', '.join(self._fields)}")
        values = self._fields[field]
        if isinstance(values, Mapping):
            return {str(key): value for key, value in values.items()}
        return {str(i): value for i, value in enumerate(values)}

    def numbers(self, field: str) -> np.ndarray:
        """(N,), or (N, W) for a field of lists, in fp64."""
        values = self._field(field)
        if set(values) != set(self._samples):
            raise UserError(
                f"TOFU log {self._name!r}: field {field!r} has {len(values)} samples, not the {len(self._samples)} of "
                "the others"
            )
        try:
            return np.array([values[sample] for sample in self._samples], dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(
                f"TOFU log {self._name!r}: field {field!r} must hold a number for each sample, or as many for each"
            ) from None

    def paraphrased(self) -> np.ndarray:
        return self.numbers("avg_paraphrased_loss" if "avg_paraphrased_loss" in self._fields else "avg_gt_loss")
