"""An adapter's tensors, and its base's: each is there, finite and of its shape, and none is left over."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alter import WEIGHTS, altered, one_line
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.merging import lora, shards
from pipeline.model import Base


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(
    plain_adapter: Path, base: Base, value: float
) -> None:
    tensors = load_file(plain_adapter / WEIGHTS)
    key = f"{lora.PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key][3, 3] = value
    save_file(tensors, plain_adapter / WEIGHTS)
    with pytest.raises(UserError, match=f"{re.escape(key)} holds numbers that are not finite"):
        lora.read(plain_adapter, base.folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.norm.weight": torch.ones(3)}, r"norm\.weight is \(3,\), not \(128,\)"),
        ({"model.norm.weight": None}, r"lacks .*model\.norm\.weight"),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, 128)},
            r"trainable_tokens_delta is \(3, 128\), not \(2, 128\)",
        ),
        ({"model.layers.0.self_attn.k_proj.bias": torch.ones(128)}, r"k_proj\.bias is left over"),
    ],
)
def test_what_was_trained_whole_must_be_there_and_fit(
    untied: Callable[[torch.dtype], Path],
    make_adapter: Callable[..., Path],
    change: dict[str, torch.Tensor | None],
    said: str,
) -> None:
    folder = untied(torch.float32)
    options = {"modules_to_save": ["model.norm"], "trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}
    adapter = make_adapter(folder, **options)
    tensors: dict[str, torch.Tensor | None] = dict(load_file(adapter / WEIGHTS))
    tensors |= {f"{lora.PREFIX}{key}": value for key, value in change.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, adapter / WEIGHTS)
    with pytest.raises(UserError, match=said) as error:
        lora.read(adapter, folder)
    one_line(error)


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


def test_the_bases_weight_that_peft_puts_beside_an_output_layers_adapter_must_be_the_bases(
    untied: Callable[[torch.dtype], Path], make_adapter: Callable[..., Path]
) -> None:
    folder = untied(torch.float32)
    adapter = make_adapter(folder, target_modules=["q_proj", "lm_head"])
    trained = load_file(adapter / WEIGHTS)
    assert "base_model.model.lm_head.base_layer.weight" in trained
    lora.read(adapter, folder)
    trained["base_model.model.lm_head.base_layer.weight"][5, 5] += 1e-3
    save_file(trained, adapter / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight is left over"):
        lora.read(adapter, folder)


def test_a_tied_weight_that_the_base_stores_twice_is_refused(
    plain_adapter: Path, untied: Callable[[torch.dtype], Path], tmp_path: Path
) -> None:
    twice = shutil.copytree(untied(torch.float32), tmp_path / "twice")
    altered(twice / "config.json", tie_word_embeddings=True)
    altered(plain_adapter / "adapter_config.json", trainable_token_indices=[1])
    tensors = load_file(plain_adapter / WEIGHTS)
    tensors[f"{lora.PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(1, 128)
    save_file(tensors, plain_adapter / WEIGHTS)
    said = r"changes model\.embed_tokens\.weight, which the base stores twice, as .* and as .*; try "
    with pytest.raises(UserError, match=said):
        lora.read(plain_adapter, twice)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_head.weight": None}, r"lacks lm_head\.weight, which its configuration asks for"),
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight, which"),
        ({"model.norm.weight": torch.ones(3)}, r"norm\.weight is \(3,\), and its configuration asks for \(128,\)"),
    ],
)
def test_a_weight_that_would_be_made_up_is_missed_in_the_base(
    plain_adapter: Path,
    untied: Callable[[torch.dtype], Path],
    tmp_path: Path,
    change: dict[str, torch.Tensor | None],
    said: str,
) -> None:
    folder = shutil.copytree(untied(torch.float32), tmp_path / "lacking")
    kept = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors")
    with pytest.raises(UserError, match=said) as error:
        lora.read(plain_adapter, folder)
    assert one_line(error).startswith(str(folder))


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_what_transformers_ties_or_puts_together_is_not_missed(tmp_path: Path, stored: str) -> None:
    """A tied weight under either name, experts stored apart that load as one tensor, a tensor too many."""
    import transformers

    small = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    config.tie_word_embeddings = True
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[stored] = weights.pop("model.embed_tokens.weight")
    save_file(weights | {"more": torch.ones(2)}, tmp_path / "model.safetensors")
    assert weights.keys() != model.state_dict().keys()
    lora._check_base(model, config, shards.tensors(tmp_path), "base")
    expert = next(name for name in weights if "experts.1" in name)
    lacking = {name: one for name, one in shards.tensors(tmp_path).items() if name != expert}
    with pytest.raises(UserError, match=r"not those that its configuration asks for|lacks") as error:
        lora._check_base(model, config, lacking, "base")
    one_line(error)
