"""A run of unlearning in this process, or as a Ray Train job on several workers.

Both end with the same checkpoint in the run's folder, and both continue from what they find there: after a killed
worker (Ray Train starts the group again), after a killed driver (the same command), and with another number of
workers. So the folder must be visible from every node.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from algorithms.checkpoints import Checkpoints, NoCheckpoints
from algorithms.corpus import Corpus, Evaluation
from algorithms.passes import Head
from algorithms.recipe import Execution, Objectives, Recipe, layer_of, total_updates
from algorithms.reference import Reference, compute_reference
from algorithms.trainable import Group
from algorithms.unlearner import Diverged, History, Progress, Unlearner, retain_order, trainable_for
from scoring.cluster import Footprint, check_versions, how_many_fit, versions
from scoring.errors import UserError, first_line
from scoring.files import replacing
from scoring.plugins import Plugin, load_plugins, loaded_plugins
from scoring.replica import load_model
from scoring.settings import adopt, current_naming, named
from scoring.work import LocalPool, Pool, ReplicaSpec

# Ray Train answers a report when it looks at its workers next: the default of two seconds would be waited for.
POLL_S = "0.1"
# Time that workers have to start when the cluster said there is room; Ray itself would wait for ever.
START_TIMEOUT_S = "300"
PROGRESS_S = 0.3
# Where a worker leaves an error that would come again on every start.
MISTAKE = ".mistake.txt"


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a worker needs to know.

    Attributes:
        recipe: resolved.
        execution: how it is carried out.
        corpus: the samples.
        source, revision: the initial model, see scoring.replica.load_model.
        folder: of the run, an absolute path: checkpoints, reference and progress are kept there.
        tokenizer: is saved with the model.
        evaluation: measured after each epoch; None measures nothing.
        keeps_checkpoints: False for a run so short that it is begun anew where it was stopped.
        plugins: files that add to the registries, see `scoring.plugins`.
    """

    recipe: Recipe
    execution: Execution
    corpus: Corpus
    source: str
    revision: str | None
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    evaluation: Evaluation | None = None
    keeps_checkpoints: bool = True
    plugins: tuple[Plugin, ...] = field(default_factory=loaded_plugins)

    @property
    def reference_path(self) -> Path:
        return self.folder / "reference.safetensors"

    @property
    def checkpoints(self) -> Checkpoints:
        if not self.keeps_checkpoints:
            return NoCheckpoints()
        return Checkpoints(self.folder / "checkpoints", self.tokenizer)


Observe = Callable[[Progress], None]
Report = Callable[[Mapping[str, Any]], None]


def train_here(
    job: TrainingJob, device: str = "cpu", observe: Observe = lambda _: None, report: Report = lambda _: None
) -> History:
    """Run the job in this process.

    Args:
        observe: is shown the progress after each update.
        report: is given the row of each epoch; what a Ray Tune trial passes on.
    """
    model = load_model(job.source, "float32", device, job.revision)
    ensure_reference(job, lambda: LocalPool(model))
    return unlearner_of(job, model, Group(), observe, report).run()


def train_on_ray(job: TrainingJob, footprint: Footprint, observe: Observe = lambda _: None) -> History:
    """Run the job on Ray Train workers; needs a connected cluster.

    Args:
        footprint: CPU cores and GPUs of a worker, and of a replica that computes the reference.
        observe: is shown the progress every now and then.

    Raises:
        UserError: the workers do not fit on the cluster, training diverged, or workers keep dying.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from scoring.pool import ReplicaPool

    workers, max_failures = job.execution.workers, job.execution.max_failures
    if (fits := how_many_fit(footprint, "worker")) < workers:
        raise UserError(
            f"{workers} workers of {footprint.cpus} CPU and {footprint.gpus:g} GPU: the cluster has room for {fits}; "
            f"lower {named('workers')}, or add nodes"
        )
    spec = ReplicaSpec(job.source, job.revision)
    ensure_reference(job, lambda: ReplicaPool(spec, footprint, workers))
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = START_TIMEOUT_S
    # Ray Train's own record. A name of its own each time: what there is to continue is in the checkpoints.
    storage = job.folder / ".ray"
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={
            "job": job,
            "threads": footprint.cpus,
            "driver_versions": versions(),
            "naming": current_naming(),
        },
        torch_config=TorchConfig(backend="nccl" if footprint.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=footprint.gpus > 0,
            resources_per_worker={"CPU": footprint.cpus, **({"GPU": footprint.gpus} if footprint.gpus else {})},
        ),
        run_config=RunConfig(
            name=f"unlearn-{uuid.uuid4().hex[:12]}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=1),  # type: ignore[call-arg]
        ),
    )
    (job.folder / MISTAKE).unlink(missing_ok=True)
    with _watched(job.folder, observe):
        try:
            result: Any = trainer.fit()
        except Exception as error:  # the controller's own types differ between versions
            raise UserError(
                f"Ray Train gave up (workers are started again {max_failures} times): {_cause(error)}"
            ) from error
        finally:
            shutil.rmtree(storage, ignore_errors=True)
            (job.folder / MISTAKE).unlink(missing_ok=True)
    if message := (result.return_value or {}).get("error"):
        raise UserError(message)
    saved = job.checkpoints.latest()
    assert saved is not None
    return History(**saved.history())


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does. An error that would come again ends as a value: what is raised, Ray Train tries again."""
    import ray.train
    import ray.train.torch

    job: TrainingJob = config["job"]
    adopt(config["naming"])
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), job.execution.strategy)
    device = str(ray.train.torch.get_device())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    last_written = 0.0

    def show(progress: Progress) -> None:
        nonlocal last_written
        if time.monotonic() - last_written > PROGRESS_S or progress.step == progress.total:
            with replacing(job.folder / "progress.json") as unfinished:
                unfinished.write_text(json.dumps(asdict(progress)))
            last_written = time.monotonic()

    def report(row: Mapping[str, Any]) -> None:
        ray.train.report({key: value for key, value in row.items() if isinstance(value, int | float)})

    mistake = job.folder / MISTAKE
    if mistake.is_file():
        return {"error": mistake.read_text()}
    try:
        check_versions(config["driver_versions"])
        load_plugins(job.plugins)
        unlearner_of(job, load_model(job.source, "float32", device, job.revision), group, show, report).run()
    except Diverged as error:
        return {"error": str(error)}  # all workers know the sums, and are here
    except Exception as error:
        if _lost_contact(error) and not mistake.is_file():
            raise  # another worker has died: Ray Train starts the group again
        if not mistake.is_file():
            with replacing(mistake) as unfinished:
                unfinished.write_text(_cause_of(error))
        if torch.distributed.is_initialized():
            if torch.distributed.get_backend() == "nccl":
                raise  # the others wait on their GPUs, and only Ray Train can end them: started again, they see it
            # The others may be waiting for this one: it leaves, and they see why.
            torch.distributed.destroy_process_group()
        return {"error": mistake.read_text()}
    return {"error": None}


