"""Promise 4, the merge receipt: what is merged is base + adapter, and every planted wrong merge is caught."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.chat import CONTRACT_FILE
from pipeline.errors import StageFailed, UserError
from pipeline.merge import Lora, Merge, check_weights
from pipeline.model import Base
from pipeline.records.find import records
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.workspace import Workspace

WEIGHTS = "model.safetensors"
TARGETED = "model.layers.1.self_attn.q_proj.weight"
PROMPTS = ([0, 17, 400, 9, 31], [0, 5, 6, 7, 8, 9, 10, 11, 300, 301])


def logits(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.eval()(input_ids=torch.tensor([prompt])).logits[0].float() for prompt in PROMPTS]


def base_and_adapter(folder: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def exact(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """base + alpha / rank · B·A in float64, worked out from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {name: tensor.double() for name, tensor in weights(base).items()}
    halves = load_file(adapter / "adapter_model.safetensors")
    for key in halves:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            b = halves[key.replace("lora_A", "lora_B")].double()
            found[name] = found[name] + config["lora_alpha"] / config["r"] * b @ halves[key].double()
    return found


def test_every_merged_weight_is_base_plus_adapter(trained: Any, base: Base) -> None:
    expected, found = exact(base.folder, trained.output("dpo")), weights(trained.output("merge"))
    before = weights(base.folder)
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(tensor, before[name]) == ("norm" in name or "embed" in name), name
    receipt = trained.record("merge").facts().results["receipt"]
    assert receipt["modules"] == 28 and receipt["unchanged_tensors"] == len(found) - 28
    assert receipt["worst_share_of_rounding_bound"] <= 1


