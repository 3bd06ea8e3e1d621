"""Makes .venv from requirements.lock: what `make setup` runs, with the system's Python and nothing installed.

Does nothing when .venv already holds these pins. The stamp that says so is written last, so an interrupted run is
simply run again. Kept free of new syntax, so that an old Python can say that it is too old.
"""

import hashlib
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
STAMP = os.path.join(VENV, ".installed")
PINS = ("requirements.lock", "pyproject.toml")
NEEDED_GB = 4.0  # the CPU build; a CUDA build of torch needs about 6 GB more
UNREACHABLE = (
    "Could not fetch URL",
    "Max retries exceeded",
    "Temporary failure in name resolution",
    "ConnectTimeout",
    "NewConnectionError",
    "No matching distribution found",
    "ProxyError",
    "ReadTimeoutError",
)


def fail(what):
    sys.exit("error: setup: " + what)


def pins_hash():
    digest = hashlib.sha256(sys.version.encode())
    for name in PINS:
        with open(os.path.join(HERE, name), "rb") as pins:
            digest.update(pins.read())
    return digest.hexdigest()


def is_done(pins):
    try:
        with open(STAMP) as stamp:
            return stamp.read() == pins and os.path.exists(os.path.join(VENV, "bin", "aletheia"))
    except OSError:
        return False


def run(*command):
    """Runs pip or venv. pip's own words are shown; a failure is put in one line after them."""
    done = subprocess.run(command, cwd=HERE, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return
    sys.stderr.write(done.stderr)
    if "No space left on device" in done.stderr:
        fail("the disk is full; make room and run `make setup` again")
    if any(sign in done.stderr for sign in UNREACHABLE):
        fail(
            "the package index cannot be reached or lacks a pinned package; check the network (pip config list), then run `make setup` again"
        )
    fail("`%s` failed; its last words are above" % " ".join(command[-4:]))


def main():
    if sys.version_info < (3, 11):
        fail("needs Python 3.11 or newer, this is %d.%d; try make setup PYTHON=python3.12" % sys.version_info[:2])
    pins = pins_hash()
    if is_done(pins):
        os.utime(STAMP)
        return
    free = shutil.disk_usage(HERE).free / 1e9
    if free < NEEDED_GB and not os.path.exists(VENV):
        fail("needs %.0f GB of disk, %.1f GB are free at %s; make room and run it again" % (NEEDED_GB, free, HERE))
    if os.path.exists(STAMP):
        os.unlink(STAMP)
    python = os.path.join(VENV, "bin", "python")
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--quiet")
    sys.stderr.write("setting up .venv from requirements.lock: a few minutes, about 2 GB\n")
    if not os.path.exists(os.path.join(VENV, "bin", "pip")):
        run(sys.executable, "-m", "venv", "--clear", VENV)
    torch = next(line.strip() for line in open(os.path.join(HERE, "requirements.lock")) if line.startswith("torch=="))
    run(*pip, torch)  # first and alone: where a local CPU build is offered, nothing else may pull the CUDA one
    run(*pip, "-r", "requirements.lock")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ".")
    with open(STAMP, "w") as stamp:
        stamp.write(pins)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; run `make setup` again to go on")
