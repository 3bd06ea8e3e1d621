"""Code that tries to leave the sandbox. What fails inside is also tried outside, where it must succeed: else it shows nothing."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from eval.sandbox import breakouts, keeper, sandbox, syscalls
from eval.sandbox.sandbox import MB, Limits, Outcome
from eval.sandbox.walls import landlock_abi
from pipeline.errors import UserError
from pipeline.workspace import CHECKOUT

HERE = sys.platform == "linux" and os.uname().machine == "x86_64" and landlock_abi() > 0
pytestmark = pytest.mark.skipif(not HERE, reason="Linux on x86-64 with Landlock")
LIMITS = Limits(memory=192 * MB, cpu=5, wall=20.0, files=24, file_size=MB)
QUICK = Limits(memory=192 * MB, wall=0.5)
BARE = [sys.executable, "-I", "-S"]

# Outside they need what not every machine has: root, the 32-bit ABIs, perf, keys, vsock, user.* attributes
NEEDS_MORE = {
    "network: packets", "network: vsock", "network: kernel's ciphers", "files: by handle", "files: a device",
    "files: /dev/kmsg", "files: name", "processes: trace", "processes: memory",
    "processes: memory, from the side", "kernel: namespace", "kernel: namespace by clone", "kernel: enter a namespace",
    "kernel: open a tree", "kernel: chroot", "kernel: io_uring", "kernel: keys", "kernel: add a key", "kernel: bpf",
    "kernel: perf", "kernel: userfaultfd", "kernel: log", "kernel: 32-bit calls", "kernel: x32 calls", "kernel: privileges",
    "kernel: become another", "kernel: mount", "memory: queue", "memory: more", "time: more",
}  # fmt: skip
REFUSED = ("PermissionError 1", "PermissionError 13", "OSError 38")  # EPERM, EACCES, ENOSYS
FAILS = {  # for another reason
    "files: read through a hard link": ("OSError 18", "PermissionError 13"),
    "files: name": ("OSError 95",),
    "files: too large": ("OSError 27",),
    "files: too large, written": ("OSError 27",),
    "files: too large, copied": ("OSError 27",),
    "files: too large, beyond its end": ("OSError 95",),
    "files: too many": ("OSError 122",),
    "files: too many open": ("OSError 24",),
    "files: descriptors": ("OSError none",),
    "files: change a mode": ("AssertionError ",),  # says yes and does nothing
    "files: change times": ("AssertionError ",),
    "environment": ("AssertionError ",),
    "processes: signal through a socket": ("OSError 25",),
    "processes: too many": ("BlockingIOError 11",),
    "processes: too many threads": ("RuntimeError can't start new thread",),
    "kernel: 32-bit calls": (f"OSError {signal.SIGSYS}",),
    "kernel: x32 calls": (f"OSError {signal.SIGSYS}",),
    "kernel: privileges": ("OSError none",),
    "memory: one block": ("MemoryError ",),
    "memory: more": ("ValueError not allowed to raise maximum limit",),
    "time: more": ("ValueError not allowed to raise maximum limit",),
}
NOT_OUTSIDE = {"kernel: mount", "kernel: bpf"}  # they would be felt

_OUTSIDE = """
tried = {}
for name, attempt in attempts.items():
    open(secret, "w").write("secret")
    if not (child := os.fork()):
        try:
            exec(attempt)
            os._exit(0)
        except BaseException:
            os._exit(1)
    tried[name] = os.waitpid(child, 0)[1] == 0
print(json.dumps([name for name, done in tried.items() if done]))
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A secret, a folder, a listening socket and a process, none of them the sandbox's."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    (outside / "readable").write_text("readable")
    (outside / "empty").mkdir()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
        subprocess.Popen(["sleep", "600"], env={"SECRET": "1"}, start_new_session=True) as process,
    ):
        listening.bind("\0" + outside.name)
        paths = {"secret": str(outside / "secret"), "readable": str(outside / "readable"), "outside": str(outside)}
        yield {**paths, "parent": process.pid, "most": asdict(LIMITS)}
        process.kill()


@pytest.fixture(scope="module")
def inside(target: dict[str, object]) -> dict[str, str | None]:
    """How the attempts fail inside, with an inheritable descriptor open out here."""
    opened = os.open(str(target["secret"]), os.O_RDONLY)
    os.set_inheritable(opened, True)
    assert sandbox.available() is None
    python = sandbox.languages()["python"]
    python = replace(python, readable=(*python.readable, str(target["readable"])))
    outcome = sandbox._run(python, breakouts.program(breakouts.ATTEMPTS, **target), LIMITS, {}, None)
    os.close(opened)
    assert outcome.ended == "ended" and outcome.code == 0, outcome
    return dict(json.loads(outcome.stdout))


