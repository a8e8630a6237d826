"""`mrd-bench benchmark unlearning`: what unlearning costs, and whether MRD shortens it, in one run.

    speed     every objective in our training loop: tokens a second, seconds of a round (Table 9 of the paper)
    trainer   the same objective on the same batches in transformers' Trainer, in alternating segments
    refresh   what measuring MRD again costs beside training, and how that depends on the batch size (Table 8)
    stopping  runs until every sample is forgotten, with and without MRD (Table 10)

The first three are measured in this process on one thread. The runs of the last are Ray tasks of one core, as many
at a time as there are cores, from the first to the last.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from algorithms.corpus import Corpus
from algorithms.objectives import ALGORITHMS, npo, settings_of
from algorithms.ray_train import TrainingJob, ensure_reference, unlearner_of
from algorithms.recipe import Objectives, Recipe, updates_per_epoch
from algorithms.samplers import Sampler
from algorithms.trainable import Group
from algorithms.unlearner import Diverged, measure_mrd, retain_order
from bench.jobs.unlearn import UnlearnSpec, corpus_of, datasets_of, unlearn
from bench.models.find import find_model
from bench.speed.scoring import timed
from bench.stats.estimates import LEVEL, Estimate, over_samples, t_interval
from scoring.cluster import Footprint, connect, default_gpus, how_many_fit
from scoring.errors import UserError
from scoring.mrd import Request, estimate
from scoring.replica import TransformersReplica, load_model
from scoring.samples import Batch, Sample, collate, make_batches
from scoring.work import LocalPool

IGNORED = -100  # label of what is not scored
# Their losses must agree to this, relative; below LOSS_FLOOR absolute, in units of it: a cross-entropy in fp32 has
# no more digits where the model is certain.
LOSS_TOLERANCE, LOSS_FLOOR = 1e-3, 1e-3
ALPHAS = (0.0, 1.0, -1.0)
# Table 10: time with MRD / time without, 6m23s / 8m20s and so on.
PAPER_TIME = {"GA": 383 / 500, "GradDiff": 698 / 861, "PO": 851 / 1024, "NPO": 723 / 960}
COMPARED = tuple(PAPER_TIME)
BETA = settings_of(npo)["beta"]


@dataclass(frozen=True)
class Sizes:
    """How much of everything is run.

    Attributes:
        warm_up: updates before any are timed.
        rounds: timed rounds of each objective.
        pairs, segment: alternations of ours and Trainer, and the updates of each.
        losses: first updates whose losses are compared.
        refreshes: timed refreshes.
        draws: K of monte-carlo.
        timed_draws: how many are run, the rest is scaled: each costs the same.
        batch_sizes: samples in a batch of monte-carlo.
        batch_size_samples: at most so many samples are scored to compare batch sizes.
        check_every: updates after which samples are looked at.
        epochs: after which a run that has not forgotten all is given up.
    """

    warm_up: int = 5
    rounds: int = 3
    pairs: int = 12
    segment: int = 10
    losses: int = 5
    refreshes: int = 3
    draws: int = 200
    timed_draws: int = 4
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    batch_size_samples: int = 256
    check_every: int = 5
    epochs: int = 30


def run_benchmark(
    model: str,
    data: str,
    split: str | None,
    retain: str | None,
    seeds: int,
    out: str | None,
    sizes: Sizes = Sizes(),
) -> dict[str, Any]:
    """Measure, print tables and findings, write the figures as JSON if asked to, and return them.

    Args:
        model, data, split, retain: as in UnlearnSpec.
        seeds: of the runs to the stopping rule, 2 or more; 0 leaves them out.
        out: JSON file.
    """
    if seeds < 0 or seeds == 1:
        raise UserError(f"--seeds {seeds}: expected at least 2, or 0 to leave out the runs to the stopping rule")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("comparing with transformers' Trainer needs accelerate: pip install 'mrd-bench[trainer]'")
    spec = UnlearnSpec(
        model=model,
        task=data,
        forget_split=split or ("forget10" if data == "authors" else None),
        retain=retain,
        algorithm="GradDiff",
        alpha=0.0,
        evaluate=False,
        workers=0,
    )
    figures = _describe(spec)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures["speed"] = measure_speed(spec, sizes, Path(folder))
        figures["trainer"] = compare_with_trainer(spec, sizes, Path(folder))
        figures["refresh"] = measure_refresh(spec, sizes, figures["speed"])
    figures["stopping"] = run_to_the_rule(spec, sizes, seeds) if seeds else None
    figures["sizes"] = asdict(sizes)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")
        print(f"figures -> {out}")
    return figures


def _describe(spec: UnlearnSpec) -> dict[str, Any]:
    checked, corpus, weights = spec.checked(), _samples(spec), _weights(spec)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    tokens = sum(s.length for s in corpus.forget)
    print(
        f"{len(corpus.forget)} samples to forget, {tokens} tokens, {len(corpus.retain)} to retain; "
        f"{weights / 1e6:.2f} M weights; batches of {checked.batch_size}; {device}"
    )
    return {
        "forget_samples": len(corpus.forget),
        "forget_tokens": tokens,
        "retain_samples": len(corpus.retain),
        "weights": weights,
        "batch_size": checked.batch_size,
        "learning_rate": checked.learning_rate,
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }


def _samples(spec: UnlearnSpec) -> Corpus:
    spec = spec.checked()
    model = find_model(spec.model)
    return corpus_of(spec, model, *datasets_of(spec, model.tokenizer))[0]


def _loaded(spec: UnlearnSpec) -> PreTrainedModel:
    reference = find_model(spec.model)
    return load_model(reference.source, "float32", "cuda" if torch.cuda.is_available() else "cpu", reference.revision)


def _weights(spec: UnlearnSpec) -> int:
    return sum(p.numel() for p in _loaded(spec).parameters())


# --- Speed of our loop --------------------------------------------------------------------------------------


class Loop:
    """Our training loop, advanced by some updates at a time: no checks, no evaluation, no checkpoints, and no sample
    leaves the draw, which is uniform.

    Args:
        spec: its algorithm is what is trained.
        updates: at most so many will be asked for.
        folder: for what the initial model says.
    """

    def __init__(self, spec: UnlearnSpec, updates: int, folder: Path) -> None:
        self.spec = spec = dataclasses.replace(spec, max_steps=updates, early_stopping=False).checked()
        self.corpus = _samples(spec)
        found, model = find_model(spec.model), _loaded(spec)
        folder = folder / spec.algorithm
        folder.mkdir(exist_ok=True)
        job = TrainingJob(spec, spec, self.corpus, found.source, found.revision, folder, found.tokenizer)
        job.reference_path.unlink(missing_ok=True)
        ensure_reference(job, lambda: LocalPool(model))
        self.unlearner = unlearner_of(job, model, Group())

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The record of each update."""
        return self.unlearner.history.steps

    def advance(self, updates: int) -> float:
        """Train; the seconds that it took."""
        return timed(partial(self._train, updates))

    def _train(self, updates: int) -> None:
        unlearner, everyone = self.unlearner, np.ones(len(self.corpus.forget), dtype=bool)
        for _ in range(updates):
            unlearner.step(unlearner.sampler.draw(unlearner.history.step, self.spec.batch_size or 1, everyone))

    def batches(self, updates: int) -> list[list[dict[str, Sample]]]:
        """What the first updates are made of: for each its pairs of a forget and a retain sample, by role. A sample
        that is to be refused is there with its refusal."""
        spec, corpus, objectives = self.spec, self.corpus, Objectives.of(self.spec)
        forget = corpus.refusals if objectives.needs_refusals else corpus.forget
        everyone, size = np.ones(len(forget), dtype=bool), spec.batch_size or 1
        sampler = Sampler(len(forget), spec.order, spec.alpha or 0.0, spec.replacement, seed=spec.seed)
        found = []
        for step in range(updates):
            drawn = sampler.draw(step, size, everyone).tolist()
            pairs = [{"forget": forget[i]} for i in drawn]
            if objectives.retain is not None:
                retained = retain_order(step * size, len(drawn), len(corpus.retain), spec.seed)
                for pair, i in zip(pairs, retained, strict=True):
                    pair["retain"] = corpus.retain[i]
            found.append(pairs)
        return found


