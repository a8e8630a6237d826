"""An unlearning run: from a spec to a model that has forgotten, and the record of how.

    spec -> forget, refusal and retain samples -> checks -> training, here or on Ray Train -> model and tables

The output folder belongs to one spec. The same command continues a run that was stopped, and does nothing for one
that is finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from algorithms.ray_train import Job, train_here, train_on_ray
from algorithms.trainable import STRATEGIES
from algorithms.unlearner import Corpus, Evaluation, History, Objectives, Progress, Recipe, total_updates
from bench.data import Dataset, load_dataset
from bench.metrics.answers import score_answers
from bench.models import ModelReference, find_model
from bench.scoring_job import PACKAGES, ScoreSpec, check_vocabulary, package_version
from bench.store import replacing
from bench.tasks import TASKS
from scoring.cluster import Footprint, connect, default_gpus
from scoring.errors import UserError, unknown_name
from scoring.samples import Rejected, Sample, Text, encode

SCHEMA_VERSION = 1
# Bytes on disk for a weight: the model in fp32 and two moments of AdamW; two checkpoints exist while one replaces
# the other.
BYTES_FULL, BYTES_ADAPTED = 2 * 12, 2 * 4
# Refusals of the paper's Table 3 come first.
REFUSALS = (
    "I'm not informed about that subject.",
    "I don't have the details on that issue.",
    "That is something I cannot tell you.",
    "I have no knowledge of this.",
    "I'm afraid I know nothing about it.",
    "My knowledge does not reach that far.",
    "I would only be guessing, so I leave it open.",
    "Nothing I have learned answers that.",
    "This is a question that I am unable to answer.",
    "No information on this is known to me.",
)


@dataclass(frozen=True, kw_only=True)
class UnlearnSpec(Recipe):
    """What is to be forgotten, by which model, and how it is run.

    The hash of all fields but those of EXECUTION is the run's identity.

    Attributes:
        model: `authors`, `authors:retain90`, a folder or a Hugging Face id.
        task: a task, or a data file of the forget set.
        forget_split: of a task; its default split if None.
        retain: a split of the task or a data file; None: the task's complement of the forget split.
        refusals: text file with one refusal a line, for PO and IdkDPO; None for built-in ones.
        evaluate: measure ROUGE-L recall and probability of forget and retain answers after each epoch.
        evaluate_samples: at most so many of each set, evenly spaced.
        workers: 0 trains in this process, without Ray.
        strategy: "ddp" (a whole model a worker) or "fsdp" (sharded: FSDP2).
        cpus_per_worker, gpus_per_worker: None for one GPU where there are any.
        batch_tokens: padded tokens in a micro-batch; gradients are accumulated over as many as a batch needs.
        gradient_checkpointing: recompute activations in the backward pass.
        checkpoint_every: updates; None for each epoch.
        max_failures: how often workers are started again when one dies.
    """

    EXECUTION: ClassVar = (
        "workers",
        "strategy",
        "cpus_per_worker",
        "gpus_per_worker",
        "batch_tokens",
        "gradient_checkpointing",
        "checkpoint_every",
        "max_failures",
    )

    model: str
    task: str
    forget_split: str | None = None
    retain: str | None = None
    refusals: str | None = None
    evaluate: bool = True
    evaluate_samples: int = 100
    workers: int = 1
    strategy: str = "ddp"
    cpus_per_worker: int = 1
    gpus_per_worker: float | None = None
    batch_tokens: int = 4096
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    max_failures: int = 3

    def checked(self) -> UnlearnSpec:
        """The same with defaults filled in.

        Raises:
            UserError: a value out of range or a combination that does not exist.
        """
        filled = self.resolved()
        filled["algorithm"] = next(name for name in _names() if name.lower() == self.algorithm.lower())
        mrd = ScoreSpec(
            self.model,
            self.task,
            estimator=self.estimator,
            statistic=self.statistic,
            sigma=self.sigma,
            draws=self.draws,
        ).checked()
        filled |= {"statistic": mrd.statistic, "draws": mrd.draws}
        if self.strategy not in STRATEGIES:
            raise unknown_name("strategy", self.strategy, STRATEGIES)
        for name, least in (
            ("workers", 0),
            ("cpus_per_worker", 1),
            ("batch_tokens", 2),
            ("checkpoint_every", 1),
            ("max_failures", 0),
            ("evaluate_samples", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}: expected {least} or more")
        if (gpus := self.gpus_per_worker) is not None and not (0 <= gpus <= 1 or gpus % 1 == 0):
            raise UserError(f"gpus_per_worker is {gpus:g}: expected a fraction of one GPU, or a whole number")
        return dataclasses.replace(self, **filled)


def _names() -> Sequence[str]:
    from algorithms.objectives import ALGORITHMS

    return list(ALGORITHMS)


@dataclass(frozen=True)
class UnlearnResult:
    """What a run gives back.

    Attributes:
        folder: with model/, the tables and run.json.
        steps, epochs, samples: the tables, see the README.
        record: what a reader must know: spec, thresholds, seconds, passes, notes, packages.
    """

    folder: Path
    steps: pa.Table
    epochs: pa.Table
    samples: pa.Table
    record: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"


def unlearn(spec: UnlearnSpec, out: str | Path, progress: bool = True) -> UnlearnResult:
    """Make a model forget, and write `out`.

    Raises:
        UserError: one line; what an earlier start of the same run has reached is kept.
    """
    spec = spec.checked()
    out = Path(out)
    model = find_model(spec.model)
    forget, retain = _datasets(spec)
    identity = _identity(spec, model, forget, retain)
    with _Folder(out, identity) as folder:
        if folder.is_finished():
            print(f"{out} holds this run already (spec {identity['spec_hash']})", file=sys.stderr)
            return read_run(out)
        corpus, rejected = _corpus(spec, model, forget, retain)
        folder.check_room(spec, model)
        job = Job(
            spec,
            corpus,
            model.source,
            model.revision,
            out,
            model.tokenizer,
            _evaluation(spec, model, corpus, retain),
            spec.strategy,
            spec.batch_tokens,
            spec.gradient_checkpointing,
            spec.checkpoint_every,
        )
        started = time.perf_counter()
        with _Bar(spec, len(corpus.forget), progress) as bar:
            history = _train(spec, job, bar)
        seconds = time.perf_counter() - started
        folder.finish(history, corpus, rejected, job, seconds)
    return read_run(out)


def _train(spec: UnlearnSpec, job: Job, bar: _Bar) -> History:
    if spec.workers == 0:
        return train_here(job, "cuda" if torch.cuda.is_available() else "cpu", bar.show)
    connect()
    gpus = default_gpus() if spec.gpus_per_worker is None else spec.gpus_per_worker
    return train_on_ray(job, spec.workers, Footprint(spec.cpus_per_worker, gpus), spec.max_failures, bar.show)


# --- What is forgotten and kept -----------------------------------------------------------------------------


def _datasets(spec: UnlearnSpec) -> tuple[Dataset, Dataset | None]:
    """The forget set, and the retain set where the objective or the evaluation uses one."""
    forget = load_dataset(spec.task, spec.forget_split)
    source = spec.retain
    task = TASKS.get(spec.task)
    if source is None and task is not None:
        source = task.RETAIN_OF.get(spec.forget_split or task.DEFAULT_SPLIT)
    needed = Objectives.of(spec).retain is not None
    if source is None:
        if needed:
            raise UserError(
                f"algorithm {spec.algorithm} has a retain term and there is no retain set: name a split of the task or "
                "a data file with --retain, or take --retain-term none"
            )
        return forget, None
    if task is not None and source in task.SPLITS:
        return forget, load_dataset(spec.task, source)
    return forget, load_dataset(source)


def _corpus(
    spec: UnlearnSpec, model: ModelReference, forget: Dataset, retain: Dataset | None
) -> tuple[Corpus, list[Rejected]]:
    samples, rejected = _encoded(forget.texts, model, forget)
    refusals: list[Sample] = []
    objectives = Objectives.of(spec)
    if objectives.needs_refusals:
        texts = {text.sample_id: text for text in forget.texts}
        phrases = _refusals(spec)
        refused = [_refused(texts[s.sample_id], phrases, spec.seed, forget) for s in samples]
        refusals, unfit = encode(refused, model.tokenizer, model.max_length)
        if unfit:
            raise UserError(f"{forget.name}, {unfit[0].sample_id!r}: with a refusal as its answer: {unfit[0].reason}")
    kept: list[Sample] = []
    if retain is not None and objectives.retain is not None:
        kept, more = _encoded(retain.texts, model, retain)
        rejected = rejected + more
    return Corpus(samples, refusals, kept, model.tokenizer.eos_token_id), rejected


def _encoded(texts: Sequence[Text], model: ModelReference, dataset: Dataset) -> tuple[list[Sample], list[Rejected]]:
    """Samples whose index is their position among those that could be encoded."""
    samples, rejected = encode(texts, model.tokenizer, model.max_length)
    check_vocabulary(samples, rejected, model, dataset)
    return [dataclasses.replace(sample, index=i) for i, sample in enumerate(samples)], rejected


def _refusals(spec: UnlearnSpec) -> Sequence[str]:
    if spec.refusals is None:
        return REFUSALS
    path = Path(spec.refusals)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"refusals: {spec.refusals!r} cannot be read as UTF-8 text: {error}") from error
    if not any(lines):
        raise UserError(f"refusals: {spec.refusals!r} is empty; expected one refusal a line")
    return [line for line in lines if line]


def _refused(text: Text, phrases: Sequence[str], seed: int, dataset: Dataset) -> Text:
    """The question with a refusal for an answer: one for each sample, drawn by seed and sample."""
    phrase = random.Random(f"{seed}/{text.sample_id}").choice(phrases)
    if text.messages is not None:
        return dataclasses.replace(text, messages=(*text.messages[:-1], {**text.messages[-1], "content": phrase}))
    if text.completion is None:
        raise UserError(
            f"{dataset.name}, {text.sample_id!r}: a plain text has no question to refuse; PO and IdkDPO need "
            "'prompt'+'completion', 'question'+'answer' or 'messages'"
        )
    # The space that separates prompt and answer belongs to the completion.
    space = " " if text.completion.startswith(" ") else ""
    return dataclasses.replace(text, completion=space + phrase)


def _evaluation(spec: UnlearnSpec, model: ModelReference, corpus: Corpus, retain: Dataset | None) -> Evaluation | None:
    if not spec.evaluate:
        return None
    sets = {"forget": _spaced(corpus.forget, spec.evaluate_samples)}
    if retain is not None:
        kept = corpus.retain or _encoded(retain.texts, model, retain)[0]
        sets["retain"] = _spaced(kept, spec.evaluate_samples)
    return Evaluation(sets, partial(_answers, model.tokenizer))


def _answers(tokenizer: Any, model: Any, samples: Sequence[Sample]) -> Mapping[str, np.ndarray]:
    scores = score_answers(model, tokenizer, samples)
    return {"rouge_l_recall": scores.rouge_l_recall, "probability": scores.probability}


def _spaced(samples: Sequence[Sample], most: int) -> list[Sample]:
    where = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    return [samples[i] for i in where.tolist()]


# --- The output folder --------------------------------------------------------------------------------------


def _identity(spec: UnlearnSpec, model: ModelReference, forget: Dataset, retain: Dataset | None) -> dict[str, Any]:
    """The spec with hashes in place of what names can hide, and its own hash."""
    content = {k: v for k, v in dataclasses.asdict(spec).items() if k not in UnlearnSpec.EXECUTION} | {
        "schema_version": SCHEMA_VERSION,
        "model_fingerprint": model.fingerprint,
        "forget_sha256": forget.sha256,
        "retain_sha256": retain.sha256 if retain else None,
        "refusals": list(_refusals(spec)) if Objectives.of(spec).needs_refusals else None,
    }
    hashed = {k: v for k, v in content.items() if k not in ("model", "task", "forget_split", "retain")}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return content | {"spec_hash": digest[:16]}


class _Folder:
    """The output folder, claimed for one spec and one process."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._out, self._identity = out, identity
        self._lock = FileLock(out / ".lock")

    def __enter__(self) -> _Folder:
        if self._out.exists() and not self._out.is_dir():
            raise UserError(f"--out {self._out} is a file: expected a folder to write to")
        spec = self._out / "spec.json"
        if not spec.is_file() and self._out.is_dir() and any(p.name != ".lock" for p in self._out.iterdir()):
            raise UserError(f"--out {self._out} is not empty and holds no run: choose another folder")
        if spec.is_file():
            self._check_owner(json.loads(spec.read_text()))
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            if not spec.is_file():
                with replacing(spec) as unfinished:
                    unfinished.write_text(json.dumps(self._identity, indent=2) + "\n")
        except Timeout:
            raise UserError(f"--out {self._out}: another run is writing here; wait for it, or choose another") from None
        except OSError as error:
            raise UserError(f"--out {self._out}: cannot be written to ({error.strerror})") from error
        return self

    def _check_owner(self, found: dict[str, Any]) -> None:
        if found["spec_hash"] != self._identity["spec_hash"]:
            differ = [k for k, v in self._identity.items() if found.get(k) != v and k != "spec_hash"]
            raise UserError(
                f"--out {self._out} holds a run of another spec (different: {', '.join(differ)}): choose another, or "
                "remove it"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        # Refused before anything was done: the next command, mended, must not find the claim of this one.
        if not any((self._out / name).exists() for name in ("checkpoints", "reference.safetensors", "run.json")):
            shutil.rmtree(self._out, ignore_errors=True)

    def is_finished(self) -> bool:
        return (self._out / "run.json").is_file()

    def check_room(self, spec: UnlearnSpec, model: ModelReference) -> None:
        """Refuse to start where the checkpoints will not fit."""
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.source, revision=model.revision))
        weights = sum(p.numel() for p in empty.parameters())
        needed = weights * (BYTES_ADAPTED if spec.lora_rank else BYTES_FULL)
        free = shutil.disk_usage(self._out).free
        if free < needed:
            raise UserError(
                f"--out {self._out}: {free / 1e9:.2f} GB free, and checkpoints of {weights / 1e6:.1f} million weights "
                f"need {needed / 1e9:.2f} GB; free some, or choose a folder on another disk"
            )

    def finish(self, history: History, corpus: Corpus, rejected: Sequence[Rejected], job: Job, seconds: float) -> None:
        """Put model and tables in place; run.json comes last and says that all is there."""
        saved = job.checkpoints.latest()
        assert saved is not None
        unfinished = self._out / ".model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(saved.model, unfinished, copy_function=_link)
        shutil.rmtree(self._out / "model", ignore_errors=True)
        unfinished.rename(self._out / "model")
        tables = {
            "steps": pa.Table.from_pylist(history.steps, _step_schema()),
            "epochs": pa.Table.from_pylist(history.epochs),
            "samples": _samples(history, corpus),
            "difficulty": _difficulty(history, corpus),
        }
        for name, table in tables.items():
            with replacing(self._out / f"{name}.parquet") as path:
                pq.write_table(table, path)
        record = {
            "spec": self._identity,
            "updates": history.step,
            "thresholds": history.thresholds,
            "seconds": history.seconds | {"last_start": seconds},
            "passes": history.passes,
            "notes": history.notes,
            "rejected": [dataclasses.asdict(r) for r in rejected],
            "packages": {name: package_version(name) for name in PACKAGES},
        }
        with replacing(self._out / "run.json") as path:
            path.write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(self._out / "checkpoints")
        job.reference_path.unlink(missing_ok=True)


