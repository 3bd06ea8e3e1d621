"""A training on two ranks: what one process learns, and one fate. Two processes with gloo, kept for all tests."""

import math
import random
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from little import little_model, pair, sequence, trainable
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from pipeline import config
from pipeline.config import DpoConfig
from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.train import attention, trainer
from pipeline.train.guards import Guards, Trip
from pipeline.train.head import bare
from pipeline.train.objective import PreferenceLoss, SupervisedLoss
from pipeline.train.passes import Pass, supervised
from pipeline.train.ranks import Ranks
from pipeline.train.trainer import Execution, Step, StepTrainer
from tests import forked

EXACT = 1e-9
SOURCE = random.Random(0)
ROWS = [sequence(SOURCE, turn) for turn in ((2, 1), (3, 40), (30, 2), (4, 55), (2, 3), (25, 1), (1, 9), (6, 30))]
PAIRS = [
    pair(SOURCE, *lengths)
    for lengths in ((5, 4, 40), (6, 7, 1), (1, 2, 3), (30, 3, 9), (2, 20, 2), (3, 1, 1), (2, 9, 30))
]
STEPS = [[0, 1, 2, 3], [4, 5, 6], [1], [2, 0, 5, 6, 3]]  # of the third one rank has no row
Outcome = Any  # what a scenario returns, or the exception it ended with
Both = Callable[..., list[Outcome]]


# Two processes


def serve(rank: int, meeting: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    while True:
        scenario, given = orders.recv()
        try:
            outcome = scenario(Ranks(rank, 2), **given)
        except SystemExit as left:
            outcome = left.__cause__
        except Exception as error:
            outcome = error
        orders.send(outcome)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """`both(scenario, …)`: it is called with each rank, in a process of its own; returns how each ended."""
    meeting = str(tmp_path_factory.mktemp("ranks") / "meeting")
    context = forked.context()
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=serve, args=(rank, meeting, pipe[1]), daemon=True) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()

    def run(scenario: Callable[..., Outcome], **given: Any) -> list[Outcome]:
        for ours, _ in pipes:
            ours.send((scenario, given))
        for ours, _ in pipes:
            assert ours.poll(120), "a rank waits for ever"
        return [ours.recv() for ours, _ in pipes]

    yield run
    for process in processes:
        process.kill()


# What they do: each of these runs on each rank, or alone


class MeanOfTheRank(SupervisedLoss):
    """The fault of averaging over ranks: each by its own tokens."""

    ranks = Ranks()

    def part(self, log_probs: Tensor, batch: Pass) -> Tensor:
        mine = self.ranks.share([ROWS[row] for row in self.rows], lambda row: len(row.ids))
        return -log_probs.sum() / sum(self.supervised[self.rows[place]] for place in mine) / 2


class MeanOfTheRanksPairs(PreferenceLoss):
    def part(self, log_probs: Tensor, batch: Pass) -> Tensor:
        return super().part(log_probs, batch) * len(self.rows) / len(batch.rows) / 2


class NotANumber(SupervisedLoss):
    """Where row 6 is: on one rank."""

    def part(self, log_probs: Tensor, batch: Pass) -> Tensor:
        wrong = any(self.rows[place] == 6 for place in batch.rows)
        return super().part(log_probs, batch) * (math.nan if wrong else 1.0)


