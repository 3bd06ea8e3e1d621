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
