"""What a run logs for TensorBoard, Weights & Biases, MLflow, or as JSON lines: the rows of its tables, as they come.

Logs follow the tables: by way of transformers' own callbacks each row is given out once, and `logged.json` keeps which
have been given to which log, so that a continued run appends, and a finished one logs what it has not. A log that fails
ends alone. For a sweep every trial is a run of its own, with its settings and metrics.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pyarrow.parquet as pq
from filelock import FileLock
from transformers import TrainerControl, TrainerState
from typing_extensions import TypedDict

from bench.files.folders import check_folder
from scoring.errors import UserError, first_line
from scoring.files import replacing, shown
from scoring.reading import read_json
from scoring.settings import Doc, named

FOLLOW_S = 5.0
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
# Rows of these tables are logged, by the column that counts them; those of epochs stand under eval/.
COUNTED_BY = {"steps": "step", "epochs": "epoch"}
LOGGED, JSONL = "logged.json", "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is logged while it runs. None of it changes a result."""

    log: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow", "jsonl"]],
        Doc("also log losses, gradient norm, learning rate and each epoch; several with commas (default: none)"),
    ] = field(default_factory=list)
    log_dir: Annotated[str | None, Doc("folder of the logs (default: logs in --out)")] = None

    def check_logs(self) -> None:
        """Refuse what is known not to work before there is anything to log.

        Raises:
            UserError: a package is missing, with the extra that has it; or the folder cannot be written to, or is for
                no log.
        """
        for kind in self.log:
            packages = PACKAGES.get(kind, ())
            if packages and not any(importlib.util.find_spec(name) for name in packages):
                raise UserError(f"{named('log')} {kind} needs the package {packages[0]}: pip install 'mrd-bench[log]'")
        if self.log_dir is not None:
            if not self.log:
                raise UserError(
                    f"{named('log_dir')} is the folder of logs, and there are none: name them with {named('log')}, or "
                    "leave it out"
                )
            check_folder("log_dir", self.folder(Path()))

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
    return _Closing(lambda: _Callback(WandbCallback(), arguments), wandb.finish)