def supervised_loss(step: list[int], kind: type[SupervisedLoss] = SupervisedLoss) -> SupervisedLoss:
    return kind(step, [supervised(row) for row in ROWS], [1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def pair_loss(step: list[int], kind: type[PreferenceLoss] = PreferenceLoss) -> PreferenceLoss:
    tokens = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in PAIRS]
    reference = [(-4.0 - n, -5.0 + n) for n in range(len(PAIRS))]
    return kind(step, DpoConfig(sft_weight=0.5), tokens, [1.0] * len(PAIRS), reference)


class Diary(TrainerCallback):
    """What each step was, and a request to stop after one of them."""

    def __init__(self, of: StepTrainer, stop_after: int | None) -> None:
        self.of, self.stop_after, self.steps = of, stop_after, list[Step]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(self.of.step)
        control.should_training_stop |= any(self.of.ranks.gather(state.global_step == self.stop_after))


def made(of: Ranks, folder: Path, rows: Any, loss: Any, how: Execution, model: Any, **options: Any) -> StepTrainer:
    attention.install(bare(model))
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = quiet | {"use_cpu": True, "remove_unused_columns": False, "lr_scheduler_type": "constant"}
    arguments |= {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "num_train_epochs": 1}
    settings = TrainingArguments(output_dir=str(folder), **arguments)
    return StepTrainer(
        model=model, rows=rows, steps=STEPS, step_loss=loss, execution=how, ranks=of, args=settings, **options
    )


def train(
    of: Ranks,
    folder: Path,
    *,
    pairs: bool = False,
    loss: Any = None,
    packed: bool = True,
    pass_tokens: int = 60,
    fails_on: int | None = None,
    fails: Callable[[int, Pass], Exception | None] | None = None,
    stop_on: int | None = None,
    other_start: bool = False,
) -> dict[str, Any]:
    """A few steps; the weights and what the steps were."""
    MeanOfTheRank.ranks = of
    model, rows = little_model(), PAIRS if pairs else ROWS
    if other_start and not of.first:
        torch.nn.init.ones_(trainable(model)[0])
    honest, guards, begun = trainer.token_log_probs, Guards(config.Guards()), 0

    def log_probs(model: Any, batch: Pass) -> Tensor:
        nonlocal begun
        begun += 1
        if fails and of.rank == fails_on and (error := fails(begun, batch)):
            raise error
        return honest(model, batch)

    def look(step: Step) -> Trip | None:
        number = training.state.global_step + 1
        return guards.before_update(step=number, loss=step.loss, grad_norm=step.grad_norm, supervised=step.supervised)

    loss = loss or (pair_loss if pairs else supervised_loss)
    training = made(of, folder, rows, loss, Execution(pass_tokens, packed), model)
    training.look, diary = look, Diary(training, 2 if of.rank == stop_on else None)
    training.add_callback(diary)
    trainer.token_log_probs = log_probs
    try:
        with of.together():
            training.train()
    finally:
        trainer.token_log_probs = honest
    weights = torch.cat([p.detach().flatten() for p in trainable(model)])
    return {"weights": weights, "steps": diary.steps, "execution": training.execution}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def mean_of_the_rank(step: list[int]) -> SupervisedLoss:
    return supervised_loss(step, MeanOfTheRank)


def mean_of_the_ranks_pairs(step: list[int]) -> PreferenceLoss:
    return pair_loss(step, MeanOfTheRanksPairs)


def not_a_number(step: list[int]) -> SupervisedLoss:
    return supervised_loss(step, NotANumber)


# They learn what one learns


@pytest.mark.parametrize(("pairs", "packed"), [(False, True), (True, False)], ids=["sft packed", "dpo padded"])
def test_two_ranks_learn_what_one_process_learns(pairs: bool, packed: bool, both: Both, tmp_path: Path) -> None:
    alone = train(Ranks(), tmp_path, pairs=pairs, packed=packed)
    one, other = both(train, folder=tmp_path, pairs=pairs, packed=packed)
    assert apart(one["weights"], alone["weights"]) < EXACT
    assert torch.equal(one["weights"], other["weights"])
    assert [step.rows for step in one["steps"]] == STEPS
    for mine, theirs, right in zip(one["steps"], other["steps"], alone["steps"], strict=True):
        for step in (mine, theirs):
            assert step.loss == pytest.approx(right.loss, rel=1e-6)
            assert step.grad_norm == pytest.approx(right.grad_norm, rel=1e-6)
            assert (step.tokens, step.supervised) == (right.tokens, right.supervised) or not packed
            assert step.figures == pytest.approx(right.figures, rel=1e-6) and bool(step.figures) is pairs


@pytest.mark.parametrize("pairs", [False, True], ids=["sft", "dpo"])
def test_a_mean_over_each_ranks_own_rows_would_be_seen(pairs: bool, both: Both, tmp_path: Path) -> None:
    alone = train(Ranks(), tmp_path, pairs=pairs)
    wrong = mean_of_the_ranks_pairs if pairs else mean_of_the_rank
    one, _ = both(train, folder=tmp_path, pairs=pairs, loss=wrong, pass_tokens=10_000)
    assert apart(one["weights"], alone["weights"]) > 1e-3


def test_ranks_start_from_the_first_ones_weights(both: Both, tmp_path: Path) -> None:
    one, other = both(train, folder=tmp_path, other_start=True)
    assert torch.equal(one["weights"], other["weights"])
    assert apart(one["weights"], train(Ranks(), tmp_path)["weights"]) < EXACT


def test_rows_are_shared_out_once_each_and_evenly() -> None:
    sizes = [9, 1, 8, 2, 7, 3, 30]
    for ranks_ in (1, 2, 3, 9):
        shares = [Ranks(rank, ranks_).share(sizes, lambda size: size) for rank in range(ranks_)]
        assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
        assert all(share == sorted(share) for share in shares)
    assert [sum(sizes[place] for place in Ranks(rank, 2).share(sizes, lambda size: size)) for rank in (0, 1)] == [
        30,
        30,
    ]


def noise(of: Ranks, folder: Path) -> tuple[Tensor, Tensor]:
    """NEFTune's, in a step of the same row twice: one for each rank. And how the generator stands after it."""
    model = little_model(adapter={"lora_dropout": 0.5})
    training = made(of, folder, [ROWS[3]] * 4, supervised_loss, Execution(60, True), model, neftune_alpha=5.0)
    embedding = bare(model).get_input_embeddings()
    drawn: list[Tensor] = []
    embedding.register_forward_hook(lambda m, ids, output: drawn.append((output - m.weight[ids[0]]).detach()))
    training.training_step(model, [0, 1])
    assert len(drawn) == 1 and drawn[0].any()
    return drawn[0], torch.get_rng_state()


def test_ranks_draw_noise_of_their_own_and_their_generators_stay_alike(both: Both, tmp_path: Path) -> None:
    (one, state), (other, other_state) = both(noise, folder=tmp_path)
    assert (one != other).float().mean() > 0.99
    assert torch.equal(state, other_state)
    (again, _), _ = both(noise, folder=tmp_path)
    assert torch.equal(again, one)


# One fate


def memory(number: int, batch: Pass) -> Exception | None:
    return torch.OutOfMemoryError("planted") if len(batch.rows) > 1 else None


def no_memory(number: int, batch: Pass) -> Exception | None:
    return MemoryError() if number == 2 else None


def broken(number: int, batch: Pass) -> Exception | None:
    return RuntimeError("planted") if number == 2 else None


@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_on_one_rank_halves_the_passes_of_all(rank: int, both: Both, tmp_path: Path) -> None:
    one, other = both(train, folder=tmp_path, pass_tokens=200, fails_on=rank, fails=memory)
    assert apart(one["weights"], train(Ranks(), tmp_path)["weights"]) < EXACT
    assert torch.equal(one["weights"], other["weights"])
    assert one["execution"] == other["execution"] and len(one["execution"].out_of_memory) > 1
    assert one["execution"].out_of_memory[0] == {"step": 1, "pass_tokens": 100}


def test_out_of_memory_with_one_row_on_one_rank_ends_both(both: Both, tmp_path: Path) -> None:
    ended = both(train, folder=tmp_path, pass_tokens=1, fails_on=1, fails=no_memory)
    assert all(isinstance(error, StageFailed) and error.step == 1 for error in ended)
    assert all("one row in a pass" in str(error) for error in ended)


def test_another_error_on_one_rank_ends_both_and_the_first_says_which(both: Both, tmp_path: Path) -> None:
    first, second = both(train, folder=tmp_path, pass_tokens=1, fails_on=1, fails=broken)
    assert str(first) == "rank 1: RuntimeError: planted" and isinstance(first, StageFailed)
    assert isinstance(second, RuntimeError)


def test_a_row_that_is_not_a_number_on_one_rank_trips_the_guard_on_both(both: Both, tmp_path: Path) -> None:
    alone = train(Ranks(), tmp_path, loss=not_a_number)
    found = both(train, folder=tmp_path, loss=not_a_number)
    for each in (alone, *found):
        trips = [step.trip and step.trip.kind for step in each["steps"]]
        assert trips == [None, "loss_not_finite", None, "loss_not_finite"]
        assert [step.rows for step in each["steps"]] == STEPS
    assert all(apart(each["weights"], alone["weights"]) < EXACT for each in found)


def test_what_one_rank_is_asked_all_do_after_the_same_step(both: Both, tmp_path: Path) -> None:
    one, other = both(train, folder=tmp_path, stop_on=1)
    assert len(one["steps"]) == len(other["steps"]) == 2
    assert torch.equal(one["weights"], other["weights"])


def interrupted(of: Ranks) -> list[int]:
    with of.together():
        if of.rank == 1:
            raise Interrupted("planted")
        return of.from_first(lambda: [1])


def test_an_interruption_of_one_rank_is_one_of_all(both: Both) -> None:
    assert [type(error) for error in both(interrupted)] == [Interrupted, Interrupted]


def different(of: Ranks) -> tuple[list[int], str]:
    with of.together():
        return of.gather(of.rank), of.from_first(lambda: f"by {of.rank}")


def test_the_first_rank_decides_and_values_come_by_rank(both: Both) -> None:
    assert both(different) == [([0, 1], "by 0")] * 2


def failing_together(of: Ranks) -> None:
    with of.together():
        raise UserError(f"as {of.rank} says")


def test_ranks_that_fail_alike_each_know_their_own_error(both: Both) -> None:
    assert [str(error) for error in both(failing_together)] == ["as 0 says", "as 1 says"]


def goes_on_alone(of: Ranks) -> list[Any]:
    with of.together():
        before = of.gather(of.rank)
        of.part()
        return [before, of.gather("alone"), of.from_first(lambda: "alone")]


def test_the_first_rank_goes_on_alone_where_the_others_are_done(both: Both) -> None:
    assert both(goes_on_alone) == [[[0, 1], ["alone"], "alone"], None]
