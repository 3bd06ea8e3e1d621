"""Which system calls the sandbox lets through: a seccomp filter in classic BPF, for x86-64 alone.

What is not named is refused: with EPERM, or, where the number is newer than any that this list could know, with ENOSYS, on
which libraries fall back to older calls. Calls of another architecture (32-bit `int 0x80`) or of x32 kill the process.
Calls marked ASK wait until the keeper (`eval/sandbox/keeper.py`) has answered: those that make a process, a thread or a file are
counted, and signals go to the sandbox's own processes alone (seccomp_unotify(2)).

A call is let through only where it can neither reach beyond the process, the files that Landlock allows and what it was
given, nor hold memory that no limit counts (memfd, shared segments, message queues). fcntl's F_SETOWN sends signals, prlimit
sets the limits of others, and a datagram socket of a pair writes to any address: they are why arguments are looked at.
"""

import errno
import socket
import struct

ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
X32 = 0x40000000
FIRST_UNKNOWN = 424  # from here on numbers are the same on all architectures, and libraries expect ENOSYS

ALLOW, ASK, KILL = 0x7FFF0000, 0x7FC00000, 0x80000000  # SECCOMP_RET_ALLOW, _USER_NOTIF, _KILL_PROCESS
NAMESPACES = 0x7E020000  # CLONE_NEW*
CLONE_THREAD = 0x10000
O_CREAT, O_TRUNC, O_TMPFILE, O_ACCMODE = 0o100, 0o1000, 0x400000, 3
WHOLE = 0xFFFFFFFF


def fail(number: int) -> int:
    return 0x00050000 | number  # SECCOMP_RET_ERRNO; 0: says that it succeeded, and does nothing


DENY = fail(errno.EPERM)

_ALLOWED = """
    read:0 write:1 close:3 stat:4 fstat:5 lstat:6 poll:7 lseek:8 mmap:9 mprotect:10 munmap:11 brk:12 rt_sigaction:13
    rt_sigprocmask:14 rt_sigreturn:15 pread64:17 pwrite64:18 readv:19 writev:20 access:21 pipe:22 select:23
    sched_yield:24 mremap:25 msync:26 madvise:28 dup:32 dup2:33 pause:34 nanosleep:35 getitimer:36 alarm:37
    setitimer:38 getpid:39 sendfile:40 sendto:44 recvfrom:45 sendmsg:46 recvmsg:47 shutdown:48 getsockname:51
    getpeername:52 getsockopt:55 execve:59 exit:60 wait4:61 uname:63 flock:73 fsync:74 fdatasync:75 ftruncate:77
    getdents:78 getcwd:79 chdir:80 fchdir:81 rename:82 rmdir:84 unlink:87 readlink:89 umask:95 gettimeofday:96
    getrlimit:97 getrusage:98 sysinfo:99 times:100 getuid:102 getgid:104 geteuid:107 getegid:108 setpgid:109
    getppid:110 getpgrp:111 setsid:112 getgroups:115 getresuid:118 getresgid:120 getpgid:121 getsid:124 capget:125
    rt_sigpending:127 rt_sigtimedwait:128 rt_sigsuspend:130 sigaltstack:131 statfs:137 fstatfs:138 getpriority:140
    sched_getparam:143 sched_getscheduler:145 sched_get_priority_max:146 sched_get_priority_min:147 mlock:149
    munlock:150 arch_prctl:158 setrlimit:160 gettid:186 time:201 futex:202 sched_getaffinity:204 epoll_create:213
    getdents64:217 set_tid_address:218 restart_syscall:219 fadvise64:221 timer_create:222 timer_settime:223
    timer_gettime:224 timer_getoverrun:225 timer_delete:226 clock_gettime:228 clock_getres:229 clock_nanosleep:230
    epoll_wait:232 epoll_ctl:233 waitid:247 newfstatat:262 unlinkat:263 renameat:264 readlinkat:267 faccessat:269
    pselect6:270 ppoll:271 set_robust_list:273 epoll_pwait:281 signalfd:282 timerfd_create:283 eventfd:284
    timerfd_settime:286 timerfd_gettime:287 signalfd4:289 eventfd2:290 epoll_create1:291 dup3:292
    pipe2:293 preadv:295 pwritev:296 getcpu:309 renameat2:316 getrandom:318 membarrier:324 copy_file_range:326
    preadv2:327 pwritev2:328 statx:332 rseq:334 close_range:436 faccessat2:439 epoll_pwait2:441
"""
_JUDGED = """
    open:2 ioctl:16 socketpair:53 clone:56 fork:57 vfork:58 kill:62 fcntl:72 truncate:76 mkdir:83 creat:85 link:86
    symlink:88 chmod:90 fchmod:91 utime:132 prctl:157 setxattr:188 lsetxattr:189 fsetxattr:190 getxattr:191
    lgetxattr:192 fgetxattr:193 listxattr:194 llistxattr:195 flistxattr:196 removexattr:197 lremovexattr:198
    fremovexattr:199 tkill:200 exit_group:231 tgkill:234 utimes:235 openat:257 mkdirat:258 futimesat:261 linkat:265
    symlinkat:266 fallocate:285 fchmodat:268 utimensat:280 prlimit64:302 fchmodat2:452
"""


