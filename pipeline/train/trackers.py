"""A training's run in MLflow and at W&B while it goes on: one run a record, named by its id, its curves under `log/`.

It is a window, and `aletheia exp export` takes the whole record there afterwards: in MLflow in place of the live run,
which it knows by the tag `live`. What both must agree on, where a record's run is and how it is named, is here.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline import config
from pipeline.errors import UserError
from pipeline.records.capture import redact
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Facts
from pipeline.stage import flat

MLFLOW_STATUS = {"complete": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "dead": "KILLED"}
MLFLOW_ENVIRONMENT = {  # what the client reads, and nothing else sets
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default asks a server that is not there for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; the default is 120
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password in it
}
MLFLOW_MAX_PARAM = 6000  # characters
NOT_IN_MLFLOW_NAMES = re.compile(r"[^\w\-./: ]")


@dataclass(frozen=True)
class Line:
    """The numbers of a line of the log, by dotted name."""

    at: float  # seconds since the epoch
    step: int
    validates: bool
    numbers: dict[str, float]

    @property
    def place(self) -> tuple[int, bool]:
        """In the log a step's own line comes before its validation's."""
        return self.step, self.validates


class Tracker(Protocol):
    """Used from one thread, but for `load`, which imports. Anything may raise."""

    name: ClassVar[str]
    key: ClassVar[str]  # in the profile, and of its file in the record's folder

    def load(self) -> None: ...

    def open(self) -> bool:
        """Whether the run was there before, and keeps what was sent to it. Called again where it raised."""

    def send(self, lines: Sequence[Line]) -> None: ...

    def close(self, status: str) -> None:
        """`status`: complete, failed or cancelled."""

    def where(self) -> dict[str, Any] | None:
        """For the record's `external`; None before it was opened."""


def trackers(settings: config.Telemetry, record: Record) -> list[Tracker]:
    found: list[Tracker] = []
    if settings.mlflow:
        found.append(Mlflow(settings.mlflow, record))
    if settings.wandb and os.environ.get("WANDB_MODE") != "disabled":
        found.append(Wandb(settings.wandb, record))
    return found


class Mlflow:
    """Experiment: the profile."""

    name: ClassVar[str] = "MLflow"
    key: ClassVar[str] = "mlflow"

    def __init__(self, uri: str, record: Record) -> None:
        self.given, self.record = uri, record
        self._client: Any = None
        self._run: str | None = None

    def load(self) -> None:
        workspace = self.record.workspace
        self.uri, self._artifacts = mlflow_store(
            self.given, workspace.root, workspace.experiments / "mlflow-artifacts", where="telemetry.mlflow"
        )
        import_mlflow()

    def open(self) -> bool:
        self._client = self._client or mlflow_client(self.uri)  # which asks a database at once
        facts = self.record.facts
        experiment = mlflow_experiment(self._client, facts.profile, self._artifacts)
        there = [run for run in mlflow_runs(self._client, experiment, self.record.id, facts) if "live" in run.data.tags]
        if there:
            self._run = str(there[0].info.run_id)
            self._client.update_run(self._run, "RUNNING")
            return True
        tags = {"id": self.record.id, "started": fingerprint(facts), "stage": facts.stage, "profile": facts.profile}
        run = self._client.create_run(experiment, tags=tags | {"live": "true"}, run_name=self.record.id)
        self._run = str(run.info.run_id)
        self._client.log_batch(self._run, params=list(self._params()))
        return False

    def send(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(NOT_IN_MLFLOW_NAMES.sub("_", f"log/{name}"), value, int(line.at * 1000), line.step)
            for line in lines
            for name, value in line.numbers.items()
            if not math.isinf(value)  # MLflow would store the largest number there is
        ]
        self._client.log_batch(self._run, metrics=metrics)  # which it sends in as many requests as it takes

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, MLFLOW_STATUS[status])

    def where(self) -> dict[str, Any] | None:
        return {"uri": redact(self.uri), "run_id": self._run, "live": True} if self._run else None

    def _params(self) -> Any:
        from mlflow.entities import Param

        for name, value in flat(_configuration(self.record.facts)).items():
            if len(str(value)) <= MLFLOW_MAX_PARAM:
                yield Param(NOT_IN_MLFLOW_NAMES.sub("_", name), str(value))


