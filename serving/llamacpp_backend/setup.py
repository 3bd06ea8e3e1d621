"""Makes llama.cpp's environment: what `make setup-llamacpp` runs, once, for about ten minutes.

    .venv/bin/python -m serving.llamacpp_backend.setup

    requirements.txt         the source distribution of its Python binding, which holds all of llama.cpp
    requirements-build.txt   what unpacks it

Built for this CPU, into `.venv-llamacpp/llama.cpp`: its server, its quantiser and its library; beside them its converter
and the binding's `ctypes` declarations. One line of its server is changed (`TOKENS_ONLY`). The stamp that says that all
is there is written last, after the library was loaded; an interrupted run is run again and goes on with what is built.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import bootstrap
from pipeline.to_gguf.llamacpp import LlamaCpp, cpu_features, environment_folder
from pipeline.workspace import INSTALLED

HERE = Path(__file__).parent
SOURCE_PIN, BUILD_PINS = HERE / "requirements.txt", HERE / "requirements-build.txt"
NEEDED_GB = 2.0
TARGETS = ("llama-server", "llama-quantize")
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",  # libraries are found beside the programs, wherever the folder goes
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # else it is fetched while building
)
SERVER = "tools/server/server-context.cpp"
TEXT = "        const std::string token_str = result.text_to_send;\n"
# The server waits for whole characters and streams only the last of their tokens' ids. Who asks for ids gets ids alone.
TOKENS_ONLY = "        if (slot.task->params.return_tokens) { result.text_to_send.clear(); }\n" + TEXT


def main() -> None:
    bootstrap.check_python()
    folder = environment_folder()
    found = LlamaCpp.find()
    if found and json.loads((folder / INSTALLED).read_text())["pins"] == pins_hash():
        bootstrap.say(f"{folder.name} holds llama.cpp, as llama-cpp-python {found.version} has it")
    else:
        install(folder)


def install(folder: Path) -> None:
    check_tools(folder.parent)
    (folder / INSTALLED).unlink(missing_ok=True)
    began = time.monotonic()
    bootstrap.say(f"building llama.cpp {version()} into {folder.name}: about ten minutes on two cores")
    if not bootstrap.is_whole_venv(str(folder)):
        bootstrap.run(sys.executable, "-m", "venv", "--clear", str(folder))
    pip = bootstrap.pip_of(str(folder))
    bootstrap.run(*pip, "--require-hashes", "--no-deps", "-r", str(BUILD_PINS))
    source = unpacked(folder)
    built = build(source / "vendor" / "llama.cpp", folder / "build")
    assemble(source, built, folder / "llama.cpp")
    loaded = "import sys; sys.path.insert(0, sys.argv[1]); from llama_cpp import llama_cpp"
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(folder / "llama.cpp" / "bin")}
    python = str(folder / "bin" / "python")
    run([python, "-c", loaded, str(folder / "llama.cpp" / "python")], folder / "build.log", environment)
    shutil.rmtree(folder / "source")
    shutil.rmtree(folder / "build")
    stamp = {"build": "cpu", "version": version(), "cpu": cpu_features(), "pins": pins_hash()}
    (folder / INSTALLED).write_text(json.dumps(stamp))
    size = sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6
    bootstrap.say(f"{folder.name} is ready: {size:.0f} MB, {time.monotonic() - began:.0f} s")


def check_tools(root: Path) -> None:
    free = shutil.disk_usage(root).free / 1e9
    if free < NEEDED_GB:
        bootstrap.fail(
            f"llama.cpp needs {NEEDED_GB:.0f} GB of disk while it is built, {free:.1f} GB are free at {root}"
        )
    missing = [] if shutil.which("cmake") else ["cmake"]
    missing += [] if shutil.which("ninja") or shutil.which("make") else ["ninja"]
    missing += [] if any(shutil.which(name) for name in ("c++", "g++", "clang++")) else ["g++"]
    if missing:
        packages = " ".join(name.replace("ninja", "ninja-build") for name in missing)
        bootstrap.fail(f"llama.cpp is built here and needs {', '.join(missing)}; try sudo apt-get install {packages}")


def unpacked(folder: Path) -> Path:
    """The source, its hash checked, in a folder that has its name only when all of it is there."""
    source = folder / "source"
    if source.exists() and (source / "pin").read_text() == SOURCE_PIN.read_text():
        return source
    partial = folder / "source.partial"
    for left in (source, partial, folder / "build"):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    pip = [word if word != "install" else "download" for word in bootstrap.pip_of(str(folder))]
    options = ["--require-hashes", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    bootstrap.run(*pip, *options, "--dest", str(partial), "-r", str(SOURCE_PIN))
    archive = next(partial.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(partial, filter="data")
    archive.unlink()
    inner = next(path for path in partial.iterdir() if path.is_dir())
    server = inner / "vendor" / "llama.cpp" / SERVER
    text = server.read_text("utf-8")
    if text.count(TEXT) != 1:
        bootstrap.fail(f"llama.cpp's {SERVER} is not as expected; the pin and the change made to it belong together")
    server.write_text(text.replace(TEXT, TOKENS_ONLY), "utf-8")
    (inner / "pin").write_text(SOURCE_PIN.read_text())
    inner.rename(source)
    shutil.rmtree(partial)
    return source


def build(source: Path, out: Path) -> Path:
    """Only the targets that are used. What an interrupted build has compiled is kept."""
    log, cores = out.parent / "build.log", os.cpu_count() or 1
    log.unlink(missing_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(["cmake", *generator, "-S", str(source), "-B", str(out), *CMAKE], log)
    run(["cmake", "--build", str(out), "--parallel", str(cores), "--target", *TARGETS], log)
    return out / "bin"


def assemble(source: Path, built: Path, out: Path) -> None:
    """Programs and libraries, converter, declarations: all of `llama.cpp/`."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "python" / "llama_cpp").mkdir(parents=True)
    (out / "bin").mkdir()
    for file in (*built.glob("*.so*"), *(built / target for target in TARGETS)):
        shutil.copy2(file, out / "bin" / file.name, follow_symlinks=False)
    vendored = source / "vendor" / "llama.cpp"
    shutil.copy2(vendored / "convert_hf_to_gguf.py", out)
    shutil.copy2(vendored / "LICENSE", out)
    shutil.copytree(vendored / "conversion", out / "conversion")
    shutil.copytree(vendored / "gguf-py" / "gguf", out / "gguf-py" / "gguf")
    for name in ("llama_cpp.py", "_ctypes_extensions.py"):
        shutil.copy2(source / "llama_cpp" / name, out / "python" / "llama_cpp")
    (out / "python" / "llama_cpp" / "__init__.py").touch()  # the binding's own imports what is not needed here


def run(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.stderr.write("\n".join(log.read_text("utf-8", "replace").splitlines()[-20:]) + "\n")
        bootstrap.fail(f"`{command[0]} {command[1]} …` failed; its last words are above, all of them in {log}")


def version() -> str:
    return SOURCE_PIN.read_text().partition("==")[2].split()[0]


def pins_hash() -> str:
    digest = hashlib.sha256()
    for part in (SOURCE_PIN.read_text(), BUILD_PINS.read_text(), TOKENS_ONLY, *CMAKE):
        digest.update(part.encode())
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        bootstrap.fail("interrupted; run `make setup-llamacpp` again to go on")
