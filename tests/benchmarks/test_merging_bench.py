"""The merge benchmark's own promises: both merge the same, work that is not the same is found, ratios are of a round."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import merging
from benchmarks.merging import ALONE, DEPTH, FASTER, FULL, MEMORY, PEFT, PROVEN, SMALL, Result
from pipeline.merge import Merge
from pipeline.profile import load_profile
from pipeline.records.find import sha256
from pipeline.stage import Job, run_stage
from pipeline.workspace import Workspace

SHAPE = SMALL | {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ours, by the command and alone, and peft's, of a small model, in this process."""
    root = merging.make_root(tmp_path_factory.mktemp("merging") / "root", SHAPE)
    workspace = Workspace(root)
    job = Job(workspace, load_profile(workspace, "bench", ["merge_config.check_logits=true"]))
    ours = run_stage(Merge, job).output / "model"
    for name, script in (("peft", PEFT), ("alone", ALONE)):
        words = ["-c", str(root / "base"), str(root / "checkpoints" / merging.SOURCE / "adapter"), str(root / name)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            exec(script, {})
    assert sha256(ours / "model.safetensors") == sha256(root / "alone" / "model.safetensors")
    return ours, root / "peft"


def test_both_merge_the_same(merged: tuple[Path, Path]) -> None:
    assert merging.differences(*merged) == []
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= {path.name for path in merged[1].iterdir()}


@pytest.mark.parametrize("fault", ["an element", "many units", "a tensor", "the dtype"])
def test_a_merge_that_is_not_the_same_is_found(merged: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    tensors, name = load_file(merged[1] / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if fault == "an element":
        tensors[name][3, 3] += 0.1
    elif fault == "many units":
        tensors[name].view(torch.int16)[::5] += 1
    elif fault == "a tensor":
        del tensors[name]
    else:
        tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "model.safetensors")
    assert name in "".join(merging.differences(merged[0], tmp_path))


def test_the_model_is_of_the_size_that_the_goals_name() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(tie_word_embeddings=False, **FULL))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.1e9, rel=0.01)


def test_ratios_are_of_a_round_and_of_the_deeper_model_to_the_other() -> None:
    def result(name: str, number: int, wall: float, peak: int, merging: float | None = None) -> Result:
        return Result(name, number, wall, wall, peak, merging=merging)

    results = [
        *(result("ours", 0, 10, 100), result("peft", 0, 20, 200, 12), result("ours-alone", 0, 9, 50, 3)),
        *(result("ours-alone", 1, 9, 50, 5), result("ours", 1, 30, 100), result("peft", 1, 90, 400, 10)),
        result("peft", 2, 1, 1, 1),  # alone in its round
        *(result("ours-logits", 0, 99, 999), result("ours-deeper", 0, 40, 102)),
    ]
    found: dict[Any, list[float]] = merging.ratios(results)
    assert found[FASTER] == [4.0, 2.0] and found[PROVEN] == [2.0, 3.0]
    assert found[MEMORY] == [0.5, 0.25] and found[DEPTH] == [1.02]
    assert FASTER.reached(1.8) and not FASTER.reached(1.79)
    assert MEMORY.reached(0.6) and not MEMORY.reached(0.61)
    assert "3.00 (2.00–4.00)×" in merging.goals_table(results) and "reached" in merging.goals_table(results)
    assert "2.50 (2.00–3.00)×" in merging.goals_table(results)
