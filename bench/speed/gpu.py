"""`mrd-bench benchmark gpu`: how much of a card's arithmetic MRD reaches, on a random Llama of a billion weights.

Monte Carlo in fp32 (the perturbation would not survive in bf16) and the gradient estimator in fp32 and bf16, each as a
share of what a large matrix product reaches in the same dtype on the same card. A gradient counts three forward passes.
Monte Carlo is measured on few draws and scaled to K: every draw costs the same. Without a GPU it measures the CPU,
which takes a model of a few million weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.files.origin import origin
from bench.speed.calibration import shape_of
from bench.speed.plan import Shape
from scoring.errors import UserError
from scoring.mrd import Request, estimate
from scoring.replica import DTYPES, TransformersReplica
from scoring.samples import Sample, make_batches

SIGMA = 1e-5
SCORED = 0.5
DRAWS = 3
REPEATS = 3
BACKWARD = 2  # forward passes that a backward pass counts


def run_benchmark(params: float, samples: int, tokens: int, draws: int, batch_tokens: int, out: str | None) -> None:
    """Measure, print, and write the figures as JSON if asked to."""
    if params < 1e5 or samples < 2 or tokens < 4 or draws < 2:
        raise UserError(
            f"--model-params {params:g} --samples {samples} --tokens {tokens} --draws {draws}: expected at least 1e5 "
            "weights, 2 samples, 4 tokens and 2 draws"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    model = _model(params)
    shape = shape_of(model)
    batches = make_batches(_samples(samples, tokens, shape.vocabulary), batch_tokens)
    scored = sum(int(batch.mask.sum()) for batch in batches)
    flops = shape.forward_flops(samples * tokens, scored, tokens)
    print(f"{samples} samples of {tokens} tokens, {shape.params / 1e6:.0f} M weights, K = {draws}, {card}")
    rows: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        peak = _matmul_peak(device, DTYPES[dtype])
        replica = TransformersReplica(model.to(device, DTYPES[dtype]).eval())
        seconds = _seconds(partial(estimate, replica, batches, Request("gradient", SIGMA, 0)), device)
        rows[f"gradient, {dtype}"] = _row(seconds, flops * (1 + BACKWARD), peak)
        if dtype == "float32":
            base = [replica.logprobs(batch) for batch in batches]
            drawn = _seconds(
                partial(estimate, replica, batches, Request("monte-carlo", SIGMA, 0, 0, DRAWS), base), device
            )
            rows[f"monte-carlo, {dtype}"] = _row(drawn / DRAWS * draws, flops * draws, peak)
    print(f"{'':<24}{'seconds':>10}{'TFLOP/s':>10}{'of the matmul peak':>20}")
    for name, row in rows.items():
        print(f"{name:<24}{row['seconds']:>10.2f}{row['flops'] / 1e12:>10.2f}{row['share']:>20.0%}")
    ratio = rows["monte-carlo, float32"]["seconds"] / rows["gradient, float32"]["seconds"]
    print(f"gradient is {ratio:.1f} x faster than monte-carlo")
    if out:
        figures: dict[str, Any] = {"card": card, "params": shape.params, "samples": samples, "tokens": tokens}
        figures |= {"draws": draws, "batch_tokens": batch_tokens, "rows": rows, **origin()}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


def _model(params: float) -> Any:
    """A random Llama of about so many weights, with heads of 64."""
    shape = Shape.of_size(params)
    width = max(64, round(shape.hidden / 64) * 64)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=shape.layers,
            num_attention_heads=width // 64,
        )
    )


def _samples(count: int, tokens: int, vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    scored = np.arange(tokens) >= max(1, round(tokens * (1 - SCORED)))
    return [Sample(str(i), rng.integers(0, vocabulary, tokens), scored, i) for i in range(count)]


def _seconds(work: Callable[[], object], device: str) -> float:
    """The median of several times, after one that is not counted."""
    taken = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def _matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product that is large enough for the device."""
    # As the replicas compute: TF32 would be another arithmetic.
    torch.set_float32_matmul_precision("highest")
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _row(seconds: float, flops: float, peak: float) -> dict[str, float]:
    return {"seconds": seconds, "flops": flops / seconds, "peak": peak, "share": flops / seconds / peak}