@pytest.fixture(scope="module")
def outside(
    target: dict[str, object], inside: dict[str, str | None], tmp_path_factory: pytest.TempPathFactory
) -> set[str]:
    """Which of them succeed without it, one process each."""
    attempts = {name: code for name, code in breakouts.ATTEMPTS.items() if name not in NOT_OUTSIDE}
    names = "".join(f"{name} = {value!r}\n" for name, value in target.items())
    text = f"{breakouts.PRELUDE}{names}attempts = {attempts!r}{_OUTSIDE}"
    with open(str(target["secret"])) as inherited:
        done = subprocess.run(
            [*BARE, "-c", text], capture_output=True, text=True, cwd=tmp_path_factory.mktemp("cwd"),
            pass_fds=(inherited.fileno(),), check=True,
        )  # fmt: skip
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("name", breakouts.ATTEMPTS)
def test_what_can_be_done_outside_cannot_be_done_inside(
    name: str, inside: dict[str, str | None], outside: set[str]
) -> None:
    failure = inside[name]
    assert failure is not None and failure in FAILS.get(name, REFUSED)
    assert name in outside or name in NEEDS_MORE


def test_root_can_do_outside_nearly_all_that_may_need_more(outside: set[str]) -> None:
    """So that the list of exceptions does not grow into a list of everything."""
    if os.geteuid() == 0:
        assert len(outside) > 0.85 * len(breakouts.ATTEMPTS)


def run(text: str, limits: Limits = LIMITS, language: str = "python") -> Outcome:
    return sandbox.run(language, text, limits)


# ── It proves itself, and refuses ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("abi", [1, 2, 5])
def test_the_walls_stand_with_the_landlock_of_older_kernels_too(abi: int | None) -> None:
    assert sandbox.available(abi) is None


REFUSING = """
import ctypes, struct, sys
sys.path.insert(0, {root!r})
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, {call}), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]  # ENOSYS
code = b"".join(struct.pack("<HBBI", *step) for step in steps)
kept = ctypes.create_string_buffer(code)
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("<HxxxxxxQ", 4, ctypes.addressof(kept)), 0, 0) == 0
from eval.sandbox import sandbox
from pipeline.errors import UserError
print(sandbox.available())
try:
    print(sandbox.run("python", "print('it ran')"))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("call", "missing"),
    [(444, "the kernel has no Landlock"), (317, "seccomp with a listener: Function not implemented")],
)
def test_where_the_kernel_lacks_a_wall_nothing_runs(call: int, missing: str) -> None:
    text = REFUSING.format(root=str(CHECKOUT), call=call)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith(missing) and second.startswith(f"no sandbox here: {missing}")
    assert "it ran" not in done.stdout


def test_elsewhere_than_on_linux_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    sandbox.available.cache_clear()
    try:
        with pytest.raises(UserError, match="no sandbox here: it needs Linux on x86-64"):
            run("print()")
    finally:
        sandbox.available.cache_clear()


def test_the_page_promises_what_the_limits_are() -> None:
    page, most = (CHECKOUT / "docs" / "sandbox.md").read_text("utf-8"), Limits()
    for promise in (
        f"at most {most.files} files made, {most.file_size // MB} MiB each: {most.files * most.file_size // MB // 1024} GiB",
        f"at most {most.open_files} files open in a process",
        f"at most {most.processes} processes at once, {most.threads} threads in all",
        f"at most {most.memory // MB} MiB of address space each",
        f"{most.processes * most.memory // MB // 1024} GiB (16) in all",
        f"{most.cpu} s of CPU time each",
        f"{most.wall:.0f} s in all, {most.output // 1024} KiB on each",
    ):
        assert promise in page
    walls = {name.partition(":")[0] for name in breakouts.ATTEMPTS}
    assert [wall for wall in walls if f"`{wall}" not in page] == []


def test_numbers_of_calls_are_the_kernels() -> None:
    headers = [p for p in Path("/usr/include").glob("**/asm/unistd_64.h")]
    if not headers:
        pytest.skip("no kernel headers")
    theirs = {name: int(number) for name, number in re.findall(r"__NR_(\w+)\s+(\d+)", headers[0].read_text())}
    ours = syscalls.ALLOWED | syscalls.JUDGED
    assert {name: number for name, number in ours.items() if theirs.get(name, number) != number} == {}
    assert len(ours) - len(set(ours) & set(theirs)) <= 3, "of a kernel newer than the headers"


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HIDDEN_MEMORY = """
import ctypes, mmap, sys
libc, held = ctypes.CDLL(None), 0
kept = []
try:
    while held < 300:
        kept.append(mmap.mmap(-1, 10 << 20, mmap.{kind} | mmap.MAP_ANONYMOUS))
        held += 10
        if {freeze}:
            libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))), 10 << 20, 1)
