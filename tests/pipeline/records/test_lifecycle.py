import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil
import pytest

from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record, StopRequest, liveness
from pipeline.records.schema import Facts, StatusChange
from pipeline.workspace import CHECKOUT, Workspace

Open = Callable[..., AbstractContextManager[Record]]
KEY, PASSWORD = "hf_" + "Ab1" * 8, "hunter" * 2
WORKER = """
import signal, sys
from pathlib import Path
from pipeline.config import Cost
from pipeline.errors import Interrupted
from pipeline.records.lifecycle import open_record
from pipeline.workspace import Workspace

try:
    with open_record(
        Workspace(Path(sys.argv[1])), stage="sft", profile="small", person={}, overrides={}, configuration={}, cost=Cost()
    ) as record:
        record.facts.results["loss"] = 1.5
        record.save()
        print(record.id, flush=True)
        while True:
            signal.pause()
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def read(record: Record | RecordFile) -> Facts:
    facts = (record.file if isinstance(record, Record) else record).facts()
    assert facts is not None
    return facts


@contextmanager
def worker(place: Workspace) -> Iterator[tuple["subprocess.Popen[str]", RecordFile]]:
    """Another process inside an open record."""
    command = [sys.executable, "-c", WORKER, str(place.root)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, RecordFile(place.experiments / f"{process.stdout.readline().strip()}.yaml")
        finally:
            process.kill()


def test_a_block_that_ends_is_complete(opened: Open) -> None:
    with opened() as record:
        assert read(record).status == "running"
        assert liveness(read(record)) == "running"
        record.facts.results["loss"] = 1.5
    facts = read(record)
    assert facts.status == liveness(facts) == "complete"
    assert facts.results == {"loss": 1.5}
    assert [change.status for change in facts.history] == ["running", "complete"]
    assert facts.failure is None
    assert facts.code["command"].startswith("aletheia")
    assert facts.environment["python"] and facts.resources["wall_seconds"] >= 0


def test_a_failed_record_keeps_message_step_rows_and_partial_results(opened: Open) -> None:
    with pytest.raises(StageFailed), opened() as record:
        record.facts.results["loss"] = 1.5
        raise StageFailed("loss is nan", step=7, rows=["a-1", "a-2"], remedy="a lower rate")
    facts = read(record)
    assert facts.status == "failed"
    assert facts.results == {"loss": 1.5}
    assert facts.failure is not None
    assert facts.failure.message == "loss is nan; try a lower rate"
    assert (facts.failure.kind, facts.failure.step, facts.failure.rows) == ("StageFailed", 7, ["a-1", "a-2"])
    assert facts.resources["wall_seconds"] >= 0


def test_an_unforeseen_error_is_kept_with_its_traceback_and_without_secrets(opened: Open, place: Workspace) -> None:
    with pytest.raises(ValueError, match="bad"), opened() as record:
        raise ValueError(f"bad {KEY} at https://me:{PASSWORD}@host")
    failure = read(record).failure
    assert failure is not None
    assert failure.message == "ValueError: bad [redacted] at https://[redacted]@host"
    assert failure.traceback == f"{record.id}/traceback.txt"
    text = (place.experiments / failure.traceback).read_text()
    assert "test_lifecycle.py" in text
    assert "ValueError: bad [redacted]" in text
    for secret in (KEY, PASSWORD):
        assert secret not in text
        assert secret not in record.file.path.read_text()


@pytest.mark.parametrize(
    "error", [UserError("too few rows"), MemoryError(), SystemExit(0), OSError(28, "No space left")]
)
def test_whatever_ends_the_block_early_is_not_complete(opened: Open, error: BaseException) -> None:
    with pytest.raises(type(error)), opened() as record:
        raise error
    assert read(record).status == "failed"


def test_ctrl_c_is_cancelled(opened: Open) -> None:
    with pytest.raises(Interrupted), opened() as record:
        raise KeyboardInterrupt
    assert (read(record).status, read(record).failure) == ("cancelled", None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_closes_the_record_as_cancelled(place: Workspace, number: signal.Signals) -> None:
    with worker(place) as (process, file):
        assert liveness(read(file)) == "running"
        process.send_signal(number)
        assert process.wait(timeout=30) == 130
    facts = read(file)
    assert facts.status == "cancelled"
    assert facts.results == {"loss": 1.5}
    assert facts.history[-1].note == f"interrupted by {number.name}"
    assert facts.resources["wall_seconds"] > 0


def test_a_killed_run_reads_as_dead_and_keeps_what_it_had(place: Workspace) -> None:
    with worker(place) as (process, file):
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert liveness(read(file)) == "dead"
        process.wait()
        assert liveness(read(file)) == "dead"
    assert read(file).status == "running"
    assert read(file).results == {"loss": 1.5}


def test_a_reused_pid_is_not_the_run_and_another_machine_is_not_judged(opened: Open) -> None:
    with opened() as record:
        change = read(record).history[-1]

        def running(**changes: object) -> Facts:
            history: list[StatusChange] = [change.model_copy(update=changes)]
            return Facts(status="running", stage="sft", profile="small", history=history)

        assert change.started is not None
        assert liveness(running()) == "running"
        assert liveness(running(started=change.started - 60)) == "dead"
        assert liveness(running(host="elsewhere")) == "running on elsewhere"


def test_a_resume_takes_the_same_record_back_to_running(opened: Open) -> None:
    with pytest.raises(StageFailed), opened() as first:
        first.facts.results["loss"] = 1.5
        raise StageFailed("no", step=1)
    first.file.path.write_bytes(b"# my note\n" + first.file.path.read_bytes())
    with opened(resume=first.file) as second:
        assert second.id == first.id
        assert read(second).status == "running"
        assert read(second).failure is None
    after = read(second)
    assert [(c.status, c.note) for c in after.history] == [
        ("running", None),
        ("failed", None),
        ("running", "resumed"),
        ("complete", None),
    ]
    assert after.results == {"loss": 1.5}
    assert first.file.path.read_bytes().startswith(b"# my note\n")


def test_the_resources_of_a_resumed_run_are_those_of_all_its_parts(opened: Open) -> None:
    with pytest.raises(StageFailed), opened() as first:
        raise StageFailed("no")
    facts = read(first)
    facts.resources |= {"wall_seconds": 3600.0, "cpu_seconds": 7200.0, "peak_memory_gb": 512.0, "gpu_hours": 1.0}
    facts.resources |= {"energy": {"kwh": 2.0, "co2_kg": 1.0}, "cost": {"amount": 3.0, "currency": "USD"}}
    first.file.write(facts)  # as if it had run for an hour
    with opened(resume=first.file):
        pass
    now = read(first).resources
    assert 3600 <= now["wall_seconds"] < 3660
    assert 7200 <= now["cpu_seconds"] < 7260
    assert (now["peak_memory_gb"], now["gpu_hours"]) == (512.0, 1.0)
    assert (now["energy"]["kwh"], now["energy"]["co2_kg"], now["cost"]["amount"]) == (2.0, 1.0, 3.0)
    assert now["energy"]["how"]


@pytest.mark.parametrize(
    "text", ["the rate may be null", "a\u2028b\x85c", "one\ntwo null\n", "date: '2026-11-20'", "fix #12: é😀", " null"]
)
def test_what_a_person_said_stands_in_the_record_word_for_word(opened: Open, text: str) -> None:
    with opened(hypothesis=text, conclusion=None, overrides={"eval_config.limit": None}) as record:
        pass
    person = record.file.person()
    assert person["hypothesis"] == text
    assert person["conclusion"] is None
    assert person["overrides"] == {"eval_config.limit": None}
    assert "\nconclusion:\n" in record.file.path.read_text("utf-8")


def test_a_new_record_opens_with_its_id_and_date(opened: Open) -> None:
    with opened() as record:
        top = record.file.path.read_text("utf-8").splitlines()[:3]
    assert top == [
        "# Yours. The pipeline never touches what stands above the line.",
        f"experiment_id: {record.id}",
        f"date: {record.id[4:14]}",
    ]


def test_the_first_signal_asks_and_the_second_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    with stop.listening(), pytest.raises(Interrupted, match="interrupted by SIGTERM"), stop.deferred("saving"):
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        assert capsys.readouterr().err == "\nSIGTERM: saving; once more to stop at once\n"
        signal.raise_signal(signal.SIGTERM)


def test_outside_of_deferred_a_signal_stops_at_once() -> None:
    stop = StopRequest()
    with stop.listening():
        with stop.deferred():
            pass
        with pytest.raises(Interrupted, match="interrupted by SIGHUP"):
            signal.raise_signal(signal.SIGHUP)


def test_the_handlers_of_before_are_put_back(opened: Open) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with opened():
        assert [signal.getsignal(number) for number in numbers] != before
    with pytest.raises(ZeroDivisionError), opened():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before
