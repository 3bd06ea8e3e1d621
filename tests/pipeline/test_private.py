"""The reaches into private parts of libraries: each breaks here, and not in someone's training, when a part changes."""

from dataclasses import replace

import torch

from pipeline.model import Base


def test_a_measurement_does_not_change_the_gradients_of_a_4_bit_model(base: Base) -> None:
    """bitsandbytes repacks for inference in eval mode where the CPU has AVX512-BF16, and then passes no gradient on."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    quantised = replace(base, quantization="nf4").load(quantized=True)
    model = get_peft_model(quantised, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([[0, 17, 400, 9, 31, 5]])

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    assert len(before) == 56 and all(gradient.abs().max() > 0 for gradient in before)
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


def test_what_keeps_the_layout_is_still_what_bitsandbytes_asks() -> None:
    """Planted: a library that renames it would repack again, without an error."""
    from bitsandbytes.nn import Linear4bit

    from pipeline.private import keep_4bit_layout

    layer = Linear4bit(64, 64)
    layer.support_avx512bf16_for_cpu = True  # as on such a CPU
    keep_4bit_layout(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False
    assert "support_avx512bf16_for_cpu" in Linear4bit.forward.__code__.co_names
