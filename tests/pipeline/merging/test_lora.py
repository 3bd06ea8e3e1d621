"""Every kind of adapter becomes the weights that peft makes of it, and what cannot be merged rightly is refused."""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.merging import adapter_config, lora, shards
from pipeline.merging.blocks import over_blocks
from pipeline.merging.shards import rewrite
from pipeline.merging.update import Adapter, LowRank
from pipeline.model import Base, load_model

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


def merge(base: Path, adapter: Path, folder: Path, arithmetic: Any = "float32") -> dict[str, torch.Tensor]:
    folder.mkdir()
    updates = lora.read(adapter, base).updates

    def change(weight: torch.Tensor, name: str) -> torch.Tensor:
        return updates[name].merged(weight, arithmetic)

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
    assert moved > 0.01 and (merged - adapted).pow(2).mean().sqrt() < share * moved


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


def test_tokens_named_twice_or_not_in_the_vocabulary_are_refused(
    untied: Callable[[torch.dtype], Path], make_adapter: Callable[..., Path]
) -> None:
    folder = untied(torch.float32)
    adapter = make_adapter(folder, trainable_token_indices=[1, 2], target_modules=["q_proj"])
    altered(adapter / "adapter_config.json", trainable_token_indices=[2, 2])
    with pytest.raises(UserError, match="name a token twice, or one that the base has not"):
        lora.read(adapter, folder)


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


@pytest.fixture(scope="module")
def made_adapter(base: Base, make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(base.folder, target_modules=["q_proj", "up_proj"])


@pytest.fixture
def plain_adapter(made_adapter: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_adapter, tmp_path / "adapter")


def test_a_module_trained_whole_and_by_tokens_is_refused(
    plain_adapter: Path, untied: Callable[[torch.dtype], Path]
) -> None:
    both = {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]}
    altered(plain_adapter / "adapter_config.json", **both)
    with pytest.raises(
        UserError, match=r"trains all of model\.embed_tokens and tokens of it too; try training without"
    ):
        lora.read(plain_adapter, untied(torch.float32))


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
