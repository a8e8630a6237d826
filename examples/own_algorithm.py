"""An algorithm of your own, as a plugin: registered when the file is loaded.

mrd-bench unlearn --plugin examples/own_algorithm.py --model authors --task authors --algorithm CappedGA \
    --settings cap=3 --workers 0 --out runs/capped
python examples/own_algorithm.py        # or here, beside GradDiff
"""

from __future__ import annotations

import torch

from algorithms.objectives import ALGORITHMS, Algorithm


def capped_ga(logprobs: torch.Tensor, mask: torch.Tensor, *, cap: float = 5.0) -> torch.Tensor:
    """Gradient ascent that lets go of a token once its NLL is above `cap` nats."""
    return (logprobs.clamp_min(-cap) * mask).sum(-1) / mask.sum(-1)


ALGORITHMS["CappedGA"] = Algorithm(capped_ga, retain="nll")


def main() -> None:
    from transformers import AutoModelForCausalLM

    import algorithms
    from bench.models.find import find_model
    from bench.tasks.datasets import load_dataset

    found = find_model("authors")
    forget = load_dataset("authors", "forget10").records
    retain = load_dataset("authors", "retain90").records
    for name in ("GradDiff", "CappedGA"):
        model = AutoModelForCausalLM.from_pretrained(found.source)
        result = algorithms.unlearn(
            model,
            found.tokenizer,
            forget,
            retain,
            algorithm=name,
            learning_rate=1e-4,
            epochs=4,
            early_stopping=False,
            check_every=0,
            evaluate_samples=20,
        )
        last = result.epochs.iloc[-1]
        print(f"{name}: ROUGE-L recall {last['forget_rouge_l_recall']:.2f} of what was to be forgotten, ", end="")
        print(f"{last['retain_rouge_l_recall']:.2f} of what was to be kept")


if __name__ == "__main__":
    main()
