"""What others run is written as they do it, and gives the same numbers; its speeds are read, not asserted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.cli import main
from bench.speed.peers import KEPT, public_scores
from bench.speed.unlearning.trainer import padded
from tests.tiny_models import random_samples, tiny_model


@pytest.mark.parametrize("kept", [True, False])
def test_the_public_way_is_algorithm_1_by_hand(kept: bool) -> None:
    """A sample at a time in fp64, on weights to which each draw adds its noise anew; and what drifts is rounding."""
    model: Any = tiny_model("llama").double()
    samples, sigma, draws = random_samples(5), 1e-4, 3
    parts = [samples[:3], samples[3:]]
    expected = []
    for number, part in enumerate(parts):
        for sample in part:
            ids = torch.from_numpy(sample.input_ids)
            places = np.flatnonzero(sample.scored)
            changes = []
            for draw in range(draws):
                moved = copy.deepcopy(model)
                torch.manual_seed(number * draws + draw)
                with torch.no_grad():
                    for p in moved.parameters():
                        p += sigma * torch.randn_like(p)
                    before, after = (
                        torch.log_softmax(m(input_ids=ids[None]).logits[0, :-1].float(), -1)[places - 1, ids[places]]
                        for m in (model, moved)
                    )
                changes.append(((before - after) / before).sum().abs().item())
            expected.append(np.mean(changes))
    start = copy.deepcopy(model)
    got = public_scores(model, [padded(part, 0) for part in parts], sigma, draws, kept)
    assert got == pytest.approx(expected, rel=1e-2)  # the log-probs are fp32
    pairs = list(zip(model.parameters(), start.parameters(), strict=True))
    assert 0 < max((p - q).abs().max().item() for p, q in pairs) < 1e-14


def test_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "peers.json", torch.get_num_threads()
    try:
        command = f"benchmark peers --params 1e5 --samples 6 --batch 3 --draws 4 --turns 2 --out {out}"
        assert main(command.split()) == 0
    finally:
        torch.set_num_threads(before)
    printed, figures = capsys.readouterr().out, json.loads(out.read_text())
    mrd, npo = figures["mrd"], figures["npo"]
    for name, row in mrd.items():
        assert name in printed
        assert len(row["cpu_seconds"]) == 2
        assert (row["drift"] > 0) == name.startswith("public")
    # Four draws of each way have the same error, 0.76 / 2; the closed form has that of rounding.
    assert mrd["gradient"]["error"] < 1e-5
    assert all(0.1 < row["error"] < 0.8 for name, row in mrd.items() if name != "gradient")
    # Kept noise takes as much as the weights, and is not counted where it is drawn once more.
    assert mrd[KEPT]["peak_weights"] > mrd["public way, noise drawn again"]["peak_weights"] + 0.5
    # The frozen copy is the difference; everything else is the same training.
    assert npo["weights_difference"] < 1e-3
    assert npo["loss_difference"] < 1e-4
    assert npo["peak_weights"]["trainer"] > npo["peak_weights"]["ours"] + 0.9
