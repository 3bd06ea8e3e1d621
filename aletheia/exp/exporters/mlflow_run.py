"""A record as an MLflow run, through MLflow's own client; a pipeline's record with its stages as nested runs.

    aletheia exp export EXP-2026-11-21-003 --to mlflow --uri sqlite:///mlflow.db

The experiment is the profile, the run's name the record's id. Parameters: configuration and data. Metrics: every figure,
the ends of its interval as `….ci_low` and `….ci_high`, and under `log/` the curves by step; the log has no clock, so a
curve's points carry the time at which the run ended. Artifacts: the record itself, its log, its pictures. A record that
is there already is refused; with --force the earlier run is marked deleted, once the new one stands. So is, without
asking, the one that a training wrote while it ran (`pipeline.train.trackers`).
"""

import json
import math
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aletheia.exp.exporters.record import Finished, attachments, curves, figures, finished, texts, with_children
from aletheia.exp.reading import flat
from pipeline.errors import AletheiaError, UserError
from pipeline.progress import say
from pipeline.records.capture import redact
from pipeline.train.trackers import (
    MLFLOW_MAX_PARAM,
    MLFLOW_STATUS,
    NOT_IN_MLFLOW_NAMES,
    fingerprint,
    mlflow_client,
    mlflow_experiment,
    mlflow_runs,
    mlflow_store,
)
from pipeline.workspace import Workspace

MAX_NAME, MAX_TAG = 250, 8000  # MLflow's limits, in characters; it cuts what is longer


def export_mlflow(workspace: Workspace, exp: str, uri: str | None, force: bool) -> str:
    """URI, without credentials, and run id. Raises `UserError`."""
    family = with_children(finished(workspace, exp))
    default, artifacts = f"sqlite:///{workspace.experiments}/mlflow.db", workspace.experiments / "mlflow-artifacts"
    uri, folder = mlflow_store(uri or default, Path.cwd(), artifacts, where="--uri")
    with _in_one_line(uri):
        client = mlflow_client(uri)
        experiment = mlflow_experiment(client, family[0].facts.profile, folder)
        earlier = [run for record in family for run in _runs(client, experiment, record)]
        exported = [run.data.tags["id"] for run in earlier if "live" not in run.data.tags]
        if exported and not force:
            names = ", ".join(dict.fromkeys(exported))
            raise UserError(f"{names} is there already", where=redact(uri), remedy="--force")
        runs: dict[str, str] = {}
        try:
            parent = _parent(client, experiment, family[0])
            for record in family:
                runs[record.id] = _create(client, experiment, record, parent)
                _fill(client, runs[record.id], record)
                parent = runs[family[0].id]
        except BaseException:  # half an export would be taken for the whole
            for run in runs.values():
                with suppress(Exception):  # the store that failed may fail again; what failed first is what is told
                    client.delete_run(run)
            raise
        for run in earlier:
            client.delete_run(run.info.run_id)
            kind = "live" if "live" in run.data.tags else "earlier"
            say(f"the {kind} run {run.info.run_id} of {run.data.tags['id']} is marked deleted")
    for record in family:
        record.note_external("mlflow", {"uri": redact(uri), "run_id": runs[record.id]})
    return f"{redact(uri)} {runs[family[0].id]}"


@contextmanager
def _in_one_line(uri: str) -> Iterator[None]:
    try:
        yield
    except AletheiaError:
        raise
    except Exception as error:  # whatever its HTTP library, SQLAlchemy or a database's driver raises
        lines = redact(str(error)).splitlines() or [""]
        raise UserError(f"{type(error).__name__}: {lines[0]}", where=redact(uri)) from error


def _runs(client: Any, experiment: str, record: Finished) -> list[Any]:
    return mlflow_runs(client, experiment, record.id, record.facts)


def _parent(client: Any, experiment: str, record: Finished) -> str | None:
    """The run of the pipeline that the record is a part of, where that was exported."""
    pipeline = record.facts.lineage.parent
    if pipeline is None:
        return None
    try:
        runs = _runs(client, experiment, finished(record.workspace, pipeline))
    except UserError:  # it runs, or is gone
        return None
    return str(runs[0].info.run_id) if runs else None


def _create(client: Any, experiment: str, record: Finished, parent: str | None) -> str:
    tags = {key: _fitting(text, MAX_TAG, key, record) for key, text in _tags(record, parent)}
    started = _milliseconds(record.started)
    return str(client.create_run(experiment, start_time=started, tags=tags, run_name=record.id).info.run_id)


