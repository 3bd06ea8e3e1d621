"""Memory and work by formula, against what autograd keeps, what peft and bitsandbytes hold, and what torch counts."""

import random
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import SftConfig
from pipeline.train import attention, footprint
from pipeline.train.adapter import peft_config as peft_configuration
from pipeline.train.footprint import Setup, Shape
from pipeline.train.head import token_log_probs
from pipeline.train.passes import Pass, lay
from tests.pipeline.little import pair, sequence

TOKENS = 512
BF16 = Setup(device="cpu", precision="bf16", quantization="none", checkpointing=False, pass_tokens=TOKENS)


def configuration(layers: int = 2, key_value_heads: int = 4, **more: Any) -> LlamaConfig:
    small = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "vocab_size": 61}
    return LlamaConfig(num_hidden_layers=layers, num_key_value_heads=key_value_heads, **(small | more))


def model(config: LlamaConfig, lora: SftConfig, setup: Setup) -> Any:
    """As a training has it: the adapter in float32 over the base as it is computed."""
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    adapted = get_peft_model(LlamaForCausalLM(config).to(dtype), peft_configuration(lora))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if setup.packed:
        attention.install(adapted.get_base_model())
    if setup.checkpointing:
        adapted.get_base_model().activation_checkpointing_enable()
    return adapted.train()


def one_pass(setup: Setup, rows: int = 4) -> Pass:
    source, half = random.Random(0), TOKENS // rows // 2
    if setup.pairs:
        given: list[Any] = [pair(source, 8, half - 8, half) for _ in range(rows)]
    else:
        given = [sequence(source, (half, half)) for _ in range(rows)]
    (batch,) = lay(given, TOKENS * 2, setup.packed)
    assert batch.input_ids.numel() == TOKENS
    return batch