class Wandb:
    """Group: the pipeline experiment; job type: the stage. `WANDB_MODE` and the other settings of the shell hold."""

    name: ClassVar[str] = "W&B"
    key: ClassVar[str] = "wandb"

    def __init__(self, project: str, record: Record) -> None:
        self.project, self.record = project, record
        made = hashlib.sha256(fingerprint(record.facts).encode()).hexdigest()[:8]
        self._id = f"{record.id}-{made}"  # one's own choice, so that a resume finds it again
        self._run: Any = None
        self._anew = False
        self._hooks = sys.exit, sys.excepthook

    def load(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._offline = wandb.setup().settings.mode in ("offline", "dryrun")

    def open(self) -> bool:
        """What an interrupted run left here and nobody has uploaded is written anew, from the log: once, in one run."""
        import wandb

        if not self._offline and not wandb.login(prompt=False):
            raise UserError("no API key", remedy="`wandb login`, or WANDB_MODE=offline")
        for folder in (self.record.folder / "wandb").glob(f"offline-run-*-{self._id}"):
            if not any(folder.glob("*.synced")):
                shutil.rmtree(folder)
                self._anew = True
        self._run = wandb.init(
            project=self.project,
            id=self._id,
            resume=None if self._offline else "allow",
            dir=self.record.folder,
            name=self.record.id,
            group=self.record.facts.lineage.parent or self.record.id,
            job_type=self.record.facts.stage,
            config=_configuration(self.record.facts),
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=30,
                finish_timeout=15,
                x_disable_stats=True,  # the lines have what the GPU does
                x_disable_meta=True,  # and the record the rest
                x_save_requirements=False,
            ),
        )
        return not self._anew

    def send(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._run.log({f"log/{name}": value for name, value in line.numbers.items()}, step=line.step)

    def close(self, status: str) -> None:
        """None of its hooks outlives it, nor its service's process."""
        import wandb

        self._run.finish(exit_code=0 if status == "complete" else 1)
        wandb.teardown()
        sys.exit, sys.excepthook = self._hooks

    def where(self) -> dict[str, Any] | None:
        if self._run is None:
            return None
        found = {"project": self.project, "run_id": self._id, "live": True}
        folder = Path(self._run.dir).parent
        return found | {"path": self.record.workspace.shown(folder)} if self._offline else found


def _configuration(facts: Facts) -> dict[str, Any]:
    """Without the password that a tracking URI may hold."""
    return dict(json.loads(redact(json.dumps(facts.configuration))))


def fingerprint(facts: Facts) -> str:
    """Tells a record from one of the same id that another checkout made."""
    first = facts.history[0] if facts.history else None
    return f"{first.at} {first.host or ''}".strip() if first else ""


def mlflow_store(uri: str, folder: Path, artifacts: Path, where: str) -> tuple[str, str | None]:
    """The tracking URI, a relative one from `folder`, and where a new experiment keeps its artifacts; None: the server knows."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        what = f"{redact(uri)} is a folder, and MLflow keeps no runs in folders any more"
        raise UserError(what, where=where, remedy="sqlite:///PATH/mlflow.db, or a server's http://…")
    if scheme in ("http", "https", "databricks"):
        return uri, None
    if scheme != "sqlite":
        return uri, artifacts.as_uri()
    path, mark, options = rest.removeprefix("/").partition("?")
    if not path:
        raise UserError("names no file", where=f"{where} {uri}", remedy="sqlite:///PATH/mlflow.db")
    database = (folder / Path(path).expanduser()).resolve()
    return f"sqlite:///{database}{mark}{options}", (database.parent / f"{database.stem}-artifacts").as_uri()


def import_mlflow() -> Any:
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # a new database's tables, one by one
    return mlflow


def mlflow_client(uri: str) -> Any:
    return import_mlflow().MlflowClient(tracking_uri=uri)


def mlflow_experiment(client: Any, name: str, artifacts: str | None) -> str:
    there = client.get_experiment_by_name(name)
    if there is None:
        return str(client.create_experiment(name, artifact_location=artifacts))
    if there.lifecycle_stage != "active":
        raise UserError(
            f"MLflow's experiment `{name}` is deleted", remedy=f"mlflow experiments restore -x {there.experiment_id}"
        )
    return str(there.experiment_id)


def mlflow_runs(client: Any, experiment: str, record: str, facts: Facts) -> list[Any]:
    """This record's runs; not those of another checkout's record with the same id."""
    found = client.search_runs([experiment], filter_string=f"tags.id = '{record}'")
    return [run for run in found if run.data.tags.get("started") == fingerprint(facts)]
