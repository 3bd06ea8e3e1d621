"""The keeper of a sandbox: starts the walled process, answers the calls that wait for it, and leaves nothing behind.

A bare Python runs `main()`, with the job as a line of JSON on standard input, and says how it ended as JSON on standard
output. It is two processes, so that one remains when the other is killed: the guard, which owns the scratch folder and to
which every orphan falls, and the keeper itself. Both end everything when the other is gone, or the one who asked (standard
input is closed). A process made without the keeper's leave does not exist, so killing what there is, is final.
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
from typing import Any

from eval.sandbox import syscalls
from eval.sandbox.walls import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, NoWall, Walls, landlock_abi, prctl

RECEIVE, SEND, NOTICE, CONTINUE = 0xC0502100, 0xC0182101, 80, 1  # SECCOMP_IOCTL_NOTIF_*, struct seccomp_notif, its flag
HANDSHAKE_SECONDS = 10


def main() -> None:
    """The guard."""
    job = json.loads(sys.stdin.buffer.readline())
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    scratch = job["scratch"]
    try:
        for name, text in job["files"].items():
            with open(os.path.join(scratch, name), "w", encoding="utf-8", errors="surrogatepass") as out:
                out.write(text)
        alive, ours = os.pipe()
        if not (keeper := os.fork()):
            os.close(ours)
            _keep(job, alive)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(keeper, 0)
        end_all()
    finally:
        remove(scratch)


def _keep(job: dict[str, Any], guard: int) -> None:
    """Never returns."""
    try:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        report = Keeper(job, guard).run()
    except NoWall as missing:
        report = {"ended": "no wall", "detail": str(missing)}
    except BaseException as error:
        report = {"ended": "no wall", "detail": f"{type(error).__name__}: {error}"}
    end_all()
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(report).encode())
    os._exit(0)


class Keeper:
    def __init__(self, job: dict[str, Any], guard: int) -> None:
        self.limits, self.argv, self.scratch, self.guard = job["limits"], job["argv"], job["scratch"], guard
        limits = self.limits
        abi = min(landlock_abi(), job["abi"] or 99)
        self.walls = Walls(
            self.scratch,
            tuple(job["readable"]),
            limits["memory"],
            limits["cpu"],
            limits["file_size"],
            limits["open_files"],
            abi,
        )
        self.processes, self.threads, self.files = limits["processes"] - 1, limits["threads"], limits["files"]
        self.leaving: set[int] = set()  # processes that said they end, whose place was not given back yet
        self.refused: set[str] = set()
        self.output: dict[int, bytearray] = {}

    def run(self) -> dict[str, Any]:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        ours, theirs = socket.socketpair()
        if not (child := os.fork()):
            self._become(theirs, out_end, err_end)
        started = time.monotonic()
        for end in (out_end, err_end):
            os.close(end)
        theirs.close()
        self.output = {out: bytearray(), err: bytearray()}
        for pipe in self.output:
            os.set_blocking(pipe, False)
        ours.settimeout(HANDSHAKE_SECONDS)
        with ours:
            try:
                said, passed, _, _ = socket.recv_fds(ours, 4096, 1)
                if not passed:
                    raise NoWall(said.decode() or "the walled process ended before its walls stood")
                if problem := ours.recv(4096):
                    return {"ended": "no program", "detail": problem.decode()}
            except TimeoutError:
                raise NoWall("the walled process did not put up its walls") from None
        ended, status = self._watch(child, passed[0], started + self.limits["wall"])
        seconds = time.monotonic() - started
        os.close(passed[0])  # what waits for an answer now fails
        end_all()
        for pipe in self.output:
            self._take(pipe)
        over = ended == "ended" and max(map(len, self.output.values())) > self.limits["output"]
        most = self.limits["output"]
        stdout, stderr = (bytes(said[:most]).decode("utf-8", "replace") for said in self.output.values())
        return {
            "ended": "output" if over else ended, "code": status, "stdout": stdout, "stderr": stderr,
            "refused": sorted(self.refused), "seconds": seconds,
        }  # fmt: skip

    def _become(self, ours: socket.socket, out: int, err: int) -> None:
        """In the child; never returns. What it has to say before its program runs goes over the socket."""
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            os.umask(0o077)
            os.chdir(self.scratch)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
                score.write("1000")  # when memory runs out, it goes first
            nothing = os.open("/dev/null", os.O_RDONLY)
            for source, target in ((nothing, 0), (out, 1), (err, 2), (ours.fileno(), 3)):
                os.dup2(source, target, inheritable=target < 3)
            os.closerange(4, 2**31 - 1)
            socket.send_fds(talk := socket.socket(fileno=3), [b"walls"], [self.walls.stand()])
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(3, str(error).encode())
            os._exit(1)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            for number in range(1, signal.NSIG):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            home = {"HOME": self.scratch, "TMPDIR": self.scratch}
            os.execve(
                self.argv[0],
                self.argv,
                {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OPENSSL_CONF": "/dev/null"} | home,
            )
        except OSError as error:
            talk.send(f"{self.argv[0]}: {error.strerror}".encode())
        talk.close()  # before the last call, which waits for the keeper
        os._exit(1)

    def _watch(self, child: int, listener: int, deadline: float) -> tuple[str, int | None]:
        """Until the program ends, or must: what ended it, and its exit code (negative: a signal)."""
        poll, ended = select.poll(), os.pidfd_open(child)
        for watched in (0, self.guard, listener, ended, *self.output):
            poll.register(watched, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for ready, event in poll.poll(left * 1000):
                if ready in (0, self.guard):
                    return "abandoned", None
                if ready == listener:
                    if not event & select.POLLIN:
                        poll.unregister(listener)
                    elif event & select.POLLIN:
                        self._answer(listener)
                elif ready == ended:
                    _, status = os.waitpid(child, 0)
                    return "ended", os.waitstatus_to_exitcode(status)
                elif not self._take(ready):
                    poll.unregister(ready)
                elif len(self.output[ready]) > self.limits["output"]:
                    return "output", None
        return "time", None

    def _take(self, pipe: int) -> bool:
        """What is there now, and one byte more than is kept; False at its end."""
        said = self.output[pipe]
        try:
            while len(said) <= self.limits["output"]:
                if not (more := os.read(pipe, 65536)):
                    return False
                said += more
        except BlockingIOError:
            pass
        return True

    def _answer(self, listener: int) -> None:
        notice = bytearray(NOTICE)
        try:
            fcntl.ioctl(listener, RECEIVE, notice)
        except OSError:  # whoever asked is gone
            return
        serial, task, _, call, _, _, *arguments = struct.unpack("<QIIiIQ6Q", notice)
        try:
            problem = self._judge(syscalls.NAMES[call], task, arguments)
        except (OSError, ValueError):  # its entry in /proc is gone
            problem = errno.EPERM
        if problem:
            self.refused.add(syscalls.NAMES[call])
        with contextlib.suppress(OSError):
            fcntl.ioctl(listener, SEND, struct.pack("<QqiI", serial, 0, -problem, 0 if problem else CONTINUE))

    def _judge(self, call: str, task: int, arguments: list[int]) -> int:
        """0, or the error that the call gets. Only numbers are looked at: memory could change under the eyes."""
        if call == "exit_group":
            self.leaving.add(_status(task)["Tgid"])
            return 0
        if call in ("kill", "tkill", "tgkill"):
            target = arguments[0] & 0xFFFFFFFF
            target -= (target >> 31) << 32
            try:
                return 0 if target == 0 or (target != -1 and self._own(abs(target))) else errno.EPERM
            except FileNotFoundError:
                return errno.ESRCH
        if call == "clone" and arguments[0] & syscalls.CLONE_THREAD:
            self.threads -= 1
            return errno.EAGAIN if self.threads < 0 else 0
        if call in ("clone", "fork", "vfork"):
            if self.processes <= 0:
                ended = {process for process in self.leaving if _ended(process)}
                self.leaving -= ended
                self.processes += len(ended)
            if self.processes <= 0:
                return errno.EAGAIN
            self.processes -= 1
            return 0
        self.files -= 1
        return errno.EDQUOT if self.files < 0 else 0

    def _own(self, process: int) -> bool:
        """Whether it descends from the keeper: every orphan in the sandbox does, too."""
        keeper = os.getpid()
        while process > 1:
            process = _status(process)["PPid"]
            if process == keeper:
                return True
        return False


def _status(task: int) -> dict[str, int]:
    with open(f"/proc/{task}/status", "rb") as status:
        fields = dict(line.split(b":", 1) for line in status if line.startswith((b"Tgid:", b"PPid:")))
    return {name.decode(): int(value) for name, value in fields.items()}


def _ended(process: int) -> bool:
    """Gone, or a zombie of one task, which holds no memory. That it asked to end proves nothing: a signal could stop that."""
    try:
        with open(f"/proc/{process}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] in b"ZX" and len(os.listdir(f"/proc/{process}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def end_all() -> None:
    """Kills every process below this one, orphans of orphans too, and waits until none is left."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        below = _below(os.getpid())
        if not below:
            return
        for process in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _below(process: int) -> list[int]:
    try:  # without children, nobody is below
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, KeyError):
                parents[int(name)] = _status(int(name))["PPid"]
    found = [process]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def remove(folder: str) -> None:
    """Folders that forbid their owner to look inside are his again first."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            inner = os.path.join(path, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
