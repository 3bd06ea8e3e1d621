"""The one place that opens and closes a record; every stage runs inside it.

    with open_record(job, stage="sft", inputs=[…], configuration={…}) as record:
        record.facts.results["eval_loss"] = …

The person's success criteria are frozen as it opens and judged when it is complete. Whatever ends the block, the
record says so: complete, failed (with what, step, rows) or cancelled. A process that is killed outright leaves
`running`; `liveness` tells that it is dead, and `close_dead` closes it.
"""

import fcntl
import json
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline import yamlio
from pipeline.errors import AletheiaError, Interrupted, StageFailed, UserError
from pipeline.progress import say
from pipeline.records import capture, criteria, ids
from pipeline.records.file import RecordFile
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Criterion, Facts, Failure, Input, Lineage, Status, StatusChange, Verdict
from pipeline.workspace import Workspace

ENDED_EARLY = ("failed", "cancelled", "dead")  # what may be taken up again


class Record:
    """An open record: the typed facts, its file, its folder and whether someone asked to stop."""

    def __init__(self, file: RecordFile, facts: Facts, workspace: Workspace, stop: "StopRequest") -> None:
        self.file, self.facts, self.workspace, self.stop = file, facts, workspace, stop
        self.id = file.id
        self.of_stages: dict[str, dict[str, Any]] = {}  # a pipeline experiment: the results of its stages, by name
        self.links: dict[str, Path] = {}
        self.when_complete: list[Callable[[], None]] = []  # what wants the whole record, its cost among it
        file.folder.mkdir(exist_ok=True)

    @property
    def folder(self) -> Path:
        """`experiments/EXP-…/`: logs, rejects, samples."""
        return self.file.folder

    @property
    def output(self) -> Path:
        """`checkpoints/EXP-…/`: what the stage makes."""
        path = self.workspace.checkpoints / self.id
        path.mkdir(parents=True, exist_ok=True)
        return path

    def link(self, name: str, target: Path) -> str:
        """`checkpoints/<name>`, which points at `target` once the record is complete: nobody takes what is not."""
        self.links[name] = target
        return self.workspace.shown(self.workspace.checkpoints / name)

    def save(self) -> None:
        self.file.write(self.facts)

    def judge(self) -> None:
        """The verdict on the criteria frozen at the start; what was changed above the line since then is only shown."""
        frozen = self.facts.verdict
        try:
            now = criteria.read(self.file.person().get("success_criteria"))
            changed = criteria.changes(frozen.criteria if frozen else [], now)
        except UserError as error:
            changed = [f"could not be compared: {error}"] if frozen else []
        if frozen or changed:
            frozen = frozen or Verdict(frozen_at=self.facts.history[0].at)
            self.facts.verdict = criteria.judge(frozen, self.facts.results | self.of_stages)
            self.facts.verdict.changed_after_start = changed

    def guard(self, text: str) -> None:
        """A guardrail that the profile asks for, beside the person's criteria: frozen at the start, as the profile is."""
        verdict = self.facts.verdict or Verdict(frozen_at=self.facts.history[0].at)
        others = [criterion for criterion in verdict.of_profile if criterion.criterion != text]
        guards = [*others, Criterion(criterion=text, role="guardrail")]
        self.facts.verdict = verdict.model_copy(update={"of_profile": guards})

    def change_status(self, status: Status, note: str | None = None) -> None:
        self.facts.status = status
        self.facts.history.append(_status_change(status, note))
        self.save()


class StopRequest:
    """Ctrl-C, SIGTERM and SIGHUP. Inside `deferred()` the first one only sets `requested`; otherwise it raises."""

    def __init__(self, deferring: bool = False) -> None:
        """`deferring`: from the start, until `heed`."""
        self.requested: str | None = None
        self._deferring: str | None = "" if deferring else None

    def heed(self) -> None:
        """Ends what was deferred from the start. Raises `Interrupted` when a signal came meanwhile."""
        self._deferring = None
        if self.requested:
            raise Interrupted(f"interrupted by {self.requested}")

    @contextmanager
    def deferred(self, meanwhile: str = "") -> Iterator[None]:
        """`meanwhile` tells what goes on after the first signal, and what the second does."""
        self._deferring = meanwhile
        try:
            yield
        finally:
            self._deferring = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self._deferring is not None and self.requested is None:
            self.requested = name
            if self._deferring:
                say(f"\n{name}: {self._deferring}; once more to stop at once")
            return
        self.requested = name
        raise Interrupted(f"interrupted by {name}")


