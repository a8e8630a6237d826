"""How many updates does it take to forget a record? Forecasts it for all of them, and finds it out for a few.

python examples/forecast.py             # 6 of the embedded task's records
python examples/forecast.py 12          # or so many, evenly spaced
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import bench
import scoring
from bench.jobs.truth import TruthSpec, truth
from bench.models.find import find_model
from bench.tasks.datasets import load_dataset

NAME = "authors"  # of the embedded model, and of its task
THRESHOLD = 0.75  # a record counts as forgotten when the model predicts a smaller share of its tokens (MA)
LEARNING_RATE = 5e-5


def main(count: str = "6") -> None:
    found = find_model(NAME)
    model = AutoModelForCausalLM.from_pretrained(found.source)
    records = load_dataset(NAME).records

    # A look ahead of two gradients: eight forward passes a record. MRD, for comparison, is 2.4.
    forecast = scoring.difficulty(
        model,
        found.tokenizer,
        records,
        measure=["flip-time", "mrd"],
        thresholds=THRESHOLD,
        lookahead=2,
        learning_rate=LEARNING_RATE,
    )

    # Each of a few is unlearnt by itself, from the same weights, until it is forgotten.
    spec = TruthSpec(model=NAME, data=NAME, samples=int(count), until=[THRESHOLD], learning_rate=LEARNING_RATE)
    with tempfile.TemporaryDirectory() as folder:
        real = truth(spec, Path(folder) / "truth.parquet", bench.Resources(replicas=0)).table.to_pandas()

    both = real[["sample_id", f"updates@{THRESHOLD}"]].merge(forecast, on="sample_id")
    both = both.sort_values(f"updates@{THRESHOLD}")
    columns = ["sample_id", "num_tokens", "mrd", f"flip-time@{THRESHOLD}", f"updates@{THRESHOLD}"]
    print(f"{len(forecast)} records forecast, {len(both)} of them forgotten by gradient ascent:")
    print(both[columns].to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main(*sys.argv[1:])
