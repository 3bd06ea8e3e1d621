"""Makes .venv from requirements.lock: what `make setup` runs, with the system's Python and nothing installed.

    python3 bootstrap.py            # does nothing when .venv already holds these pins
    python3 bootstrap.py --lock     # `make lock`: resolves the names in pyproject.toml anew and rewrites the pins

The stamp that says that all is installed is written last, so an interrupted run is simply run again. Kept free of new
syntax, so that an old Python can say that it is too old.
"""

# mypy: ignore-errors
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
STAMP = os.path.join(VENV, ".installed")
LOCK = os.path.join(HERE, "requirements.lock")
PINS = ("requirements.lock", "pyproject.toml")
NEEDED_GB = 4.0  # the CPU build; a CUDA build of torch needs about 6 GB more
UNREACHABLE = (
    "Could not fetch URL",
    "Max retries exceeded",
    "Temporary failure in name resolution",
    "Name or service not known",
    "ConnectTimeout",
    "NewConnectionError",
    "No matching distribution found",
    "ProxyError",
    "ReadTimeoutError",
)
LOCK_HEADER = """\
# Every package of .venv, exactly. Made by `make lock`; installed by `make setup`.
# torch's own CUDA packages, on a machine with them, are pinned by torch itself.
"""


def fail(what):
    sys.stderr.write("error: setup: %s\n" % what)
    sys.exit(2)


def main():
    check_python()
    if "--lock" in sys.argv:
        lock()
    elif is_done():
        os.utime(STAMP)
    else:
        install()


def check_python():
    if sys.version_info < (3, 11):
        fail("needs Python 3.11 or newer, this is %d.%d; try make setup PYTHON=python3.12" % sys.version_info[:2])


def install():
    free = shutil.disk_usage(HERE).free / 1e9
    if free < NEEDED_GB and not os.path.exists(VENV):
        fail("needs %.0f GB of disk, %.1f GB are free at %s; make room and run it again" % (NEEDED_GB, free, HERE))
    if os.path.exists(STAMP):
        os.unlink(STAMP)
    say("setting up .venv from requirements.lock: one to ten minutes, about 2 GB (more with CUDA)")
    if not is_whole_venv():
        run(sys.executable, "-m", "venv", "--clear", VENV)
    pip = pip_of(VENV)
    say("torch")
    run(*pip, torch_pin())  # first and alone: where a local CPU build is offered, nothing else may pull the CUDA one
    with open(LOCK) as pins:
        say("%d other packages" % sum("==" in line for line in pins))
    run(*pip, "-r", LOCK)
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", HERE)
    with open(STAMP, "w") as stamp:
        stamp.write(pins_hash())


def lock():
    """Installs the names of pyproject.toml, newest versions, with torch as pinned, and writes what that gave."""
    import tomllib

    with open(os.path.join(HERE, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)
    names = project["project"]["dependencies"] + project["dependency-groups"]["dev"] + ["setuptools"]
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        run(*pip_of(folder), torch_pin())
        run(*pip_of(folder), torch_pin(), *[name for name in names if name != "torch"])
        command = (os.path.join(folder, "bin", "python"), "-m", "pip", "freeze", "--all", "--exclude", "pip")
        frozen = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    with open(LOCK, "w") as out:
        out.write(LOCK_HEADER + frozen.replace("+cpu\n", "\n"))


def is_done():
    try:
        with open(STAMP) as stamp:
            return stamp.read() == pins_hash() and os.path.exists(os.path.join(VENV, "bin", "aletheia"))
    except OSError:
        return False


def is_whole_venv(venv=VENV):
    """Made by this Python, and not interrupted before pip was in it."""
    try:
        with open(os.path.join(venv, "pyvenv.cfg")) as config:
            same_python = "version = %s\n" % platform.python_version() in config.read()
    except OSError:
        return False
    return same_python and os.path.exists(os.path.join(venv, "bin", "pip"))


def pins_hash():
    digest = hashlib.sha256(sys.version.encode())
    for name in PINS:
        with open(os.path.join(HERE, name), "rb") as pins:
            digest.update(pins.read())
    return digest.hexdigest()


def torch_pin():
    with open(LOCK) as pins:
        return next(line.strip() for line in pins if line.startswith("torch=="))


def pip_of(venv):
    python = os.path.join(venv, "bin", "python")
    return (
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--quiet",
        "--retries",
        "2",
    )


def run(*command):
    """Runs pip or venv. When it fails its own words are shown, and one line after them says what to do."""
    done = subprocess.run(command, cwd=HERE, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return
    sys.stderr.write(done.stderr)
    if "No space left on device" in done.stderr:
        fail("the disk is full; make room and run it again")
    if any(sign in done.stderr for sign in UNREACHABLE):
        fail(
            "the package index cannot be reached or lacks a pin; check the network (pip config list), then run it again"
        )
    fail("`pip %s` failed; its last words are above" % " ".join(command[3:]))


def say(text):
    sys.stderr.write("setup: %s\n" % text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; run `make setup` again to go on")