def kept(adapted: Any, setup: Setup) -> int:
    """Bytes that autograd holds after the forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*adapted.parameters(), *adapted.buffers())}
    saved: list[weakref.ref[torch.Tensor]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if setup.bytes == 2 else nullcontext()
    with (
        disable_input_dtype_casting(adapted, active=setup.bytes == 2),
        autocast,
        saved_tensors_hooks(keep, lambda t: t),
    ):
        loss = token_log_probs(adapted, one_pass(setup)).mean()
    living = [storage for ref in saved if (tensor := ref()) is not None and (storage := tensor.untyped_storage())]
    assert loss.requires_grad and living
    return sum({s.data_ptr(): s.nbytes() for s in living if s.data_ptr() not in own}.values())


ATTENTION_ONLY = SftConfig(target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("lora", "setup", "key_value_heads"),
    [
        (SftConfig(), BF16, 4),
        (SftConfig(), BF16, 1),
        (SftConfig(lora_rank=64), replace(BF16, precision="fp32"), 4),
        (SftConfig(), replace(BF16, packed=False), 4),
        (SftConfig(), replace(BF16, pairs=True), 2),
        (SftConfig(), replace(BF16, checkpointing=True), 4),
        (ATTENTION_ONLY, BF16, 4),
        (SftConfig(adapter="dora"), BF16, 4),
        (SftConfig(lora_dropout=0.1), BF16, 4),
    ],
    ids=["lora", "grouped", "fp32", "padded", "pairs", "checkpointing", "attention-only", "dora", "dropout"],
)
def test_what_a_layer_keeps_is_what_autograd_keeps(lora: SftConfig, setup: Setup, key_value_heads: int) -> None:
    measured, predicted = [], []
    for layers in (2, 6):
        config = configuration(layers, key_value_heads)
        measured.append(kept(model(config, lora, setup), setup))
        shape = Shape.of(config)
        a_layer = footprint.kept_by_layer(shape, lora, setup)
        if setup.checkpointing:
            a_layer = setup.bytes * shape.hidden
        casts = 2 * shape.trainable(lora) if setup.bytes == 2 and not setup.checkpointing else 0
        predicted.append(TOKENS * a_layer * layers + casts)
    slack = (
        0.06 if lora is ATTENTION_ONLY else 0.03
    )  # attention's output end to end is kept for the adapter of o_proj alone
    assert measured[1] - measured[0] == pytest.approx(predicted[1] - predicted[0], rel=slack)


def test_checkpointing_leaves_one_layer_and_the_inputs_of_the_others() -> None:
    shape, lora = Shape.of(configuration(8)), SftConfig()
    whole, lean = (footprint.memory(shape, lora, replace(BF16, checkpointing=c))["activations"] for c in (False, True))
    a_layer = footprint.kept_by_layer(shape, lora, BF16)
    assert whole - lean == pytest.approx(TOKENS * (7 * a_layer - 8 * 2 * shape.hidden), rel=1e-6)


@pytest.mark.parametrize("lora", [SftConfig(), SftConfig(adapter="dora", lora_rank=4), ATTENTION_ONLY])
def test_parameters_are_those_of_the_model_and_of_peft(lora: SftConfig) -> None:
    config = configuration(key_value_heads=2, tie_word_embeddings=True)
    adapted, shape = model(config, lora, BF16), Shape.of(config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.trainable(lora) == trained
    assert shape.parameters == sum(p.numel() for p in adapted.parameters()) - trained
    memory = footprint.memory(shape, lora, replace(BF16, precision="fp32"))
    assert (memory["adapter"], memory["gradients"], memory["optimiser"]) == (4 * trained, 4 * trained, 8 * trained)


def test_four_bit_weights_take_what_bitsandbytes_takes() -> None:
    from bitsandbytes.nn import Linear4bit

    config = configuration(hidden_size=512, intermediate_size=1024)
    plain, shape = LlamaForCausalLM(config), Shape.of(config)
    found = 0
    for module in plain.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            layer = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(module.state_dict())
            state = layer.to("cpu").weight.quant_state
            parts = (layer.weight, state.absmax, state.state2.absmax)
            assert layer.weight.dtype == torch.uint8
            found += sum(part.numel() * part.element_size() for part in parts)
    assert found == pytest.approx(shape.in_linears * footprint.NF4, rel=0.01)
    setup = replace(BF16, quantization="nf4")
    assert footprint.memory(shape, SftConfig(), setup)["weights"] > found + (shape.parameters - shape.in_linears) * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_work_is_what_torch_counts(checkpointing: bool) -> None:
    lora, setup = SftConfig(), replace(BF16, precision="fp32", checkpointing=checkpointing)
    config = configuration(8, hidden_size=128, intermediate_size=344)  # the first layer has no input to move
    adapted, batch, shape = model(config, lora, setup), one_pass(setup, rows=32), Shape.of(config)
    with FlopCounterMode(display=False) as counter:
        token_log_probs(adapted, batch).mean().backward()
    lengths, supervised = (
        [TOKENS // 32] * 32,
        len(batch.targets),
    )  # so short that attention, uncounted on a CPU, is little
    predicted = footprint.training_flops(shape, lora, setup, lengths, supervised)
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_log_probs(adapted.eval(), batch)
    measuring = footprint.forward_flops(shape, lengths, supervised)
    assert measuring * 0.95 < counter.get_total_flops() < measuring * 1.3  # the adapter's part, of so small a model


def seven_billion(**more: Any) -> Shape:
    """Of deepseek-coder-7b-instruct-v1.5, but for what is named otherwise."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32}
    return Shape.of(LlamaConfig(**({"vocab_size": 102400, "dtype": "bfloat16"} | shape | more)))


def test_the_7b_model_fits_where_it_is_to_fit() -> None:
    shape = seven_billion()
    assert (shape.parameters, shape.stored) == (6_910_365_696, "bf16")
    at = replace(BF16, device="cuda", checkpointing=True, pass_tokens=2048)
    gb = {
        q: sum(footprint.memory(shape, SftConfig(), replace(at, quantization=q)).values()) / 1e9
        for q in ("none", "nf4")
    }
    assert 15 < gb["none"] < 22
    assert 6 < gb["nf4"] < 10


def test_a_published_figure_is_met() -> None:
    """LLaMA-Factory's wiki: Llama-2-7B, LoRA r8, bf16, batches of 4 × 1,024 tokens padded, checkpointing: 18 GB."""
    shape = seven_billion(vocab_size=32000, num_hidden_layers=32)
    setup = replace(BF16, device="cuda", checkpointing=True, pass_tokens=4096, packed=False)
    memory = footprint.memory(shape, SftConfig(lora_rank=8), setup)
    assert sum(memory.values()) / 1e9 == pytest.approx(18, rel=0.15)
