"""Promise 4: what is merged is base + adapter, of every kind, and a merge that is not leaves no model."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.chat import CONTRACT_FILE
from pipeline.errors import StageFailed, UserError
from pipeline.merge import Merge
from pipeline.merging.update import LowRank
from pipeline.model import Base, load_model
from pipeline.records.find import artifacts, records, sha256
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train import preflight
from pipeline.workspace import Workspace

WEIGHTS = "model.safetensors"
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


def test_the_record_says_what_was_merged_how_and_what_each_tensor_changed_by(trained: Any, base: Base) -> None:
    facts = trained.record("merge").facts()
    results, before, after = facts.results, weights(base.folder), weights(trained.output("merge"))
    assert results["receipt"]["arithmetic"] == "float32"
    assert [one["name"] for one in facts.data["adapters"]] == [trained.dpo]
    assert facts.lineage.base["sha256"] == base.identity()["sha256"]
    assert facts.data["contract"] == base.chat().contract.sha256
    assert facts.data["template"]["end_of_turn_id"] == base.chat().end_of_turn_id
    generation = json.loads((trained.output("merge") / "generation_config.json").read_text())
    assert generation == facts.data["generation_config"]["set"] | facts.data["generation_config"]["carried_over"]
    assert generation["eos_token_id"] == base.chat().end_of_turn_id
    written = {path.relative_to(trained.workspace.root): path for path in trained.output("merge").rglob("*")}
    assert {Path(a.path): (a.sha256, a.bytes) for a in facts.artifacts} == {
        name: (sha256(path), path.stat().st_size) for name, path in written.items()
    }
    with (trained.workspace.root / results["each_tensor"]).open() as file:
        table = {row["tensor"]: row for row in csv.DictReader(file)}
    assert len(table) == 28
    for name, row in table.items():
        change = (after[name].double() - before[name].double()).norm() / before[name].double().norm()
        assert float(row["relative_change"]) == pytest.approx(change.item(), rel=1e-4), name
    least = results["receipt"]["relative_change"]["least"]
    assert min(table, key=lambda name: float(table[name]["relative_change"])) == least["tensor"]


def test_what_a_base_says_of_generation_is_carried_over_even_where_transformers_would_not_write_it(
    trained_copy: Any, base: Base, tmp_path: Path
) -> None:
    """Llama-2-chat's own has a temperature and no sampling."""
    folder = shutil.copytree(base.folder, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    merge = run_stage(Merge, trained_copy.job(f"base_model={folder}", "merge_config.check_logits=false"))
    found = json.loads((merge.output / "model" / "generation_config.json").read_text())
    assert (found["temperature"], found["eos_token_id"]) == (0.6, base.chat().end_of_turn_id)


def test_in_peft_s_arithmetic_the_files_hold_what_peft_merges(trained_copy: Any, base: Base) -> None:
    merge = run_stage(Merge, trained_copy.job("merge_config.arithmetic=peft"))
    assert merge.facts.results["receipt"]["arithmetic"] == "peft"
    expected = base_and_adapter(base.folder, trained_copy.output("dpo")).merge_and_unload().state_dict()
    for name, tensor in weights(merge.output / "model").items():
        assert torch.equal(tensor, expected[name]), name


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


def test_a_failed_merge_leaves_no_model_and_the_link_where_it_was(
    trained_copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LowRank.merged

    def doubled(update: LowRank, weight: Any, arithmetic: Any, out: torch.Tensor) -> Any:
        factor = update.factors[0]
        return honest(replace(update, factors=(replace(factor, scale=2 * factor.scale),)), weight, arithmetic, out)

    monkeypatch.setattr(LowRank, "merged", doubled)
    with pytest.raises(StageFailed, match="away from base"):
        run_stage(Merge, trained_copy.job())
    file, facts = next(records(trained_copy.workspace))
    assert facts.status == "failed" and file.id != trained_copy.merge
    assert not list((trained_copy.workspace.checkpoints / file.id).iterdir())  # nor anything a resume would go on with
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


def planted(trained: Any, adapter: Path, quantization: str = "none") -> None:
    """Puts the adapter in place of DPO's, as if DPO had trained it over a base so quantised."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, trained.output("dpo") / name)
    facts = trained.record("dpo").facts()
    facts.artifacts = artifacts(trained.workspace, trained.output("dpo"))
    facts.results["training"]["quantization"] = quantization
    trained.record("dpo").write(facts)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_and_rslora_are_merged_into_the_base_as_stored(
    trained_copy: Any, base: Base, make_adapter: Callable[..., Path], quantization: str
) -> None:
    model = load_model(base.folder, base, quantization)
    adapter = make_adapter(base.folder, model=model, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 3})
    planted(trained_copy, adapter, quantization)
    merge = run_stage(Merge, trained_copy.job())
    receipt = merge.facts.results["receipt"]
    assert (receipt["adapter"], receipt["modules"]) == ("rsLoRA and DoRA", 28)
    assert receipt["logits"].startswith("merged, against the base as stored + adapter")
    assert ("trained_over" in receipt) == (quantization == "nf4")
    from transformers import AutoModelForCausalLM

    merged = logits(AutoModelForCausalLM.from_pretrained(merge.output / "model"))
    for one, other in zip(merged, logits(base_and_adapter(base.folder, adapter)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_an_adapter_that_cannot_be_merged_is_refused_before_a_record_is_opened(
    trained_copy: Any, base: Base, make_adapter: Callable[..., Path]
) -> None:
    planted(trained_copy, make_adapter(base.folder, lora_bias=True))
    before = sorted(trained_copy.workspace.experiments.glob("EXP-*.yaml"))
    with pytest.raises(UserError, match="merge handles LoRA, rsLoRA and DoRA, not lora_bias"):
        run_stage(Merge, trained_copy.job())
    assert sorted(trained_copy.workspace.experiments.glob("EXP-*.yaml")) == before


def test_a_base_that_is_stored_quantised_is_refused(trained_copy: Any, base: Base, tmp_path: Path) -> None:
    folder = shutil.copytree(base.folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    facts = trained_copy.record("dpo").facts()
    facts.lineage.base |= {"sha256": replace(base, folder=folder).identity()["sha256"]}  # as if trained on it
    trained_copy.record("dpo").write(facts)
    with pytest.raises(UserError, match=r"base_model: .* is stored quantised; try the model it was quantised from"):
        run_stage(Merge, trained_copy.job(f"base_model={folder}"))


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


def test_an_adapter_that_auto_trained_over_4_bits_is_said_to_have_been(
    small_talk: Workspace,
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = preflight.choose
    monkeypatch.setattr(
        preflight, "choose", lambda task: replace(honest(task), quantization="nf4")
    )  # as with little memory
    trained = run_stage(Sft, job("quantization=auto", "sft_config.epochs=1.0", "sft_config.warmup_ratio=0.0"))
    assert trained.facts.configuration["quantization"] == "auto"
    assert trained.facts.results["training"]["quantization"] == "nf4"
    assert Merge.prepare(job("quantization=auto")).trained_over == "nf4"
    monkeypatch.undo()
    Sft.prepare(job(source=trained.id))
    said = f"note: the adapter of {trained.id} was trained over quantization nf4, here it is none"
    assert said in capsys.readouterr().err


def both(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """base + every adapter's alpha / rank · B·A in float64, worked out from the files alone."""
    before = weights(base)
    changes = [exact(base, adapter) for adapter in adapters]
    return {
        name: sum(change[name] - before[name].double() for change in changes) + before[name].double() for name in before
    }


def unrelated(trained: Any) -> None:
    """As if its DPO had not gone on from its SFT."""
    facts = trained.record("dpo").facts()
    facts.lineage.inputs = []
    trained.record("dpo").write(facts)


def test_a_further_adapter_is_added_in_the_same_pass(trained_copy: Any, base: Base) -> None:
    unrelated(trained_copy)
    merge = run_stage(Merge, trained_copy.job(f"merge_config.adapters=[{trained_copy.sft}]"))
    expected = both(base.folder, trained_copy.output("dpo"), trained_copy.output("sft"))
    for tensor, found in weights(merge.output / "model").items():
        torch.testing.assert_close(found.double(), expected[tensor], rtol=1e-6, atol=2e-7, msg=tensor)
    facts = merge.facts
    assert [taken.id for taken in facts.lineage.inputs] == [trained_copy.dpo, trained_copy.sft]
    assert [one["name"] for one in facts.data["adapters"]] == [trained_copy.dpo, trained_copy.sft]
    assert len({one["sha256"] for one in facts.data["adapters"]}) == 2
    receipt = facts.results["receipt"]
    assert receipt["adapter"] == "LoRA + LoRA" and receipt["logits_rms_difference"] < 1e-3
    for name in ("checkpoints/small-sft", f"checkpoints/{trained_copy.sft}/adapter"):  # the same, by a link or a folder
        other = Merge.prepare(trained_copy.job(f"merge_config.adapters=[{name}]")).taken[1]
        assert other.name == trained_copy.sft and other.sha256 == facts.data["adapters"][1]["sha256"]
        assert other.input == facts.lineage.inputs[1]


def test_a_folder_from_elsewhere_must_bring_the_contract_and_name_the_base(
    trained_copy: Any, base: Base, make_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter(base.folder, target_modules=["q_proj"])
    job = trained_copy.job(f"merge_config.adapters=[{folder}]", "merge_config.check_logits=false")
    with pytest.raises(UserError, match=f"has no readable {CONTRACT_FILE}"):
        Merge.prepare(job)
    base.chat().contract.save(folder)
    merge = run_stage(Merge, job)
    assert f"note: {folder} has no record: that its base had these very weights is not known" in capsys.readouterr().err
    expected = both(base.folder, trained_copy.output("dpo"), folder)
    for tensor, found in weights(merge.output / "model").items():
        torch.testing.assert_close(found.double(), expected[tensor], rtol=1e-6, atol=2e-7, msg=tensor)
    assert [taken.id for taken in merge.facts.lineage.inputs] == [trained_copy.dpo]  # a lineage is of records
    assert "no hash of it is known" in merge.facts.data["adapters"][1]["base"]
    altered(folder, base_model_name_or_path="another/base")
    with pytest.raises(UserError, match="is an adapter of another/base, not of tiny"):
        Merge.prepare(job)
    altered(folder, base_model_name_or_path=str(base.folder))
    replace(base.chat().contract, sha256="0" * 64).save(folder)
    with pytest.raises(UserError, match="another chat template than the base has now"):
        Merge.prepare(trained_copy.job(f"merge_config.adapters=[{folder}]"))


def other_base(trained: Any) -> str:
    facts = trained.record("sft").facts()
    facts.lineage.base["sha256"] = "0" * 64
    trained.record("sft").write(facts)
    return str(trained.sft)


def a_dora(trained: Any) -> str:
    unrelated(trained)
    altered(trained.output("sft"), use_dora=True)
    file = trained.output("sft") / "adapter_model.safetensors"
    halves = load_file(file)
    magnitudes = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(values))
        for key, values in halves.items()
        if "lora_B" in key
    }
    save_file(halves | magnitudes, file)
    facts = trained.record("sft").facts()
    facts.artifacts = artifacts(trained.workspace, trained.output("sft"))
    trained.record("sft").write(facts)
    return str(trained.sft)


def a_copy_of_the_sft(trained: Any) -> str:
    folder = shutil.copytree(trained.output("sft"), trained.workspace.root / "copied")
    altered(folder, lora_alpha=64)
    return str(folder)


def changed_since(trained: Any) -> str:
    altered(trained.output("sft"), lora_alpha=64)
    return str(trained.sft)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            lambda trained: trained.dpo,
            r"merge_config.adapters: EXP-.*: it would be added twice; try naming one of them",
        ),
        (lambda trained: trained.sft, r"holds the adapter of EXP-\d{4}-\d\d-\d\d-001, as another one does"),
        (a_copy_of_the_sft, r"copied holds the adapter of .*copied, as another one does: it would be added twice"),
        (lambda trained: trained.merge, "is no dpo or sft record"),
        (lambda trained: "checkpoints/nothing", "checkpoints/nothing is neither a record nor a folder"),
        (lambda trained: "data", "data holds no adapter that peft saved; try EXP-"),
        (lambda trained: f"checkpoints/{trained.merge}/model", "is no dpo or sft record"),
        (changed_since, r"adapter_config\.json was changed since"),
        (other_base, "was trained on other weights than this base's"),
        (a_dora, "is a DoRA, which adds up with no other adapter"),
    ],
)
def test_a_further_adapter_that_cannot_be_added_is_refused(
    trained_copy: Any, name: Callable[[Any], str], said: str
) -> None:
    named = name(trained_copy)
    with pytest.raises(UserError, match=said) as error:
        Merge.prepare(trained_copy.job(f"merge_config.adapters=[{named}]"))
    assert "\n" not in str(error.value)
