"""A sandbox for code that a model wrote. Every limit is held by the kernel, for root too; without that, nothing runs.

    outcome = run("python", "print(6 * 7)", Limits(wall=5.0))
    outcome.passed, outcome.stdout

| promise | held by |
|---|---|
| no network, no socket of any kind but a pair with itself | seccomp |
| writes to its scratch folder alone; reads there, the system's programs and libraries, and the interpreter | Landlock |
| new files (`files`) and the size of each (`file_size`): together the most it can write | seccomp's listener, RLIMIT_FSIZE |
| memory of a process (`memory`), processes at once (`processes`): together the most it can hold | RLIMIT_AS, seccomp's listener |
| CPU time of a process (`cpu`), wall time (`wall`), output (`output`) | RLIMIT_CPU, the keeper's SIGKILL |
| sees, signals and traces its own processes alone; none outlives it | seccomp, Landlock, a subreaper |
| no privileges, old or new; no environment, no open files of ours | no_new_privs, capset, close_range |

Linux 5.13 on x86-64, with Landlock and seccomp; no namespaces, no root, no cgroups: they hold in a container as on a laptop, and
the same code ends the same way in both. `available` proves them first, by trying to get out (`eval/sandbox/breakouts.py`).

What it does not hide: that a path exists, its size and times (stat); the kernel's version and host name; how busy the machine
is. Changes of mode and times (chmod, utime) say that they succeed and do nothing. Against someone who has a fault of the kernel
itself, use a virtual machine. Details: docs/sandbox.md.
"""

import functools
import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MB = 2**20
GRACE_SECONDS = 30  # for the keeper, after the program's own time is over
_START = "import sys; sys.path.insert(0, {!r}); from eval.sandbox.keeper import main; main()"


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    memory: int = 512 * MB  # address space of each process
    cpu: int = 10  # of each process
    wall: float = 20.0
    processes: int = 8  # at once, the program itself counted
    threads: int = 64  # started, all in all
    file_size: int = 8 * MB
    files: int = 128  # opened to be made, and folders and links: all in all
    open_files: int = 64  # at once, of each process
    output: int = 64 * 1024  # of each of stdout and stderr; more ends the program


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `ended`: by itself (`ended`), or `time`, `output`, `no program` (it could not be started)."""

    ended: str
    code: int | None  # its exit code; negative: the signal; None where it did not end by itself
    stdout: str
    stderr: str
    seconds: float
    refused: tuple[str, ...]  # system calls that the keeper refused: a limit reached, or a signal to others

    @property
    def passed(self) -> bool:
        return self.ended == "ended" and self.code == 0

    @property
    def problem(self) -> str | None:
        """One line; None where it passed."""
        if self.passed:
            return None
        if self.ended == "ended":
            said = [line.strip() for line in self.stderr.splitlines() if line.strip()]
            if self.code is not None and self.code < 0:
                return _SIGNALS.get(-self.code, f"was ended by signal {-self.code}")
            return said[-1][:300] if said else f"ended with {self.code}"
        return {"time": "did not end in time", "output": "wrote too much"}.get(self.ended, self.stderr or self.ended)


_SIGNALS = {24: "used up its CPU time", 25: "wrote too large a file", 31: "made a system call of another architecture"}


@dataclass(frozen=True)
class Language:
    """How a program's text is run. `memory`: what its runtime reserves at the least, bytes."""

    command: tuple[str, ...]
    file: str
    readable: tuple[str, ...] = ()
    memory: int = 0


@functools.cache
def languages() -> Mapping[str, Language]:
    """Those found on this machine. Python is this very version, with the standard library alone.

    Go is not among them: to compile even a small program takes far more than the limits.
    """
    python, prefix = os.path.realpath(getattr(sys, "_base_executable", sys.executable)), sys.base_prefix
    homes = (os.path.dirname(python), *(os.path.join(prefix, name) for name in ("bin", "lib")))
    found = {"python": Language((python, "-I", "-S", "-B", "-X", "utf8"), "main.py", homes)}
    for name, program, options, memory in (("shell", "bash", ("--norc",), 0), ("node", "node", (), 2048 * MB)):
        if path := shutil.which(program):
            path = os.path.realpath(path)
            found[name] = Language((path, *options), f"main.{'sh' if name == 'shell' else 'js'}", (path,), memory)
    return found