def _tags(record: Finished, parent: str | None) -> Iterator[tuple[str, str]]:
    facts, person = record.facts, record.person
    yield "id", record.id
    yield "started", fingerprint(facts)
    yield "status", record.status
    yield "stage", facts.stage
    yield "profile", facts.profile
    yield "commit", str(facts.code.get("commit"))
    yield "dirty", json.dumps(facts.code.get("dirty"), default=str)
    yield "parents", ", ".join([*filter(None, [facts.lineage.parent]), *(taken.id for taken in facts.lineage.inputs)])
    for key in ("hypothesis", "tags"):
        if written := texts(person.get(key)):
            yield key, ", ".join(written)
    if facts.verdict:
        yield "verdict", facts.verdict.finding or "not evaluated"
        judged = [f"{one.criterion}: {one.finding} ({one.observed})" for one in facts.verdict.judged]
        yield "criteria", "\n".join(judged or [one.criterion for one in facts.verdict.criteria])
    if facts.overrides:
        yield "overrides", _text(facts.overrides)
    if facts.failure:
        yield "failure", facts.failure.message
    if parent:
        yield "mlflow.parentRunId", parent
    if isinstance(facts.code.get("command"), str):
        yield "mlflow.source.name", facts.code["command"]
    if isinstance(facts.code.get("commit"), str):
        yield "mlflow.source.git.commit", facts.code["commit"]
    if described := texts(person.get("description")):
        yield "mlflow.note.content", "\n".join(described)  # what MLflow shows as the run's description


def _fill(client: Any, run: str, record: Finished) -> None:
    from mlflow.entities import Metric, Param

    facts = record.facts
    settings = dict(flat(facts.configuration)) | dict(flat(facts.data, "data."))
    names = _names(settings, record)
    params = [Param(names[k], _fitting(_text(v), MLFLOW_MAX_PARAM, k, record)) for k, v in settings.items()]
    at = _milliseconds(record.ended or record.started) or 0
    found = figures(facts.results) | {f"resources.{k}": v for k, v in figures(facts.resources).items()}
    points = [(name, value, 0) for name, value in found.items()]
    for step, values in curves(record).items():
        points += [(f"log/{name}", value, step) for name, value in values.items()]
    infinite = [name for name, value, _ in points if math.isinf(value)]
    if infinite:  # MLflow would store the largest number there is
        say(
            f"note: {len(infinite)} infinite values ({', '.join(sorted(set(infinite)))}) are in the artifact log.jsonl only"
        )
    names = _names((name for name, _, _ in points), record)
    metrics = [Metric(names[name], value, at, step) for name, value, step in points if not math.isinf(value)]
    client.log_batch(run, metrics=metrics, params=params)  # which it sends in as many requests as it takes

    for path, folder in attachments(record):
        client.log_artifact(run, str(path), folder or None)
    status, ended = MLFLOW_STATUS[record.status], _milliseconds(record.ended)
    if ended is None:
        client.update_run(run, status)  # without inventing an end
    else:
        client.set_terminated(run, status, ended)


def _names(wanted: Iterable[str], record: Finished) -> dict[str, str]:
    """MLflow's name for each of ours: letters, digits and `_-./: `, at most 250, in the form of a relative path."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(wanted):
        plain = NOT_IN_MLFLOW_NAMES.sub("_", name)
        if posixpath.normpath(plain) != plain or plain.startswith(("/", ".")):
            plain = f"_{plain.replace('/', '_')}"
        plain, number = plain[:MAX_NAME], 1
        stem = plain[: MAX_NAME - 8]
        while plain in taken:
            number += 1
            plain = f"{stem}_{number}"
        taken.add(plain)
        names[name] = plain
    changed = [f"{name} → {plain}" for name, plain in names.items() if name != plain]
    if changed:
        say(f"note: {record.id}: MLflow does not take these names: {', '.join(changed)}")
    return names


def _fitting(text: str, limit: int, name: str, record: Finished) -> str:
    """The text where it fits, else where it stands whole."""
    if len(text) <= limit:
        return text
    say(
        f"note: {record.id}: {name} is longer than MLflow's {limit} characters; it stands in the artifact {record.file.path.name}"
    )
    return f"{len(text)} characters, more than MLflow keeps: see the artifact {record.file.path.name}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _milliseconds(moment: Any) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)
