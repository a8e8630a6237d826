"""What unlearning is judged by.

`METRICS` names every metric with its one-line definition, its source and how it is formed from per-sample values; the
evaluation job measures those values and stores them beside the metrics.

For logs made elsewhere, `tofu_metrics(logs, retain_logs)` computes TOFU's metrics from per-sample losses in TOFU's own
layout.
"""

from bench.metrics.registry import ATTACKED, GROUPS, METRICS, Metric, knowledge_sign, limits_of
from bench.metrics.tofu import tofu_metrics

__all__ = ["ATTACKED", "GROUPS", "METRICS", "Metric", "knowledge_sign", "limits_of", "tofu_metrics"]
