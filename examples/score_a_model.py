"""Which records are hard to forget? Scores them under a loaded model, in this process.

python examples/score_a_model.py                                             # the embedded model and task
python examples/score_a_model.py meta-llama/Llama-3.2-1B forget.jsonl        # your own
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM

import scoring
from bench.models.find import find_model
from bench.tasks.datasets import load_dataset


def main(name: str = "authors", data: str = "authors") -> None:
    found = find_model(name)
    model = AutoModelForCausalLM.from_pretrained(found.source, revision=found.revision)
    records = load_dataset(data).records

    table = scoring.score(model, found.tokenizer, records)

    # A longer sample has more terms in its sum, so samples of different lengths are compared by token.
    ranked = table.sort_values("mrd_per_token")
    columns = ["sample_id", "num_tokens", "nll", "mrd", "mrd_per_token"]
    print(f"{len(table)} records by {table.attrs['settings']['estimator']}")
    print("hardest to forget:", ranked[columns].head(5).to_string(index=False), sep="\n")
    print("easiest:", ranked[columns].tail(5).to_string(index=False), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
