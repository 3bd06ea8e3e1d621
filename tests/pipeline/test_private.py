"""The reaches into private parts of libraries: each breaks here, and not in someone's training, when a part changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from pipeline.chat import Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import PreferencePair
from pipeline.dpo import _dataset
from pipeline.model import Base
from pipeline.private import PreparedDpoTrainer, reference_log_probs

Pairs = list[tuple[Encoded, Encoded]]


@pytest.fixture(scope="module")
def pairs(trained: Any, base: Base) -> Pairs:
    rows = read_rows(trained.workspace, "data/dpo", PreferencePair)[:3]
    return [base.chat().pair(row) for row in rows]


@pytest.fixture(scope="module")
def trainer(trained: Any, base: Base, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> PreparedDpoTrainer:
    from peft import PeftModel

    arguments = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        per_device_train_batch_size=3,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    return PreparedDpoTrainer(
        model=PeftModel.from_pretrained(base.load(), trained.output("sft"), is_trainable=True),
        args=arguments,
        train_dataset=_dataset([(None, sides) for sides in pairs]),  # type: ignore[misc]
        processing_class=base.tokenizer(),
    )


def test_trl_takes_our_token_ids_and_masks_as_they_are(trainer: PreparedDpoTrainer, pairs: Pairs) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for ids, mask, attention in zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True):
        real = attention.bool()
        found.append((ids[real].tolist(), mask[real].bool().tolist()))
    expected = [(side.ids, side.mask) for sides in pairs for side in sides]
    assert sorted(found) == sorted(expected)


def test_what_we_override_is_still_what_trl_calls() -> None:
    assert "_prepare_dataset" in vars(DPOTrainer)
    assert "compute_loss" in vars(DPOTrainer)
    assert any("get_batch_samples" in vars(kind) for kind in DPOTrainer.__mro__)
    assert any("loss_is_scaled_for_ga" in vars(kind) for kind in DPOTrainer.__mro__)


def test_reference_log_probs_are_the_ref_adapters_and_the_bases(
    trainer: PreparedDpoTrainer, pairs: Pairs, base: Base, answer_losses: Callable[[Any, Encoded], list[float]]
) -> None:
    sides = [side for pair in pairs for side in pair]
    reference, of_base = reference_log_probs(trainer, sides, base.tokenizer().pad_token_id)

    def by_hand(model: Any) -> list[float]:
        return [-sum(answer_losses(model, side)) for side in sides]

    assert of_base == pytest.approx(by_hand(base.load()), abs=2e-2)
    assert reference == pytest.approx(by_hand(trainer.model), abs=2e-2)  # the policy is still the SFT adapter
    assert trainer.model.active_adapters == ["default"]
    policy = next(p for name, p in trainer.model.named_parameters() if ".default." in name and "lora_B" in name)
    with torch.no_grad():
        kept = policy.clone()
        policy.zero_()
        moved, _ = reference_log_probs(trainer, sides, base.tokenizer().pad_token_id)
        policy.copy_(kept)
    assert moved == reference  # it does not follow the policy


def test_the_frozen_copy_is_named_ref_and_does_not_train(trainer: PreparedDpoTrainer) -> None:
    assert set(trainer.model.peft_config) == {"default", "ref"}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


def test_a_measurement_does_not_change_the_gradients_of_a_4_bit_model(base: Base, trained: Any) -> None:
    """bitsandbytes repacks for inference in eval mode where the CPU has AVX512-BF16, and then passes no gradient on."""
    from peft import PeftModel

    quantised = replace(base, quantization="nf4").load(quantized=True)
    model = PeftModel.from_pretrained(quantised, trained.output("sft"), is_trainable=True)
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
