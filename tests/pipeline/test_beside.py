"""Work beside the program: its results come in order, its faults come through, and nothing of it outlives the program."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.beside import beside, in_a_process, in_processes
from pipeline.errors import StageFailed, UserError

CHECKOUT = Path(__file__).resolve().parents[2]
READ = {"x86_64": "0", "aarch64": "63"}[platform.machine()]  # the system call's number


def test_what_a_thread_finds_or_raises_is_given_to_who_waits() -> None:
    assert beside(lambda: 7)() == 7
    wait = beside(lambda: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        wait()


def test_what_a_process_gives_or_raises_comes_back_and_nothing_else_does() -> None:
    kept = list[int]()

    def work() -> tuple[int, int]:
        kept.append(1)
        return len(kept), os.getpid()

    length, worker = in_a_process(work)
    assert length == 1 and worker != os.getpid() and not kept

    def fault() -> None:
        raise UserError("has no end", where="file:3", remedy="one")

    with pytest.raises(UserError, match=r"^file:3: has no end; try one$") as raised:
        in_a_process(fault)
    assert (raised.value.where, raised.value.remedy) == ("file:3", "one")
    with pytest.raises(StageFailed, match=r"was killed, perhaps for want of memory$"):
        in_a_process(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_items_come_in_their_order_and_before_all_are_known(tmp_path: Path) -> None:
    """The first waits for the second, which another process has; the last is asked for only once others have come."""
    came: list[str] = []

    def items() -> Iterator[str]:
        yield from ("first", "second", "third")
        while not came:
            time.sleep(0.05)
            yield "more"
        yield "last"

    def work(item: str) -> int:
        if item == "second":
            (tmp_path / item).touch()
        deadline = time.monotonic() + 60
        while item == "first" and not (tmp_path / "second").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return os.getpid()

    found = []
    for item, worker in in_processes(work, items(), 2):
        came.append(item)
        found.append(worker)
    assert came[:3] == ["first", "second", "third"] and came[-1] == "last"
    assert len(set(found)) == 2 and os.getpid() not in found


def test_what_the_work_knows_need_not_be_sent() -> None:
    secret = {"a": lambda: 1}  # nothing that can be pickled
    assert list(in_processes(lambda name: secret[name](), ["a"], 1)) == [("a", 1)]


@pytest.mark.parametrize(
    "error",
    [StageFailed("b is wrong", step=3, rows=["r"]), UserError("is cut off", where="file:1", remedy="again")],
    ids=str,
)
def test_an_error_comes_through_whole_and_ends_the_others(error: Exception) -> None:
    def work(item: str) -> str:
        if item == "b":
            raise error
        return item

    found, before = [], psutil.Process().children()
    with pytest.raises(type(error)) as raised:
        for item, _ in in_processes(work, "abc" * 50, 2):
            found.append(item)
    assert found == ["a"] and str(raised.value) == str(error) and vars(raised.value) == vars(error)
    assert psutil.Process().children() == before


def test_an_error_of_who_gives_the_items_ends_the_processes() -> None:
    def items() -> Iterator[str]:
        yield "a"
        raise StageFailed("the disk is full")

    before = psutil.Process().children()
    with pytest.raises(StageFailed, match="the disk is full"):
        list(in_processes(str.upper, items(), 2))
    assert psutil.Process().children() == before


@pytest.mark.parametrize("later", [False, True], ids=["when waited for", "when given the next"])
def test_a_process_that_is_killed_is_said_to_be(later: bool) -> None:
    def work(item: str) -> None:
        if item == "b":
            os.kill(os.getpid(), signal.SIGKILL)

    def items() -> Iterator[str]:
        yield from "abc"
        if later:
            time.sleep(1)
            yield "d"

    what = "a process beside this one was killed, perhaps for want of memory; try --resume"
    with pytest.raises(StageFailed, match=what):
        list(in_processes(work, items(), 1))


def test_one_that_is_killed_while_it_holds_a_lock_leaves_no_one_waiting() -> None:
    """Of idle processes one waits for the next item, holding the lock that the others wait for."""
    before = set(psutil.Process().children())

    def items() -> Iterator[str]:
        yield "a"
        workers = set(psutil.Process().children()) - before
        assert len(workers) == 4
        deadline, reads = time.monotonic() + 60, []
        while not reads and time.monotonic() < deadline:
            reads = [one for one in workers if Path(f"/proc/{one.pid}/syscall").read_text().split()[0] == READ]
        reads[0].kill()
        time.sleep(0.5)
        yield "b"

    with pytest.raises(StageFailed, match="was killed"):
        list(in_processes(str.upper, items(), 4))
    assert set(psutil.Process().children()) == before


STARTED = """
import os, sys, time
from pipeline.beside import in_processes

def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(600)

list(in_processes(work, "ab", 2))
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda sign: sign.name)
def test_no_process_outlives_the_one_it_works_for(sign: signal.Signals) -> None:
    """Killed, it ends nothing itself; Ctrl-C and SIGTERM reach the whole group, of which only the parent heeds them."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", STARTED]
    parent = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout
    workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    if sign == signal.SIGKILL:
        parent.kill()
    else:
        for worker in workers:
            worker.send_signal(sign)
        time.sleep(0.2)
        assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
        parent.kill()
    parent.wait(60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    parent.communicate()
