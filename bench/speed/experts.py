"""`mrd-bench benchmark experts`: the gradient of mixtures of experts for a batch at once, against a sample at a time.

Each expert is a linear layer over the tokens that are routed to it, so the norm of a gradient has a closed form
there too. Both ways take turns on the same random models and samples, in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.files.origin import origin
from bench.speed.figures import device_name, interval, require_at_least, seconds_in_turns, write_figures
from bench.stats.estimates import geometric_mean
from scoring.load import copied
from scoring.sample_gradients import autograd_norms, log_abs_logprob, per_sample_gradient_norms
from scoring.samples import Batch, Sample, collate

VOCABULARY = 2000
EXPERTS_OF_A_TOKEN = 4
BATCHED, ALONE = "a batch at once", "a sample at a time"


def run_benchmark(experts: Sequence[int], samples: int, turns: int, out: str | None) -> None:
    """Measure, print a table with ratios, and write the figures as JSON if asked to.

    Args:
        experts: numbers of experts, a model each.
        samples: in a batch.
        turns: how often each way is timed.
        out: JSON file.
    """
    for count in experts:
        require_at_least(EXPERTS_OF_A_TOKEN, experts=count)
    require_at_least(2, samples=samples, turns=turns)
    torch.set_num_threads(1)  # as a replica has
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = collate(_random_samples(samples)).to(device)
    figures: dict[str, Any] = {"samples": samples, "turns": turns, "device": device_name()}
    print(f"{samples} samples of 30 to 59 tokens, {EXPERTS_OF_A_TOKEN} experts a token, {figures['device']}")
    print("experts  M weights  ms a sample, at once  alone  ratio                       largest error")
    for count in experts:
        figures[str(count)] = row = _measure(_random_model(count).to(device), batch, turns)  # type: ignore[arg-type]
        print(
            f"{count:>7}{row['weights'] / 1e6:>11.1f}{row['ms_a_sample'][BATCHED]:>22.1f}"
            f"{row['ms_a_sample'][ALONE]:>7.1f}  {row['ratio']['value']:.2f} {interval(row['ratio'], '.2f')}"
            f"{row['largest_error']:>9.1e}"
        )
    figures |= origin()
    write_figures(figures, out)


def _measure(model: Any, batch: Batch, turns: int) -> dict[str, Any]:
    works = {
        BATCHED: partial(per_sample_gradient_norms, model, batch, log_abs_logprob),
        ALONE: partial(autograd_norms, model, batch, log_abs_logprob),
    }
    norms, _ = works[BATCHED]()  # also a first time that does not count
    exact, _ = autograd_norms(copied(model, torch.float64), batch, log_abs_logprob)
    seconds = seconds_in_turns(works, turns)
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "ms_a_sample": {name: 1000 * float(np.median(taken)) / len(batch) for name, taken in seconds.items()},
        "ratio": asdict(geometric_mean(np.array(seconds[ALONE]) / np.array(seconds[BATCHED]))),
        "largest_error": float(((norms.cpu() - exact.cpu()).abs() / exact.cpu()).max()),
    }


def _random_model(experts: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,  # type: ignore[call-arg]
        num_experts=experts,
        num_experts_per_tok=EXPERTS_OF_A_TOKEN,
    )
    return Qwen3MoeForCausalLM(config).eval()


def _random_samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 60, count)
    return [
        Sample(str(i), rng.integers(3, VOCABULARY, length), np.arange(length) >= 10, i)
        for i, length in enumerate(lengths.tolist())
    ]
