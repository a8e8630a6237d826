"""What a run logs for TensorBoard, Weights & Biases, MLflow, or as JSON lines: the rows of its tables, as they come.

Logs follow the tables: by way of transformers' own callbacks each row is given out once, and `logged.json` keeps which
have been, so that a continued run appends. For a sweep every trial is a run of its own, with its settings and metrics.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pyarrow.parquet as pq
from filelock import FileLock
from transformers import TrainerControl, TrainerState

from scoring.errors import UserError, first_line
from scoring.files import replacing
from scoring.settings import Doc, named

FOLLOW_S = 5.0
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
# Rows of these tables are logged, by the column that counts them; those of epochs stand under eval/.
COUNTED_BY = {"steps": "step", "epochs": "epoch"}
LOGGED = "logged.json"


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is logged while it runs. None of it changes a result."""

    log: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow", "jsonl"]],
        Doc("also log losses, gradient norm, learning rate and each epoch; several with commas (default: none)"),
    ] = field(default_factory=list)
    log_dir: Annotated[str | None, Doc("folder of the logs (default: logs in --out)")] = None

    def check_packages(self) -> None:
        """Refuse a log whose package is missing.

        Raises:
            UserError: one line that names the extra.
        """
        for kind in self.log:
            packages = PACKAGES.get(kind, ())
            if packages and not any(importlib.util.find_spec(name) for name in packages):
                raise UserError(f"{named('log')} {kind} needs the package {packages[0]}: pip install 'mrd-bench[log]'")

    def folder(self, out: Path) -> Path:
        """Where logs of what is written to `out` go."""
        return Path(self.log_dir).absolute() if self.log_dir else out / "logs"


LOG_FIELDS = tuple(field.name for field in dataclasses.fields(Logging))


