import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.records import capture, ids
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record, StopRequest, close_dead, liveness
from pipeline.records.schema import Facts, StatusChange
from pipeline.workspace import CHECKOUT, Workspace

Open = Callable[..., AbstractContextManager[Record]]
KEY, PASSWORD = "hf_" + "Ab1" * 8, "hunter" * 2
WORKER = r"""
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
        (record.folder / "log.jsonl").write_text('{"step": 6}\n{"step": 7, "loss": 1.5}\n{"step": 8, "lo')
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_the_record_is_opened_closes_it_as_cancelled(
    place: Workspace, opened: Open, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = ids.allocate

    def signalled(*given: Any) -> Path:
        path = allocate(*given)
        signal.raise_signal(number)  # the file is there, and nothing stands below its line yet
        return path

    monkeypatch.setattr(ids, "allocate", signalled)
    with pytest.raises(Interrupted, match=number.name), opened():
        raise AssertionError("the block must not begin")
    (path,) = ids.newest_first(place)
    assert read(RecordFile(path)).status == "cancelled"


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


def test_a_killed_run_is_closed_truthfully_with_the_last_step_of_its_log(place: Workspace) -> None:
    with worker(place) as (process, file):
        process.kill()
        process.wait()
    close_dead(file, place)
    closed = read(file)
    assert (closed.status, closed.results) == ("failed", {"loss": 1.5})
    assert closed.failure is not None
    assert (closed.failure.kind, closed.failure.step) == ("ProcessGone", 7)  # the line of step 8 is torn
    assert closed.failure.message.startswith(f"its process ({process.pid} on ")
    assert [(change.status, change.note) for change in closed.history] == [
        ("running", None),
        ("failed", "closed by exp repair"),
    ]
    assert liveness(closed) == "failed"


@pytest.mark.parametrize(
    ("log", "step"),
    [
        (b"", None),
        (b"\xff\xfe\x00", None),
        (b'{"step": 3}\n{"step": 4, "note": "\xe9"}\n', 3),
        (b'{"step": 3}\n{"step": 1e999}\n{"step": null}\n[1]\n"x"\n' + b"[" * 100_000, 3),
        (b'{"loss": 1}\n', None),
    ],
)
def test_a_broken_log_hinders_no_closing(
    kept: Callable[..., RecordFile], place: Workspace, log: bytes, step: int | None
) -> None:
    history = [StatusChange(status="running", at="then", host=socket.gethostname(), pid=1)]
    file = kept(1, status="running", history=history)
    (file.folder / "log.jsonl").write_bytes(log)
    close_dead(file, place)
    failure = read(file).failure
    assert failure is not None
    assert failure.step == step


def test_what_is_not_dead_is_not_closed(opened: Open, place: Workspace, kept: Callable[..., RecordFile]) -> None:
    with opened() as record:
        for file in (record.file, kept(9)):
            before = file.path.read_bytes()
            with pytest.raises(UserError, match=r"is (running|complete)\b"):
                close_dead(file, place)
            assert file.path.read_bytes() == before


def test_a_name_that_is_not_utf8_hides_no_error(opened: Open) -> None:
    with pytest.raises(StageFailed, match="gone"), opened() as record:
        record.facts.results["path"] = "\udcfe"
        raise StageFailed("\udcff.jsonl is gone", rows=["\udcff"])
    facts = read(record)
    assert facts.status == "failed"
    assert facts.failure is not None
    assert (facts.failure.message, facts.failure.rows) == ("\\udcff.jsonl is gone", ["\\udcff"])
    assert facts.results == {"path": "\\udcfe"}
    assert "\\udcff.jsonl is gone" in (record.folder / "traceback.txt").read_text()


def test_an_error_while_closing_hides_not_the_first(
    opened: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageFailed, match="the first"), opened():
        monkeypatch.setattr(capture, "redact", lambda text: str(1 // 0))
        raise StageFailed("the first")
    assert "could not be closed (ZeroDivisionError: " in capsys.readouterr().err


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
    with opened(file=first.file) as second:
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
    with opened(file=first.file):
        pass
    now = read(first).resources
    assert 3600 <= now["wall_seconds"] < 3660
    assert 7200 <= now["cpu_seconds"] < 7260
    assert (now["peak_memory_gb"], now["gpu_hours"]) == (512.0, 1.0)
    assert (now["energy"]["kwh"], now["energy"]["co2_kg"], now["cost"]["amount"]) == (2.0, 1.0, 3.0)
    assert now["energy"]["how"]


def test_amounts_in_two_currencies_are_not_added_up(opened: Open) -> None:
    with pytest.raises(StageFailed), opened() as first:
        raise StageFailed("no")
    facts = read(first)
    facts.resources["cost"] = {"amount": 3.0, "currency": "EUR"}
    first.file.write(facts)
    with opened(file=first.file):
        pass
    cost = read(first).resources["cost"]
    assert cost == {"amount": 0.0, "currency": "USD", "before_resume": {"amount": 3.0, "currency": "EUR"}}


@pytest.mark.parametrize("resources", [{"wall_seconds": "long", "energy": 5, "cost": {"amount": None}}, {"energy": {}}])
def test_a_resume_counts_what_a_damaged_record_still_knows(opened: Open, resources: dict[str, Any]) -> None:
    with pytest.raises(StageFailed), opened() as first:
        raise StageFailed("no")
    facts = read(first)
    facts.resources = resources
    first.file.write(facts)
    with opened(file=first.file):
        pass
    assert read(first).status == "complete"
    assert read(first).resources["wall_seconds"] < 60


def test_a_run_that_is_taken_up_often_names_its_code_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    file = None
    for commit in ("a", "a", "b", "b", "b"):
        monkeypatch.setattr(capture, "code", lambda folder, commit=commit: {"commit": commit, "dirty": False})
        with pytest.raises(StageFailed), opened(file=file) as record:
            raise StageFailed("no")
        file = record.file
    assert read(record).code == {"commit": "b", "dirty": False, "before_resume": {"commit": "a", "dirty": False}}


def test_a_record_is_run_by_one_process_at_a_time(opened: Open, kept: Callable[..., RecordFile]) -> None:
    with opened() as record:
        before = record.file.path.read_bytes()
        with pytest.raises(UserError, match=r"-001\.yaml: is running"), opened(file=record.file):
            pass
        assert record.file.path.read_bytes() == before
    with pytest.raises(UserError, match="is complete: a record is run once"), opened(file=record.file):
        pass


def test_of_two_that_start_one_plan_at_once_one_runs_it(
    opened: Open, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before the first of them has written that it runs."""
    plan = RecordFile(place.experiments / "EXP-2026-11-20-001.yaml")
    plan.path.write_text("profile: small\n")
    refused = []

    def meanwhile(folder: Path) -> dict[str, Any]:
        assert plan.facts() is None
        with pytest.raises(UserError, match="is running"), opened(file=plan):
            pass
        refused.append(True)
        return {}

    monkeypatch.setattr(capture, "code", meanwhile)
    with opened(file=plan):
        pass
    assert refused
    assert [change.status for change in read(plan).history] == ["running", "complete"]