@contextmanager
def open_record(
    workspace: Workspace,
    *,
    stage: str,
    profile: str,
    person: dict[str, Any],
    overrides: dict[str, Any],
    configuration: dict[str, Any],
    cost: Any,
    inputs: list[Input] | None = None,
    parent: str | None = None,
    file: RecordFile | None = None,
    ranks: int = 1,
) -> Iterator[Record]:
    """Opens a new record, fills in a planned `file` or takes one back to running, and closes it whatever happens.

    Raises `UserError` for a `file` that is running or complete.
    """
    lineage = Lineage(parent=parent, inputs=inputs or [])
    fresh = Facts(
        status="running",
        stage=stage,
        profile=profile,
        lineage=lineage,
        overrides=overrides,
        configuration=configuration,
    )
    stop = StopRequest(deferring=True)  # a signal before the record can say so waits until it can
    with stop.listening():
        file = file or RecordFile(ids.allocate(workspace, lambda name, date: upper_half(name, date, person)))
        with _held(file, workspace):
            earlier = file.facts()
            check_may_run(workspace, file, earlier)
            if earlier is None:
                fresh.verdict = _freeze(file, workspace)
            record = Record(file, earlier or fresh, workspace, stop)
            with _closing(record):
                stop.heed()
                meter = capture.Meter(cost, ranks)
                record.facts.failure = None
                code, known = capture.code(record.folder), earlier.code if earlier else {}
                if known | code != known:  # a run that is taken up often, by the same code, names it once
                    record.facts.code = code | ({"before_resume": known} if known else {})
                record.change_status("running", "resumed" if earlier else None)
                say(f"{stage}  {workspace.shown(file.path)}")
                try:
                    yield record
                finally:
                    record.facts.environment = capture.environment()
                    record.facts.resources = _add_up(earlier.resources if earlier else None, meter.read())
                record.judge()
                record.change_status("complete")
            _say_verdict(record.facts.verdict)