def objectives_once() -> list[str]:
    """The algorithms, without those that differ from an earlier one by batch size and sampler alone."""
    seen, names = set(), []
    for name, a in ALGORITHMS.items():
        what = (a.forget, a.retain, a.forget_weight, a.retain_weight)
        if what not in seen:
            seen.add(what)
            names.append(name)
    return names


def measure_speed(spec: UnlearnSpec, sizes: Sizes, folder: Path) -> dict[str, dict[str, float]]:
    """Algorithm -> the median over rounds of tokens a second and of seconds."""
    print(f"\n{'one thread':<16}{'tokens/s':>10}{'s/round':>10}{'updates':>10}   (Table 9: a round of training)")
    found = {}
    for name in objectives_once():
        own = dataclasses.replace(spec, algorithm=name)
        updates = updates_per_epoch(len(_samples(own).forget), own.checked())
        loop = Loop(own, sizes.warm_up + sizes.rounds * updates, folder)
        loop.advance(sizes.warm_up)
        seconds = np.array([loop.advance(updates) for _ in range(sizes.rounds)])
        tokens = np.array([step["tokens"] for step in loop.steps[sizes.warm_up :]]).reshape(sizes.rounds, -1).sum(1)
        found[name] = {
            "tokens_per_second": float(np.median(tokens / seconds)),
            "round_seconds": float(np.median(seconds)),
            "round_updates": updates,
        }
        print(f"{name:<16}{found[name]['tokens_per_second']:>10.0f}{np.median(seconds):>10.2f}{updates:>10}")
    return found