def run(
    language: str, text: str, limits: Limits = Limits(), files: Mapping[str, str] | None = None, abi: int | None = None
) -> Outcome:
    """Runs a program in a scratch folder of its own, with `files` beside it, and waits for its end.

    `abi`: at most this version of Landlock is used, as on an older kernel. Raises `UserError` where a wall is missing, or
    the language's program.
    """
    if problem := available():
        raise UserError(f"no sandbox here: {problem}", remedy="eval_config.run_code=false, or a machine that has it")
    if (how := languages().get(language)) is None:
        raise UserError(f"{language} cannot be run here", remedy=f"one of {', '.join(languages())}")
    return _run(how, text, limits, files or {}, abi)


@functools.cache
def available(abi: int | None = None) -> str | None:
    """None where all walls stand: every attempt of `breakouts.py` was made, and failed. Else what is missing, in a line."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return f"it needs Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    return _prove(abi)


def _prove(abi: int | None) -> str | None:
    from eval.sandbox import breakouts

    limits = Limits(memory=192 * MB, files=24, file_size=MB)
    with (
        tempfile.TemporaryDirectory(prefix="outside-") as outside,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
    ):
        listening.bind("\0" + os.path.basename(outside))
        secret = Path(outside, "secret")
        secret.write_text("not yours")
        Path(outside, "empty").mkdir()
        (readable := Path(outside, "readable")).write_text("not yours to change")
        python = languages()["python"]
        python = replace(python, readable=(*python.readable, str(readable)))
        before = _seen(outside)
        try:
            names = {"secret": str(secret), "outside": outside, "readable": str(readable), "parent": os.getpid()}
            names["most"] = asdict(limits)
            inside = _run(python, breakouts.program(breakouts.ATTEMPTS, **names), limits, {}, abi)
            tried = json.loads(inside.stdout or "null")
        except (UserError, json.JSONDecodeError) as error:
            return str(error)
        if not isinstance(tried, dict):
            return f"its self-test did not end by itself: {inside.problem}"
        free = [name for name, failure in tried.items() if failure is None]
        if free or _seen(outside) != before:
            return f"code in it got out: {', '.join(free) or 'files outside were changed'}"
        text = "import os, time\nprint(os.fork() or os.setsid() or os.getpid(), flush=True)\ntime.sleep(1000)"
        for seconds in (0.5, 5.0, 30.0):  # a loaded machine may not even have started it
            late = _run(python, text, replace(limits, wall=seconds), {}, abi)
            if len(processes := late.stdout.split()) == 2:
                break
        if late.ended != "time" or len(processes) < 2 or any(os.path.exists(f"/proc/{number}") for number in processes):
            return f"what takes too long is not ended, or leaves a process behind ({late.ended}: {processes})"
    return None


def _seen(folder: str) -> list[Any]:
    found = ((path, path.lstat()) for path in sorted(Path(folder).rglob("*")))
    return [(path, state.st_mode, state.st_size, state.st_mtime_ns, state.st_nlink) for path, state in found]


def _run(how: Language, text: str, limits: Limits, files: Mapping[str, str], abi: int | None) -> Outcome:
    from eval.sandbox.keeper import remove

    scratch = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
    job = {
        "scratch": scratch, "argv": [*how.command, how.file], "files": {**files, how.file: text}, "abi": abi,
        "readable": [*_system(), *how.readable], "limits": asdict(limits) | {"memory": max(limits.memory, how.memory)},
    }  # fmt: skip
    try:
        report = _ask_keeper(job, limits.wall + GRACE_SECONDS)
    finally:
        remove(scratch)
    if report["ended"] == "no wall":
        raise UserError(report["detail"])
    if report["ended"] == "no program":
        return Outcome("no program", None, "", report["detail"], 0.0, ())
    return Outcome(**report | {"refused": tuple(report["refused"])})


def _system() -> tuple[str, ...]:
    from eval.sandbox.walls import SYSTEM

    return SYSTEM


def _ask_keeper(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Its standard input stays open as long as we live: it ends everything when that is closed."""
    root = str(Path(__file__).resolve().parents[2])
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _START.format(root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/", start_new_session=True,
    )  # fmt: skip
    assert keeper.stdin and keeper.stdout and keeper.stderr
    said, deadline = b"", time.monotonic() + seconds
    with keeper, suppress(BrokenPipeError):
        try:
            keeper.stdin.write(json.dumps(job).encode() + b"\n")
            keeper.stdin.flush()
            while select.select([keeper.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not (more := os.read(keeper.stdout.fileno(), 65536)):
                    break
                said += more
        finally:
            keeper.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                keeper.wait(GRACE_SECONDS)
            keeper.kill()
    try:
        return dict(json.loads(said))
    except ValueError:
        return {"ended": "no wall", "detail": "its keeper ended without a word"}