class Log(Protocol):
    """Where rows go."""

    def row(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Arguments:
    """What transformers' callbacks ask of TrainingArguments, which itself would need accelerate."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.output_dir, self.run_name, self._config = str(folder), name, dict(config)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._config)

    def to_json_string(self) -> str:
        return json.dumps(self._config, indent=2)


class _Callback:
    """One of transformers' callbacks as a log."""

    def __init__(self, callback: Any, arguments: _Arguments) -> None:
        self._callback, self._arguments, self._control = callback, arguments, TrainerControl()
        self._callback.on_train_begin(arguments, TrainerState(), self._control)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._callback.on_log(self._arguments, TrainerState(global_step=step), self._control, logs=dict(values))

    def close(self) -> None:
        self._callback.on_train_end(self._arguments, TrainerState(), self._control)


class _JsonLines:
    """Rows as lines of one file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():  # a line that was not finished
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self._file = path.open("a", encoding="utf-8")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _tensorboard(folder: Path, arguments: _Arguments, first_step: int) -> Log:
    from transformers.integrations.integration_utils import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    # What a killed start may have written beyond what it noted is hidden by TensorBoard itself.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step if first_step else None)
    return _Callback(TensorBoardCallback(writer), arguments)


def _wandb(folder: Path, arguments: _Arguments, key: str) -> Log:
    import wandb
    from transformers.integrations.integration_utils import WandbCallback

    wandb.init(
        project=os.getenv("WANDB_PROJECT", "mrd-bench"),
        name=arguments.run_name,
        id=key,
        resume="allow",
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
    )
    log = _Callback(WandbCallback(), arguments)
    return _Closing(log, wandb.finish)


def _mlflow(folder: Path, arguments: _Arguments, known: dict[str, Any]) -> Log:
    import mlflow
    from transformers.integrations.integration_utils import MLflowCallback

    if not os.getenv("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((folder / "mlflow").as_uri())
    mlflow.set_experiment(os.getenv("MLFLOW_EXPERIMENT_NAME", "mrd-bench"))
    run = mlflow.start_run(run_id=known.get("mlflow"), run_name=None if "mlflow" in known else arguments.run_name)
    known["mlflow"] = run.info.run_id

    def close() -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()

    return _Closing(_Callback(MLflowCallback(), arguments), close)


class _Closing:
    """A log with something more to do at its end."""

    def __init__(self, log: Log, close: Callable[[], Any]) -> None:
        self._log, self._close = log, close

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._log.row(step, values)

    def close(self) -> None:
        self._log.close()
        self._close()


class RunLogs:
    """The logs of one run: opened where it goes on, given each row once.

    Args:
        logging: which, and where.
        folder: of these logs.
        name: of the run, for a reader.
        config: its settings, with its "spec_hash".
    """

    def __init__(self, logging: Logging, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOGGED
        # By table, the number of the last row that was logged; and the names of the run elsewhere.
        self._known: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        arguments = _Arguments(folder, name, config)
        first_step = self._known.get("steps", 0) + 1 if self._known else 0
        makers: dict[str, Callable[[], Log]] = {
            "tensorboard": lambda: _tensorboard(folder, arguments, first_step),
            "wandb": lambda: _wandb(folder, arguments, str(config["spec_hash"])),
            "mlflow": lambda: _mlflow(folder, arguments, self._known),
            "jsonl": lambda: _JsonLines(folder / "log.jsonl"),
        }
        self._logs: list[Log] = []
        try:
            for kind in dict.fromkeys(logging.log):
                self._logs.append(makers[kind]())
        except BaseException:
            self.close()
            raise

    def add(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log those rows of a table that have not been.

        Args:
            table: a key of COUNTED_BY.
        """
        count, last = COUNTED_BY[table], self._known.get(table, -1)
        new = [row for row in rows if row[count] > last]
        for row in new:
            numbers = {
                ("eval_" if table == "epochs" else "") + name: float(value)
                for name, value in row.items()
                if isinstance(value, int | float) and math.isfinite(value) and name not in ("step", "epoch")
            }
            for log in self._logs:
                log.row(row["step"], numbers | {"epoch": float(row["epoch"])})
        if new:
            self._known[table] = new[-1][count]
            with replacing(self._path) as unfinished:
                unfinished.write_text(json.dumps(self._known))

    def close(self) -> None:
        for log in self._logs:
            log.close()


@contextmanager
def run_logged(logging: Logging, out: Path, name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Within the context the tables of a run are logged as they grow, by a thread of its own: all that MLflow keeps of
    a run belongs to one thread. A log that fails is said, and the run goes on.

    Args:
        out: the folder of the run.
    """
    if not logging.log:
        yield
        return
    done = threading.Event()

    def follow(logs: RunLogs) -> None:
        for table in COUNTED_BY:
            path = out / f"{table}.parquet"
            if path.is_file() or (path.is_dir() and any(path.glob("part-*"))):
                logs.add(table, pq.read_table(path).to_pylist())

    def work() -> None:
        try:
            logs = RunLogs(logging, logging.folder(out), name, config)
            try:
                while not done.wait(FOLLOW_S):
                    follow(logs)
                follow(logs)
            finally:
                logs.close()
        except Exception as error:
            print(f"mrd-bench: nothing more is logged: {first_line(error)}", file=sys.stderr)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class SweepLogs:
    """The logs of a sweep: a run for each trial that has finished.

    Args:
        out: the folder of the sweep.
    """

    def __init__(self, logging: Logging, out: Path) -> None:
        self._logging, self._folder = logging, logging.folder(out)

    def add(self, key: str, name: str, result: Mapping[str, Any]) -> None:
        """Log a trial's settings, epochs and final metrics, unless they have been.

        Args:
            key: its hash.
            name: for a reader.
            result: see `bench.jobs.trial`.
        """
        folder = self._folder / key
        if not self._logging.log or not result.get("epochs") or (folder / LOGGED).is_file():
            return
        *epochs, last = result["epochs"]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            logs = RunLogs(self._logging, folder, name, {**result["spec"], "status": result["status"]})
            try:
                logs.add("epochs", [*epochs, {**last, **result.get("values", {})}])
            finally:
                logs.close()