def _lost_contact(error: Exception) -> bool:
    """Whether a collective operation failed, and not this worker's own work. Gloo raises bare RuntimeErrors."""
    named = any(name in str(error) for name in ("gloo", "NCCL", "Connection closed by peer"))
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and named)


def _cause_of(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"training failed in a worker: {type(error).__name__}: {first_line(error)}"


def unlearner_of(
    job: TrainingJob,
    model: PreTrainedModel,
    group: Group,
    observe: Observe = lambda _: None,
    report: Report = lambda _: None,
    initial: Mapping[str, torch.Tensor] | None = None,
) -> Unlearner:
    """The job on this worker, ready to run. The reference must be there.

    Args:
        initial: the model's weights by name on the CPU, where somebody holds them already; None makes a copy.
    """
    objectives = Objectives.of(job.recipe)
    if initial is None:
        own = model.named_parameters() if not group.rank else ()
        initial = {name: p.detach().to("cpu", copy=True) for name, p in own}
    head = Head(model) if "reference_logits" in objectives.inputs else None
    reference = Reference(job.reference_path) if objectives.reference() else None
    trained = trainable_for(job.recipe, model, group, job.execution.gradient_checkpointing)
    return Unlearner(
        job.recipe,
        job.corpus,
        trained,
        initial,
        reference,
        head,
        job.checkpoints,
        job.evaluation,
        observe,
        report,
        job.execution.batch_tokens,
        job.execution.checkpoint_every,
    )


def ensure_reference(job: TrainingJob, make_pool: Callable[[], Pool], config: PreTrainedConfig | None = None) -> None:
    """Compute what the initial model says of the samples, unless an earlier start of this run has done so.

    Args:
        make_pool: gives replicas of the initial model.
        config: of the model, where it is loaded already.
    """
    wanted = Objectives.of(job.recipe).reference()
    if not wanted or job.reference_path.is_file():
        return
    corpus = job.corpus
    # Only those that will be drawn.
    draws = total_updates(len(corpus.forget), job.recipe) * (job.recipe.batch_size or 1)
    drawn = set(retain_order(0, draws, len(corpus.retain), job.recipe.seed)) if corpus.retain else set()
    samples = {
        "forget": corpus.forget,
        "refusal": corpus.refusals,
        "retain": [sample for sample in corpus.retain if sample.index in drawn],
    }
    config = config or AutoConfig.from_pretrained(job.source, revision=job.revision)
    layer = layer_of(job.recipe, config)
    with make_pool() as pool:
        compute_reference(job.reference_path, samples, wanted, layer, pool, job.execution.batch_tokens)


# --- Progress, by way of a file that the first worker writes ------------------------------------------------


@contextmanager
def _watched(folder: Path, observe: Observe) -> Iterator[None]:
    """Within the context `observe` is shown what the first worker reports."""
    path = folder / "progress.json"
    path.unlink(missing_ok=True)
    done = threading.Event()

    def look(seen: str = "") -> str:
        text = path.read_text() if path.is_file() else ""
        if text and text != seen:
            observe(Progress(**json.loads(text)))
        return text

    def watch() -> None:
        seen = ""
        while not done.wait(PROGRESS_S):
            seen = look(seen)
        look(seen)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
