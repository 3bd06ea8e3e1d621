"""The walls around a process of the sandbox: it puts them up around itself, and nothing inside takes them down again.

    listener = Walls(…).stand()       # in a child, before it runs what is not trusted

Order matters: limits, then no new privileges and no capabilities, then Landlock (landlock(7)) over all files, then the
filter of system calls (`syscalls.py`). All of it is inherited by every process that this one makes, and holds for root.
Standard library alone: it runs in a bare Python.
"""

import ctypes
import os
import resource
import struct
from dataclasses import dataclass

from eval.sandbox import syscalls

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
SECCOMP, CAPSET, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 317, 126, 444, 445, 446  # x86-64

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # MAKE_CHAR, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights over files an ABI of Landlock knows
DEVICES = {"/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE, "/dev/random": READ_FILE}
SYSTEM = ("/bin", "/lib", "/lib64", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")

_libc = ctypes.CDLL(None, use_errno=True)


class NoWall(Exception):
    """The kernel does not give what a limit needs: what, in words."""


def landlock_abi() -> int:
    """Landlock's version; 0 where the kernel has none, or it is turned off."""
    return max(0, int(_libc.syscall(LANDLOCK_CREATE, None, 0, 1)))


def prctl(option: int, value: int = 0) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise NoWall(f"prctl {option}: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class Walls:
    """Sizes are bytes, times seconds. `readable`: files and folders whose content may be read and run."""

    scratch: str
    readable: tuple[str, ...]
    memory: int
    cpu: int
    file_size: int
    open_files: int
    abi: int  # of Landlock, at most the kernel's

    def stand(self) -> int:
        """A descriptor of the filter's listener, closed on exec. Raises `NoWall`."""
        self._limits()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        header, nothing = struct.pack("<Ii", 0x20080522, 0), bytes(24)
        if _libc.syscall(CAPSET, header, nothing):
            raise NoWall("capabilities cannot be given up")
        self._landlock()
        return self._filter()

    def _limits(self) -> None:
        limits = {
            resource.RLIMIT_AS: self.memory,
            resource.RLIMIT_FSIZE: self.file_size,
            resource.RLIMIT_NOFILE: self.open_files,
            resource.RLIMIT_CORE: 1,  # 0 would still start a program that takes core dumps from a pipe; see core(5)
            resource.RLIMIT_SIGPENDING: 256,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        try:
            for which, most in limits.items():
                hard = resource.getrlimit(which)[1]
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.setrlimit(which, (most, most))
            most = min(self.cpu + 1, resource.getrlimit(resource.RLIMIT_CPU)[1] & 2**63 - 1)
            resource.setrlimit(
                resource.RLIMIT_CPU, (min(self.cpu, most), most)
            )  # SIGXCPU tells; a second later, SIGKILL
        except (OSError, ValueError) as error:
            raise NoWall(f"limits cannot be set: {error}") from None

    def _landlock(self) -> None:
        if self.abi < 1:
            raise NoWall("the kernel has no Landlock (Linux 5.13, and `landlock` among its security modules)")
        files = (1 << _RIGHTS.get(self.abi, 16)) - 1
        handled = struct.pack("<QQQ", files, 3, 3)[: 8 if self.abi < 4 else 16 if self.abi < 6 else 24]  # TCP; scopes
        rules = _libc.syscall(LANDLOCK_CREATE, handled, len(handled), 0)
        if rules < 0:
            raise NoWall(f"Landlock: {os.strerror(ctypes.get_errno())}")
        read = EXECUTE | READ_FILE | READ_DIR
        for path in self.readable:
            self._allow(rules, path, read)
        for path, rights in DEVICES.items():
            self._allow(rules, path, rights)
        self._allow(rules, self.scratch, files & 0x7FFF & ~_SPECIAL)
        if _libc.syscall(LANDLOCK_RESTRICT, rules, 0):
            raise NoWall(f"Landlock: {os.strerror(ctypes.get_errno())}")
        os.close(rules)

    def _allow(self, rules: int, path: str, rights: int) -> None:
        """A path that is not there needs no right. Rights of folders are none of a file's."""
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        if not os.path.isdir(path):
            rights &= EXECUTE | WRITE_FILE | READ_FILE
        rule = struct.pack("<Qi", rights, place)
        failed = _libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(place)
        if failed:
            raise NoWall(f"Landlock: {path}: {os.strerror(ctypes.get_errno())}")

    def _filter(self) -> int:
        code = syscalls.program(self.abi)
        kept = ctypes.create_string_buffer(code, len(code))
        header = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(kept))
        listener = _libc.syscall(SECCOMP, 1, 1 << 3, header)  # SECCOMP_SET_MODE_FILTER, _NEW_LISTENER
        if listener < 0:
            raise NoWall(f"seccomp with a listener: {os.strerror(ctypes.get_errno())} (Linux 5.5)")
        return int(listener)
