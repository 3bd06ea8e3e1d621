"""A server of another environment as a child process: started, watched, drained, and never left behind.

    with Child(command, folder / "vllm.log", environment, drain=30) as child:
        child.wait_until(ready, stop)      # raises StageFailed, quoting its log, when it dies first
        child.watch(stop)                  # until someone asks to stop; the same when it dies
        child.drain()                      # SIGTERM, time for what is running, then SIGKILL

The child leads a process group of its own, so Ctrl-C reaches it only through us, and what it starts ends with it. Should
this process be killed outright, a shell that waits on a pipe from it sees the pipe's end and stops the group.
"""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import Interrupted, StageFailed
from pipeline.progress import LINE_EVERY, duration, say
from pipeline.records.lifecycle import StopRequest

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL = 0.2  # seconds between two looks at the child
MARGIN = 15.0  # seconds beyond the drain for the child to put its things away
TAIL = 1 << 16  # bytes of a log that are looked at
# $1: the process group, $2: seconds it may take. `read` returns when no process has the other end any more.
WATCHER = """read -r _; kill -TERM "-$1" || exit 0
n=0; while [ "$n" -lt "$2" ] && kill -0 "-$1"; do sleep 1; n=$((n + 1)); done; kill -KILL "-$1" """
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PREFIX = re.compile(r"^(\([^)]*pid=\d+\) *)?((ERROR|WARNING|INFO|CRITICAL) [\d-]+ [\d:.]+ *)?(\[[\w./:]+\] *)?")
CAUSE = re.compile(r"(\w+(Error|Exception)\b(:|$)|\berror: |Killed|Segmentation fault|Out of memory)", re.ASCII)
CONSEQUENCE = re.compile(r"root cause|Engine core initialization failed|EngineDeadError")


def end_with(pid: int) -> None:
    """This process gets SIGTERM when its parent `pid` is gone, killed or not. Raises `Interrupted` when it is already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != pid:
        raise Interrupted("interrupted: the process that started this one is gone")


class Child:
    """`drain`: seconds that its running requests have after SIGTERM. `name` is what messages call it."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], drain: float, name: str
    ) -> None:
        self.command, self.log, self.environment, self.name = list(command), log, dict(environment), name
        self.grace = drain + MARGIN

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.log.parent,
                start_new_session=True,
            )
        self._watcher = subprocess.Popen(
            ["sh", "-c", WATCHER, "watcher", str(self.process.pid), str(round(self.grace))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, error: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        """Whatever happened, nothing of the group stays."""
        self._watcher.kill()  # before the child is waited for: its number may then be another's
        self._watcher.communicate()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until(self, ready: Callable[[], bool], stop: StopRequest) -> None:
        """Raises `StageFailed` when the child ends first, `Interrupted` when someone asked to stop."""
        began = told = time.monotonic()
        while not ready():
            self.check("before it was ready")
            if stop.requested:
                raise Interrupted(f"interrupted by {stop.requested}")
            if (now := time.monotonic()) - told >= LINE_EVERY:
                told = now
                said = next((line for line, _ in reversed(self._lines())), "")
                say(f"{self.name} is starting  {duration(now - began)}  {said[:100]}")
            time.sleep(POLL)

    def watch(self, stop: StopRequest) -> None:
        """Returns when someone asked to stop. Raises `StageFailed` when the child ends by itself."""
        while not stop.requested:
            self.check("while it served")
            time.sleep(POLL)

    def drain(self) -> None:
        """SIGTERM, on which it takes no more requests and ends those that run; SIGKILL when that takes too long."""
        self.process.terminate()
        try:
            self.process.wait(timeout=self.grace)
        except subprocess.TimeoutExpired:
            say(f"note: {self.name} did not end within {duration(self.grace)} of SIGTERM and was killed")

    def last_line(self) -> str:
        """What the log says last: the cause of its end where there is one, not what followed from it."""
        lines = self._lines()
        causes = [line for line, level in lines if level not in ("INFO", "WARNING") and CAUSE.search(line)]
        causes = [line for line in causes if not CONSEQUENCE.search(line)] or causes
        return (causes or [line for line, _ in lines] or [""])[-1]

    def _lines(self) -> list[tuple[str, str]]:
        """The end of the log, without what loggers put before a line; and each line's level where it has one."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
            text = COLOUR.sub("", log.read().decode("utf-8", "replace"))
        found = []
        for raw in text.splitlines():
            prefix = PREFIX.match(raw.strip())
            if prefix and (line := raw.strip()[prefix.end() :].strip(" ^~")):
                found.append((line, prefix[3] or ""))
        return found

    def check(self, when: str) -> None:
        """Raises `StageFailed` when the child has ended: how, and the cause that its log names."""
        if (code := self.process.poll()) is None:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        quoted = self.last_line()[:500]
        raise StageFailed(f"{self.name} {how} {when}{f': {quoted}' if quoted else ''}", remedy=f"its log, {self.log}")
