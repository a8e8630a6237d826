"""The demo: scores, checks and unlearns the embedded task under the embedded model, and puts all on one page.

    score a forget set three ways -> check the scaling with sigma -> score all samples -> forecast updates -> unlearn
    -> findings -> page

Every step continues where it was stopped; with all results there, a second run only writes the page again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from algorithms.recipe import Objectives
from algorithms.stopping import PAPER
from bench.demo.figures import difficulty, recall_by_epoch, scaling, trade_off
from bench.demo.findings import Findings, Forecasts
from bench.demo.page import PAGE_TITLE, page
from bench.demo.runs import DemoRun, Unlearning, has_retain_set, predictions, table_lines
from bench.files.folders import HEAD_BYTES, refuse_foreign
from bench.files.score_file import Scores, read_scores
from bench.jobs import difficulty as measures
from bench.jobs.draws import Point, ScalingLine, measure_draws, scaling_line
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreSpec, score
from bench.jobs.summary import print_summary
from bench.jobs.truth import TruthSpec, truth
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.models.find import ModelReference, find_model
from bench.report import figures
from bench.report.attributes import attribute_effects, by_attribute, correlations
from bench.tasks.datasets import load_dataset
from bench.tasks.embedded import authors
from scoring.cluster import connect, how_many_fit
from scoring.engine import Dtype
from scoring.errors import UserError
from scoring.files import replacing
from scoring.mrd import EstimatorName
from scoring.samples import encode
from scoring.settings import named

MODEL = TASK = "authors"
# Sigmas at which each statistic can be measured: below them rounding decides, above them terms of higher order.
# bfloat16 shows what rounding does at the sigma that the paper uses (1e-5).
SMALL, LARGE = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SCALING: tuple[tuple[EstimatorName, str, Dtype, tuple[float, ...]], ...] = (
    ("monte-carlo", "mean_abs", "float32", SMALL),
    ("antithetic", "abs_mean", "float32", LARGE),
    ("monte-carlo", "mean_abs", "bfloat16", SMALL),
)

ALPHAS = (0.0, 1.0)
SHOWN_ESTIMATORS: tuple[EstimatorName, ...] = ("monte-carlo", "gradient", "curvature")
# Memorization accuracy below which a sample whose updates are forecast counts as forgotten: some way to go, as the
# embedded model knows its answers by heart.
FORGOTTEN_BELOW, LOOKAHEAD = 0.75, 2
POLL_S = 1.0  # between looks at the progress of runs


@dataclass(frozen=True)
class Sizes:
    """How much the demo measures; the defaults take about five minutes on two cores.

    Attributes:
        draws: K of Monte Carlo.
        attribute_split: the split that is compared by attribute.
        scaling_samples: samples of the scaling check, evenly spaced over the split.
        scaling_draws: draws (pairs, for antithetic) at each sigma of the scaling check.
        forecast_samples: samples whose updates are forecast and counted, evenly spaced over the split.
        algorithms: algorithms of unlearning, each at ALPHAS.
        epochs: epochs of unlearning.
        evaluated: samples of the forget and of the retain set that are answered after each epoch.
    """

    draws: int = 200
    attribute_split: str = "full"
    scaling_samples: int = 10
    scaling_draws: int = 12
    forecast_samples: int = 24
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
        UserError: the split is unknown, or `out` holds a demo of another one, or a page of somebody else's.
    """
    out = Path(out)
    refuse_foreign(out / "index.html", PAGE_TITLE, "a demo", HEAD_BYTES)
    resources = resources or Resources()
    records = load_dataset(TASK, split).records
    if not overwrite:
        _check_folder(out, split)
    # Before the cluster starts: if the model must be trained first, that takes all cores.
    model = find_model(MODEL)

    print(f"1/6 Memory Removal Difficulty of {len(records)} samples ({TASK}/{split}), by three estimators")
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
    print("2/6 Does MRD follow sigma? In float32, and in bfloat16")
    scaling_lines = scaling_check(out / "scaling.parquet", model, split, sizes, resources)

    print(f"3/6 Difficulty by attribute, on {TASK}/{sizes.attribute_split}")
    attribute_spec = ScoreSpec(model=MODEL, data=TASK, split=sizes.attribute_split, estimator="gradient")
    score(attribute_spec, out / "scores-whole.parquet", resources, overwrite)
    attribute_scores = Scores.read(out / "scores-whole.parquet")
    attribute_records = load_dataset(TASK, sizes.attribute_split).records
    corpus = [f"{record['question']} {record['answer']}" for record in authors.training_records()]

    print(f"4/6 How many updates will it take? Forecasts of {sizes.forecast_samples} samples, and the real numbers")
    forecasts = forecast_updates(out, split, sizes, resources, overwrite)

    specs, skipped = unlearning_specs(split, sizes)
    names = [*dict.fromkeys(spec.algorithm for spec in specs), *(f"not {name} (no retain set)" for name in skipped)]
    print(f"5/6 Unlearning {TASK}/{split}, alpha 0 and 1, {sizes.epochs} epochs: {', '.join(names)}")
    folders = unlearn_side_by_side(specs, out / "unlearning", resources, overwrite)

    print("6/6 Page and pictures")
    scores = {name: Scores.read(result.path) for name, result in results.items()}
    findings = Findings(
        monte_carlo=scores["monte-carlo"],
        gradient=scores["gradient"],
        curvature=scores["curvature"],
        attribute_scores=attribute_scores,
        records={record["id"]: record for record in [*attribute_records, *records]},
        scaling=scaling_lines,
        scaling_draws=sizes.scaling_draws,
        effects=attribute_effects(attribute_scores, attribute_records),
        correlations=correlations(attribute_scores, attribute_records, corpus),
        forecasts=forecasts,
        model=_model_facts(model),
    )
    runs = [DemoRun.read(folder) for folder in folders]
    unlearning = Unlearning(runs, predictions(runs, findings.gradient), skipped)
    with replacing(out / "index.html") as unfinished:
        unfinished.write_text(page(findings, unlearning), encoding="utf-8")
    panels = [
        difficulty(findings.monte_carlo, f"Difficulty of {len(records)} samples, 95 % CI"),
        scaling(findings.scaling, "Does MRD follow sigma?"),
        by_attribute(findings.effects, f"By attribute, {attribute_scores.table.num_rows} samples"),
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
    """Refuse a folder that holds the demo of another split."""
    score_file = out / "scores-monte-carlo.parquet"
    if score_file.is_file() and (other_split := read_scores(score_file)[1]["split"]) != split:
        raise UserError(
            f"{named('out')} {out} holds the demo of split {other_split!r}: choose another folder for {split!r}, or "
            f"{named('overwrite')}"
        )


def scaling_check(
    path: Path, model: ModelReference, split: str, sizes: Sizes, resources: Resources
) -> list[ScalingLine]:
    """Measure the lines of SCALING on a few samples and write `path`, or read it if it holds them already.

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


def forecast_updates(out: Path, split: str, sizes: Sizes, resources: Resources, overwrite: bool) -> Forecasts:
    """Forecast the updates of a few samples, and forget each alone; writes `out`/forecast.parquet and updates.parquet,
    or reads them if they are there."""
    on: dict[str, Any] = {"model": MODEL, "data": TASK, "split": split, "samples": sizes.forecast_samples}
    rule = FORGOTTEN_BELOW
    spec = measures.DifficultySpec(measure=["flip-time", "mrd"], thresholds=[rule], lookahead=LOOKAHEAD, **on)
    forecast = measures.difficulty(spec, out / "forecast.parquet", resources, overwrite).table
    counted = TruthSpec(until=[rule], **on)
    real = truth(counted, out / "updates.parquet", resources, overwrite).table
    updates_of = dict(zip(real["sample_id"].to_pylist(), real[f"updates@{rule:g}"].to_pylist(), strict=True))
    return Forecasts(
        rule,
        asdict(spec),
        forecast[f"flip-time@{rule:g}"].to_numpy(),
        forecast["mrd"].to_numpy(),
        np.array([updates_of[name] for name in forecast["sample_id"].to_pylist()], dtype=float),
        counted.most_updates,
    )


def unlearning_specs(split: str, sizes: Sizes) -> tuple[list[UnlearnSpec], list[str]]:
    """The runs, and the algorithms left out because they need a retain set and the split has none."""
    specs = [
        UnlearnSpec(
            model=MODEL,
            task=TASK,
            forget_split=split,
            algorithm=algorithm,
            alpha=alpha,
            epochs=sizes.epochs,
            evaluate_samples=sizes.evaluated,
            stopping=PAPER,
            check_every=1,
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
    """Run each spec as a Ray task, as many at a time as there are replicas, or with 0 replicas one after the other in
    this process; and give back the folders of the runs.

    Each run has a folder of its own in `folder`, which every node must see. Finished runs are left as they are, stopped
    runs continue; if the worker of a run dies, Ray starts it again, and it continues too.

    Args:
        overwrite: begin all runs anew.

    Raises:
        UserError: a run has ended with it; the other runs are stopped.
    """
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    folders = [folder / f"{spec.algorithm}-alpha{spec.alpha:g}" for spec in specs]
    waiting = []
    for spec, run_folder in zip(specs, folders, strict=True):
        if (run_folder / "run.json").is_file():
            unlearn(spec, run_folder)  # reports a finished run, or raises if it is that of another spec
        else:
            waiting.append((spec, run_folder))
    if resources.in_this_process:
        for spec, run_folder in waiting:
            unlearn(spec, run_folder)
        return folders
    if waiting:
        _unlearn_on_ray(waiting, len(specs), resources)
    return folders


def _unlearn_on_ray(waiting: list[tuple[UnlearnSpec, Path]], total: int, resources: Resources) -> None:
    import ray
    from ray.exceptions import RayTaskError

    connect()
    footprint = resources.footprint()
    at_once = min(resources.replicas or len(waiting), how_many_fit(footprint))
    task = ray.remote(_unlearn).options(**footprint.ray_options())
    running: dict[ray.ObjectRef, Path] = {}
    with tqdm(total=total, initial=total - len(waiting), unit="run", desc="unlearning") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    spec, run_folder = waiting.pop(0)
                    running[task.remote(spec, run_folder.resolve(), footprint.cpus)] = run_folder
                done, _ = ray.wait(list(running), timeout=POLL_S)
                for reference in done:
                    del running[reference]
                    ray.get(reference)
                    bar.update()
                bar.set_postfix({run_folder.name: _updates(run_folder) for run_folder in running.values()})
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _unlearn(spec: UnlearnSpec, folder: Path, threads: int) -> None:
    # As in a replica: with more threads than Ray gave the task cores, two tasks would compete for cores.
    torch.set_num_threads(threads)
    unlearn(spec, folder, progress=False)


def _updates(folder: Path) -> int:
    """Number of updates that a run has saved so far."""
    steps = sorted((folder / "checkpoints").glob("step-*"))
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def _model_facts(model: ModelReference) -> dict[str, str]:
    """Facts about the embedded model for the page, by name."""
    folder = Path(model.source)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    training = json.loads((folder / "mrd_bench.json").read_text())["measured"]
    return {
        "model": f"{MODEL} (embedded Llama, {parameters / 1e6:.1f} million parameters)",
        "trained": f"{training['seconds']:.0f} s, mean token loss {training['final_loss']:.3g} nats at the end",
        "fingerprint": model.fingerprint[:16],
    }