def _numbers(table: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (call.partition(":") for call in table.split())}


ALLOWED, JUDGED = _numbers(_ALLOWED), _numbers(_JUDGED)
NAMES = {number: name for name, number in JUDGED.items()}

# What decides, in turn: (argument & mask) == value, then the action; the last has no condition.
Rule = tuple[int, int, int, int] | int
_OPENING: tuple[tuple[int, int, int], ...] = (
    (
        O_TRUNC | O_ACCMODE,
        O_TRUNC,
        fail(errno.EACCES),
    ),  # Landlock before ABI 3 would let it empty what it may only read
    (O_CREAT, O_CREAT, ASK),
    (O_TMPFILE, O_TMPFILE, ASK),
)
_STREAM = -1  # then the type decides: a datagram socket could write to any address that it is told
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # dup, flags, locks, F_GETPIPE_SZ; never F_SETOWN, F_SETSIG
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_PRCTL = (3, 15, 16, 0x53564D41)  # GET_DUMPABLE, SET_NAME, GET_NAME, SET_VMA
_DOES_NOTHING = (
    "chmod",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "utime",
    "utimes",
    "futimesat",
    "utimensat",
)  # Landlock has no say


def _rules(abi: int) -> dict[int, tuple[Rule, ...]]:
    """Calls whose arguments decide, or the keeper. `abi`: Landlock's."""
    rules: dict[str, tuple[Rule, ...]] = dict.fromkeys(JUDGED, (ASK,))
    rules |= {
        "open": (*((1, *rule) for rule in _OPENING), ALLOW),
        "openat": (*((2, *rule) for rule in _OPENING), ALLOW),
        "clone": (*((0, 1 << bit, 1 << bit, DENY) for bit in range(32) if NAMESPACES >> bit & 1), ASK),
        "socketpair": ((0, WHOLE, socket.AF_UNIX, _STREAM), DENY),
        "fcntl": (*((1, WHOLE, command, ALLOW) for command in _FCNTL), DENY),
        "ioctl": (*((1, WHOLE, command, ALLOW) for command in _IOCTL), fail(errno.ENOTTY)),
        "prctl": (*((0, WHOLE, option, ALLOW) for option in _PRCTL), DENY),
        "prlimit64": ((0, WHOLE, 0, ALLOW), DENY),  # of the caller alone
        "fallocate": ((1, WHOLE, 0, ALLOW), fail(errno.EOPNOTSUPP)),  # beyond a file's end, no limit holds on ext4
        "truncate": (ALLOW if abi >= 3 else fail(errno.EACCES),),
    }
    rules |= dict.fromkeys(_DOES_NOTHING, (fail(0),))
    rules |= {name: (fail(errno.ENOTSUP),) for name in JUDGED if "xattr" in name}
    return {JUDGED[name]: rule for name, rule in rules.items()}


def program(abi: int) -> bytes:
    """The filter, as an array of `struct sock_filter`."""
    code = [_load(4), _equal(ARCHITECTURE, 1, 0), _give(KILL), _load(0), (0x35, 0, 1, X32), _give(KILL)]
    for number, rules in _rules(abi).items():
        body: list[tuple[int, int, int, int]] = []
        for rule in rules:
            if isinstance(rule, int):
                body.append(_give(rule))
                continue
            argument, mask, value, action = rule
            then = [_give(action)]
            if action == _STREAM:
                then = [_load(16 + 8), (0x54, 0, 0, 0xF), _equal(1, 0, 1), _give(ALLOW), _give(DENY)]
            body += [_load(16 + 8 * argument), (0x54, 0, 0, mask), _equal(value, 0, len(then)), *then]
        code += [_equal(number, 0, len(body)), *body]
    for number in ALLOWED.values():
        code += [_equal(number, 0, 1), _give(ALLOW)]
    code += [(0x35, 0, 1, FIRST_UNKNOWN), _give(fail(errno.ENOSYS)), _give(DENY)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _load(offset: int) -> tuple[int, int, int, int]:
    """A word of `struct seccomp_data`: the call at 0, the architecture at 4, the arguments' low halves from 16."""
    return 0x20, 0, 0, offset


def _equal(value: int, then: int, otherwise: int) -> tuple[int, int, int, int]:
    """Instructions to skip."""
    return 0x15, then, otherwise, value


def _give(action: int) -> tuple[int, int, int, int]:
    return 0x06, 0, 0, action
