"""An adapter to alter, and a base with an output layer and biases of its own."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from alter import altered
from safetensors.torch import load_file, save_file

from pipeline.model import Base


@pytest.fixture(scope="module")
def untied(stored_as: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """`untied(dtype)`: the embedded base with an output layer and biases of its own."""

    @cache
    def make(dtype: torch.dtype) -> Path:
        folder = stored_as(tmp_path_factory.mktemp("untied") / "base", dtype)
        tensors = load_file(folder / "model.safetensors")
        torch.manual_seed(2)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.1
        for name in [name for name in tensors if "self_attn" in name]:
            tensors[name.replace(".weight", ".bias")] = 0.1 * torch.randn(len(tensors[name])).to(dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        altered(folder / "config.json", tie_word_embeddings=False, attention_bias=True)
        return folder

    return make


@pytest.fixture(scope="module")
def made_adapter(base: Base, make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(base.folder, target_modules=["q_proj", "up_proj"])


@pytest.fixture
def plain_adapter(made_adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_adapter, tmp_path / "adapter")