except OSError:
    pass
print(held)
"""


@pytest.mark.parametrize(("kind", "freeze"), [("MAP_PRIVATE", True), ("MAP_SHARED", False)], ids=["frozen", "shared"])
def test_memory_is_counted_however_it_is_held(kind: str, freeze: bool) -> None:
    text = HIDDEN_MEMORY.format(kind=kind, freeze=freeze)
    assert int(run(text).stdout) < 192
    assert int(subprocess.run([*BARE, "-c", text], capture_output=True, check=True).stdout) == 300


BOMB = """
import os, time
main, made = os.getpid(), os.pipe()
while True:
    try:
        os.fork() and os.write(made[1], b"x")
    except OSError:
        if os.getpid() == main:
            break
        time.sleep(0.01)
os.set_blocking(made[0], False)
time.sleep(0.3)
print(len(os.read(made[0], 100)))
"""


def test_a_fork_bomb_stays_small_and_ends() -> None:
    outcome = run(BOMB)
    assert outcome.passed and {"fork", "clone"} & set(outcome.refused)
    assert int(outcome.stdout) == LIMITS.processes - 1


HALF_GONE = """
import ctypes, os, threading
threading.Thread(target=os.read, args=(0, 1)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_place_is_free_again_only_when_its_process_has_ended() -> None:
    crowd = "import os\nfor i in range(30):\n    if not os.fork(): os._exit(0)\n    os.wait()\nprint('all')"
    assert run(crowd).stdout == "all\n"
    with subprocess.Popen([*BARE, "-c", HALF_GONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        until(lambda: b" Z " in Path(f"/proc/{process.pid}/stat").read_bytes())
        assert not keeper._ended(process.pid), "its first thread has ended, and another lives"
        process.kill()
        until(lambda: keeper._ended(process.pid))


def test_cpu_time_ends_even_what_ignores_the_warning() -> None:
    text = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    outcome = run(text, Limits(cpu=1))
    assert (outcome.ended, outcome.code) == ("ended", -signal.SIGKILL)


FOREVER = {
    "sleeping": "time.sleep(1000)",
    "without its output": "os.close(1); os.close(2); time.sleep(1000)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "deaf": "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 13, 14, 15)]; time.sleep(1000)",
    "a family": "os.fork(); os.fork(); time.sleep(1000)",
    "a daemon of a daemon": "os.fork() and time.sleep(1000); os.setsid(); os.fork() and os._exit(0); time.sleep(1000)",
}


@pytest.mark.parametrize("how", FOREVER)
def test_wall_time_ends_everything(how: str) -> None:
    with watched() as left:
        outcome = run(f"import os, signal, time\n{FOREVER[how]}", QUICK)
    assert outcome.ended == "time" and outcome.problem == "did not end in time"
    assert left() == set()


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_flood_is_cut_and_ended(stream: str) -> None:
    outcome = run(f"import os\nwhile True: os.write({stream}, b'x' * 65536)")
    assert (outcome.ended, outcome.problem) == ("output", "wrote too much")
    assert len(outcome.stdout) + len(outcome.stderr) == LIMITS.output


def test_the_last_words_are_kept_up_to_the_limit() -> None:
    outcome = run("import sys\nsys.stdout.write('x' * 65536)\nsys.stderr.write('é' * 100)")
    assert outcome.passed and len(outcome.stdout) == 65536 and outcome.stderr == "é" * 100


# ── Nothing is left ──────────────────────────────────────────────────────────────────────────────────────────────────

DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        os.write(1, b"%d" % os.getpid())
        os.close(1)
        time.sleep(30)
    os._exit(0)
os.wait()
time.sleep(0.1)
"""


def test_a_daemon_ends_with_the_program_and_outside_it_does_not() -> None:
    with watched() as left:
        assert run(DAEMON).passed
    assert left() == set()
    daemon = int(subprocess.run([*BARE, "-c", DAEMON], stdout=subprocess.PIPE, check=True).stdout)
    assert Path(f"/proc/{daemon}").exists()
    os.kill(daemon, signal.SIGKILL)


def test_nobody_outside_is_signalled_the_keeper_least() -> None:
    text = """
import os, signal
for process in (os.getppid(), os.getppid() - 1, 1, %d, -1):
    for which in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, 0):
        try:
            os.kill(process, which)
            print("reached", process)
        except OSError:
            pass
