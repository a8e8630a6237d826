"""A run of unlearning in this process, or as a Ray Train job on several workers.

Both leave the same last checkpoint in the run's folder, and both continue from the newest one there: after a killed
worker (a new group is started), after a killed driver (by the same command), and with another number of
workers. So the folder must be visible from every node.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from algorithms.checkpoints import Checkpoints, NoCheckpoints
from algorithms.corpus import Corpus, Evaluation
from algorithms.group import ALONE, Group
from algorithms.history import History, Progress
from algorithms.initial import INITIAL, write_initial
from algorithms.live import PROGRESS, LiveTables, progress_told, read_progress, write_progress
from algorithms.passes import Head
from algorithms.recipe import Execution, Objectives, Recipe, layer_of, total_updates
from algorithms.reference import REFERENCE, Reference, Role, compute_reference
from algorithms.samplers import retain_order
from algorithms.target import Target
from algorithms.trainable import trainable_for
from algorithms.unlearner import Diverged, Unlearner
from scoring.cluster import Footprint, check_versions, how_many_fit, versions
from scoring.errors import UserError, first_line
from scoring.files import replacing
from scoring.load import load_model, loading_notes, read_config
from scoring.memory import give_back_large_blocks
from scoring.plugins import Plugin, load_plugins, loaded_plugins
from scoring.progress import every, phase
from scoring.samples import Sample, default_batch_tokens
from scoring.settings import adopt, current_naming, named
from scoring.tensor_folder import StoredTensors
from scoring.work import LocalPool, Pool, ReplicaSpec

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

# How often Ray Train looks at its workers. It answers their reports then; by default they would wait two seconds.
POLL_S = "0.1"
# How long workers may take to start on a cluster that has room for them; Ray itself would wait forever.
START_TIMEOUT_S = "300"
LOOK_S = 0.5
# The file in which a worker leaves an error that would come again on every start.
LASTING_ERROR = ".mistake.txt"

Observe = Callable[[Progress], None]
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a worker needs to know.

    Attributes:
        recipe: a resolved recipe.
        execution: how the recipe is carried out.
        corpus: the samples.
        source, revision: the initial model, see `scoring.load.load_model`.
        folder: the absolute path of the run's folder, which has checkpoints, reference and progress.
        tokenizer: the tokenizer, which is saved with the model.
        evaluation: what to measure after each epoch; None measures nothing.
        continues_adapter: `source` is the folder of an adapter, which alone is trained further.
        keeps_checkpoints: False for a run so short that it begins again if it was stopped.
        plugins: files that add to the registries, see `scoring.plugins`.
        target: of a model that learns, see `Unlearner`.
    """

    recipe: Recipe
    execution: Execution
    corpus: Corpus
    source: str
    revision: str | None
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    evaluation: Evaluation | None = None
    continues_adapter: bool = False
    keeps_checkpoints: bool = True
    plugins: tuple[Plugin, ...] = field(default_factory=loaded_plugins)
    target: Target | None = None

    @property
    def reference_path(self) -> Path:
        return self.folder / REFERENCE

    @property
    def initial_path(self) -> Path:
        """The folder of the initial weights, which is there while the run goes on."""
        return self.folder / INITIAL

    @property
    def progress_files(self) -> tuple[Observe, ...]:
        """What writes the progress down: nothing, for a run that is too short to be looked at."""
        return (partial(write_progress, self.folder),) if self.keeps_checkpoints else ()

    @property
    def checkpoints(self) -> Checkpoints:
        if not self.keeps_checkpoints:
            return NoCheckpoints()
        return Checkpoints(self.folder / "checkpoints", self.tokenizer)


def train_here(
    job: TrainingJob,
    device: str = "cpu",
    observe: Observe = lambda _: None,
    report: Report = lambda _: None,
    watch: Observe = lambda _: None,
) -> History:
    """Run the job in this process.

    Args:
        observe: is shown the progress after each update.
        report: is given the row of each epoch, which a Ray Tune trial passes on.
        watch: is shown the progress from time to time, in another thread.
    """
    with phase("loading the model"):
        model = load_model(job.source, "float32", device, job.revision)
    ensure_reference(job, partial(LocalPool, model), device)
    unlearner = unlearner_of(job, model, ALONE, observe, report)
    del model  # an adapter that is continued has a base of its own
    with progress_told(unlearner.progress, watch, *job.progress_files):
        return unlearner.run()


