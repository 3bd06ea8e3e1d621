"""An adapter's configuration: what no tensor tells, and what cannot be merged rightly, is refused in one line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alter import altered, one_line
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.merging import adapter_config, lora
from pipeline.model import Base, load_model


@pytest.mark.parametrize("text", ["{", "[1]", "\ufeff{}"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "adapter_config.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"is no JSON|is no mapping") as error:
        adapter_config.read(file)
    assert one_line(error).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "4"),
        ("r", None),
        ("r", 0),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("lora_alpha", math.inf),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"q_proj": "2"}),
        ("alpha_pattern", None),
        ("bias", "some"),
        ("target_modules", "("),
        ("use_dora", "false"),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", ["a"]),
    ],
    ids=str,
)
def test_a_key_of_another_type_than_peft_takes_is_named(tmp_path: Path, key: str, value: Any) -> None:
    (file := tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: value}))
    with pytest.raises(UserError, match=f": {key}: ") as error:
        adapter_config.read(file)
    assert one_line(error).startswith(f"{file}: ")


def test_what_only_peft_knows_to_refuse_is_one_line_too(plain_adapter: Path, base: Base) -> None:
    altered(plain_adapter / "adapter_config.json", trainable_token_indices=[1], target_modules=["embed_tokens"])
    with pytest.raises(
        UserError, match=r"adapter_config\.json: peft cannot lay it over the base"
    ) as error:  # TypeError
        lora.read(plain_adapter, base.folder)
    one_line(error)


def test_tokens_named_twice_or_not_in_the_vocabulary_are_refused(
    untied: Callable[[torch.dtype], Path], make_adapter: Callable[..., Path]
) -> None:
    folder = untied(torch.float32)
    adapter = make_adapter(folder, trainable_token_indices=[1, 2], target_modules=["q_proj"])
    altered(adapter / "adapter_config.json", trainable_token_indices=[2, 2])
    with pytest.raises(UserError, match="name a token twice, or one that the base has not"):
        lora.read(adapter, folder)


def test_a_module_trained_whole_and_by_tokens_is_refused(
    plain_adapter: Path, untied: Callable[[torch.dtype], Path]
) -> None:
    both = {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]}
    altered(plain_adapter / "adapter_config.json", **both)
    with pytest.raises(
        UserError, match=r"trains all of model\.embed_tokens and tokens of it too; try training without"
    ):
        lora.read(plain_adapter, untied(torch.float32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "is on lm_head, whose weight is tied"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is on model.embed_tokens, whose weight is tied"),
        (
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},  # which peft merges twice
            "is on model.embed_tokens, whose weight is tied",
        ),
        ({"modules_to_save": ["lm_head"]}, "is on lm_head, whose weight is tied"),
        ({"modules_to_save": ["embed_tokens"]}, "is on model.embed_tokens, whose weight is tied"),
        ({"trainable_token_indices": {"lm_head": [1, 2]}}, "is on lm_head, whose weight is tied"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "is on model.embed_tokens, whose weight is tied",
        ),
        ({"lora_bias": True}, "not lora_bias"),
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
    with pytest.raises(UserError, match=r"other: lacks .*, which its configuration asks for"):
        lora.read(make_adapter(base.folder), other)


def test_training_can_ask_beforehand_whether_its_modules_can_be_merged(base: Base) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    quantised = get_peft_model(load_model(base.folder, base, "nf4"), LoraConfig(target_modules="all-linear"))
    assert len(list(lora.layers(quantised, "profile"))) == 28
    tied = LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"^profile: the adapter is on lm_head, whose weight is tied"):
        list(lora.layers(get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), tied), "profile"))
    embedding = LoraConfig(target_modules=["embed_tokens"])  # which training does not do
    with pytest.raises(UserError, match=r"is on model\.embed_tokens, which is no linear layer"):
        list(lora.layers(get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), embedding), "profile"))
