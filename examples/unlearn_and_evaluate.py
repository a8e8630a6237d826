"""Makes the embedded model forget four authors, easy samples first, and measures what is gone and what is left.

python examples/unlearn_and_evaluate.py            # GradDiff
python examples/unlearn_and_evaluate.py NPO        # or another algorithm
"""

from __future__ import annotations

import copy
import sys

from transformers import AutoModelForCausalLM

import algorithms
import bench
from bench.models.find import find_model
from bench.tasks.datasets import load_dataset


def main(algorithm: str = "GradDiff") -> None:
    found = find_model("authors")
    original = AutoModelForCausalLM.from_pretrained(found.source)
    forget = load_dataset("authors", "forget10").records
    retain = load_dataset("authors", "retain90").records

    # It is trained in place; the original is needed afterwards, to compare with.
    model = copy.deepcopy(original)
    result = algorithms.unlearn(
        model, found.tokenizer, forget, retain, algorithm=algorithm, alpha=1, epochs=3, evaluate=False, progress=True
    )
    forgotten = result.samples["forgotten_at_step"].notna().sum()
    print(f"{algorithm}: {result.record['updates']} updates, {forgotten} of {len(forget)} samples forgotten")

    evaluation = bench.evaluate(
        result.model, "authors", tokenizer=found.tokenizer, original=original, metrics="rr,ma,retain_rr"
    )
    print(evaluation.metrics[["model", "name", "value", "low", "high"]].to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
