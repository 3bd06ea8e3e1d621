"""What code in the sandbox tries in order to leave it: each attempt is Python that fails inside and would succeed outside.

`eval.sandbox.sandbox.available` makes every one of them before anything else runs. A name's first word is the wall that it tries.
They find `call` (a system call, which raises OSError), `secret` and `outside` (a file and a folder that it must not reach; a
socket listens under the folder's name, in the abstract), `readable` (a file that it may read), `parent` (a process outside)
and `most` (its limits).
"""

# Numbers of system calls are x86-64's.

PRELUDE = """
import ctypes, fcntl, json, mmap, os, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    done = libc.syscall(ctypes.c_long(number), *(a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done
def native(code):
    with mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        here = ctypes.c_char.from_buffer(page)
        done = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(here))()
        del here
    if done <= 0:
        raise OSError(-done, os.strerror(-done))
def in_child(what, *arguments):
    if not (child := os.fork()):
        try:
            what(*arguments)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(abs(code), "the error, or the signal")
def open_and_send():
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as end:
        end.sendto(b"out", "\\0" + os.path.basename(outside))
def own(target, how=10):
    ends = os.pipe()
    fcntl.fcntl(ends[0], 8, target)  # F_SETOWN
    fcntl.fcntl(ends[0], how, signal.SIGCONT)  # F_SETSIG
def in_proc(what):
    return open(f"/proc/{parent}/{what}", "rb")
def known(number):
    try:
        call(number, 0, 0)
    except OSError as error:
        if error.errno == 38:
            raise
def inherited():
    for number in range(3, 256):
        try:
            return os.fstat(number)
        except OSError:
            pass
    raise OSError("none")
def privileged():
    held = ctypes.create_string_buffer(24)
    call(125, (0x20080522).to_bytes(8, "little"), ctypes.addressof(held))
    if not any(held.raw[:8] + held.raw[12:20]):
        raise OSError("none")
def crowd():
    held = os.pipe()
    for _ in range(most["processes"]):
        if not os.fork():
            os.close(held[1])
            os.read(held[0], 1)
            os._exit(0)
def threads():
    threading.stack_size(65536)  # 64 of the usual size would be too much memory
    for _ in range(most["threads"] + 1):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""

ATTEMPTS = {
    "network: inet": "socket.socket(socket.AF_INET)",
    "network: inet, datagrams": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "network: inet6": "socket.socket(socket.AF_INET6)",
    "network: unix": "socket.socket(socket.AF_UNIX)",
    "network: abstract": "socket.socket(socket.AF_UNIX).bind(b'\\0' + os.urandom(8))",
    "network: netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "network: vsock": "socket.socket(socket.AF_VSOCK)",
    "network: packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "network: kernel's ciphers": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "network: a pair that writes elsewhere": "open_and_send()",
    "files: read": "open(secret).read()",
    "files: read through a symlink": "os.symlink(secret, 'link'); open('link').read()",
    "files: read through a hard link": "os.link(secret, 'hard'); open('hard').read()",
    "files: list": "os.listdir(outside)",
    "files: list the root": "os.listdir('/')",
    "files: write": "open(secret, 'a').write('x')",
    "files: make": "open(outside + '/made', 'w')",
    "files: make a folder": "os.mkdir(outside + '/made-folder')",
    "files: make a link": "os.symlink('x', outside + '/made-link')",
    "files: empty by path": "os.truncate(secret, 0)",
    "files: empty while reading": "os.open(readable, os.O_RDONLY | os.O_TRUNC)",
    "files: move in": "os.rename(secret, 'mine')",
    "files: move out": "open('own', 'w').close(); os.rename('own', outside + '/moved')",
    "files: delete": "os.unlink(secret)",
    "files: delete a folder": "os.rmdir(outside + '/empty')",
    "files: name": "os.setxattr(secret, 'user.x', b'1')",
    "files: by handle": "call(304, -100, bytes(16), 0)",
    "files: a device": "os.mknod('device', 0o020600, os.makedev(1, 3))",
    "files: /dev": "os.listdir('/dev')",
    "files: /dev/kmsg": "open('/dev/kmsg')",
    "files: a terminal": "open('/dev/ptmx')",
    "files: /dev/shm": "open(made := f'/dev/shm/made-{os.getpid()}', 'w'); os.unlink(made)",
    "files: /sys": "os.listdir('/sys')",
    "files: /etc/passwd": "open('/etc/passwd').read()",
    "files: write what it may read": "os.open(readable, os.O_WRONLY)",
    "files: change a mode": "os.chmod(readable, 0o777); assert os.stat(readable).st_mode & 0o777 == 0o777",
    "files: change times": "os.utime(readable, (1, 1)); assert os.stat(readable).st_mtime == 1",
    "files: descriptors": "inherited()",
    "processes: environment": "in_proc('environ').read()",
    "processes: memory": "in_proc('mem')",
    "processes: memory, from the side": "call(310, parent, bytes(16), 1, bytes(16), 1, 0)",
    "processes: trace": "call(101, 0x4206, parent, 0, 0)",
    "processes: be traced": "in_child(call, 101, 0, 0, 0, 0)",
    "processes: signal": "os.kill(parent, 0)",
    "processes: signal all": "os.kill(-1, 0)",
    "processes: signal a group": "os.kill(-(os.getpgid(parent) or parent), 0)",
    "processes: signal a thread": "call(234, parent, parent, 0)",
    "processes: signal by queue": "call(129, parent, 0, bytes(8) + b'\\xff' * 4 + bytes(116))",
    "processes: handle": "call(434, parent, 0)",
    "processes: signal through a pipe": "own(parent)",
    "processes: signal through a socket": "fcntl.ioctl(socket.socketpair()[0], 0x8901, parent.to_bytes(4, 'little'))",
    "processes: limits of others": "resource.prlimit(parent, resource.RLIMIT_CORE)",
    "processes: priority": "os.setpriority(os.PRIO_PROCESS, parent, 19)",
    "processes: processor": "os.sched_setaffinity(parent, os.sched_getaffinity(0))",
    "processes: outlive": "call(157, 1, 0, 0, 0, 0)",
    "processes: adopt": "call(157, 36, 1, 0, 0, 0)",
    "kernel: namespace": "call(272, 0x10000000)",
    "kernel: namespace by clone": "in_child(call, 56, 0x10000011, 0, 0, 0, 0)",
    "kernel: clone3": "known(435)",
    "kernel: enter a namespace": "call(308, os.open('/proc/self/ns/net', 0), 0)",
    "kernel: mount": "call(165, b'none', (outside + '/empty').encode(), b'tmpfs', 0, 0)",
    "kernel: open a tree": "call(428, -100, b'/', 1)",
    "kernel: chroot": "os.chroot('.')",
    "kernel: io_uring": "call(425, 4, bytes(120))",
    "kernel: keys": "call(250, 0, -3, 1)",
    "kernel: add a key": "call(248, b'user', b'n', b'v', 1, -2)",
    "kernel: bpf": "call(321, 0, bytes(128), 128)",
    "kernel: perf": "call(298, b'\\1\\0\\0\\0p\\0\\0\\0' + bytes(104), 0, -1, -1, 0)",
    "kernel: userfaultfd": "call(323, 1)",
    "kernel: filter": "call(317, 2, 0, (0x7fff0000).to_bytes(4, 'little'))",
    "kernel: log": "call(103, 10, 0, 0)",
    "kernel: personality": "call(135, 0xffffffff)",
    "kernel: watch": "call(294, 0)",
    "kernel: 32-bit calls": "in_child(native, bytes.fromhex('b814000000cd80c3'))",
    "kernel: x32 calls": "in_child(native, bytes.fromhex('b8270000400f05c3'))",
    "kernel: a call by hand": "native(bytes.fromhex('b829000000bf02000000be0100000031d20f05c3'))",  # socket
    "kernel: privileges": "privileged()",
    "kernel: become another": "os.setuid(12345)",
    "memory: one block": "bytearray(most['memory'])",
    "memory: memfd": "os.memfd_create('x')",
    "memory: shared segment": "call(31, call(29, 0, 4096, 0o1600), 0, 0)",
    "memory: queue": "call(240, b'made', 0o102, 0o600, 0); call(241, b'made')",
    "memory: wider pipe": "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "memory: more": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "time: more": "resource.setrlimit(resource.RLIMIT_CPU, (1 << 30, 1 << 30))",
    "files: too large": "open('large', 'wb').truncate(most['file_size'] + 1)",
    "files: too large, beyond its end": "call(285, os.open('kept', 65), 1, 0, most['file_size'] + 1)",
    "files: too large, copied": "os.copy_file_range(os.open('some', 66), os.open('copy', 66), os.write("
    "os.open('some', 1), b'some'), 0, most['file_size'])",
    "files: too large, written": "[os.write(f, bytes(9999)) for f in [os.open('all', 65)] * (most['file_size'] // 9999 + 2)]",
    "files: too many": "for i in range(most['files'] + 1): open(f'many-{i}', 'w').close()",
    "environment": "assert set(os.environ) - {'PATH', 'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE', 'OPENSSL_CONF'}",
    "processes: too many": "crowd()",  # from here on, each uses up what there is
    "processes: too many threads": "threads()",
    "files: too many open": "held = [os.dup(0) for _ in range(most['open_files'])]",
}

PROGRAM = """
tried = {}
for name, attempt in attempts.items():
    try:
        exec(attempt)
    except BaseException as error:
        tried[name] = f"{type(error).__name__} {getattr(error, 'errno', None) or error}"
    else:
        tried[name] = None
print(json.dumps(tried), flush=True)
os._exit(0)
"""


def program(attempts: dict[str, str], **names: object) -> str:
    """One program that makes them all, and prints as JSON how each failed: null where it succeeded."""
    return "".join(
        [PRELUDE, *(f"{name} = {value!r}\n" for name, value in names.items()), f"attempts = {attempts!r}", PROGRAM]
    )