# --- Against Trainer ----------------------------------------------------------------------------------------


class PlainTrainer(Trainer):
    """GA, GradDiff, PO and NPO as they are commonly written for Trainer: logits of whole padded sequences, labels
    that leave out prompt and padding, and for NPO a frozen copy of the model that runs in every step.

    Args:
        algorithm: its name.
        frozen: the initial model, for NPO.
        settings: Trainer's own.
    """

    def __init__(self, algorithm: str, frozen: PreTrainedModel | None, **settings: Any) -> None:
        super().__init__(**settings)
        self._algorithm, self._frozen = algorithm, frozen
        self.losses: list[torch.Tensor] = []

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        summed, counts = _sequence_nll(model, inputs["forget"])
        if self._algorithm == "NPO":
            with torch.no_grad():
                reference, _counts = _sequence_nll(self._frozen, inputs["forget"])
            loss = (-2 / BETA * F.logsigmoid(BETA * (summed - reference))).mean()
        else:
            loss = (summed / counts).mean() * (1 if self._algorithm == "PO" else -1)
        if "retain" in inputs:
            summed, counts = _sequence_nll(model, inputs["retain"])
            loss = loss + (summed / counts).mean()
        self.losses.append(loss.detach())
        return loss


def _sequence_nll(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed NLL of the labelled tokens of each row, and their number, (B,) each."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return losses.sum(-1), (labels != IGNORED).sum(-1)


def padded(samples: Sequence[Sample], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, (B, T) each, padded on the right."""
    shape = (len(samples), max(s.length for s in samples))
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.where(torch.from_numpy(sample.scored), IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _by_role(pad: int, pairs: Sequence[dict[str, Sample]]) -> dict[str, dict[str, torch.Tensor]]:
    return {role: padded([pair[role] for pair in pairs], pad) for role in pairs[0]}


class _Alternating(TrainerCallback):
    """At the end of each segment stops Trainer's clock and advances our loop by the same updates.

    Attributes:
        ours, theirs: seconds of each segment.
    """

    def __init__(self, loop: Loop, sizes: Sizes) -> None:
        self._loop, self._sizes = loop, sizes
        self._resumed = 0.0
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        segments, within = divmod(state.global_step - self._sizes.warm_up, self._sizes.segment)
        if segments < 0 or within:
            return
        now = _now()
        if segments:
            self.theirs.append(now - self._resumed)
        else:
            self._loop.advance(self._sizes.warm_up)
        if segments < self._sizes.pairs:
            self.ours.append(self._loop.advance(self._sizes.segment))
        self._resumed = _now()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare_with_trainer(spec: UnlearnSpec, sizes: Sizes, folder: Path) -> dict[str, dict[str, Any]]:
    """Algorithm -> speed of both, the median ratio with its interval, the largest difference of their losses.

    Raises:
        RuntimeError: the losses differ, so that the two do not train the same.
    """
    print(
        f"\n{'against Trainer':<16}{'ours':>8}{'Trainer':>9}  tokens/s, medians of {sizes.pairs} pairs of "
        f"{sizes.segment} updates; one thread"
    )
    return {name: _compare(dataclasses.replace(spec, algorithm=name), sizes, folder) for name in COMPARED}


def _compare(spec: UnlearnSpec, sizes: Sizes, folder: Path) -> dict[str, Any]:
    updates = sizes.warm_up + sizes.pairs * sizes.segment
    loop = Loop(spec, updates, folder)
    checked, alternating = loop.spec, _Alternating(loop, sizes)
    trainer = PlainTrainer(
        checked.algorithm,
        _loaded(spec) if checked.algorithm == "NPO" else None,
        model=_without_dropout(_loaded(spec)),
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=updates,
            per_device_train_batch_size=checked.batch_size or 1,
            train_sampling_strategy="sequential",
            learning_rate=checked.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=checked.weight_decay,
            max_grad_norm=checked.clip_norm or 0.0,
            optim="adamw_torch_fused",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[pair for pairs in loop.batches(updates) for pair in pairs],
        data_collator=partial(_by_role, find_model(spec.model).tokenizer.pad_token_id or 0),
        callbacks=[alternating],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    tokens = np.array([step["tokens"] for step in loop.steps[sizes.warm_up :]]).reshape(sizes.pairs, -1).sum(1)
    ours, theirs = np.array(alternating.ours), np.array(alternating.theirs)
    losses = np.array([[step["loss"] for step in loop.steps], [float(x) for x in trainer.losses]])[:, : sizes.losses]
    difference = float(np.max(np.abs(losses[0] - losses[1]) / np.maximum(np.abs(losses[1]), LOSS_FLOOR)))
    ratio = median(theirs / ours)
    print(
        f"{checked.algorithm:<16}{np.median(tokens / ours):>8.0f}{np.median(tokens / theirs):>9.0f}  ours / Trainer "
        f"{_interval(ratio, '.2f')}; losses of the first {losses.shape[1]} updates differ by {difference:.0e} at most"
    )
    if not difference < LOSS_TOLERANCE:
        raise RuntimeError(f"{checked.algorithm}: our loss and Trainer's differ by {difference:.1e}, relative")
    return {
        "ours_tokens_per_second": float(np.median(tokens / ours)),
        "trainer_tokens_per_second": float(np.median(tokens / theirs)),
        "ratio": _plain(ratio),
        "ratios": (theirs / ours).tolist(),
        "loss_difference": difference,
    }


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Trainer puts the model into training mode; ours stays in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


# --- What a refresh of MRD costs ----------------------------------------------------------------------------


def measure_refresh(spec: UnlearnSpec, sizes: Sizes, speed: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Seconds of a refresh of the forget set, of monte-carlo for each batch size, and shares of training time."""
    checked, corpus, model = spec.checked(), _samples(spec), _loaded(spec)
    refresh = partial(measure_mrd, model, corpus.forget, checked, Group(), checked.batch_tokens)
    refresh()
    timings = [timed(refresh) for _ in range(sizes.refreshes)]
    seconds = {
        "gradient": float(np.median(timings)),
        "monte-carlo": _monte_carlo_seconds(model, make_batches(corpus.forget, checked.batch_tokens), sizes),
    }
    scaled = f"K = {sizes.draws}, scaled from {sizes.timed_draws} draws"
    print(
        f"\na refresh of {len(corpus.forget)} samples, one thread: gradient {seconds['gradient']:.2f} s, monte-carlo "
        f"{seconds['monte-carlo']:.1f} s ({scaled})"
    )
    shares = {name: _share(name, speed[name]["round_seconds"], checked.refresh, seconds) for name in COMPARED}

    few = [*corpus.forget, *corpus.retain][: sizes.batch_size_samples]
    few.sort(key=lambda s: (s.length, s.num_scored))
    sized = {}
    print(f"monte-carlo on {len(few)} samples by batch size (Table 8; {scaled}):")
    for size in sizes.batch_sizes:
        if size > len(few):
            print(f"{size:>6} samples: left out, there are {len(few)}")
            continue
        batches = [collate(few[start : start + size]) for start in range(0, len(few), size)]
        sized[size] = _monte_carlo_seconds(model, batches, sizes)
        print(f"{size:>6} samples {sized[size]:>9.1f} s")
    return {"seconds": seconds, "shares": shares, "batch_size_samples": len(few), "batch_size_seconds": sized}


def _monte_carlo_seconds(model: PreTrainedModel, batches: Sequence[Batch], sizes: Sizes) -> float:
    replica = TransformersReplica(model)
    sigma = Recipe.sigma
    base: list[torch.Tensor] = []
    once = timed(lambda: base.extend(replica.logprobs(batch) for batch in batches))
    estimate(replica, batches[:1], Request("monte-carlo", sigma, 0, 0, 1))  # checks and copies, once a replica
    request = Request("monte-carlo", sigma, 0, 0, sizes.timed_draws)
    return once + timed(partial(estimate, replica, batches, request, base)) / sizes.timed_draws * sizes.draws


def _share(name: str, round_seconds: float, every: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Refreshes of the default recipe, in units of its training time."""
    epochs = ALGORITHMS[name].epochs
    refreshes = math.ceil(epochs / every)
    shares = {key: refreshes * value / (epochs * round_seconds) for key, value in seconds.items()}
    print(
        f"    {name:<10} {epochs} epochs, {refreshes} refreshes: gradient adds {shares['gradient']:.0%} to the "
        f"training time, monte-carlo {shares['monte-carlo']:.0%}; one refresh is "
        f"{seconds['gradient'] / round_seconds:.2f} and {seconds['monte-carlo'] / round_seconds:.1f} rounds"
    )
    return {"epochs": epochs, "refreshes": refreshes, **shares}


# --- Runs until all is forgotten ----------------------------------------------------------------------------


def run_to_the_rule(spec: UnlearnSpec, sizes: Sizes, seeds: int) -> dict[str, Any]:
    """Runs of every algorithm, alpha and seed, their means, and what alpha changes, paired by seed."""
    connect()
    footprint = Footprint(1, default_gpus())
    # Runs that are compared stand next to each other, should the machine's load change.
    specs = [
        dataclasses.replace(
            spec,
            algorithm=name,
            alpha=alpha,
            seed=seed,
            epochs=sizes.epochs,
            check_every=sizes.check_every,
            check_unit="steps",
        )
        for seed in range(seeds)
        for name in COMPARED
        for alpha in ALPHAS
    ]
    slots = min(how_many_fit(footprint, "worker"), len(specs))
    print(f"\nuntil all are forgotten, {sizes.epochs} epochs at most; {slots} runs at a time, one core each")
    task = ray.remote(run_once).options(**footprint.ray_options(), max_retries=0)  # type: ignore[call-overload]
    # Every worker process has imported and computed once before any run counts.
    ray.get([task.remote(dataclasses.replace(each, max_steps=1, epochs=None)) for each in specs[:slots]])
    runs = [task.remote(each) for each in specs]
    # No run has the machine to itself at the end: these take the others' places.
    fillers = [task.remote(each) for each in specs[: slots - 1]]
    rows = [ray.get(run) for run in tqdm(runs, desc="runs", unit="run")]
    for filler in fillers:
        ray.cancel(filler, force=True)
    set_pace(rows)

    print(
        f"{'':<9}{'alpha':>5}  {'updates':<19}{'updates a sample':<18}{'training + MRD, s':<22}{'at one pace, s':<22}"
        f"{'MRD, s':>7}{'checks, s':>11}  censored"
    )
    means = [_means(rows, name, alpha) for name in COMPARED for alpha in ALPHAS]
    changes = [change(rows, name, alpha) for name in COMPARED for alpha in ALPHAS if alpha]
    print(
        f"means over {seeds} seeds and {LEVEL:.0%} t intervals; looked at every {sizes.check_every} updates; "
        "at one pace: as if each token and each refresh had taken the median time of the algorithm's runs"
    )
    for each in changes:
        print(in_words(each))
    return {"runs_at_a_time": slots, "runs": rows, "means": means, "changes": changes}


def run_once(spec: UnlearnSpec) -> dict[str, Any]:
    """One run until all samples are forgotten, or the epochs are over ("reached" is False), or it diverges (then
    there are no figures)."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"algorithm": spec.algorithm, "alpha": spec.alpha, "seed": spec.seed}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = unlearn(spec, Path(folder) / "run", progress=False)
        except Diverged as error:
            return row | {"reached": False, "diverged": str(error)}
        refreshes = len(pc.unique(pq.read_table(result.folder / "difficulty.parquet")["step"]))
    seconds = {name: result.record["seconds"].get(name, 0.0) for name in ("training", "mrd", "checks")}
    updates = [u for u in result.samples["updates_until_forgotten"].to_pylist() if u is not None]
    return row | {
        "reached": len(updates) == result.samples.num_rows,
        "forgotten": len(updates) / result.samples.num_rows,
        "updates": result.record["updates"],
        "tokens": result.epochs["tokens"].to_pylist()[-1],
        "refreshes": refreshes,
        "updates_a_sample": float(np.median(updates)) if updates else None,
        "seconds": seconds["training"] + seconds["mrd"],
        **seconds,
    }


def set_pace(rows: Sequence[dict[str, Any]]) -> None:
    """Give each run "paced_seconds": its tokens and refreshes at the median time that each took over all runs of the
    algorithm. What else the machine does moves the seconds of a run, but not these."""
    for name in {row["algorithm"] for row in rows}:
        own = [row for row in rows if row["algorithm"] == name and "tokens" in row]
        token = float(np.median([row["training"] / row["tokens"] for row in own] or [0.0]))
        refresh = float(np.median([row["mrd"] / row["refreshes"] for row in own if row["refreshes"]] or [0.0]))
        for row in own:
            row["paced_seconds"] = row["tokens"] * token + row["refreshes"] * refresh


MEASURES = ("updates", "tokens", "updates_a_sample", "seconds", "paced_seconds")


def _means(rows: Sequence[dict[str, Any]], name: str, alpha: float) -> dict[str, Any]:
    """Of the runs that reached the rule."""
    own = [row for row in rows if row["algorithm"] == name and row["alpha"] == alpha]
    reached = [row for row in own if row["reached"]]
    found = {key: t_interval([row[key] for row in reached]) for key in (*MEASURES, "mrd", "checks")}
    print(
        f"{name:<9}{alpha:>5g}  {_interval(found['updates'], '.1f'):<19}"
        f"{_interval(found['updates_a_sample'], '.1f'):<18}{_interval(found['seconds'], '.2f'):<22}"
        f"{_interval(found['paced_seconds'], '.2f'):<22}{found['mrd'].value:>7.2f}{found['checks'].value:>11.1f}  "
        f"{len(own) - len(reached)} of {len(own)}"
    )
    plain = {key: _plain(value) for key, value in found.items()}
    return {"algorithm": name, "alpha": alpha, "runs": len(own), "censored": len(own) - len(reached), **plain}


def change(rows: Sequence[dict[str, Any]], name: str, alpha: float) -> dict[str, Any]:
    """What alpha changes against uniform draws with the same seed. Pairs with a run that did not reach the rule are
    left out, and counted.

    Returns:
        For each measure "difference", the mean of the differences, and "ratio", that over the mean without MRD and
        plus 1; both with the interval of the differences.
    """
    own = {(row["alpha"], row["seed"]): row for row in rows if row["algorithm"] == name}
    pairs = [(own[0.0, seed], row) for (a, seed), row in own.items() if a == alpha]
    whole = [(before, after) for before, after in pairs if before["reached"] and after["reached"]]
    found: dict[str, Any] = {
        "algorithm": name,
        "alpha": alpha,
        "pairs": len(whole),
        "left_out": len(pairs) - len(whole),
        "paper_time_ratio": PAPER_TIME[name] if alpha == 1 else None,
    }
    for key in MEASURES:
        before, after = (np.array([pair[side][key] for pair in whole], dtype=float) for side in (0, 1))
        found[key] = {
            "difference": _plain(t_interval(after - before)),
            "ratio": _plain(_relative(t_interval(after - before), before)),
        }
    return found


def _relative(difference: Estimate, before: np.ndarray) -> Estimate:
    base = float(before.mean()) if len(before) else math.nan
    return Estimate(*(1 + value / base for value in dataclasses.astuple(difference)))


def in_words(found: dict[str, Any]) -> str:
    """What `change` found, in a sentence or two."""
    text = f"{found['algorithm']}, alpha = {found['alpha']:g} against 0"
    if found["left_out"]:
        text += f" ({found['left_out']} of {found['pairs'] + found['left_out']} pairs left out: not all forgotten)"
    if not found["pairs"]:
        return f"{text}: nothing to compare"
    updates, seconds, paced = (
        Estimate(**_numbers(found[key]["ratio"])) for key in ("updates", "seconds", "paced_seconds")
    )
    text += (
        f": updates x {_interval(updates, '.2f')}, {_side(updates, 'fewer', 'more')}; time with MRD x "
        f"{_interval(seconds, '.2f')}, {_side(seconds, 'less', 'more')}; at one pace x {_interval(paced, '.2f')}, "
        f"{_side(paced, 'less', 'more')}"
    )
    if (paper := found["paper_time_ratio"]) is not None:
        inside = "inside" if paced.low <= paper <= paced.high else "outside"
        text += f". The paper's time is x {paper:.2f} (Table 10), {inside} the interval at one pace"
    return text


def _side(ratio: Estimate, below: str, above: str) -> str:
    """On which side of 1 the whole interval lies."""
    return below if ratio.high < 1 else above if ratio.low > 1 else "no difference shown"


# --- Numbers ------------------------------------------------------------------------------------------------


def median(values: np.ndarray) -> Estimate:
    """The median, and its interval by the bootstrap."""
    return over_samples(lambda rows: float(np.median(values[rows])), len(values))


def _plain(found: Estimate) -> dict[str, float | None]:
    """JSON has no nan."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(found).items()}


def _numbers(found: dict[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in found.items()}


def _interval(found: Estimate, form: str) -> str:
    if math.isnan(found.value):
        return "-"
    if math.isnan(found.low):
        return f"{found.value:{form}}"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