def _mlflow(folder: Path, arguments: _Arguments, known: dict[str, Any]) -> Log:
    import mlflow
    from transformers.integrations.integration_utils import MLflowCallback

    if not os.getenv("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((folder / "mlflow").as_uri())
    mlflow.set_experiment(os.getenv("MLFLOW_EXPERIMENT_NAME", "mrd-bench"))
    run = mlflow.start_run(run_id=known.get("run"), run_name=None if "run" in known else arguments.run_name)
    known["run"] = run.info.run_id

    def close() -> None:
        mlflow.flush_async_logging()
        mlflow.end_run()

    return _Closing(lambda: _Callback(MLflowCallback(), arguments), close)


class _Closing:
    """A log with something more to do at its end, however that comes.

    Args:
        make: makes the log.
        close: what there is to do.
    """

    def __init__(self, make: Callable[[], Log], close: Callable[[], Any]) -> None:
        self._close = close
        try:
            self._log = make()
        except BaseException:
            close()
            raise

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._log.row(step, values)

    def close(self) -> None:
        try:
            self._log.close()
        finally:
            self._close()


class _Logged(TypedDict):
    """What has been logged of a run: by log and table the number of the last row, and "run", its name in that log."""

    spec_hash: str
    logs: dict[str, dict[str, Any]]


def _logged(folder: Path, spec_hash: str) -> _Logged:
    """What has been logged in a folder of the run with this spec.

    Raises:
        UserError: the folder has the logs of another run, or nobody can tell what it has.
    """
    path = folder / LOGGED
    if not path.is_file():
        return {"spec_hash": spec_hash, "logs": {}}
    found: _Logged = read_json(path, _Logged, "what --log writes; remove it, and all rows are logged again")
    if found["spec_hash"] != spec_hash:
        raise UserError(f"{named('log_dir')} {shown(folder)} holds the logs of another run: choose another folder")
    return found


class RunLogs:
    """The logs of one run, each opened with the first row that it has not been given. One that fails is said, and ends;
    the others go on.

    Args:
        logging: which, and where.
        folder: of these logs.
        name: of the run, for a reader.
        config: its settings, with its "spec_hash".

    Raises:
        UserError: the folder has the logs of another run.
    """

    def __init__(self, logging: Logging, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        self._arguments = _Arguments(folder, name, config)
        self._logged = _logged(folder, str(config["spec_hash"]))
        self._going: list[str] = list(dict.fromkeys(logging.log))
        self._opened: dict[str, Log] = {}

    def add(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log those rows of a table that have not been.

        Args:
            table: a key of COUNTED_BY.
        """
        count, any_new = COUNTED_BY[table], False
        for kind in tuple(self._going):
            known = self._logged["logs"].setdefault(kind, {})
            new = [row for row in rows if row[count] > known.get(table, -1)]
            if not new:
                continue
            any_new = True
            with self._ending(kind):
                if kind not in self._opened:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self._opened[kind] = self._open(kind, known)
                for row in new:
                    self._opened[kind].row(row["step"], _numbers(table, row))
                    known[table] = row[count]
        if any_new and self._folder.is_dir():
            with replacing(self._folder / LOGGED) as unfinished:
                unfinished.write_text(json.dumps(self._logged))

    def _open(self, kind: str, known: dict[str, Any]) -> Log:
        if kind == "tensorboard":
            return _tensorboard(self._folder, self._arguments, known.get("steps", 0) + 1 if known else 0)
        if kind == "wandb":
            return _wandb(self._folder, self._arguments, str(self._config["spec_hash"]))
        return _mlflow(self._folder, self._arguments, known) if kind == "mlflow" else _JsonLines(self._folder / JSONL)

    @contextmanager
    def _ending(self, kind: str) -> Iterator[None]:
        """Within the context a log that fails ends, and that is said."""
        try:
            yield
        except Exception as error:
            self._going.remove(kind)
            if (log := self._opened.pop(kind, None)) is not None:
                with suppress(Exception):
                    log.close()
            _say(f"nothing more is logged to {kind}", error)

    def close(self) -> None:
        for kind, log in list(self._opened.items()):
            del self._opened[kind]
            with self._ending(kind):
                log.close()


def _numbers(table: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, by the names that transformers' callbacks take apart."""
    of_evaluation = "eval_" if table == "epochs" else ""
    numbers = {
        of_evaluation + name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in ("step", "epoch")
    }
    return numbers | {"epoch": float(row["epoch"])}


def _say(what: str, error: Exception) -> None:
    print(f"mrd-bench: {what} ({first_line(error)}); the same command logs the rest", file=sys.stderr)


@contextmanager
def run_logged(logging: Logging, out: Path, name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Within the context the tables of a run are logged as they grow, by a thread of its own: all that MLflow keeps of
    a run belongs to one thread. A log that fails is said, and the run goes on. Of a finished run what has not been
    logged is.

    Args:
        out: the folder of the run.

    Raises:
        UserError: where the logs go there are those of another run.
    """
    if not logging.log:
        yield
        return
    logs = RunLogs(logging, logging.folder(out), name, config)
    done = threading.Event()

    def follow() -> None:
        for table in COUNTED_BY:
            path = out / f"{table}.parquet"
            if path.is_file() or (path.is_dir() and any(path.glob("part-*"))):
                logs.add(table, pq.read_table(path).to_pylist())

    def work() -> None:
        try:
            try:
                while not done.wait(FOLLOW_S):
                    follow()
                follow()
            finally:
                logs.close()
        except Exception as error:
            _say("nothing more is logged", error)

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
        if not self._logging.log or not result.get("epochs"):
            return
        *epochs, last = result["epochs"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                logs = RunLogs(self._logging, folder, name, {**result["spec"], "status": result["status"]})
                try:
                    logs.add("epochs", [*epochs, {**last, **result.get("values", {})}])
                finally:
                    logs.close()
        except Exception as error:
            _say(f"{name}: nothing is logged", error)
