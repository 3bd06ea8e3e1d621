"""KTO's reference point: trl's on the same batch, of the whole step whatever its passes, and without a gradient."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Pair, gradients, little_model, pair, plain_log_probs
from torch import Tensor

from pipeline.config import DpoConfig
from pipeline.data.rows import PreferencePair
from pipeline.dpo import Dpo
from pipeline.encoded import Encoded
from pipeline.model import Base, find_base
from pipeline.stage import Job, run_stage
from pipeline.train import attention
from pipeline.train.head import bare, token_log_probs
from pipeline.train.heldout import log_probs
from pipeline.train.kto import ReferencePoint, mismatched
from pipeline.train.objective import PreferenceLoss
from pipeline.train.passes import lay
from pipeline.train.plan import plan
from pipeline.train.preference import PairSums
from pipeline.train.trainer import Execution
from pipeline.training_data import read
from pipeline.workspace import Workspace

SOURCE = random.Random(3)
PAIRS = [pair(SOURCE, SOURCE.randint(2, 9), SOURCE.randint(1, 9), SOURCE.randint(1, 9)) for _ in range(7)]
TOKENS = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in PAIRS]
STEP = [5, 2, 0, 3]
CONFIG = DpoConfig(loss_type="kto", beta=0.3)
LONG = 1000


def parts(one: Pair) -> list[list[int]]:
    """Prompt, chosen and rejected answer."""
    start = one[0].mask.index(True)
    return [one[0].ids[:start], one[0].ids[start:], one[1].ids[start:]]


def test_each_prompt_of_a_step_borrows_both_answers_of_the_pair_before_it() -> None:
    found = mismatched(PAIRS, STEP, LONG)
    for borrowing, own, other in zip(found, STEP, [3, 5, 2, 0], strict=True):
        assert parts(borrowing) == [parts(PAIRS[own])[0], *parts(PAIRS[other])[1:]]
        assert [sum(side.mask) for side in borrowing] == list(TOKENS[other])


def test_a_pair_alone_in_its_step_borrows_from_another_and_one_alone_in_the_data_from_none() -> None:
    for own, other in ((4, 3), (0, 6)):
        (found,) = mismatched(PAIRS, [own], LONG)
        assert parts(found) == [parts(PAIRS[own])[0], *parts(PAIRS[other])[1:]]
    assert mismatched(PAIRS[:1], [0], LONG) == mismatched(PAIRS, [2, 2], LONG) == []


def test_borrowed_answers_are_cut_at_the_length_that_rows_may_have() -> None:
    (found,) = mismatched([pair(SOURCE, 6, 1, 2), pair(SOURCE, 1, 2, 6)], [0], 8)
    assert [(len(side.ids), len(side.mask), sum(side.mask)) for side in found] == [(8, 8, 2), (8, 8, 2)]


@pytest.fixture(scope="module")
def moved() -> Any:
    """A policy on its way, in training, with dropout; and `reference`, its log-probs at the start of other answers."""
    model = little_model(adapter={"lora_dropout": 0.5})
    attention.install(bare(model))
    return model.train()


def reference(pairs: Sequence[Pair]) -> list[PairSums]:
    """Made up, by the answers: as if the policy had moved by some nats, mostly up."""
    return [tuple(-5.9 * sum(side.mask) + 0.02 * side.ids[-1] for side in one) for one in pairs]


def reference_point(model: Any, pass_tokens: int, packed: bool, steps: Sequence[Sequence[int]] = (STEP,)) -> Any:
    return ReferencePoint.of(model, PAIRS, steps, LONG, Execution(pass_tokens, packed), reference)


def plain_reference_point(model: Any, step: Sequence[int]) -> Tensor:
    """With its gradient, which must not be used."""
    borrowing = mismatched(PAIRS, step, LONG)
    now = [each.sum() for each in plain_log_probs(model, [side for one in borrowing for side in one])]
    attention.install(bare(model))
    before = [value for sums in reference(borrowing) for value in sums]
    return torch.stack([a - b for a, b in zip(now, before, strict=True)]).mean().clamp(min=0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pass_tokens", [1, 30, LONG])
def test_the_reference_point_is_of_the_whole_step_whatever_the_passes_without_dropout(
    pass_tokens: int, packed: bool, moved: Any
) -> None:
    found = reference_point(moved, pass_tokens, packed)(STEP)
    assert moved.training and all(p.grad is None for p in moved.parameters())
    expected = plain_reference_point(moved.eval(), STEP).item()
    moved.train()
    assert isinstance(found, float) and found > 1
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_reference_is_asked_once_and_before_the_policy_moves_for_every_step_of_the_plan(moved: Any) -> None:
    """A pair has another partner in another epoch. The policy that is its own reference has not moved: 0 everywhere."""
    config = DpoConfig(batch_size=3, gradient_accumulation=1, epochs=3.0)
    steps, how, asked = plan(config, ["ops"] * len(PAIRS), seed=1), Execution(30, packed=True), list[int]()

    def own(pairs: Sequence[Pair]) -> list[PairSums]:
        asked.append(len(pairs))
        return log_probs(moved, pairs, how, "reference", quiet=True)

    point = ReferencePoint.of(moved, PAIRS, steps, LONG, how, own)
    assert asked == [21]
    assert [len(step) for step in steps] == [3, 3, 1] * 3
    assert [point(step) for step in steps] == pytest.approx([0.0] * 9, abs=1e-9)


def test_no_progress_is_shown_in_every_step(moved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reference_point(moved, 30, True)(STEP)
    assert capsys.readouterr().err == ""


def in_passes(model: Any, pass_tokens: int, packed: bool, kl: Callable[[Sequence[int]], Any]) -> Tensor:
    """The step's loss as the trainer adds it up; `kl` of the pairs that it is given."""
    loss = PreferenceLoss(STEP, CONFIG, TOKENS, [1.0] * len(PAIRS), reference(PAIRS), kl(STEP))
    batches = lay([PAIRS[i] for i in STEP], pass_tokens, packed)
    return torch.stack([loss.part(token_log_probs(model, batch), batch) for batch in batches]).sum()


