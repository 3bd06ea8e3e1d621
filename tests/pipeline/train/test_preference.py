"""Preference losses against trl's on the same model, against the papers' arithmetic, and at their extremes.

KTO's against trl's is in `test_kto.py`, with its reference point.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pipeline.config import DpoConfig
from pipeline.encoded import Encoded
from pipeline.model import Base
from pipeline.train.preference import (
    PairLogProbs,
    figures,
    held_out_figures,
    loss_at_start,
    losses,
    reference_point,
    warnings,
)

LOSS_TYPES = get_args(DpoConfig.model_fields["loss_type"].annotation)
OF_DPO_TRAINER = [name for name in LOSS_TYPES if name not in ("orpo", "kto")]
PAIRS = [  # prompt, chosen and rejected token ids, of unlike length
    ([17, 400, 9], [31, 5, 77, 12, 3], [31, 900, 2]),
    ([8, 8, 1000, 45], [64], [64, 7, 21, 7, 99, 3]),
    ([5], [70, 71, 72, 3], [73, 74, 75, 3]),
]


def config(loss_type: str, **values: Any) -> DpoConfig:
    smoothing = {"label_smoothing": 0.2} if loss_type == "robust" else {}
    return DpoConfig.model_validate({"loss_type": loss_type, "beta": 0.3} | smoothing | values)


def log_probs(**values: list[float]) -> PairLogProbs:
    """What is not given is 0, and each answer one token."""
    n = len(next(iter(values.values())))
    given = {"chosen_tokens": [1.0] * n, "rejected_tokens": [1.0] * n} | values
    return PairLogProbs(*(torch.tensor(given.get(field.name, [0.0] * n)) for field in fields(PairLogProbs)))


def by_plain_forward(model: Any) -> PairLogProbs:
    """The policy is the adapter `default`, the reference `ref`: a sequence a pass, no code of ours or trl's."""

    def total(ids: list[int], answer: list[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        return torch.log_softmax(logits, -1)[range(len(answer)), answer].sum()

    def totals() -> list[Tensor]:
        return [torch.stack([total(pair[0], pair[side]) for pair in PAIRS]) for side in (1, 2)]

    policy = totals()
    with torch.no_grad():
        model.set_adapter("ref")
        reference = totals()
        model.set_adapter("default")
    tokens = [torch.tensor([len(pair[side]) for pair in PAIRS]) for side in (1, 2)]
    return PairLogProbs(*policy, *reference, *tokens)


@pytest.fixture(scope="module")
def referee(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """trl's trainer on the pairs above, its policy moved away from its reference."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from trl import DPOConfig, DPOTrainer

    class Referee(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    adapter = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    first = get_peft_model(base.load(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    first.save_pretrained(adapter)
    rows = Dataset.from_list([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), p, strict=True)) for p in PAIRS])

    def make(wanted: DpoConfig, folder: Path) -> Any:
        trainer = Referee(
            model=PeftModel.from_pretrained(base.load(), adapter, is_trainable=True),
            args=DPOConfig(
                output_dir=str(folder),
                loss_type=[wanted.loss_type],
                beta=wanted.beta,
                label_smoothing=wanted.label_smoothing,
                per_device_eval_batch_size=len(PAIRS),
                max_length=None,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
            ),
            train_dataset=rows,
            processing_class=base.tokenizer(),
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return trainer

    return make


@pytest.mark.parametrize("loss_type", OF_DPO_TRAINER)
def test_each_pairs_loss_its_gradients_and_the_figures_are_trls(
    loss_type: str, referee: Callable[..., Any], tmp_path: Path
) -> None:
    wanted = config(loss_type)
    trainer = referee(wanted, tmp_path)
    model = trainer.model.eval()
    trainable = [p for p in model.parameters() if p.requires_grad]
    ours = by_plain_forward(model)
    moved = ours.chosen - ours.reference_chosen - ours.rejected + ours.reference_rejected
    assert moved.abs().min() > 0.1  # nothing is compared at the point where every loss is the same
    found = losses(wanted, ours)
    for loss, row in zip(found, trainer.train_dataset, strict=True):
        expected = trainer.compute_loss(model, trainer.data_collator([row]))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
        mine = torch.autograd.grad(loss, trainable, retain_graph=True)
        theirs = torch.autograd.grad(expected, trainable)
        size = torch.cat([gradient.flatten() for gradient in theirs]).norm()
        assert size > 1e-3 or loss_type == "hinge"
        for one, other in zip(mine, theirs, strict=True):
            assert (one - other).norm() <= 1e-4 * size
    reported = trainer.evaluate(trainer.train_dataset)
    assert found.mean().item() == pytest.approx(reported["eval_loss"], rel=1e-5, abs=1e-5)
    for name, value in figures(wanted, ours).items():
        assert value == pytest.approx(reported[f"eval_{name}"], rel=1e-5, abs=1e-5)


def test_orpos_loss_and_rewards_are_trls() -> None:
    from trl.experimental.orpo import ORPOTrainer

    wanted = config("orpo", beta=0.25)
    sums = log_probs(
        chosen=[-4.0, -0.02, -300.0, -9.0],
        rejected=[-6.0, -40.0, -0.5, -9.0],
        chosen_tokens=[4, 2, 50, 9],
        rejected_tokens=[3, 10, 50, 9],
    )
    stand_in = SimpleNamespace(beta=wanted.beta, accelerator=SimpleNamespace(device="cpu"))
    gained, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(
        stand_in, sums.chosen / sums.chosen_tokens, sums.rejected / sums.rejected_tokens
    )
    assert losses(wanted, sums).tolist() == pytest.approx((-gained).tolist(), abs=1e-6)
    found = figures(wanted, sums)
    assert found["rewards/chosen"] == pytest.approx(chosen.mean().item())
    assert found["rewards/rejected"] == pytest.approx(rejected.mean().item())


def test_orpo_does_not_look_at_a_reference() -> None:
    sums = log_probs(chosen=[-4.0], rejected=[-6.0])
    other = replace(sums, reference_chosen=torch.tensor([math.nan]), reference_rejected=torch.tensor([math.nan]))
    assert losses(config("orpo"), sums).equal(losses(config("orpo"), other))
    assert figures(config("orpo"), sums) == figures(config("orpo"), other)


def test_ktos_reference_point_is_subtracted_from_both_sides() -> None:
    sums = log_probs(chosen=[3.0, 0.0], rejected=[-1.0, 2.0])
    by_hand = [(sigma(2 * (0.5 - 3)) + sigma(2 * (-1 - 0.5))) / 2, (sigma(2 * (0.5 - 0)) + sigma(2 * (2 - 0.5))) / 2]
    assert losses(config("kto", beta=2.0), sums, kl=0.5).tolist() == pytest.approx(by_hand)
    assert losses(config("apo_zero", beta=2.0), sums, kl=0.5).equal(losses(config("apo_zero", beta=2.0), sums))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_ktos_reference_point_is_a_mean_that_is_never_below_0_and_hides_no_nan() -> None:
    assert reference_point([(-1.0, -4.0), (-2.0, -3.0)], [(-2.0, -4.5), (-1.0, -5.0)]) == pytest.approx(2.5 / 4)
    assert reference_point([(-3.0, -4.0)], [(-2.0, -4.5)]) == 0.0
    assert math.isnan(reference_point([(math.nan, -4.0)], [(-2.0, -4.5)]))
    assert reference_point([], []) == reference_point([(), ()], [(), ()]) == 0.0


def test_the_held_out_loss_of_kto_has_the_reference_point_of_all_held_out_pairs() -> None:
    pair = (Encoded([1, 2], [False, True]), Encoded([1, 3], [False, True]))
    before, after = (
        [(-2.0, -3.0, -9.0, -8.0), (-1.0, -1.0, -5.0, -6.0)],
        [(-1.0, -4.0, -7.0, -7.0), (-2.0, 0.0, -4.0, -6.0)],
    )
    z0 = (2 + 1 + 1 + 0) / 4
    expected = [(sigma(z0 - 1) + sigma(-1 - z0)) / 2, (sigma(z0 + 1) + sigma(1 - z0)) / 2]
    found = held_out_figures(config("kto", beta=1.0), [pair, pair], before, after)
    assert found["eval_loss"].value == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert found["eval_preference_accuracy"].value == 0.5


def test_the_loss_of_held_out_pairs_does_not_overflow() -> None:
    pair = (Encoded([1, 2], [False, True]), Encoded([1, 3], [False, True]))
    before, after = [(0.0, 0.0)] * 2, [(-1e5, 0.0), (1e5, 0.0)]
    assert held_out_figures(config("sigmoid", beta=1.0), [pair, pair], before, after)["eval_loss"].value == 5e4


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_at_the_start_is_known_beforehand(loss_type: str) -> None:
    sums = torch.tensor([-50.0, -3.0])
    tokens = torch.tensor([20, 2])
    start = PairLogProbs(sums, sums - 7, sums, sums - 7, tokens, tokens + 3)
    known = loss_at_start(config(loss_type))
    if loss_type == "orpo":
        assert known is None
    else:
        assert losses(config(loss_type), start).tolist() == pytest.approx([known, known])


def test_dpo_starts_at_ln_2() -> None:
    assert loss_at_start(DpoConfig()) == pytest.approx(math.log(2))


def test_the_figures_of_a_step() -> None:
    sums = log_probs(chosen=[-1.0, -4.0, -2.0], rejected=[-3.0, -5.0, -1.0], reference_chosen=[-2.0, -4.5, -1.0])
    found = figures(config("sigmoid", beta=2.0), sums)
    assert found == pytest.approx(
        {
            "rewards/chosen": 2 * (1 + 0.5 - 1) / 3,
            "rewards/rejected": 2 * (-3 - 5 - 1) / 3,
            "rewards/margins": 2 * (4 + 5.5 + 0) / 3,
            "rewards/accuracies": 2 / 3,  # a tie is no win
            "logps/chosen": -7 / 3,
            "logps/rejected": -9 / 3,
        }
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_better_margin_is_never_a_higher_loss(loss_type: str) -> None:
    """Short of the target that ipo and sppo_hard aim at. An error of sign is here whatever trl does."""
    wanted = config(loss_type, beta=0.05)
    steps = torch.linspace(-5, -1, 9)
    sums = log_probs(chosen=steps.tolist(), rejected=(-6 - steps).tolist())
    sums = replace(sums, reference_chosen=torch.full((9,), -3.0), reference_rejected=torch.full((9,), -3.0))
    assert (losses(wanted, sums).diff() < 0).all()


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """The paper's promise: averaged over labels flipped with that probability, it is DPO's loss on the true ones."""
    share = 0.2
    right = log_probs(chosen=[-3.0, -8.0], rejected=[-5.0, -4.0])
    wrong = replace(right, chosen=right.rejected, rejected=right.chosen)
    robust = config("robust", label_smoothing=share)
    average = (1 - share) * losses(robust, right) + share * losses(robust, wrong)
    assert average.tolist() == pytest.approx(losses(config("sigmoid"), right).tolist(), abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_stay_finite(loss_type: str, margin: float) -> None:
    best, worst = (0.0, -1e4) if margin > 0 else (-1e4, 0.0)
    sums = log_probs(chosen=[best, best], rejected=[worst, worst], chosen_tokens=[1, 50], rejected_tokens=[50, 1])
    chosen, rejected = sums.chosen.requires_grad_(), sums.rejected.requires_grad_()
    loss = losses(config(loss_type), sums)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_is_widened_before_it_is_subtracted_and_double_stays_double(loss_type: str) -> None:
    sums = log_probs(chosen=[-514.0], rejected=[-520.0], reference_chosen=[-513.0], reference_rejected=[-523.0])

    def cast(dtype: torch.dtype) -> PairLogProbs:
        return PairLogProbs(*(getattr(sums, field.name).to(dtype) for field in fields(sums)))

    assert losses(config(loss_type), cast(torch.bfloat16)).dtype == torch.float32
    assert losses(config(loss_type), cast(torch.float64)).dtype == torch.float64


def held_out(a_token: float, margin: float, pairs: int = 30) -> PairLogProbs:
    """Answers of 40 to 60 tokens that changed by that much, some more, some less."""
    spread = torch.linspace(-0.05, 0.05, pairs)
    tokens = torch.tensor([40 + index % 21 for index in range(pairs)])
    before = -2.0 * tokens
    chosen = before + (a_token + spread) * tokens
    rejected = before + (a_token + spread.flip(0)) * tokens - margin
    return PairLogProbs(chosen, rejected, before, before, tokens, tokens)


def test_collapsed_chosen_answers_are_said() -> None:
    (said,) = warnings(held_out(a_token=-0.5, margin=8.0))
    assert said.startswith("the chosen answers lost 0.50 nats a token on 30 held-out pairs")
    assert "sft_weight" in said


@pytest.mark.parametrize("a_token", [-0.1, 0.0, 0.3])
def test_the_usual_drift_is_not_a_collapse(a_token: float) -> None:
    assert warnings(held_out(a_token, margin=8.0)) == []


def test_one_pair_says_nothing() -> None:
    assert warnings(held_out(a_token=-3.0, margin=8.0, pairs=1)) == []


def preferring(longer: bool | None, pairs: int) -> PairLogProbs:
    """Half the chosen answers are the longer one; the policy follows length, or (None) the label."""
    signs = [1 if index % 2 else -1 for index in range(pairs)]
    tokens = torch.full((pairs,), 50)
    right = [1.0 if longer is None else sign * (1.0 if longer else -1.0) for sign in signs]
    zero = torch.zeros(pairs)
    return PairLogProbs(torch.tensor(right) * 3, zero, zero, zero, tokens + 10 * torch.tensor(signs), tokens)


def test_a_policy_that_follows_length_is_said() -> None:
    (said,) = warnings(preferring(longer=True, pairs=12))
    assert "prefers the longer answer" in said
    (said,) = warnings(preferring(longer=False, pairs=12))
    assert "prefers the shorter answer" in said


def test_following_the_label_is_not_following_length() -> None:
    assert warnings(preferring(longer=None, pairs=40)) == []


def test_errors_by_chance_do_not_warn() -> None:
    """30 % of the pairs wrong, whatever their length: at most one run of a hundred may warn."""
    generator = torch.Generator().manual_seed(0)
    warned = 0
    for _ in range(200):
        sums = preferring(longer=None, pairs=40)
        wrong = torch.rand(40, generator=generator) < 0.3
        warned += bool(warnings(replace(sums, chosen=torch.where(wrong, -sums.chosen, sums.chosen))))
    assert warned <= 2