def train_on_ray(job: TrainingJob, footprint: Footprint, observe: Observe = lambda _: None) -> History:
    """Run the job on Ray Train workers; this process must be connected to a cluster.

    Args:
        footprint: CPU cores and GPUs of a worker, and of a replica that computes the reference.
        observe: is shown the progress from time to time.

    Raises:
        UserError: the workers do not fit on the cluster, training diverged, or workers keep dying.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from algorithms.torch_group import TorchGroupConfig
    from scoring.pool import ReplicaPool

    workers = job.execution.workers
    if (fits := how_many_fit(footprint, "worker")) < workers:
        raise UserError(
            f"{workers} workers of {footprint.cpus} CPU and {footprint.gpus:g} GPU: the cluster has room for {fits}; "
            f"lower {named('workers')}, or add nodes"
        )
    spec = ReplicaSpec(job.source, job.revision)
    ensure_reference(job, lambda: ReplicaPool(spec, footprint, workers), "cuda" if footprint.gpus else "cpu")
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = START_TIMEOUT_S
    storage = job.folder / ".ray"  # Ray Train's record of the run

    def make_trainer() -> TorchTrainer:
        return TorchTrainer(
            _train_in_worker,  # type: ignore[arg-type]  # Ray passes its result on, which its types do not say
            train_loop_config={
                "job": job,
                "threads": footprint.cpus,
                "driver_versions": versions(),
                "naming": current_naming(),
            },
            torch_config=TorchGroupConfig(backend="nccl" if footprint.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=footprint.gpus > 0,
                resources_per_worker={"CPU": footprint.cpus, **({"GPU": footprint.gpus} if footprint.gpus else {})},
            ),
            run_config=RunConfig(
                # New each time, so that Ray continues nothing: the checkpoints do.
                name=f"unlearn-{uuid.uuid4().hex[:12]}",
                storage_path=str(storage),
                # `_fit` starts again, see there.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )

    with _progress_shown(job.folder, observe):
        try:
            message = _fit(make_trainer, job)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
            (job.folder / LASTING_ERROR).unlink(missing_ok=True)
    if message:
        raise UserError(message)
    saved = job.checkpoints.latest()
    assert saved is not None
    return History(**saved.history())


def _fit(make_trainer: Callable[[], TorchTrainer], job: TrainingJob) -> str | None:
    """Train, and start again with a new trainer when a worker has died.

    Ray's own restarts do not do: a worker that dies as training is handed to it ends the run, and one that dies as it
    starts is a failure of another kind. All that belongs to a trainer ends with it.

    Returns:
        An error that would come again, or None.

    Raises:
        UserError: workers died more often than they may.
    """
    lasting_error, max_failures = job.folder / LASTING_ERROR, job.execution.max_failures
    lasting_error.unlink(missing_ok=True)
    for _ in range(max_failures + 1):
        try:
            with _interrupts_given_back():
                result: Any = make_trainer().fit()
            error: str | None = (result.return_value or {}).get("error")
            return error
        except Exception as failure:  # its type differs between versions of Ray
            reason = _last_line(failure)
        if lasting_error.is_file():
            return lasting_error.read_text()
    times = "once" if not max_failures else f"{max_failures + 1} times"
    raise UserError(
        f"training workers failed {times}, and {named('max_failures')} is {max_failures}; Ray says: "
        f"{reason.rstrip('.')}; out of memory? Lower {named('batch_tokens')} or {named('workers')}; the same command "
        "continues"
    )


@contextmanager
def _interrupts_given_back() -> Iterator[None]:
    """After the context SIGINT does what it did before: Ray's handler would stay, and with it the trainer's controller
    and all that this holds."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _train_in_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train in a worker. An error that would come again is returned, or left in a file: after others the run starts
    again."""
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

    if group.strategy == "fsdp":
        give_back_large_blocks()

    def report(row: Mapping[str, Any]) -> None:
        ray.train.report({key: value for key, value in row.items() if isinstance(value, int | float)})

    lasting_error = job.folder / LASTING_ERROR
    try:
        check_versions(config["driver_versions"])
        load_plugins(job.plugins)
        model = load_model(job.source, "float32", device, job.revision)
        unlearner = unlearner_of(job, model, group, report=report)
        del model  # an adapter that is continued has a base of its own
        with progress_told(unlearner.progress, *(() if group.rank else job.progress_files)):
            unlearner.run()
    except Diverged as error:
        return {"error": str(error)}  # all workers know the sums, so all of them end here
    except Exception as error:
        if _lost_contact(error) and not lasting_error.is_file():
            raise  # another worker has died: all start again
        if not lasting_error.is_file():
            with replacing(lasting_error) as unfinished:
                unfinished.write_text(_failure_message(error))
        if torch.distributed.is_initialized():
            if torch.distributed.get_backend() == "nccl":
                # The others wait on their GPUs, and only Ray Train can end them.
                raise
            # The others may be waiting for this worker: it leaves the group, and they read the file.
            torch.distributed.destroy_process_group()
        return {"error": lasting_error.read_text()}
    return {"error": None}


def _lost_contact(error: Exception) -> bool:
    """Whether a collective operation failed, not a computation of this worker. Gloo raises bare RuntimeErrors."""
    is_named = any(name in str(error) for name in ("gloo", "NCCL", "Connection closed by peer"))
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and is_named)


def _failure_message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"training failed in a worker: {type(error).__name__}: {first_line(error)}"


def unlearner_of(
    job: TrainingJob,
    model: PreTrainedModel,
    group: Group,
    observe: Observe = lambda _: None,
    report: Report = lambda _: None,
    initial: Mapping[str, Any] | None = None,
) -> Unlearner:
    """The job on this worker, ready to run. The reference must have been computed.

    Args:
        model: the initial model, which is trained in place.
        group: this worker.
        observe, report: see `Unlearner`.
        initial: the model's weights by name on the CPU, if the caller holds them already; None writes them to a file
            of the run, or makes a copy for a run that is too short for files.
    """
    objectives = Objectives.of(job.recipe)
    if initial is None:
        initial = _initial_weights(job, model, group)
    head = Head(model) if "reference_logits" in objectives.inputs else None
    reference = Reference(job.reference_path) if objectives.reference_quantities() else None
    continued = job.source if job.continues_adapter else None
    trained = trainable_for(job.recipe, model, group, job.execution.gradient_checkpointing, continued, initial)
    unlearner = Unlearner(
        job.recipe,
        job.corpus,
        trained,
        initial,
        reference,
        head,
        job.checkpoints,
        evaluation=job.evaluation,
        observe=observe,
        report=report,
        batch_tokens=job.execution.batch_tokens,
        checkpoint_every=job.execution.checkpoint_every,
        live=LiveTables(job.folder if job.keeps_checkpoints and not group.rank else None),
        target=job.target,
    )
    unlearner.history.note(*loading_notes(model))
    return unlearner


def _initial_weights(job: TrainingJob, model: PreTrainedModel, group: Group) -> Mapping[str, Any]:
    """The initial model's weights by name, on every worker."""
    if not job.keeps_checkpoints:
        return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    if group.rank == 0 and not job.initial_path.is_dir():
        with phase("writing the initial weights"):
            write_initial(model, job.initial_path)
    group.wait()
    return StoredTensors(job.initial_path)