CRITERIA = ["loss < 2", {"criterion": "margin > 0", "role": "guardrail"}]


def test_criteria_are_frozen_at_the_start_and_judged_at_the_end(
    opened: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(success_criteria=CRITERIA) as record:
        frozen = read(record).verdict
        assert frozen is not None
        assert (frozen.finding, frozen.judged) == (None, [])
        assert [one.criterion for one in frozen.criteria] == ["loss < 2", "margin > 0"]
        record.facts.results |= {"loss": 1.5, "margin": 0.5}
    verdict = read(record).verdict
    assert verdict is not None
    assert (verdict.finding, verdict.changed_after_start) == ("supported", [])
    assert [(one.finding, one.role) for one in verdict.judged] == [("supported", "primary"), ("supported", "guardrail")]
    assert "verdict: supported\n  supported: loss < 2  (observed 1.5;" in capsys.readouterr().err


def test_a_criterion_changed_after_the_start_is_shown_and_not_used(
    opened: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(success_criteria=["loss < 2"]) as record:
        record.facts.results["loss"] = 2.5
        text = record.file.path.read_text()
        record.file.path.write_text(text.replace("loss < 2", "loss < 3", 1))
    verdict = read(record).verdict
    assert verdict is not None
    assert verdict.finding == "refuted"
    assert verdict.changed_after_start == ["taken out: loss < 2", "added: loss < 3"]
    assert "changed after the start, and not used: added: loss < 3" in capsys.readouterr().err
    assert record.file.person()["success_criteria"] == ["loss < 3"]  # theirs to say


def test_criteria_that_were_added_after_the_start_are_shown_and_not_used(opened: Open) -> None:
    with opened(success_criteria=[]) as record:
        assert read(record).verdict is None
        text = record.file.path.read_text()
        record.file.path.write_text(text.replace("success_criteria: []", "success_criteria: [loss < 3]", 1))
        record.facts.results["loss"] = 2.5
    verdict = read(record).verdict
    assert verdict is not None
    assert (verdict.finding, verdict.judged) == (None, [])
    assert verdict.changed_after_start == ["added: loss < 3"]


def test_without_criteria_there_is_no_verdict(opened: Open) -> None:
    with opened() as record:
        pass
    assert read(record).verdict is None


@pytest.mark.parametrize("error", [StageFailed("no"), Interrupted("stop")])
def test_what_ended_early_is_not_judged(opened: Open, error: Exception) -> None:
    with pytest.raises(type(error)), opened(success_criteria=["loss < 2"]) as record:
        record.facts.results["loss"] = 1.5
        raise error
    verdict = read(record).verdict
    assert verdict is not None
    assert (verdict.finding, verdict.judged) == (None, [])


def test_a_resume_keeps_the_criteria_of_the_first_start(opened: Open) -> None:
    with pytest.raises(StageFailed), opened(success_criteria=["loss < 2"]) as record:
        raise StageFailed("no")
    record.file.path.write_text(record.file.path.read_text().replace("loss < 2", "loss < 9", 1))
    with opened(file=record.file) as again:
        again.facts.results["loss"] = 5.0
    verdict = read(record).verdict
    assert verdict is not None
    assert (verdict.finding, verdict.criteria[0].criterion) == ("refuted", "loss < 2")
    assert verdict.changed_after_start == ["taken out: loss < 2", "added: loss < 9"]


def test_a_plan_whose_criteria_are_wrong_is_not_begun(opened: Open, place: Workspace) -> None:
    plan = place.experiments / "EXP-2026-11-20-001.yaml"
    plan.write_text("success_criteria: [loss is low]\n")
    with (
        pytest.raises(UserError, match=r"001\.yaml: success_criteria\[1\]: `loss is low`"),
        opened(file=RecordFile(plan)),
    ):
        pass
    assert plan.read_text() == "success_criteria: [loss is low]\n"


def test_a_record_in_mid_edit_at_the_close_loses_nothing(opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(success_criteria=["loss < 2"]) as record:
        mid_edit = b"tags: [a,\n" + record.file.path.read_bytes()
        record.file.path.write_bytes(mid_edit)
        record.facts.results["loss"] = 1.5
    assert record.file.path.read_bytes() == mid_edit
    assert "what the pipeline knows waits in" in capsys.readouterr().err
    facts = read(record)  # from beside the file
    assert (facts.status, facts.results) == ("complete", {"loss": 1.5})
    assert facts.verdict is not None
    assert facts.verdict.finding == "supported"
    assert facts.verdict.changed_after_start[0].startswith("could not be compared: ")
    record.file.path.write_bytes(mid_edit.removeprefix(b"tags: [a,\n"))
    assert record.file.complete()
    assert b"\nstatus: complete\n" in record.file.path.read_bytes()


def test_the_record_that_is_deleted_while_it_runs_leaves_its_facts_beside(opened: Open) -> None:
    with opened() as record:
        record.file.path.unlink()
        record.facts.results["loss"] = 1.5
    assert not record.file.path.exists()
    assert b"loss: 1.5" in (record.folder / "below.next.yaml").read_bytes()


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
