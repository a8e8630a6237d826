"""The demo: the embedded task under the embedded model, scored, checked, unlearned and put on one page.

    score a forget set three ways -> check the scaling with sigma -> score all samples -> unlearn -> findings -> page

Every step continues where it was stopped; a second run finds all results and only writes the page again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError
from safetensors import safe_open
from tqdm import tqdm

from algorithms.recipe import Objectives
from bench.demo.figures import difficulty, recall_by_epoch, scaling, trade_off
from bench.demo.findings import Findings
from bench.demo.page import page
from bench.demo.runs import DemoRun, Unlearning, has_retain_set, predictions, table_lines
from bench.files.score_file import Scores, read_scores
from bench.jobs.draws import Point, ScalingLine, measure_draws, scaling_line
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreSpec, score
from bench.jobs.summary import print_summary
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.models.find import ModelReference, find_model
from bench.report import figures
from bench.report.attributes import attribute_effects, by_attribute, correlations
from bench.tasks.datasets import load_dataset
from bench.tasks.embedded import authors
from scoring.cluster import connect, how_many_fit
from scoring.errors import UserError
from scoring.files import replacing
from scoring.mrd import EstimatorName
from scoring.samples import encode
from scoring.settings import named

MODEL = TASK = "authors"
# Where each statistic can be measured: below, rounding; above, terms of higher order. bfloat16 is there to show
# what rounding does to the very sigma that the paper uses (1e-5).
SMALL, LARGE = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SCALING: tuple[tuple[EstimatorName, str, str, tuple[float, ...]], ...] = (
    ("monte-carlo", "mean_abs", "float32", SMALL),
    ("antithetic", "abs_mean", "float32", LARGE),
    ("monte-carlo", "mean_abs", "bfloat16", SMALL),
)

ALPHAS = (0.0, 1.0)
SHOWN_ESTIMATORS: tuple[EstimatorName, ...] = ("monte-carlo", "gradient", "curvature")
POLL_S = 1.0  # between looks at the updates of runs


@dataclass(frozen=True)
class Sizes:
    """How much the demo measures; the defaults take about four minutes on two cores.

    Attributes:
        draws: K of Monte Carlo.
        whole: the split that is compared by attribute.
        scaling_samples: samples of the scaling check, evenly spaced over the split.
        scaling_draws: its draws (pairs, for antithetic) at each sigma.
        algorithms: of unlearning, each at ALPHAS.
        epochs: of unlearning.
        evaluated: samples of the forget and of the retain set that are answered after each epoch.
    """

    draws: int = 200
    whole: str = "full"
    scaling_samples: int = 10
    scaling_draws: int = 12
    algorithms: tuple[str, ...] = ("GA", "GradDiff", "PO", "NPO")
    epochs: int = 8
    evaluated: int = 40


def run_demo(
    out: str | Path = "demo",
    split: str = authors.DEFAULT_SPLIT,
    sizes: Sizes = Sizes(),
    resources: Resources | None = None,
    overwrite: bool = False,
) -> None:
    """Measure and unlearn, and write `out`/index.html, the pictures, the score files and the runs in unlearning/.

    Raises:
        UserError: one line; an unknown split, or `out` holds a demo of another one.
    """
    out = Path(out)
    resources = resources or Resources()
    records = load_dataset(TASK, split).records
    if not overwrite:
        _check_folder(out, split)
    # Found before the cluster starts: training it takes all cores.
    model = find_model(MODEL)

    print(f"1/5 Memory Removal Difficulty of {len(records)} samples ({TASK}/{split}), by three estimators")
    results = {
        estimator: score(
            ScoreSpec(
                model=MODEL,
                data=TASK,
                split=split,
                estimator=estimator,
                draws=sizes.draws if estimator == "monte-carlo" else None,
            ),
            out / f"scores-{estimator}.parquet",
            resources,
            overwrite,
        )
        for estimator in SHOWN_ESTIMATORS
    }
    print("2/5 Does MRD follow sigma? In float32, and in bfloat16")
    scaling_lines = scaling_check(out / "scaling.parquet", model, split, sizes, resources)

    print(f"3/5 Difficulty by attribute, on {TASK}/{sizes.whole}")
    whole_spec = ScoreSpec(model=MODEL, data=TASK, split=sizes.whole, estimator="gradient")
    score(whole_spec, out / "scores-whole.parquet", resources, overwrite)
    whole = Scores.read(out / "scores-whole.parquet")
    whole_records = load_dataset(TASK, sizes.whole).records
    corpus = [f"{record['question']} {record['answer']}" for record in authors.training_records()]

    specs, skipped = _unlearning_specs(split, sizes)
    names = [*dict.fromkeys(spec.algorithm for spec in specs), *(f"not {name} (no retain set)" for name in skipped)]
    print(f"4/5 Unlearning {TASK}/{split}, alpha 0 and 1, {sizes.epochs} epochs: {', '.join(names)}")
    folders = unlearn_side_by_side(specs, out / "unlearning", resources, overwrite)

    print("5/5 Page and pictures")
    scores = {name: Scores.read(result.path) for name, result in results.items()}
    findings = Findings(
        monte_carlo=scores["monte-carlo"],
        gradient=scores["gradient"],
        curvature=scores["curvature"],
        whole=whole,
        records={record["id"]: record for record in [*whole_records, *records]},
        scaling=scaling_lines,
        scaling_draws=sizes.scaling_draws,
        effects=attribute_effects(whole, whole_records),
        correlations=correlations(whole, whole_records, corpus),
        model=_describe(model),
    )
    runs = [DemoRun.read(folder) for folder in folders]
    unlearning = Unlearning(runs, predictions(runs, findings.gradient), skipped)
    with replacing(out / "index.html") as unfinished:
        unfinished.write_text(page(findings, unlearning), encoding="utf-8")
    panels = [
        difficulty(findings.monte_carlo, f"Difficulty of {len(records)} samples, 95 % CI"),
        scaling(findings.scaling, "Does MRD follow sigma?"),
        by_attribute(findings.effects, f"By attribute, {whole.table.num_rows} samples"),
    ]
    with replacing(out / "difficulty.png") as unfinished:
        figures.picture(panels, unfinished)
    panels = [recall_by_epoch(runs, "forget", f"Forgetting {split}")]
    if has_retain_set(runs):
        panels += [
            recall_by_epoch(runs, "retain", "Keeping the rest"),
            trade_off(runs, "One against the other"),
        ]
    with replacing(out / "forgetting.png") as unfinished:
        figures.picture(panels, unfinished, (5.0 * len(panels), 5.0))
    print()
    print_summary(results["monte-carlo"])
    print("\n" + "\n".join(table_lines(runs)))
    print(f"\npage      {out / 'index.html'}\npictures  {out / 'difficulty.png'}, {out / 'forgetting.png'}")
    print(f"scores    {out}/*.parquet\nruns      {out / 'unlearning'}/")


def _check_folder(out: Path, split: str) -> None:
    made = out / "scores-monte-carlo.parquet"
    if made.is_file() and (found := read_scores(made)[1]["split"]) != split:
        raise UserError(
            f"{named('out')} {out} holds the demo of split {found!r}: choose another folder for {split!r}, or "
            f"{named('overwrite')}"
        )


def scaling_check(
    path: Path, model: ModelReference, split: str, sizes: Sizes, resources: Resources
) -> list[ScalingLine]:
    """Measure the lines of SCALING on a few samples and write `path`, or read it if it holds just that.

    The draws of all sigmas have the same directions, so the slope is not blurred by sampling.
    """
    dataset = load_dataset(TASK, split)
    texts = dataset.texts[:: max(1, len(dataset.texts) // sizes.scaling_samples)]
    samples, _ = encode(texts, model.tokenizer, model.max_length, "answer")
    points = [
        Point(estimator, sigma, sizes.scaling_draws, dtype)
        for estimator, _, dtype, sigmas in SCALING
        for sigma in sigmas
    ]
    drawn = iter(measure_draws(path, model, samples, points, resources))
    return [scaling_line(list(islice(drawn, len(sigmas))), statistic) for _, statistic, _, sigmas in SCALING]


def _unlearning_specs(split: str, sizes: Sizes) -> tuple[list[UnlearnSpec], list[str]]:
    """The runs, and the algorithms left out because they need a retain set that the split has not."""
    specs = [
        UnlearnSpec(
            model=MODEL,
            task=TASK,
            forget_split=split,
            algorithm=algorithm,
            alpha=alpha,
            epochs=sizes.epochs,
            evaluate_samples=sizes.evaluated,
            workers=0,
        ).checked()
        for algorithm in sizes.algorithms
        for alpha in ALPHAS
    ]
    if split in authors.RETAIN_OF:
        return specs, []
    possible = [spec for spec in specs if Objectives.of(spec).retain is None]
    return possible, list(dict.fromkeys(spec.algorithm for spec in specs if spec not in possible))


def unlearn_side_by_side(
    specs: Sequence[UnlearnSpec], folder: Path, resources: Resources, overwrite: bool = False
) -> list[Path]:
    """Make each run a Ray task, as many at a time as there are to be replicas, and give back their folders.

    Each has a folder of its own in `folder`, which must be visible from every node. Finished runs are found, stopped
    ones continue; a task whose worker dies is started again by Ray, and continues as well.

    Args:
        overwrite: begin anew.

    Raises:
        UserError: the first that a run ends with; the others are stopped.
    """
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    folders = [folder / f"{spec.algorithm}-alpha{spec.alpha:g}" for spec in specs]
    waiting = []
    for spec, place in zip(specs, folders, strict=True):
        if (place / "run.json").is_file():
            unlearn(spec, place)  # says that it is this run, or that it is another
        else:
            waiting.append((spec, place))
    if not waiting:
        return folders

    connect()
    footprint = resources.footprint()
    at_once = min(resources.replicas or len(waiting), how_many_fit(footprint))
    task = ray.remote(_unlearn).options(**footprint.ray_options())
    running: dict[ray.ObjectRef, Path] = {}
    with tqdm(total=len(specs), initial=len(specs) - len(waiting), unit="run", desc="unlearning") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    spec, place = waiting.pop(0)
                    running[task.remote(spec, place.resolve(), footprint.cpus)] = place
                done, _ = ray.wait(list(running), timeout=POLL_S)
                for reference in done:
                    del running[reference]
                    ray.get(reference)
                    bar.update()
                bar.set_postfix({place.name: _updates(place) for place in running.values()})
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
    return folders


def _unlearn(spec: UnlearnSpec, folder: Path, threads: int) -> None:
    # As in a replica: torch must agree with what Ray gave the task, or two of them share cores.
    torch.set_num_threads(threads)
    unlearn(spec, folder, progress=False)


def _updates(folder: Path) -> int:
    """Updates that a run has saved so far."""
    steps = sorted((folder / "checkpoints").glob("step-*"))
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def _describe(model: ModelReference) -> dict[str, str]:
    folder = Path(model.source)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    training = json.loads((folder / "mrd_bench.json").read_text())["measured"]
    return {
        "model": f"{MODEL} (embedded Llama, {parameters / 1e6:.1f} million parameters)",
        "trained": f"{training['seconds']:.0f} s, mean token loss {training['final_loss']:.3g} nats at the end",
        "fingerprint": model.fingerprint[:16],
    }
