"""`mrd-bench benchmark gpu`: how much of a card's arithmetic MRD uses, on a random Llama of a billion weights.

Monte Carlo in fp32 (the perturbation would not survive in bf16) and the gradient estimator in fp32 and bf16, each as a
share of the speed of a large matrix product in the same dtype on the same card. A gradient counts as three forward
passes. Monte Carlo is measured on few draws and scaled to K: every draw costs the same. Without a GPU the CPU is
measured, with which a model of a few million weights is large enough.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.files.origin import origin
from bench.speed.figures import matmul_flops, median_seconds, require_at_least, write_figures
from bench.speed.made import random_llama, random_samples
from bench.speed.plan import Shape
from scoring.load import DTYPES
from scoring.mrd import Request, estimate
from scoring.replica import TransformersReplica
from scoring.samples import make_batches

SIGMA = 1e-5
SCORED = 0.5
DRAWS = 3
REPEATS = 3
BACKWARD = 2  # forward passes that a backward pass counts as
HEAD_DIM = 64


def run_benchmark(params: float, samples: int, tokens: int, draws: int, batch_tokens: int, out: str | None) -> None:
    """Measure, print, and write the figures as JSON if asked to.

    Args:
        params: weights of the model.
        samples: that are scored.
        tokens: of a sample.
        draws: K.
        batch_tokens: in a batch.
        out: JSON file.
    """
    require_at_least(1e5, model_params=params)
    require_at_least(2, samples=samples, draws=draws)
    require_at_least(4, tokens=tokens)
    require_at_least(1, batch_tokens=batch_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    model = _model(params)
    shape = Shape.of_model(model)
    scored = tokens - max(1, round(tokens * (1 - SCORED)))
    batches = make_batches(random_samples(samples, tokens, scored, shape.vocabulary), batch_tokens)
    flops = shape.forward_flops(samples * tokens, samples * scored, tokens)
    print(f"{samples} samples of {tokens} tokens, {shape.params / 1e6:.0f} M weights, K = {draws}, {card}")
    rows: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        peak = matmul_flops(8192 if device == "cuda" else 1024, device, DTYPES[dtype])
        replica = TransformersReplica(model.to(device, DTYPES[dtype]).eval())
        gradient = partial(estimate, replica, batches, Request("gradient", SIGMA, 0))
        rows[f"gradient, {dtype}"] = _row(median_seconds(gradient, REPEATS), flops * (1 + BACKWARD), peak)
        if dtype == "float32":
            base = [replica.logprobs(batch) for batch in batches]
            few_draws = partial(estimate, replica, batches, Request("monte-carlo", SIGMA, 0, 0, DRAWS), base)
            seconds = median_seconds(few_draws, REPEATS) / DRAWS * draws
            rows[f"monte-carlo, {dtype}"] = _row(seconds, flops * draws, peak)
    print(f"{'':<24}{'seconds':>10}{'TFLOP/s':>10}{'of the matmul peak':>20}")
    for name, row in rows.items():
        print(f"{name:<24}{row['seconds']:>10.2f}{row['flops'] / 1e12:>10.2f}{row['share']:>20.0%}")
    ratio = rows["monte-carlo, float32"]["seconds"] / rows["gradient, float32"]["seconds"]
    print(f"gradient is {ratio:.1f} x faster than monte-carlo")
    figures: dict[str, Any] = {"card": card, "params": shape.params, "samples": samples, "tokens": tokens}
    figures |= {"draws": draws, "batch_tokens": batch_tokens, "rows": rows, **origin()}
    write_figures(figures, out)


def _model(params: float) -> Any:
    """A random Llama of about so many weights."""
    shape = Shape.of_size(params)
    heads = max(1, round(shape.hidden / HEAD_DIM))
    return random_llama(shape.vocabulary, heads * HEAD_DIM, shape.layers, heads)


def _row(seconds: float, flops: float, peak: float) -> dict[str, float]:
    return {"seconds": seconds, "flops": flops / seconds, "peak": peak, "share": flops / seconds / peak}