def plainly(model: Any) -> tuple[Tensor, Tensor]:
    """The step's loss by the paper, z0 held; and the same with a gradient through z0."""
    z0 = plain_reference_point(model, STEP)
    sums = torch.stack([each.sum() for each in plain_log_probs(model, [side for i in STEP for side in PAIRS[i]])])
    attention.install(bare(model))
    before = [value for i in STEP for value in reference([PAIRS[i]])[0]]
    r = (sums - torch.tensor(before, dtype=torch.float64)).view(-1, 2)

    def loss(point: Tensor) -> Tensor:
        desirable = 1 - torch.sigmoid(CONFIG.beta * (r[:, 0] - point))
        undesirable = 1 - torch.sigmoid(CONFIG.beta * (point - r[:, 1]))
        return torch.cat([desirable, undesirable]).mean()

    return loss(z0.detach()), loss(z0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pass_tokens", [1, 30, LONG])
def test_loss_and_gradient_of_a_step_are_the_papers_with_the_reference_point_held(
    pass_tokens: int, packed: bool
) -> None:
    """A gradient through z0 would be seen."""
    model = little_model()
    expected, through = plainly(model)
    (right, wrong) = gradients([expected, through], model)
    assert (right - wrong).norm() > 0.1 * right.norm()
    attention.install(bare(model))
    found = in_passes(model, pass_tokens, packed, reference_point(model, pass_tokens, packed))
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    (gradient,) = gradients([found], model)
    assert (gradient - right).norm() < 1e-9 * right.norm()


def test_a_reference_point_of_a_pass_would_be_seen() -> None:
    model = little_model()
    attention.install(bare(model))
    whole = reference_point(model, LONG, True)(STEP)
    halves = reference_point(model, LONG, True, steps=(STEP[:2], STEP[2:]))
    found = [halves(STEP[:2]), halves(STEP[2:])]
    assert max(abs(half - whole) for half in found) > 0.1


@pytest.fixture
def referee(base: Base, tmp_path: Path) -> Any:
    """trl's trainer on pairs, its batch all of them, its policy moved away from its reference."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from trl import KTOConfig, KTOTrainer

    asked = ["What is a lock?", "Why?", "And an index, how does it work?"]
    chosen = [" It keeps others out.", " It is so, and no more.", " Sorted keys."]
    rejected = [" No.", " Never.", " By magic, mostly."]
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base.load(), adapter).save_pretrained(tmp_path / "adapter")
    trainer = KTOTrainer(
        model=PeftModel.from_pretrained(base.load(), tmp_path / "adapter", is_trainable=True),
        args=KTOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=CONFIG.beta,
            per_device_train_batch_size=2 * len(asked),
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": asked, "chosen": chosen, "rejected": rejected}),
        processing_class=base.tokenizer(),
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer


def test_loss_gradient_and_reference_point_of_a_step_are_trls(referee: Any) -> None:
    """trl unpairs the pairs, pairs answers with other prompts, and gives one loss for them all."""
    model, rows = referee.model.eval(), list(referee.train_dataset)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def encoded(row: dict[str, Any], answer: str) -> Encoded:
        prompt, ids = row["prompt_ids"], row[answer]
        return Encoded([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))

    n = len(rows) // 2
    assert [row["label"] for row in rows] == [True] * n + [False] * n
    pairs = [
        (encoded(a, "completion_ids"), encoded(b, "completion_ids")) for a, b in zip(rows[:n], rows[n:], strict=True)
    ]
    step, how = list(range(n)), Execution(40, packed=False)
    theirs = sorted(encoded(row, "KL_completion_ids").ids for row in rows)
    assert sorted(side.ids for one in mismatched(pairs, step, LONG) for side in one) == theirs

    def reference(wanted: Sequence[Pair]) -> list[PairSums]:
        model.set_adapter("ref")
        try:
            return log_probs(model, wanted, how, "reference", quiet=True)
        finally:
            model.set_adapter("default")

    kl = ReferencePoint.of(model, pairs, [step], LONG, how, reference)(step)
    tokens = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in pairs]
    loss = PreferenceLoss(step, CONFIG, tokens, [1.0] * n, reference(pairs), kl)
    batches = lay(pairs, how.pass_tokens, how.packed)
    assert len(batches) > 1
    found = torch.stack([loss.part(token_log_probs(model, batch), batch) for batch in batches]).sum()

    expected = referee.compute_loss(model, referee.data_collator(rows))
    (logged,) = referee._metrics["eval"]["kl"]
    assert kl == pytest.approx(logged, rel=1e-4) and kl > 0.5  # above 0, where it would be clamped
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    size = torch.cat([g.flatten() for g in torch.autograd.grad(expected, trainable, retain_graph=True)]).norm()
    mine, trls = (torch.autograd.grad(value, trainable) for value in (found, expected))
    for one, other in zip(mine, trls, strict=True):
        assert (one - other).norm() <= 1e-4 * size


def test_a_run_starts_at_one_half_and_its_held_out_loss_has_its_own_reference_point(
    small_talk: Workspace, job: Callable[..., Job], answer_losses: Callable[[Any, Encoded], list[float]]
) -> None:
    """Worked out once more from the adapter that was kept, by peft alone. The SFT term lifts z0 above 0."""
    from peft import PeftModel

    settings = ["loss_type=kto", "sft_weight=3.0", "learning_rate=2e-3", "epochs=3.0", "warmup_ratio=0.0", "beta=0.5"]
    held_out = "training_data.validation.fraction=0.5"
    asked = job(*(f"dpo_config.{setting}" for setting in settings), held_out, source="base")
    record, base = run_stage(Dpo, asked), find_base(small_talk, asked.profile)
    assert record.facts.results["reference"]["loss_at_step_0"] == 0.5
    lines = [json.loads(line) for line in (record.folder / "log.jsonl").read_text("utf-8").splitlines()]
    steps, validations = ([line for line in lines if key in line] for key in ("loss", "eval_loss"))
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-3) and any(line["kl"] > 0.1 for line in steps[1:])

    chat, unseen = base.chat(), read(asked.workspace, asked.config, PreferencePair).held_out
    pairs = [chat.pair(row) for row in unseen]
    sides = [side for one in [*pairs, *mismatched(pairs, range(len(pairs)), LONG)] for side in one]
    sums = []
    for model in (PeftModel.from_pretrained(base.load(), record.output / "adapter"), base.load()):
        sums.append(torch.tensor([-sum(answer_losses(model, side)) for side in sides]))
    own, borrowed = (sums[0] - sums[1]).view(2, -1, 2)
    kl = max(borrowed.mean().item(), 0.0)
    beta = asked.config.dpo_config.beta
    each = torch.sigmoid(beta * torch.stack([kl - own[:, 0], own[:, 1] - kl]))
    assert validations[-1]["eval_loss"] == pytest.approx(each.mean().item(), abs=1e-4)
    assert kl > 0.1 and validations[-1]["eval_n"] == len(pairs)
