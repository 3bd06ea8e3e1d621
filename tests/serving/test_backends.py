"""Which backend serves, why, and what is refused with a remedy."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.stage import Job
from pipeline.workspace import INSTALLED
from serving.backends import Environment, choose
from tests.serving.vllm_backend.fake_vllm import install

Make = Callable[..., Job]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """`machine(gpu=True, vllm="cuda")`: what this machine has."""

    def make(gpu: bool = False, vllm: str | None = None) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setenv("ALETHEIA_VLLM", str(install(tmp_path / vllm, vllm) if vllm else tmp_path / "none"))

    make()
    return make


def on_gpu(job: Make, *settings: str) -> Job:
    return job("device=auto", *settings)


@pytest.mark.parametrize(
    ("gpu", "vllm", "backend", "reason"),
    [
        (True, "cuda", "vllm", "a GPU and vLLM's environment are here"),
        (True, "cpu", "transformers", "there is a GPU, but vLLM's environment holds its CPU build"),
        (True, None, "transformers", "there is a GPU, but vLLM's environment is not here: `make setup-vllm` makes it"),
        (False, "cuda", "transformers", "no GPU is used"),
        (False, "cpu", "transformers", "no GPU is used; vLLM's CPU build is here for `--backend vllm`"),
        (False, None, "transformers", "no GPU is used"),
    ],
)
def test_auto_takes_vllm_where_it_and_a_gpu_are(
    machine: Callable[..., None], job: Make, gpu: bool, vllm: str | None, backend: str, reason: str
) -> None:
    machine(gpu, vllm)
    choice = choose(on_gpu(job))
    assert (choice.backend, choice.reason) == (backend, reason)
    assert choice.version == ("0.32.0" if backend == "vllm" else version("transformers"))
    assert str(choice) == f"{backend} {choice.version}: {reason}"


def test_a_profile_that_says_cpu_gets_no_gpu(machine: Callable[..., None], job: Make) -> None:
    machine(gpu=True, vllm="cuda")
    assert choose(job("device=cpu")).backend == "transformers"
    with pytest.raises(UserError, match="holds the CUDA build, and no GPU is used here"):
        choose(job("device=cpu", "serve_config.backend=vllm"))


def test_what_is_asked_for_is_taken_or_refused_with_a_remedy(machine: Callable[..., None], job: Make) -> None:
    asked = "serve_config.backend=vllm"
    with pytest.raises(
        UserError, match=r"^--set: serve_config.backend: .* is not installed here; try make setup-vllm$"
    ):
        choose(job(asked))
    machine(vllm="cpu")
    choice = choose(job(asked))
    assert (choice.backend, choice.reason) == ("vllm", "asked for, its CPU build")
    assert choice.environment and choice.environment.python.exists()
    machine(gpu=True, vllm="cuda")
    assert choose(on_gpu(job, asked)).reason == "asked for, its CUDA build"
    assert choose(on_gpu(job, "serve_config.backend=transformers")).reason == "asked for"


@pytest.mark.parametrize(
    "setting", ["adapters=[EXP-2026-01-01-001]", "tensor_parallel=2", "pipeline_parallel=2", "vllm_args=[--seed=1]"]
)
def test_what_only_vllm_does_is_not_passed_over_in_silence(
    machine: Callable[..., None], job: Make, setting: str
) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"serve_config.{key}: only vLLM does that.*make setup-vllm, then --backend vllm"
    ):
        choose(job(f"serve_config.{setting}"))
    machine(vllm="cpu")
    with pytest.raises(UserError, match=r"the backend is transformers \(asked for\); try --backend vllm$"):
        choose(job(f"serve_config.{setting}", "serve_config.backend=transformers"))
    assert choose(job(f"serve_config.{setting}", "serve_config.backend=vllm")).backend == "vllm"


@pytest.mark.parametrize("stamp", [None, "", "{", "[]", '{"build": "cpu"}'])
def test_an_environment_that_was_not_wholly_installed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamp: str | None
) -> None:
    folder = install(tmp_path / "vllm")
    monkeypatch.setenv("ALETHEIA_VLLM", str(folder))
    assert Environment.find("vllm") == Environment(folder / "bin" / "python", "cpu", "0.32.0")
    (folder / INSTALLED).unlink()
    if stamp is not None:
        (folder / INSTALLED).write_text(stamp)
    assert Environment.find("vllm") is None


def test_a_package_of_the_environment_is_found_without_running_it(tmp_path: Path) -> None:
    environment = Environment(install(tmp_path / "vllm") / "bin" / "python", "cuda", "0.33.0")
    assert not environment.has("ray")
    package = tmp_path / "vllm" / "lib" / "python3.12" / "site-packages" / "ray"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert environment.has("ray")


def test_a_backend_that_does_not_exist_is_one_line(job: Make) -> None:
    with pytest.raises(UserError, match=r"^--set: serve_config.backend: must be 'auto', 'vllm', .*, not 'ollama'$"):
        job("serve_config.backend=ollama")