def _link(source: str, target: str) -> None:
    """A second name for a file, where the file system has them: the weights are not written twice."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _step_schema() -> pa.Schema:
    number, whole = pa.float64(), pa.int64()
    return pa.schema(
        [
            ("step", whole),
            ("epoch", whole),
            ("loss", number),
            ("forget_loss", number),
            ("retain_loss", number),
            ("gradient_norm", number),
            ("learning_rate", number),
            ("samples", pa.list_(pa.string())),
            ("tokens", whole),
            ("forwards", whole),
            ("backwards", whole),
            ("seconds", number),
        ]
    )


def _samples(history: History, corpus: Corpus) -> pa.Table:
    memory = history.memory
    nothing = [None] * len(corpus.forget)
    return pa.table(
        {
            "sample_id": [s.sample_id for s in corpus.forget],
            "num_tokens": [s.num_scored for s in corpus.forget],
            "updates": history.drawn,
            "updates_until_forgotten": pa.array(history.drawn_until_forgotten, pa.int64()),
            "forgotten_at_step": pa.array(history.forgotten_at, pa.int64()),
            "mrd_initial": pa.array(history.mrd[0]["mrd"] if history.mrd else nothing, pa.float64()),
            "ma_initial": memory["initial"]["ma"],
            "el_initial": memory["initial"]["el"],
            "ma_last": memory["last"]["ma"],
            # EL is not measured where MA alone says that the sample is not forgotten.
            "el_last": pa.array([None if np.isinf(el) else el for el in memory["last"]["el"]], pa.float64()),
        }
    )


def _difficulty(history: History, corpus: Corpus) -> pa.Table:
    """MRD of every sample at every refresh."""
    ids = [s.sample_id for s in corpus.forget]
    rows = [
        {"step": entry["step"], "sample_id": name, "mrd": mrd}
        for entry in history.mrd
        for name, mrd in zip(ids, entry["mrd"], strict=True)
    ]
    schema = pa.schema([("step", pa.int64()), ("sample_id", pa.string()), ("mrd", pa.float64())])
    return pa.Table.from_pylist(rows, schema)


def read_run(folder: str | Path) -> UnlearnResult:
    """A finished run.

    Raises:
        UserError: the folder holds none.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text())
        steps, epochs, samples = (pq.read_table(folder / f"{name}.parquet") for name in ("steps", "epochs", "samples"))
    except (OSError, json.JSONDecodeError, pa.ArrowException) as error:
        raise UserError(f"{folder}: no finished run; expected what `mrd-bench unlearn` writes") from error
    return UnlearnResult(folder, steps, epochs, samples, record)


class _Bar:
    """The progress bar: updates, loss terms and the share of samples forgotten."""

    def __init__(self, spec: UnlearnSpec, forget_samples: int, shown: bool) -> None:
        total = total_updates(forget_samples, spec)
        self._bar = tqdm(total=total, unit="update", desc=f"unlearning ({spec.algorithm})", disable=not shown)
        self._retains = Objectives.of(spec).retain is not None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, progress: Progress) -> None:
        terms = {"forget": f"{progress.forget_loss:.3g}"}
        if self._retains:
            terms["retain"] = f"{progress.retain_loss:.3g}"
        self._bar.set_postfix(terms | {"forgotten": f"{progress.forgotten:.0%}"}, refresh=False)
        self._bar.update(progress.step - self._bar.n)
