"""Runs a command as a user would and watches it from outside: nothing is put into the process that is measured.

    run = observe([".venv/bin/trl", "sft", …], environment, folder, lambda: trl_steps(folder))

Every contestant tells its steps anyway, in a line of its output or of its log. When one appears, the wall clock and the CPU
time of the whole process tree are read. Linux only (`/proc`).
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOOK_EVERY = 0.02  # seconds; a step takes about a second
SETTLED = 5  # looks: a process that has just been forked still shows its parent's memory
WEIGH_EVERY = 0.5  # seconds: the kernel walks through a process's pages to say which are its own
TICKS = os.sysconf("SC_CLK_TCK")
OUTPUT = "output.txt"  # of the command, stdout and stderr together


@dataclass(frozen=True)
class Told:
    """What a command says of a step."""

    loss: float
    tokens: (
        int  # non-padding tokens so far; only the first step's are used: some tell later ones rounded, or not at all
    )


@dataclass(frozen=True)
class Step(Told):
    wall: float  # seconds from the start of the command to the end of this step
    cpu: float  # CPU seconds of all its processes until then


@dataclass(frozen=True)
class Run:
    """A finished command. Memory is in bytes."""

    wall: float
    cpu: float
    largest: int  # peak resident memory of its largest process
    whole: int  # the most that all processes of the tree had at once, what they share counted once
    steps: list[Step] = field(default_factory=list)


def observe(
    command: Sequence[str], environment: dict[str, str], folder: Path, told: Callable[[], Sequence[Told]]
) -> Run:
    """`told` gives the steps that the command has told so far. Raises `SystemExit` when the command fails."""
    steps: list[Step] = []
    looks: Counter[int] = Counter()
    largest = whole = 0
    weighed = 0.0
    started = time.perf_counter()
    with (folder / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    ended = False
    while not ended:
        time.sleep(LOOK_EVERY)
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        tree = [process.pid, *_descendants(process.pid)]
        now, used = time.perf_counter() - started, sum(map(_cpu_seconds, tree))
        looks.update(tree)
        peaks = {pid: _peak(pid) for pid in tree if looks[pid] >= SETTLED}
        largest = max([largest, *peaks.values()])
        if now - weighed >= WEIGH_EVERY:
            weighed = now
            others = sorted(peaks, key=peaks.__getitem__)[:-1]
            whole = max(whole, largest + sum(map(_own, others)))
        steps += [Step(t.loss, t.tokens, now, used) for t in told()[len(steps) :]]
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (folder / OUTPUT).read_text("utf-8", "replace").splitlines()[-20:]
        raise SystemExit("\n".join([*last, f"{' '.join(map(str, command))}: exit {process.returncode}"]))
    return Run(wall, usage.ru_utime + usage.ru_stime, largest, max(whole, largest), steps)


def _descendants(pid: int) -> list[int]:
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return []
    return [descendant for child in children for descendant in (child, *_descendants(child))]


def _cpu_seconds(pid: int) -> float:
    """Of the process and of its children that have ended and were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS


def _peak(pid: int) -> int:
    """Bytes: its peak resident memory, which the kernel keeps."""
    return sum(_sizes(pid, "status", ["VmHWM"]))


def _own(pid: int) -> int:
    """Bytes that it shares with no process: not the libraries, nor what a forked one still has in common with its parent."""
    return sum(_sizes(pid, "smaps_rollup", ["Private_Clean", "Private_Dirty"]))


def _sizes(pid: int, file: str, names: Sequence[str]) -> list[int]:
    """Bytes, as the kernel tells them of a process; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in names]
