"""A server as a child process: how it starts, ends, and that nothing of it is ever left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.errors import Interrupted, StageFailed
from pipeline.records.lifecycle import StopRequest
from pipeline.workspace import CHECKOUT
from serving import child as child_module
from serving.child import Child
from tests.serving.processes import runs, until

# a server with an engine of its own: it says that it is up, and on SIGTERM ends what runs
SERVER = "trap 'sleep 0.3; echo drained; exit 0' TERM; sleep 600 & echo $! > engine.pid; echo up; while :; do sleep 0.05; done"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "POLL", 0.01)
    monkeypatch.setattr(child_module, "LINE_EVERY", 0.0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def shell(script: str, log: Path, drain: float = 10.0) -> Child:
    return Child(["sh", "-c", script], log, os.environ, drain, "the server")


def up(log: Path) -> bool:
    return "up" in log.read_text() and (log.parent / "engine.pid").read_text().endswith("\n")


def test_it_starts_serves_and_ends_in_order_with_all_that_it_started(
    log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = StopRequest()
    with shell("sleep 0.2; " + SERVER, log) as child:
        child.wait_until(lambda: log.exists() and "up" in log.read_text(), stop)
        engine = int((log.parent / "engine.pid").read_text())
        assert runs(engine)
        stop.requested = "SIGTERM"
        child.watch(stop)
        child.drain()
        assert child.last_line() == "drained" and child.process.returncode == 0
    until(lambda: not runs(engine))
    assert "the server is starting" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'argument --dtype: invalid choice'; echo 'server: error: unrecognized arguments: --x'; exit 2",
         "ended with exit code 2 before it was ready: server: error: unrecognized arguments: --x"),
        ("echo '(Engine pid=7) ERROR 11-21 10:00:00 [core.py:1] ValueError: no room'; echo; "
         "echo '(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.'; exit 1",
         "ended with exit code 1 before it was ready: ValueError: no room"),
        ("echo '(APIServer pid=6) WARNING 11-21 10:00:00 [a.py:1] else: OSError: too many files'; echo 'no model'; exit 1",
         "ended with exit code 1 before it was ready: no model;"),
        ("echo 'OSError: [Errno 98] Address already in use'; echo 'resource_tracker: leaked'; exit 1",
         "Address already in use"),
        ("printf 'loading\\n\\377\\n'; kill -KILL $$", "was killed by SIGKILL before it was ready"),
        ("exit 3", "ended with exit code 3 before it was ready; try its log"),
    ],
)  # fmt: skip
def test_one_that_dies_as_it_starts_fails_the_stage_with_the_line_that_says_why(
    script: str, told: str, log: Path
) -> None:
    with pytest.raises(StageFailed) as failure, shell(script, log) as child:
        child.wait_until(lambda: False, StopRequest())
    assert told in str(failure.value) and str(log) in str(failure.value) and "\n" not in str(failure.value)


def test_one_that_dies_while_it_serves_fails_the_stage(log: Path) -> None:
    with pytest.raises(StageFailed, match="killed by SIGSEGV while it served: up"), shell(SERVER, log) as child:
        child.wait_until(lambda: up(log), StopRequest())
        child.process.send_signal(signal.SIGSEGV)
        child.watch(StopRequest())


def test_asked_to_stop_before_it_is_ready_it_is_interrupted_and_gone(log: Path) -> None:
    stop = StopRequest()
    stop.requested = "SIGINT"
    with pytest.raises(Interrupted, match="interrupted by SIGINT"), shell(SERVER, log) as child:
        until(lambda: up(log))
        child.wait_until(lambda: False, stop)
    assert not runs(child.process.pid)
    until(lambda: not runs(int((log.parent / "engine.pid").read_text())))


def test_one_that_does_not_heed_sigterm_is_killed_when_its_time_is_over(
    log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child_module, "MARGIN", 0.2)
    with shell(SERVER.replace("sleep 0.3; echo drained; exit 0", ""), log, drain=0.1) as child:
        child.wait_until(lambda: up(log), StopRequest())
        child.drain()
    assert "did not end within 0.3 s of SIGTERM and was killed" in capfd.readouterr().err
    assert child.process.returncode == -signal.SIGKILL


def test_ctrl_c_in_the_terminal_reaches_it_only_through_us(log: Path) -> None:
    with shell(SERVER, log) as child:
        assert os.getpgid(child.process.pid) != os.getpgid(0) and os.getsid(child.process.pid) != os.getsid(0)


PARENT = """
import os, sys
from pathlib import Path
from serving.child import Child
from tests.serving.processes import runs, until
with Child(["sh", "-c", sys.argv[1]], Path(sys.argv[2]), os.environ, 10, "the server") as child:
    child.process.wait()
"""


def test_a_killed_parent_leaves_nothing_behind(log: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, SERVER, str(log)], cwd=CHECKOUT)
    until(lambda: log.exists() and up(log))
    until(lambda: len(psutil.Process(parent.pid).children()) == 2)  # the server, and what watches
    server = psutil.Process(parent.pid).children()
    engine = int((log.parent / "engine.pid").read_text())
    assert runs(engine)
    parent.kill()
    parent.wait()
    until(lambda: not any(runs(process.pid) for process in server) and not runs(engine))
    assert "drained" in log.read_text()  # in order: SIGTERM, not SIGKILL


FOLLOWER = """
import os, subprocess, sys, time
code = "import sys, time; from serving.child import end_with; end_with(int(sys.argv[1]))"
code += "; print('follows', flush=True); time.sleep(60)"
follower = subprocess.Popen([sys.executable, "-c", code, sys.argv[1] if len(sys.argv) > 1 else str(os.getpid())])
print(follower.pid, flush=True)
sys.exit(follower.wait())
"""


def test_a_server_that_a_pipeline_started_ends_with_it_however_that_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", FOLLOWER], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout
        follower = int(starter.stdout.readline())
        assert starter.stdout.readline() == "follows\n"
        starter.kill()
    until(lambda: not runs(follower))


def test_one_that_was_started_by_a_process_already_gone_does_not_begin() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWER, "1"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "the process that started this one is gone" in done.stderr
