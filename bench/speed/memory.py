"""`mrd-bench benchmark memory`: what a run of unlearning holds in memory, and whether it fits under a limit.

A random Llama is unlearned with everything that looks at it (draws by MRD, checks, evaluation, checkpoints), in a
process of its own, and with workers in those of the workers: with adapters in one process, and with full weights
sharded over two workers. Of every process is watched what it has for itself: private memory, and what counts against
the limit (RLIMIT_DATA), which has the mapped file of the weights in it, too.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bench.files.origin import origin
from bench.models.embedded import FAMILIES, train_tokenizer
from bench.speed.figures import require_at_least, write_figures
from bench.speed.made import random_data_file, random_llama_folder
from scoring.errors import UserError, unknown_name

LAYERS, HEAD_DIM = 16, 64
# What is unlearned, by name.
WAYS = {
    "adapters": ["--workers", "0", "--lora-rank", "4"],
    "shards": ["--workers", "2", "--strategy", "fsdp"],
}
SETTINGS = """
    --algorithm GradDiff --alpha 1 --refresh 1 --refresh-unit steps --max-steps 2 --batch-size 2 --batch-tokens 64
    --check-every 1 --check-unit steps --no-early-stopping --evaluate-samples 1 --evaluate-every 0
    --checkpoint-every 1 --threads 1
"""
# The processes of workers inherit the limit, each for itself.
CHILD = """
import resource, sys
from bench.cli import main
if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""
# Arrow's own allocator reserves a gigabyte that it does not use, and threads of OpenMP have stacks.
ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
LOOK_S = 0.1
# What is watched of a process, as /proc calls it.
WATCHED = {"private": "RssAnon", "resident": "VmHWM", "data": "VmData"}


def run_benchmark(params: float, limit: float | None, ways: tuple[str, ...], out: str | None) -> None:
    """Measure, print, and write the figures as JSON if asked to.

    Args:
        params: weights of the model.
        limit: bytes of data of each process (RLIMIT_DATA); None: none.
        ways: keys of WAYS.
        out: JSON file.

    Raises:
        UserError: the machine has no /proc to watch, or there is no such way.
    """
    require_at_least(1e5, params=params)
    if limit is not None:
        require_at_least(1e6, limit=limit)
    for way in ways:
        if way not in WAYS:
            raise unknown_name("way", way, WAYS)
    if not Path("/proc/self/status").is_file():
        raise UserError("benchmark memory watches processes in /proc, which this machine does not have")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mrd-bench-memory-") as name:
        folder = Path(name)
        heads = max(1, round(math.sqrt(params / (12 * LAYERS)) / HEAD_DIM))
        tokenizer = train_tokenizer(FAMILIES["authors"].tokenizer_text())
        model = random_llama_folder(folder / "model", tokenizer, heads * HEAD_DIM, LAYERS, heads)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        shown = "none" if limit is None else f"{limit / 1e9:.2f} GB"
        print(f"{size / 4e6:.0f} M weights, {size / 1e9:.2f} GB; limit of each process: {shown}")
        print(f"{'':<10}{'fits':>6}{'private':>14}{'with mapped':>14}{'data':>14}   GB, the largest process")
        for way in ways:
            rows[way] = row = _watched(folder / way, model, int(limit or 0), WAYS[way])
            values = "".join(f"{row[name] / 1e9:>14.2f}" for name in ("private", "resident", "data"))
            print(
                f"{way:<10}{'yes' if row['fits'] else 'no':>6}{values}" + ("" if row["fits"] else f"   {row['error']}")
            )
    write_figures({"params": size // 4, "weights": size, "limit": limit, "ways": rows, **origin()}, out)


def _watched(folder: Path, model: Path, limit: int, flags: list[str]) -> dict[str, Any]:
    """Whether a run ends well, the error if it does not, and the most that any of its processes held of each kind, in
    bytes."""
    folder.mkdir()
    arguments = ["unlearn", "--model", str(model), *SETTINGS.split(), *flags, "--out", str(folder / "run")]
    for flag, count in (("--task", 4), ("--retain", 3)):
        arguments += [flag, str(random_data_file(folder, count))]
    peaks = dict.fromkeys(WATCHED, 0)
    with (folder / "errors").open("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(limit), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | ENVIRONMENT,
        )
        while child.poll() is None:
            for process in _family(child.pid):
                for name, value in _status(process).items():
                    peaks[name] = max(peaks[name], value)
            time.sleep(LOOK_S)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    fits = child.returncode == 0
    return {"fits": fits, "error": "" if fits or not lines else lines[-1].strip()[:300], **peaks}


def _family(pid: int) -> Iterator[int]:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        yield pid
        yield from (child.pid for child in process.children(recursive=True))


def _status(pid: int) -> dict[str, int]:
    """What a process holds, in bytes; nothing of one that has ended."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        return {name: 1024 * int(lines[key].split()[0]) for name, key in WATCHED.items() if key in lines}
    return {}
