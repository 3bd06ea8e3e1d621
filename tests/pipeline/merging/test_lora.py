"""Every kind of adapter becomes the weights that peft makes of it."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from alter import WEIGHTS
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.merging import lora
from pipeline.merging.blocks import over_blocks
from pipeline.merging.shards import rewrite
from pipeline.merging.update import Adapter, LowRank
from pipeline.model import Base

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


def merge(base: Path, adapter: Path, folder: Path, arithmetic: Any = "float32") -> dict[str, torch.Tensor]:
    folder.mkdir()
    updates = lora.read(adapter, base).updates

    def change(weight: Any, out: torch.Tensor, name: str) -> Any:
        return updates[name].merged(weight, arithmetic, out)

    names = list(rewrite(base, folder, {name: partial(change, name=name) for name in updates}))
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert sorted(names) == sorted(found)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([[0, 17, 400, 9, 31, 300, 301, 7]])).logits.float()


def check(folder: Path, adapter: Path, work: Path, dtype: torch.dtype, roundings: int = 1) -> None:
    """Merged in peft's arithmetic it is what peft merges, bit for bit; in float32 within as many roundings of peft's.

    And its logits, computed in float32, are those of base + adapter.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, as_peft = merge(folder, adapter, work / "merged"), merge(folder, adapter, work / "as-peft", "peft")
    before = load_file(folder / "model.safetensors")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), adapter)
    expected = peft.merge_and_unload().state_dict()
    one_step = roundings * {torch.float32: 4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == as_peft[name].dtype == dtype
        assert torch.equal(as_peft[name], expected[name]), name
        near_zero = 2**-22 * tensor.abs().max().item()  # both are sums in float32
        if roundings > 1:  # of the update itself, before it is added
            near_zero += one_step * (tensor.float() - before[name].float()).abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=one_step, atol=near_zero, msg=name)
        changed += not torch.equal(tensor, before[name])
        assert dtype == torch.float32 or roundings > 1 or (tensor != expected[name]).float().mean() < 1e-3, name
    assert changed == len(lora.read(adapter, folder).updates) > 0

    # and the logits of base + adapter, both computed in float32
    shutil.copyfile(folder / "config.json", work / "merged" / "config.json")
    models = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in (folder, work / "merged")]
    untouched, merged = logits(models[0]), logits(models[1])
    adapted = logits(PeftModel.from_pretrained(models[0], adapter))
    moved = (adapted - untouched).pow(2).mean().sqrt()
    share = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert moved > 1e-3 and (merged - adapted).pow(2).mean().sqrt() < share * moved


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
    folder = stored_as(tmp_path / "base", dtype)
    check(folder, make_adapter(folder, **KINDS[kind]), tmp_path, dtype)


def trained_too(adapter: Path) -> Path:
    """Gives values to what peft begins as zeros, or as the base's: biases, modules to save, tokens, embeddings."""
    torch.manual_seed(1)
    tensors = load_file(adapter / WEIGHTS)
    for key, values in tensors.items():
        if not key.endswith(("lora_A.weight", "lora_B.weight", "magnitude_vector", "base_layer.weight")):
            tensors[key] = values + 0.02 * torch.randn_like(values)
    save_file(tensors, adapter / WEIGHTS)
    return adapter


BESIDE: dict[str, dict[str, Any]] = {
    "embedding and output layer": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
    "DoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head", "norm"], "target_modules": ["v_proj", "embed_tokens"]},
    "a block to save": {"modules_to_save": ["embed_tokens", "layers.2.mlp"], "target_modules": ["v_proj"]},
    "tokens": {"trainable_token_indices": [5, 400, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [9]}, "bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.bfloat16) for kind in BESIDE] + [(kind, torch.float32) for kind in list(BESIDE)[:3]],
    ids=str,
)
def test_what_is_trained_beside_the_linear_layers_is_what_peft_makes_of_it(
    untied: Callable[[torch.dtype], Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    dtype: torch.dtype,
) -> None:
    folder = untied(dtype)
    adapter = trained_too(make_adapter(folder, **BESIDE[kind]))
    check(folder, adapter, tmp_path, dtype, roundings=2)  # peft's on an embedding


TIED: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [5, 400, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [5, 7]}},
    "embedding to save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "output layer to save": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_weight_is_merged_where_both_its_modules_learnt_the_same(
    stored_as: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = stored_as(tmp_path / "base", torch.bfloat16)
    adapter = trained_too(make_adapter(folder, target_modules=["q_proj"], **TIED[kind]))
    tensors = load_file(adapter / WEIGHTS)
    tied = "base_model.model.lm_head.weight"
    if tied in tensors:  # `trained_too` drew twice
        apart = tensors[tied]
        with pytest.raises(UserError, match="are tied and differ"):
            lora.read(adapter, folder)
        tensors[tied] = tensors["base_model.model.model.embed_tokens.weight"].clone()
        assert not torch.equal(apart, tensors[tied])
        save_file(tensors, adapter / WEIGHTS)
    check(folder, adapter, tmp_path, torch.bfloat16)
    assert "model.embed_tokens.weight" in lora.read(adapter, folder).updates


def test_each_modules_scale_follows_its_own_rank_and_alpha(base: Base, make_adapter: Callable[..., Path]) -> None:
    options = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 40}}
    plain = lora.read(make_adapter(base.folder, **options), base.folder)
    assert low_rank(plain, "model.layers.0.self_attn.q_proj.weight").factors[0].scale == 16 / 3
    assert low_rank(plain, "model.layers.1.mlp.up_proj.weight").factors[0].scale == 40 / 8
    assert low_rank(plain, "model.layers.2.mlp.up_proj.weight").factors[0].scale == 16 / 8
    adapter = lora.read(make_adapter(base.folder, use_rslora=True, **options), base.folder)
    assert adapter.kind == "rsLoRA" and len(adapter.updates) == 28
    scale = low_rank(adapter, "model.layers.0.self_attn.q_proj.weight").factors[0].scale
    assert scale == pytest.approx(16 / math.sqrt(3))


def low_rank(adapter: Adapter, name: str) -> LowRank:
    update = adapter.updates[name]
    assert isinstance(update, LowRank)
    return update


def test_dora_sets_each_rows_length(base: Base, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """arXiv 2402.09353, equation 5: the direction of W + s·B·A, of length m."""
    adapter = lora.read(make_adapter(base.folder, use_dora=True), base.folder)
    before = load_file(base.folder / "model.safetensors")
    for name in adapter.updates:
        update = low_rank(adapter, name)
        factor = update.factors[0]
        merged = update.merged(before[name]).double()
        direction = before[name].double() + 2.0 * factor.b.double() @ factor.a.double()
        torch.testing.assert_close(merged.norm(dim=1), update.magnitude.double(), rtol=1e-6, atol=0)
        cosine = torch.nn.functional.cosine_similarity(merged, direction, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-9)


def test_a_weight_is_not_altered_by_being_merged(base: Base, make_adapter: Callable[..., Path]) -> None:
    adapter = lora.read(make_adapter(base.folder), base.folder)
    before = load_file(base.folder / "model.safetensors")
    name, update = next(iter(adapter.updates.items()))
    kept = before[name].clone()
    update.merged(before[name])
    for weight in (before[name], doubled := before[name].double()):
        at = update.exact(weight)
        over_blocks(weight, lambda rows, at=at, weight=weight: at(rows, weight[rows]))
    assert torch.equal(before[name], kept) and torch.equal(doubled, kept.double())
