"""The few reaches into private parts of libraries, in one place; `tests/pipeline/test_private.py` breaks when they change."""

from typing import Any


def keep_4bit_layout(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    It repacks at the first pass in eval mode, for inference only: no gradient flows through a packed layer, so training
    after a measurement would go wrong in silence, and rows that are no multiple of 32 fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def take_over_batching(manager: Any, processor: Any, router: Any) -> None:
    """Before transformers' continuous batching starts: `processor` chooses each token, `router` gets the results.

    It offers neither. Its own sampling draws a whole batch from one generator, so that an answer depends on its
    neighbours, and its router keeps what belongs to cancelled requests.
    """
    from transformers import LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
    manager.logit_processor.tensors_required = 1  # it counts only those that it converted itself
    manager.output_router = router


def cache_bytes(manager: Any) -> tuple[int, int]:
    """Bytes of its KV cache, and those that no request holds: free, or an old prompt's until they are needed."""
    cache = manager.batch_processor.cache
    kept = sum(len(part.ledger.cached_blocks) * part.bytes_per_block for part in cache.cache_allocators.values())
    return cache.num_sectors * cache.bytes_per_sector, cache.compute_free_capacity(relative=False) + kept
