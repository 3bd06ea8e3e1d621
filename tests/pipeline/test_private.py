"""The reaches into private parts of libraries: each breaks here, and not in someone's training, when a part changes."""

import queue
from dataclasses import replace
from typing import Any

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


def test_continuous_batching_lets_another_choose_tokens_and_take_results(base: Base) -> None:
    """Planted: a library that no longer asks them would draw and deliver as it likes, without an error."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    from pipeline.private import cache_bytes, take_over_batching

    class AlwaysSeven(ContinuousBatchingLogitsProcessor):
        supported_kwargs, ignored_kwargs = {"mark": str}, ()

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
            self.seen = [request.state for request in requests_with_new_token]
            return torch.empty(0, dtype=torch.int32)

        def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
            places.append([(s.request_id, s.position_offset, s.logit_processor_kwargs) for s in self.seen])
            assert scores.dtype == torch.float32 and len(scores) >= len(self.seen)
            return torch.nn.functional.one_hot(torch.full((len(scores),), 7), scores.shape[-1]).float()

    class Kept(OutputRouter):
        def deliver(self, output: Any) -> None:
            arrived.put(output)

        def deliver_batch(self, outputs: list[Any]) -> None:
            for output in outputs:
                self.deliver(output)

    places: list[Any] = []
    arrived: queue.Queue[Any] = queue.Queue()
    manager = base.load().init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=4, num_blocks=8, max_batch_tokens=4, use_cuda_graph=False, use_async_batching=False
        ),
    )
    take_over_batching(manager, AlwaysSeven(), Kept())
    manager.warmup()
    total, free = cache_bytes(manager)
    assert free == total > 0
    manager.start()
    try:
        manager.add_request([1, 2, 3, 4, 5], request_id="one", max_new_tokens=3, streaming=True, mark="own")
        results = [arrived.get(timeout=30) for _ in range(3)]
        assert [result.generated_tokens for result in results] == [[7], [7, 7], [7, 7, 7]]
        assert [place for place in places if place] == [[("one", at, {"mark": "own"})] for at in (5, 6, 7)]
        manager.add_request([9] * 9, request_id="two", max_new_tokens=20, streaming=True, mark="")
        arrived.get(timeout=30)
        assert cache_bytes(manager)[1] < total
        manager.cancel_request("two")
        with manager.pause():  # the next pass has taken note of it
            pass
        with manager.pause():
            assert cache_bytes(manager) == (total, total)
    finally:
        manager.stop(hard_stop=True)
