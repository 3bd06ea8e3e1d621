"""Adapters as peft makes them, with values that no training has to find, and the embedded base in other dtypes, and shallow."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.model import Base
from tests.pipeline.shallow import shallow_base


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_adapter(base_folder, use_dora=True, …)`: a folder as peft saves it, of options of its `LoraConfig`.

    On `model` where it is given, say a quantised one; `config` is another peft configuration in place of LoRA.
    """
    import torch

    made = 0

    def make(folder: Path, *, model: Any = None, config: Any = None, **options: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        nonlocal made
        made += 1
        torch.manual_seed(made)
        base = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(base, config or LoraConfig(**plain | options))
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(values, std=0.02)
            elif "lora_magnitude_vector" in name:
                values.data *= 1 + 0.2 * torch.randn_like(values)
        out = tmp_path_factory.mktemp("adapter")
        adapted.save_pretrained(out)
        return out

    return make


@pytest.fixture(scope="session")
def stored_as(base: Base) -> Callable[..., Path]:
    """`stored_as(folder, torch.bfloat16)`: the embedded base, its weights in that dtype, in a new folder."""
    from safetensors.torch import load_file, save_file

    def store(folder: Path, dtype: Any) -> Path:
        shutil.copytree(base.folder, folder)
        weights = folder / "model.safetensors"
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        return folder

    return store


@pytest.fixture(scope="session")
def shallow(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow_base(base, tmp_path_factory.mktemp("shallow") / "base")
