"""Which backend serves, and why: the one asked for, or fail; else vLLM where it and a GPU are; else transformers.

`transformers` and `llamacpp` run behind the server of this project (`serving.front.app`), vLLM behind its own.
"""

import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, get_args

from pipeline.config import ServeConfig
from pipeline.stage import Job
from pipeline.workspace import CHECKOUT, INSTALLED

BACKENDS: tuple[str, ...] = get_args(ServeConfig.model_fields["backend"].annotation)
VLLM_ALONE = {"adapters": [], "tensor_parallel": 1, "pipeline_parallel": 1, "vllm_args": []}  # and what leaves them out


@dataclass(frozen=True)
class Environment:
    """A backend's own virtual environment, whole."""

    python: Path
    build: str  # cuda | cpu
    version: str

    @classmethod
    def find(cls, name: str) -> Self | None:
        """`ALETHEIA_VLLM`, else `.venv-vllm` in the checkout; None where it is not, or not wholly, installed."""
        folder = Path(os.environ.get(f"ALETHEIA_{name.upper()}") or CHECKOUT / f".venv-{name}").expanduser().absolute()
        python = folder / "bin" / "python"
        try:
            stamp = json.loads((folder / INSTALLED).read_text("utf-8"))
            return cls(python, stamp["build"], stamp["version"]) if python.exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def has(self, package: str) -> bool:
        return any(self.python.parent.parent.glob(f"lib/python3*/site-packages/{package}/__init__.py"))


@dataclass(frozen=True)
class Choice:
    backend: str
    reason: str
    environment: Environment | None = None  # vLLM's

    @property
    def version(self) -> str:
        """Of the library that computes."""
        if self.backend == "llamacpp":
            from pipeline.to_gguf.llamacpp import LlamaCpp

            return LlamaCpp.required().version
        return self.environment.version if self.environment else version("transformers")

    def __str__(self) -> str:
        return f"{self.backend} {self.version}: {self.reason}"


def choose(job: Job) -> Choice:
    """Raises `UserError` where what was asked for cannot be had."""
    wanted = job.config.serve_config.backend
    vllm = Environment.find("vllm")
    gpu = _has_gpu(job) if wanted in ("auto", "vllm") else False
    if wanted == "auto":
        choice = _automatic(vllm, gpu)
    elif wanted == "vllm":
        choice = Choice("vllm", _asked_for_vllm(job, vllm, gpu), vllm)
    else:
        choice = Choice(wanted, "asked for")
    if choice.backend != "vllm":
        _refuse_what_only_vllm_does(job, choice, vllm)
    return choice


def _automatic(vllm: Environment | None, gpu: bool) -> Choice:
    if gpu and vllm and vllm.build == "cuda":
        return Choice("vllm", "a GPU and vLLM's environment are here", vllm)
    if gpu:
        why = "holds its CPU build" if vllm else "is not here: `make setup-vllm` makes it"
        return Choice("transformers", f"there is a GPU, but vLLM's environment {why}")
    hint = "; vLLM's CPU build is here for `--backend vllm`" if vllm and vllm.build == "cpu" else ""
    return Choice("transformers", f"no GPU is used{hint}")


def _asked_for_vllm(job: Job, vllm: Environment | None, gpu: bool) -> str:
    if vllm is None:
        raise job.profile.error("serve_config.backend", "vLLM's environment is not installed here", "make setup-vllm")
    if vllm.build == "cuda" and not gpu:
        what = "vLLM's environment holds the CUDA build, and no GPU is used here"
        raise job.profile.error("serve_config.backend", what, "make setup-vllm BUILD=cpu, or --backend transformers")
    return f"asked for, its {'CUDA' if vllm.build == 'cuda' else 'CPU'} build"


def _refuse_what_only_vllm_does(job: Job, choice: Choice, vllm: Environment | None) -> None:
    for key, off in VLLM_ALONE.items():
        value: Any = getattr(job.config.serve_config, key)
        if value != off:
            remedy = "--backend vllm" if vllm else "make setup-vllm, then --backend vllm"
            what = f"only vLLM does that, and the backend is {choice.backend} ({choice.reason})"
            raise job.profile.error(f"serve_config.{key}", what, remedy)


def _has_gpu(job: Job) -> bool:
    """One that this profile may use."""
    if job.config.device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()
