"""The few reaches into private parts of libraries, in one place; `tests/pipeline/test_private.py` breaks when they change."""

from collections.abc import Sequence
from typing import Any

from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from pipeline.chat import Encoded
from pipeline.heldout import log_probs


class PreparedDpoTrainer(DPOTrainer):
    """A `DPOTrainer` that takes token ids as they are.

    trl's own preparation would tokenise again, and train the newline that the template puts after the end-of-turn.
    `SFTTrainer` has an option for this (`skip_prepare_dataset`); `DPOTrainer` has none in trl 1.16.

    And the loss is the mean over a step's pairs. trl's is the mean of the passes' means, in which the pairs of a pass
    that is not full would count for more.
    """

    loss_is_scaled_for_ga = True  # by compute_loss; else the Trainer divides by the number of passes
    _rows_of_step = 0

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def get_batch_samples(self, *given: Any) -> Any:
        batches, items = super().get_batch_samples(*given)
        self._rows_of_step = sum(len(batch["input_ids"]) for batch in batches)
        return batches, items

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **options: Any) -> Any:
        found = super().compute_loss(model, inputs, *given, **options)
        return found * len(inputs["input_ids"]) / self._rows_of_step if model.training else found


def reference_log_probs(trainer: Any, encoded: Sequence[Encoded], pad_id: int) -> tuple[list[float], list[float]]:
    """Log-probs of the trainer's reference, by its own rule (the `ref` adapter where there is one), and of the base."""
    model = trainer.model
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        reference = log_probs(model, encoded, pad_id, len(encoded), "reference")
    with model.disable_adapter():
        base = log_probs(model, encoded, pad_id, len(encoded), "base")
    return reference, base


def keep_4bit_layout(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    It repacks at the first pass in eval mode, for inference only: no gradient flows through a packed layer, so training
    after a measurement would go wrong in silence, and rows that are no multiple of 32 fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