@contextmanager
def _held(file: RecordFile, workspace: Workspace) -> Iterator[None]:
    """Locks the record's folder: of two that start one plan at once, one runs it. A process that is gone holds none."""
    file.folder.mkdir(exist_ok=True)
    handle = os.open(file.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("is running", where=workspace.shown(file.path), remedy="waiting for it to end") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def _closing(record: Record) -> Iterator[None]:
    """Whatever ends the block early, the record says so."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        try:
            record.facts.failure = None if stopped else _failure(error, record.folder)
            record.change_status(
                "cancelled" if stopped else "failed", (str(error) or "interrupted") if stopped else None
            )
        except Exception as second:  # a full disk: what went wrong first is still what is told
            why = getattr(second, "strerror", None) or f"{type(second).__name__}: {second}"
            say(f"note: {record.file.path} could not be closed ({why}) and will read as dead")
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("interrupted") from None
        raise


def check_may_run(workspace: Workspace, file: RecordFile, facts: Facts | None) -> None:
    """A plan may, and what ended early. Raises `UserError`."""
    if facts is not None and (state := liveness(facts)) not in ENDED_EARLY:
        remedy = "aletheia exp plan" if state == "complete" else "waiting for it to end"
        raise UserError(f"is {state}: a record is run once", where=workspace.shown(file.path), remedy=remedy)


def close_dead(file: RecordFile, workspace: Workspace) -> Facts:
    """Closes a run whose process is gone as failed, with the last step that its log knows; its results stay.

    Raises `UserError` for one that is not dead, or is being taken up again.
    """
    with _held(file, workspace):
        facts = file.facts()
        if facts is None or (state := liveness(facts)) != "dead":
            raise UserError(f"is {state if facts else 'planned'}", where=workspace.shown(file.path))
        last = facts.history[-1]
        step = _last_step(file.folder / "log.jsonl")
        what = f"its process ({last.pid} on {last.host}) was gone: killed, or the machine went down"
        facts.failure = Failure(kind="ProcessGone", message=what, step=step)
        facts.status = "failed"
        facts.history.append(_status_change("failed", "closed by exp repair"))
        file.write(facts)
        return facts


def liveness(facts: Facts) -> str:
    """The status as it truly is: `dead` for a run whose process is gone."""
    if facts.status != "running" or not facts.history:
        return facts.status
    last = facts.history[-1]
    if last.host != socket.gethostname():
        return f"running on {last.host}"
    try:
        process = psutil.Process(last.pid) if last.pid is not None else None
        alive = process is not None and abs(process.create_time() - (last.started or 0)) < 2
        if process is not None and process.status() == psutil.STATUS_ZOMBIE:  # ended, and nobody has asked how
            alive = False
    except (psutil.NoSuchProcess, ValueError):  # gone, or a number that no process has
        alive = False
    return "running" if alive else "dead"


def upper_half(experiment_id: str, date: str, person: dict[str, Any]) -> bytes:
    top = {"experiment_id": experiment_id, "date": datetime.fromisoformat(date).date(), **person}
    text = "".join(f"{key}:\n" if value is None else yamlio.dump({key: value}) for key, value in top.items())
    return f"# Yours. The pipeline never touches what stands above the line.\n{text}\n".encode()


def _freeze(file: RecordFile, workspace: Workspace) -> Verdict | None:
    frozen = criteria.read(file.person().get("success_criteria"), workspace.shown(file.path))
    return Verdict(frozen_at=_now(), criteria=frozen) if frozen else None


def _say_verdict(verdict: Verdict | None) -> None:
    if verdict is None:
        return
    say(f"verdict: {verdict.finding}")
    for judged in verdict.judged:
        say(f"  {judged.finding}: {judged.criterion}  (observed {judged.observed}; {judged.why})")
    for change in verdict.changed_after_start:
        say(f"  changed after the start, and not used: {change}")


def _last_step(log: Path) -> int | None:
    try:
        lines = log.read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):  # the last line may be torn
            return int(json.loads(line)["step"])
    return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _status_change(status: Status, note: str | None) -> StatusChange:
    now = _now()
    process = psutil.Process()
    if status != "running":
        return StatusChange(status=status, at=now, note=note)
    started = round(process.create_time(), 2)
    return StatusChange(status=status, at=now, note=note, host=socket.gethostname(), pid=process.pid, started=started)


def _failure(error: BaseException, folder: Path) -> Failure:
    told = capture.redact("".join(traceback.format_exception(error)))
    (folder / "traceback.txt").write_text(told, "utf-8", "backslashreplace")  # a file's name may be no text
    message = str(error) if isinstance(error, AletheiaError) else f"{type(error).__name__}: {error}"
    failure = Failure(
        kind=type(error).__name__, message=capture.redact(message), traceback=f"{folder.name}/traceback.txt"
    )
    if isinstance(error, StageFailed):
        failure.step, failure.rows = error.step, error.rows
    return failure


def _add_up(earlier: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The resources of a resumed run are those of all its parts; the peak is the highest."""
    total = dict(now)
    if earlier is not None and not earlier:
        total["note"] = "without the part of the run that was killed, which could not be measured"
    earlier = earlier or {}
    for key in ("wall_seconds", "cpu_seconds", "gpu_hours"):
        total[key] = round(_amount(earlier, key) + now.get(key, 0), 4)
    for key in ("peak_memory_gb", "gpu_peak_memory_gb"):
        if key in now:
            total[key] = max(_amount(earlier, key), now[key])
    for block, keys in (("energy", ("kwh", "co2_kg")), ("cost", ("amount",))):
        total[block] = now[block] | {
            key: float(f"{_amount(earlier.get(block), key) + now[block][key]:.3g}") for key in keys
        }
    before = earlier.get("cost")
    if isinstance(before, dict) and before.get("currency", now["cost"]["currency"]) != now["cost"]["currency"]:
        total["cost"] = now["cost"] | {"before_resume": before}  # two currencies do not add up
    return total


def _amount(block: Any, key: str) -> float:
    """0 where an older or damaged record has no number."""
    known = as_metric(block.get(key)) if isinstance(block, dict) else None
    return known.value if known else 0.0
