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
    """

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def reference_log_probs(trainer: Any, encoded: Sequence[Encoded], pad_id: int) -> tuple[list[float], list[float]]:
    """Log-probs of the trainer's reference, by its own rule (the `ref` adapter where there is one), and of the base."""
    model = trainer.model
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        reference = log_probs(model, encoded, pad_id, len(encoded), "reference")
    with model.disable_adapter():
        base = log_probs(model, encoded, pad_id, len(encoded), "base")
    return reference, base
