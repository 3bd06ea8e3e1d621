"""Every kind of adapter becomes the weights that peft makes of it, and what cannot be merged rightly is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import lora
from pipeline.errors import UserError
from pipeline.model import Base, load_model
from pipeline.shards import rewrite

WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "r": 12},
    "DoRA": {"use_dora": True},
    "rsLoRA and DoRA": {"use_rslora": True, "use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"down_proj": 40}},
    "patterns, rsLoRA and DoRA": {"use_rslora": True, "use_dora": True, "rank_pattern": {r"layers\.[02]\..*": 3}},
    "some layers": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.layers\.2\..*"},
    "one layer": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
}  # fmt: skip


def merge(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    names = list(rewrite(base, folder, lora.read(adapter, base).merged))
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert sorted(names) == sorted(found)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([[0, 17, 400, 9, 31, 300, 301, 7]])).logits.float()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in list(KINDS)[:4] for dtype in (torch.float32, torch.bfloat16)]
    + [(kind, torch.bfloat16) for kind in list(KINDS)[4:]]
    + [("DoRA", torch.float16)],
    ids=str,
)
def test_merged_is_what_peft_merges_and_computes(
    stored_as: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = stored_as(tmp_path / "base", dtype)
    adapter = make_adapter(folder, **KINDS[kind])
    found = merge(folder, adapter, tmp_path / "merged")
    before = load_file(folder / "model.safetensors")

    # peft's own merge, of the weights as stored
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), adapter)
    expected = peft.merge_and_unload().state_dict()
    one_step = {torch.float32: 4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        near_zero = 2**-22 * tensor.abs().max().item()  # both are sums in float32
        torch.testing.assert_close(tensor, expected[name], rtol=one_step, atol=near_zero, msg=name)
        changed += not torch.equal(tensor, before[name])
        assert dtype == torch.float32 or (tensor != expected[name]).float().mean() < 1e-3, name
    assert changed == len(lora.read(adapter, folder).updates) > 0

    # and the logits of base + adapter, both computed in float32
    shutil.copyfile(folder / "config.json", tmp_path / "merged" / "config.json")
    models = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (folder, tmp_path / "merged")]
    untouched, merged = logits(models[0]), logits(models[1])
    adapted = logits(PeftModel.from_pretrained(models[0], adapter))
    moved = (adapted - untouched).pow(2).mean().sqrt()
    share = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert moved > 0.01 and (merged - adapted).pow(2).mean().sqrt() < share * moved


def test_each_modules_scale_follows_its_own_rank_and_alpha(base: Base, make_adapter: Callable[..., Path]) -> None:
    options = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 40}}
    plain = lora.read(make_adapter(base.folder, **options), base.folder).updates
    assert plain["model.layers.0.self_attn.q_proj.weight"].scale == 16 / 3
    assert plain["model.layers.1.mlp.up_proj.weight"].scale == 40 / 8
    assert plain["model.layers.2.mlp.up_proj.weight"].scale == 16 / 8
    adapter = lora.read(make_adapter(base.folder, use_rslora=True, **options), base.folder)
    assert adapter.kind == "rsLoRA" and len(adapter.updates) == 28
    assert adapter.updates["model.layers.0.self_attn.q_proj.weight"].scale == pytest.approx(16 / math.sqrt(3))


def test_dora_sets_each_rows_length(base: Base, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """arXiv 2402.09353, equation 5: the direction of W + s·B·A, of length m."""
    adapter = lora.read(make_adapter(base.folder, use_dora=True), base.folder)
    before = load_file(base.folder / "model.safetensors")
    for name, update in adapter.updates.items():
        merged = update.merged(before[name]).double()
        direction = before[name].double() + 2.0 * update.b.double() @ update.a.double()
        torch.testing.assert_close(merged.norm(dim=1), update.magnitude.double(), rtol=1e-6, atol=0)
        cosine = torch.nn.functional.cosine_similarity(merged, direction, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-9)


def test_a_weight_is_not_altered_by_being_merged(base: Base, make_adapter: Callable[..., Path]) -> None:
    adapter = lora.read(make_adapter(base.folder), base.folder)
    before = load_file(base.folder / "model.safetensors")
    name, update = next(iter(adapter.updates.items()))
    kept = before[name].clone()
    update.merged(before[name])
    list(update.exact(before[name]))
    list(update.exact(doubled := before[name].double()))
    assert torch.equal(before[name], kept) and torch.equal(doubled, kept.double())


def test_an_adapter_on_an_untied_output_layer_is_merged(
    stored_as: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    untied = stored_as(tmp_path / "untied", torch.float32)
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.1
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    altered(untied / "config.json", tie_word_embeddings=False)
    adapter = make_adapter(untied, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / WEIGHTS)  # peft puts the base's beside
    found = merge(untied, adapter, tmp_path / "merged")
    update = lora.read(adapter, untied).updates["lm_head.weight"]
    torch.testing.assert_close(found["lm_head.weight"], tensors["lm_head.weight"] + 2.0 * update.b @ update.a)

    trained = load_file(adapter / WEIGHTS)
    trained["base_model.model.lm_head.base_layer.weight"][5, 5] += 1e-3
    save_file(trained, adapter / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight is left over"):
        lora.read(adapter, untied)


def altered(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "is on lm_head, whose weight is tied"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is on model.embed_tokens, which is no linear layer"),
        ({"lora_bias": True}, "not lora_bias"),
        ({"bias": "all"}, "not bias"),
        ({"modules_to_save": ["lm_head"]}, "not modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "not trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "not init_lora_weights: pissa"),
        ({"init_lora_weights": "olora"}, "not init_lora_weights: olora"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, "not target_parameters"),
        ({"layer_replication": [(0, 3), (2, 4)]}, "not layer_replication"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_adapter_that_merge_would_get_wrong_is_refused(
    base: Base, make_adapter: Callable[..., Path], options: dict[str, Any], said: str
) -> None:
    adapter = make_adapter(base.folder, **options)
    with pytest.raises(UserError, match=said) as error:
        lora.read(adapter, base.folder)
    assert str(adapter) in one_line(error)


def test_another_method_is_refused(base: Base, make_adapter: Callable[..., Path]) -> None:
    from peft import LoHaConfig

    adapter = make_adapter(base.folder, config=LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="merge handles LoRA, rsLoRA and DoRA, not LOHA") as error:
        lora.read(adapter, base.folder)
    one_line(error)


@pytest.mark.parametrize("option", ["fan_in_fan_out", "use_qalora", "an_option_of_tomorrow"])
def test_an_option_that_is_not_known_to_be_handled_is_refused(
    base: Base, make_adapter: Callable[..., Path], option: str
) -> None:
    adapter = make_adapter(base.folder)
    lora.read(adapter, base.folder)
    altered(adapter / "adapter_config.json", **{option: True})
    with pytest.raises(UserError, match=f"not {option}"):
        lora.read(adapter, base.folder)


def without(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"{lora.PREFIX}{key}")


def added(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{lora.PREFIX}{key}": torch.ones(2, 2)})


def short_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    key = f"{lora.PREFIX}model.layers.0.mlp.up_proj.lora_magnitude_vector"
    tensors[key] = tensors[key][:1].clone()  # would broadcast over every row


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without("model.layers.3.mlp.up_proj.lora_A.weight"),
            r"lacks .*layers\.3\.mlp\.up_proj\.lora_A\.weight, which",
        ),
        (without("model.layers.3.mlp.up_proj.lora_magnitude_vector"), "lacks .*lora_magnitude_vector"),
        (added("model.layers.0.self_attn.z_proj.lora_A.weight"), "z_proj.lora_A.weight is left over"),
        (added("model.layers.0.mlp.up_proj.lora_B.bias"), "lora_B.bias is left over"),
        (added("model.norm.weight"), "model.norm.weight is left over"),
        (added("model.layers.9.mlp.up_proj.lora_A.weight"), "layers.9.mlp.up_proj.lora_A.weight is left over"),
        (short_magnitude, r"lora_magnitude_vector is \(1,\), not \(344,\)"),
    ],
)
def test_a_key_missing_left_over_or_of_another_shape_is_refused(
    base: Base,
    make_adapter: Callable[..., Path],
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    adapter = make_adapter(base.folder, use_dora=True)
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError, match=said) as error:
        lora.read(adapter, base.folder)
    one_line(error)


@pytest.mark.parametrize(("key", "value"), [("r", 4), ("use_dora", False), ("target_modules", ["q_proj"])])
def test_a_configuration_that_is_not_the_tensors_is_refused(
    base: Base, make_adapter: Callable[..., Path], key: str, value: Any
) -> None:
    adapter = make_adapter(base.folder, use_dora=True)
    altered(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=r"not \(4, 128\)|is left over"):
        lora.read(adapter, base.folder)


def test_an_adapter_for_another_model_is_refused(base: Base, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(base.folder)
    altered(adapter / "adapter_config.json", target_modules=["query"])
    with pytest.raises(UserError, match="query") as error:
        lora.read(adapter, base.folder)
    one_line(error)
    other = shutil.copytree(base.folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"q_proj\.weight is no weight of the base"):
        lora.read(make_adapter(base.folder), other)


def test_training_can_ask_beforehand_whether_its_modules_can_be_merged(base: Base) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    quantised = get_peft_model(load_model(base.folder, base, "nf4"), LoraConfig(target_modules="all-linear"))
    assert len(list(lora.layers(quantised, "profile"))) == 28
    tied = LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"^profile: the adapter is on lm_head, whose weight is tied"):
        list(lora.layers(get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), tied), "profile"))