def test_plain_transformers_loads_the_merged_folder_with_the_same_logits(trained: Any, base: Base) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = trained.output("merge")
    model, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    adapted = logits(base_and_adapter(base.folder, trained.output("dpo")))
    for one, other in zip(logits(model), adapted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    untouched = logits(AutoModelForCausalLM.from_pretrained(base.folder))
    assert max((a - b).abs().max() for a, b in zip(adapted, untouched, strict=True)) > 0.1
    assert AutoTokenizer.from_pretrained(merged).chat_template == base.tokenizer().chat_template
    assert model.generation_config.eos_token_id == base.chat().end_of_turn_id


def test_the_contract_is_carried_and_the_link_points_at_the_model(trained: Any) -> None:
    contracts = [(trained.output(stage) / CONTRACT_FILE).read_bytes() for stage in ("sft", "dpo", "merge")]
    assert contracts[0] == contracts[1] == contracts[2]
    assert (trained.workspace.checkpoints / "small-merged").resolve() == trained.output("merge").resolve()
    assert trained.record("merge").facts().lineage.inputs[0].id == trained.dpo


def scale_doubled(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    for name in merged:
        merged[name] = base[name] + 2 * (merged[name] - base[name])


def one_module_skipped(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    merged[TARGETED] = base[TARGETED].clone()


def one_element_off(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    merged[TARGETED][3, 5] += 3e-6


def no_number(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    merged[TARGETED][3, 5] = float("nan")


def untargeted_changed(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    merged["model.norm.weight"][0] = torch.nextafter(merged["model.norm.weight"][0], torch.tensor(9.0))


def missing(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    del merged["model.layers.3.mlp.down_proj.weight"]


def left_over(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    merged["model.layers.3.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 4)


def coarser(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    merged[TARGETED] = merged[TARGETED].bfloat16().float()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (scale_doubled, "away from base \\+ adapter"),
        (one_module_skipped, TARGETED),
        (one_element_off, f"{TARGETED} is .* × the rounding"),
        (no_number, TARGETED),
        (coarser, f"{TARGETED} is .* × the rounding"),
        (untargeted_changed, "model.norm.weight is not targeted by the adapter and changed"),
        (missing, "other tensors than the base"),
        (left_over, "other tensors than the base"),
    ],
)
def test_a_wrong_merge_is_caught(
    trained: Any,
    base: Base,
    tmp_path: Path,
    fault: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    adapter = Lora.read(trained.output("dpo"))
    merged = load_file(trained.output("merge") / WEIGHTS)
    save_file(merged, tmp_path / WEIGHTS)
    check_weights(base.folder, tmp_path, adapter)  # the honest one passes
    fault(merged, load_file(base.folder / WEIGHTS))
    save_file(merged, tmp_path / WEIGHTS)
    with pytest.raises(StageFailed, match=said):
        check_weights(base.folder, tmp_path, adapter)


def test_a_targeted_module_that_did_not_change_is_caught(trained: Any, base: Base) -> None:
    """An adapter of zeros would pass every comparison with base + adapter."""
    adapter = Lora.read(trained.output("dpo"))
    for _, b in adapter.matrices.values():
        b.zero_()
    with pytest.raises(StageFailed, match="targeted by the adapter and did not change"):
        check_weights(base.folder, base.folder, adapter)


def test_a_failed_merge_leaves_no_model_and_the_link_where_it_was(
    trained_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Lora.merged

    def doubled(adapter: Lora, name: str, weight: torch.Tensor) -> torch.Tensor:
        return honest(Lora(2 * adapter.scale, adapter.matrices), name, weight)

    monkeypatch.setattr(Lora, "merged", doubled)
    with pytest.raises(StageFailed, match="away from base"):
        run_stage(Merge, trained_copy.job())
    file, facts = next(records(trained_copy.workspace))
    assert facts.status == "failed" and file.id != trained_copy.merge
    assert not (trained_copy.workspace.checkpoints / file.id / "model").exists()
    assert (trained_copy.workspace.checkpoints / "small-merged").resolve() == trained_copy.output("merge").resolve()


def test_too_little_disk_is_said_before_anything_is_written(trained_copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(trained_copy.workspace.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"needs .* GB of disk, 0.0 GB are free"):
        run_stage(Merge, trained_copy.job())


def test_a_bf16_base_in_shards_merges_within_rounding(
    small_talk: Workspace, job: Callable[..., Job], base: Base, tmp_path: Path
) -> None:
    """The SFT-only path, on a base stored as large models are."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="1MB"
    )
    base.tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1

    sft = run_stage(Sft, job(f"base_model={folder}", "sft_config.epochs=1.0"))
    run_stage(Merge, job(f"base_model={folder}", "precision=fp32"))  # computed finer than it is stored
    merge = run_stage(Merge, job(f"base_model={folder}"))
    assert merge.facts.lineage.inputs[0].id == sft.id
    adapter = sft.output / "adapter"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(adapter / "adapter_model.safetensors").values())
    expected, found = exact(folder, adapter), weights(merge.output / "model")
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        near_zero = 1e-8  # the sum is a float32, whose own error counts there
        assert ((tensor.double() - expected[name]).abs() <= expected[name].abs() * 2**-8 + near_zero).all(), name
    model, report = AutoModelForCausalLM.from_pretrained(merge.output / "model", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not report["missing_keys"]


def altered(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"peft_type": "LOHA"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_adapter_that_is_not_plain_lora_is_refused(trained: Any, tmp_path: Path, option: dict[str, Any]) -> None:
    folder = shutil.copytree(trained.output("dpo"), tmp_path / "adapter")
    Lora.read(folder)
    altered(folder, **option)
    with pytest.raises(UserError, match="merge handles plain LoRA only"):
        Lora.read(folder)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "is left over"),
        ("base_model.model.lm_head.weight", "is left over"),
        ("base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight", "only half"),
    ],
)
def test_a_key_left_over_in_the_adapter_is_refused(trained: Any, tmp_path: Path, key: str, said: str) -> None:
    folder = shutil.copytree(trained.output("dpo"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {key: torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=said):
        Lora.read(folder)


def test_a_changed_adapter_file_is_refused(trained_copy: Any) -> None:
    altered(trained_copy.output("dpo"), lora_alpha=64)
    with pytest.raises(UserError, match=r"adapter_config\.json was changed since; try make dpo again"):
        run_stage(Merge, trained_copy.job())


def test_an_adapter_trained_on_other_weights_is_refused(trained_copy: Any, base: Base, tmp_path: Path) -> None:
    other = shutil.copytree(base.folder, tmp_path / "other")
    content = bytearray((other / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (other / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="was trained on other weights than this base's"):
        run_stage(Merge, trained_copy.job(f"base_model={other}"))


def test_an_adapter_trained_with_another_template_is_refused(trained_copy: Any, base: Base, tmp_path: Path) -> None:
    other = shutil.copytree(base.folder, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("### Instruction:", "### Question:"))
    with pytest.raises(UserError, match="another chat template than the base has now"):
        run_stage(Merge, trained_copy.job(f"base_model={other}"))
    assert len(list(trained_copy.workspace.experiments.glob("EXP-*.yaml"))) == 3  # no record was opened