"""
    outcome = run(text % os.getpid())
    assert outcome.passed and outcome.stdout == "" and "kill" in outcome.refused


def test_folders_that_are_deep_and_closed_are_removed_too() -> None:
    text = "import os\nfor i in range(20):\n    os.mkdir('deep'); os.chdir('deep')\nos.mkdir('closed', 0)\nprint(os.getcwd())"
    outcome = run(text)
    assert outcome.passed and not Path(outcome.stdout.split("/deep")[0]).exists()


FAMILY = """from eval.sandbox import sandbox
how = sandbox.languages()["python"]
text = "import os, time; os.fork(); os.fork(); os.fork(); time.sleep(1000)"
sandbox._run(how, text, sandbox.Limits(wall=500.0), {}, None)
"""


@pytest.mark.parametrize("which", ["evaluation", "guard", "keeper"])
def test_whoever_of_us_is_killed_the_code_does_not_live_on(which: str) -> None:
    start = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); {FAMILY}"
    with watched() as left, subprocess.Popen([sys.executable, "-c", start], stderr=subprocess.DEVNULL) as process:
        chain = [process.pid]
        until(lambda: len(below(process.pid)) == 10)  # guard, keeper and eight
        chain += below(process.pid)[:2]
        os.kill(chain[("evaluation", "guard", "keeper").index(which)], signal.SIGKILL)
        until(lambda: not any(alive(p) for p in chain[1:]))
        until(lambda: left() <= {process.pid})
        process.kill()


def test_two_at_once_do_not_meet() -> None:
    text = "import os, time\nopen('mine', 'x').write('{0}')\ntime.sleep(0.3)\nprint(open('mine').read(), len(os.listdir()))"
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda i: run(text.format(i)), range(2)))
    assert [o.stdout for o in outcomes] == ["0 2\n", "1 2\n"]


# ── What it is for ───────────────────────────────────────────────────────────────────────────────────────────────────

ORDINARY = {
    "files": "import tempfile, shutil\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x'); shutil.copy2(f.name, 'b')",
    "a database": "import sqlite3\nsqlite3.connect('x.db').execute('create table a (b)')",
    "threads": "from concurrent.futures import ThreadPoolExecutor as T\nwith T(4) as t: assert list(t.map(str, range(4)))",
    "processes": "import subprocess\nassert subprocess.run(['echo', 'a'], capture_output=True).stdout == b'a\\n'",
    "a process that is ended": "import subprocess\np = subprocess.Popen(['sleep', '100']); p.terminate(); assert p.wait() == -15",
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(0.01)\nasyncio.run(f())",
    "a pool": "import multiprocessing as m\nq = m.Pipe(); m.Process(target=q[1].send, args=(1,)).start(); assert q[0].recv()",
    "modules": "import unittest, dataclasses, decimal, zoneinfo, ctypes, random, json, re\nzoneinfo.ZoneInfo('UTC')",
}


@pytest.mark.parametrize("what", ORDINARY)
def test_ordinary_programs_run(what: str) -> None:
    outcome = run(ORDINARY[what], Limits())
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("language", "text"),
    [
        (
            "shell",
            'for i in 1 2 3; do echo $i | sed s/1/one/; done > all; wc -l < all; rm all; test -z "$SECRET"',
        ),
        ("node", "const a = [1, 2, 3].map(x => x); require('fs').writeFileSync('a', 'b'); console.log(a.length)"),
    ],
)
def test_other_languages_run_where_they_are_found(language: str, text: str) -> None:
    if language not in sandbox.languages():
        pytest.skip(f"no {language}")
    outcome = run(text, Limits(), language)
    assert outcome.passed and outcome.stdout == "3\n", outcome


def test_files_beside_are_there_and_how_it_failed_is_told() -> None:
    beside = sandbox.run(
        "python",
        "import sys\nsys.path[:0] = ['']\nimport solution\nassert solution.two() == 3",
        files={"solution.py": "def two(): return 2"},
    )
    assert (beside.passed, beside.problem) == (False, "AssertionError")
    assert run("import os; os.abort()").problem == "was ended by signal 6"
    with pytest.raises(UserError, match="cobol cannot be run here"):
        run("", LIMITS, "cobol")


# ── Watching processes ───────────────────────────────────────────────────────────────────────────────────────────────


def until(holds: Callable[[], bool]) -> None:
    """Waits; that it never holds is a hang, which the whole run's own limit ends."""
    while not holds():
        time.sleep(0.01)


def alive(process: int) -> bool:
    return not keeper._ended(process)


def below(process: int) -> list[int]:
    """All that descend from a process, nearest first."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found[1:]


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], set[int]]]:
    """Gives what of a sandbox is left: processes with a filter and the mark that it goes first when memory runs out."""

    def marked() -> set[int]:
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "oom_score_adj").read_text() == "1000\n" and "\nSeccomp:\t2" in (
                    path / "status"
                ).read_text():
                    found.add(int(path.name))
        return found

    before = marked()
    yield lambda: marked() - before
