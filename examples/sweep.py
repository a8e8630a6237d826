"""Two algorithms on three draws of ten forget samples: does the draw decide which one is ahead?

python examples/sweep.py [FOLDER]        # the same command continues a sweep that was stopped
"""

from __future__ import annotations

import sys

import bench

SPEC = {
    "base": {
        "model": "authors",
        "task": "authors",
        "forget_split": "forget10",
        "epochs": 2,
        # Quicker: nobody looks which samples are forgotten, and answers are measured at the end, on 20 samples a set.
        "early_stopping": False,
        "check_every": 0,
        "evaluate_every": 0,
        "evaluate_samples": 20,
    },
    "vary": {"algorithm": ["GradDiff", "NPO"]},
    "selections": [{"kind": "random", "size": 10, "count": 3}],
}


def main(folder: str = "sweep-example") -> None:
    # One trial after the other in this process. Without `resources` as many as fit run at once, on Ray.
    result = bench.sweep(SPEC, folder, resources=bench.SweepResources(concurrent=0))
    trials = result.trials.to_pandas()
    print(trials.pivot(index="selection", columns="algorithm", values="completeness").round(3).to_string())
    print(f"tables: {result.folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