def ensure_reference(
    job: TrainingJob, make_pool: Callable[[], Pool], device: torch.device | str, config: PreTrainedConfig | None = None
) -> None:
    """Compute the quantities of the initial model that the objectives need, unless an earlier start of this run has.

    Args:
        make_pool: gives replicas of the initial model.
        device: of the replicas.
        config: the model's configuration, if it is loaded already.
    """
    quantities = Objectives.of(job.recipe).reference_quantities()
    if not quantities or job.reference_path.is_dir():
        return
    corpus = job.corpus
    # Of the retain set only the samples that will be drawn.
    draws = total_updates(len(corpus.forget), job.recipe) * (job.recipe.batch_size or 1)
    drawn = set(retain_order(0, draws, len(corpus.retain), job.recipe.seed)) if corpus.retain else set()
    samples: dict[Role, Sequence[Sample]] = {
        "forget": corpus.forget,
        "refusal": corpus.refusals,
        "retain": [sample for sample in corpus.retain if sample.index in drawn],
    }
    config = config or read_config(job.source, job.revision)
    layer = layer_of(job.recipe, config)
    with make_pool() as pool, phase("reading the samples with the initial model"):
        batch_tokens = job.execution.batch_tokens or default_batch_tokens(device)
        compute_reference(job.reference_path, samples, quantities, layer, pool, batch_tokens)


# --- Progress, read from a file that the first worker writes ------------------------------------------------


@contextmanager
def _progress_shown(folder: Path, observe: Observe) -> Iterator[None]:
    """Within the context `observe` is shown the progress of the first worker."""
    path = folder / PROGRESS
    path.unlink(missing_ok=True)

    def look() -> None:
        if progress := read_progress(folder):
            observe(progress)

    with every(LOOK_S, look):
        yield


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
