"""Guards fire on planted faults, and never on runs that go well: simulated ones by the thousand, and real ones."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest

from pipeline import config
from pipeline.records import items
from pipeline.train.guards import FLAT, LASTING, OVERFLOWS, Guards, Kind, Trip

LN2 = math.log(2)
SETTINGS = config.Guards()
RUNS = 340  # of each kind, of 20, 100 or 400 steps


@dataclass(frozen=True)
class S:
    """A step as the trainer tells it."""

    loss: float
    grad_norm: float = 0.5
    update_norm: float = 0.02
    learning_rate: float = 1e-4
    supervised: int = 100


def look(guards: Guards, number: int, step: S) -> Trip | None:
    """As the trainer does: a step that trips before its update is not taken."""
    return guards.before_update(
        step=number, loss=step.loss, grad_norm=step.grad_norm, supervised=step.supervised
    ) or guards.after_update(
        step=number,
        loss=step.loss,
        grad_norm=step.grad_norm,
        update_norm=step.update_norm,
        learning_rate=step.learning_rate,
    )


def first_trip(steps: Iterable[S], settings: config.Guards = SETTINGS) -> tuple[int, str] | None:
    """Number of the step and kind."""
    guards = Guards(settings)
    trips = ((number, look(guards, number, step)) for number, step in enumerate(steps, 1))
    return next(((number, trip.kind) for number, trip in trips if trip), None)


def sound(n: int, seed: int = 0) -> list[S]:
    """Steps of a run that goes well, long past warm-up."""
    rng = np.random.default_rng(seed)
    losses, norms = rng.lognormal(0, 0.2, n), rng.lognormal(-1, 0.4, n)
    return [S(float(loss), float(norm)) for loss, norm in zip(losses, norms, strict=True)]


# Runs that go well


Noise = np.random.Generator
Figures = tuple[np.ndarray, np.ndarray, np.ndarray]  # loss, gradient norm, share of the usual update: (steps,)


def rates(steps: int) -> np.ndarray:
    """Warm-up from 0, then cosine, as transformers has it; of the highest."""
    done = np.arange(steps)
    warm = math.ceil(0.05 * steps)
    return np.where(done < warm, done / warm, 0.5 * (1 + np.cos(np.pi * (done - warm) / (steps - warm))))


def conversations(rng: Noise, steps: int, rows: int, harder: float = 1.0) -> Figures:
    """SFT: rows of 1 to 3,000 tokens, domains of their own level, lognormal losses; later rows `harder` (a curriculum)."""
    start, floor, fast = rng.uniform(0.8, 6), rng.uniform(0.3, 0.9), rng.uniform(0.05, 1)
    level = start * (floor + (1 - floor) * np.exp(-np.arange(steps) / steps / fast))
    level *= harder ** (np.arange(steps) * 3 // steps / 2)
    tokens = 1 + np.floor(rng.choice([rng.lognormal(5, 0.8, (steps, rows)), 10 ** rng.uniform(0, 3.5, (steps, rows))]))
    domains = rng.lognormal(0, rng.uniform(0, 0.5), 5)[rng.integers(0, 5, (steps, rows))]
    losses = domains * rng.lognormal(0, np.hypot(rng.uniform(0.05, 0.5), tokens**-0.5))
    relative = (losses * tokens).sum(1) / tokens.sum(1)
    norms = rng.lognormal(-1, 0.7) * np.minimum(relative, 4) * np.hypot(1, 12 * tokens.sum(1) ** -0.5)
    norms *= rng.lognormal(0, 0.35, steps) * np.where(rng.random(steps) < 0.005, 8, 1)
    return level * relative, norms, rng.uniform(0.3, 1, steps)


def pairs(rng: Noise, steps: int, rows: int, *, loss: str) -> Figures:
    """DPO: margins grow with the rate spent; they have heavy tails (t, 4 degrees), and some pairs are labelled wrongly."""
    wrong = rng.uniform(0, 0.2)
    top = rng.uniform(0.1, 0.6) if loss == "ipo" else rng.uniform(0.5, 12)  # IPO pulls margins to 1 / 2β
    spent = np.concatenate([[0], np.cumsum(rates(steps))[:-1]]) / steps
    mean = top * (1 - np.exp(-spent * rng.uniform(1, 5)))[:, None]
    z = mean * (1 + rng.uniform(0.3, 1) * rng.standard_t(4, (steps, rows)))
    z = np.where(rng.random(z.shape) < wrong, -z / 2, z)
    s = 1 / (1 + np.exp(np.clip(z, -50, 50)))
    losses, slopes = {
        "sigmoid": (np.logaddexp(0, -z), s),
        "hinge": (np.maximum(0, 1 - z), (z < 1) * 1.0),
        "ipo": ((10 * z - 5) ** 2, abs(10 * z - 5)),
        "apo_zero": (2 * s, s * (1 - s)),
    }[loss]
    norms = (slopes * rng.lognormal(rng.normal(), 0.7, z.shape)).mean(1)
    momentum = np.zeros(steps)
    for t in range(steps):  # Adam's updates go on for a while after the gradients are 0
        momentum[t] = 0.9 * (momentum[t - 1] if t else 1) + 0.1 * min(1, norms[t])
    return losses.mean(1), norms, momentum


def simulated(figures: Figures, largest_update: float, learning_rate: float) -> list[S]:
    rate = rates(len(figures[0]))
    columns = (*figures[:2], figures[2] * rate * largest_update, rate * learning_rate)
    return [S(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


LOSSES = ("sigmoid", "hinge", "ipo", "apo_zero")
CLEAN: dict[str, Callable[[Noise, int, int], Figures]] = {
    "sft": conversations,
    "curriculum": lambda rng, steps, rows: conversations(rng, steps, rows, rng.uniform(1, 2)),
    **{loss: partial(pairs, loss=loss) for loss in LOSSES},
}


def clean_runs(kind: str, runs: int) -> Iterator[list[S]]:
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        steps, rows = int(rng.choice([20, 100, 400])), int(rng.choice([1, 1, 2, 4, 32]))
        yield simulated(CLEAN[kind](rng, steps, rows), 0.05, 2e-4)


@pytest.mark.parametrize("kind", CLEAN)
def test_no_run_that_goes_well_is_stopped(kind: str) -> None:
    trips = [trip for run in clean_runs(kind, RUNS) if (trip := first_trip(run))]
    assert trips == []


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_no_real_run_that_goes_well_is_stopped(trained: Any, stage: str) -> None:
    record = trained.record(stage)
    lines = [line for line in items.read(record.path.with_suffix("") / "log.jsonl") if "loss" in line]
    figures = ("loss", "grad_norm", "update_norm", "learning_rate")
    assert len(lines) >= LASTING
    assert first_trip(S(*(line[figure] for figure in figures)) for line in lines) is None


# Planted faults


@pytest.mark.parametrize("before", [0, 1, 40])
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (S(math.nan), "loss_not_finite"),
        (S(math.inf), "loss_not_finite"),
        (S(-math.inf, math.nan), "loss_not_finite"),
        (S(1.0, math.nan), "gradient_not_finite"),
        (S(1.0, math.inf), "gradient_not_finite"),
        (S(0.0, 0.0, supervised=0), "nothing_supervised"),
        (S(math.nan, math.nan, supervised=0), "nothing_supervised"),
    ],
)
def test_what_cannot_be_learnt_from_never_reaches_the_optimiser(before: int, step: S, kind: str) -> None:
    guards = Guards(SETTINGS)
    for number, earlier in enumerate(sound(before), 1):
        assert look(guards, number, earlier) is None
    trip = guards.before_update(step=before + 1, loss=step.loss, grad_norm=step.grad_norm, supervised=step.supervised)
    assert trip and trip.kind == kind and f"step {before + 1}" in trip.message and trip.remedy


REAL = {  # (loss, update norm) of the first steps on the tiny base, by how much the rate is higher than its profile's
    "sft, 100 times": "6.22 0|6.3 1.2|6.59 1.7|14.17 .95|8.68 .48|12.36 .31|8.06 .23|8.47 .17|7.21 .13|7.33 .11",
    "sft, 100 times, 2": "6.02 0|6.22 1.2|6.5 1.7|17.83 .95|19.56 .48|8.78 .3|9.29 .21|7.75 .16|7.53 .12|8.14 .1",
    "sft, 30 times": "6.22 0|6.3 .36|5.78 .75|7.06 .71|9.49 .44|25.5 .32|9.4 .25|20 .19|7.99 .15|8.23 .12",
    "dpo, 100 times": ".693 0|.693 .13|.508 .22|.935 .26|1.18 .21|.693 .17|2.36 .14|.88 .12|.58 .1|.63 .09|.96 .08",
    "dpo, 100 times, 2": ".693 0|.693 .13|.309 .22|.438 .27|2.12 .21|2.24 .17|.852 .13|.163 .11|2 .09|1.67 .08",
    "hinge, 100 times": "1 0|1 .2|0 .3|3.11 .24|2.72 .2|.0238 .16|.454 .13|4.58 .11|19.7 .097|0 .08",
}
LEARNS = {  # at the profile's rate, or too high a one at which the loss falls all the same
    "sft, a row a step": "5.97 0|6.05 .004|5.97 .008|6.09 .01|6.1 .01|6.39 .02|5.95 .02|6.31 .02|6.05 .02|"
    "6.53 .03|6 .03|5.65 .03|6.1 .03|5.93 .03|7.05 .02|5.91 .02|5.79 .02|5.64 .02|5.94 .02",
    "sft, 10 times": "6.22 0|6.3 .1|5.78 .3|5.72 .3|5.9 .3|6.45 .2|5.83 .2|6.06 .2|5.94 .1|"
    "5.92 .1|5.94 .1|5.91 .1|5.93 .09|5.92 .08|5.86 .08|5.82 .07|5.76 .07|6.05 .06|6.59 .06",
    "ipo, 2 pairs a step": "25 0|25 .0007|24.8 .001|24.6 .001|24.9 .002|24.8 .002|19.2 .002|27.3 .002|2.5 .002|"
    "2.1 .002|26.4 .002|27.6 .002|24.9 .002|14.3 .002|24.6 .002|3.9 .002|17.2 .002|17.7 .001|21.7 .001",
    "dpo, 30 times": ".693 0|.693 .04|.662 .07|.631 .08|.307 .08|.596 .07|.589 .06|.95 .06|.126 .05|"
    ".601 .05|.916 .04|1.17 .04|.576 .04|.783 .03|.218 .03|2.46 .03|.98 .03|1.04 .03|.56 .03",
}


def real(run: str) -> list[S]:
    steps = [[float(figure) for figure in step.split()] for step in run.split("|")]
    return [S(loss, update_norm=moved, learning_rate=moved) for loss, moved in steps]


@pytest.mark.parametrize("run", REAL)
def test_a_learning_rate_far_too_high_is_caught_within_12_steps(run: str) -> None:
    trip = first_trip(real(REAL[run]))
    assert trip and trip[1] == "loss_explosion" and trip[0] > 3  # the first three are as good as any


@pytest.mark.parametrize("run", LEARNS)
def test_a_real_run_that_learns_is_not_stopped(run: str) -> None:
    assert first_trip(real(LEARNS[run])) is None


@pytest.mark.parametrize("seed", range(5))
def test_an_explosion_is_caught_at_its_fifth_step(seed: int) -> None:
    high = [S(step.loss * 8, step.grad_norm) for step in sound(20, seed + 100)]
    assert first_trip(sound(60, seed) + high) == (60 + LASTING, "loss_explosion")
    assert first_trip(sound(3, 1) + high) == (3 + LASTING, "loss_explosion")
    assert first_trip(sound(60, seed) + high, config.Guards(explosion=50)) is None
    assert first_trip(sound(60, seed) + high[: LASTING - 1] + sound(60, seed + 1)) is None


def test_a_few_losses_that_are_low_by_chance_do_not_make_the_next_ones_an_explosion() -> None:
    assert first_trip([S(0.2), *(S(1.0 + i / 100) for i in range(20))]) is None
    assert first_trip([S(1.2), S(0.2), S(0.2), *sound(20)]) is None
    assert first_trip([S(0.2), S(1.2, update_norm=0.3), *sound(20)]) is None


def test_after_a_large_update_a_rise_counts_only_when_it_lasts() -> None:
    first = S(6.0, update_norm=0.3)
    assert first_trip([first, S(10.0), *(S(6.1) for _ in range(5))]) is None
    assert first_trip([first, *(S(6.9 + i / 100) for i in range(20))]) is None
    assert first_trip([first, *(S(8.0 + i / 100) for i in range(20))]) == (LASTING, "loss_explosion")


@pytest.mark.parametrize("before", [10, 200])
def test_a_gradient_out_of_all_proportion_is_a_spike_and_a_large_one_is_not(before: int) -> None:
    assert first_trip([*sound(before), S(1.0, 1000.0)]) == (before + 1, "gradient_spike")
    assert first_trip([*sound(before), S(1.0, 8.0)]) is None  # 20 times the usual, which clipping makes harmless
    assert first_trip([*sound(before), S(1.0, 1000.0)], config.Guards(spike=1e4)) is None


@pytest.mark.parametrize("update", [math.nan, math.inf])
def test_an_update_that_is_no_number_trips_at_once(update: float) -> None:
    assert first_trip([*sound(3), S(2.0, 0.5, update)]) == (4, "update_not_finite")


def test_an_adapter_without_updates_is_dead() -> None:
    warm = S(3.0, 0.5, 0.0, 0.0)
    frozen = [S(3.0 + i / 10, 0.0, 0.0) for i in range(20)]
    assert first_trip([warm, *frozen]) == (1 + LASTING, "dead_adapter")
    lost = [S(step.loss, 0.5, 1e-12, 1e-14) for step in sound(20)]
    assert first_trip([warm, *lost]) == (1 + LASTING, "dead_adapter")
    assert first_trip([*sound(60), *frozen]) == (60 + LASTING, "dead_adapter")


def test_a_learning_rate_of_0_is_dead_after_five_steps_and_warm_up_s_first_step_is_not() -> None:
    assert first_trip(S(3.0 + i / 10, 0.5, 0.0, 0.0) for i in range(20)) == (LASTING, "dead_adapter")
    assert first_trip([S(3.0, 0.5, 0.0, 0.0), *sound(20)]) is None


def test_a_slow_explosion_is_one_though_each_step_is_near_the_usual() -> None:
    slow = [S(1.02**i * (1 + 0.1 * math.sin(i))) for i in range(300)]
    found = first_trip([*sound(60), *slow])
    assert found and found[1] == "loss_explosion" and slow[found[0] - 61].loss < 20


def test_harder_rows_later_in_a_curriculum_are_no_explosion_and_no_spike() -> None:
    steps = [*(S(0.5 + i / 1000, 1e-3) for i in range(24)), *(S(7.5 - i / 10, 1.0) for i in range(24))]
    assert first_trip(steps) in ((25, "gradient_spike"), (29, "loss_explosion"))  # as they would be, if rows were mixed
    guards = Guards(SETTINGS, curriculum=True, rows_differ=False)
    assert [look(guards, number, step) for number, step in enumerate(steps, 1)] == [None] * len(steps)
    ruined = [S(9.0, 0.5, 0.9), *(S(12.0, 0.5, 0.9) for _ in range(20))]
    assert any(look(guards, 100 + number, step) for number, step in enumerate(ruined))


def test_a_loss_that_hardly_moves_is_no_wonder_where_every_step_has_all_rows() -> None:
    for rows_differ in (True, False):
        guards = Guards(SETTINGS, rows_differ=rows_differ)
        trips = [look(guards, number, S(2.0)) for number in range(1, 30)]
        assert any(trips) == rows_differ


def test_one_loss_for_different_rows_is_flat() -> None:
    assert first_trip(S(LN2) for _ in range(20)) == (FLAT, "flat_loss")  # DPO against itself: every margin is 0
    assert first_trip(S(1.0000049 + 2e-7 * (i % 2)) for i in range(20)) == (FLAT, "flat_loss")  # float32's last digit
    assert first_trip(S(0.0, 1e-9) for _ in range(20)) == (FLAT, "flat_loss")  # never was anything else
    assert first_trip(S(LN2 * (1 + 1e-4 * (i % 2))) for i in range(20)) is None


def test_pairs_that_are_all_learnt_are_neither_flat_nor_dead() -> None:
    learnt = [S(0.0, 0.0, 0.02 * 0.9**i) for i in range(400)]
    assert first_trip([S(1.0), S(0.7), S(0.2), *learnt]) is None


def test_the_tail_of_a_schedule_need_not_move_anything() -> None:
    assert first_trip([*sound(50), *(S(1.0, 0.5, 0.0, 1e-8) for _ in range(50))]) is None


def test_fp16_may_overflow_while_its_scale_falls_but_not_for_ever() -> None:
    guards = Guards(SETTINGS)

    def overflow(number: int) -> Trip | None:
        return guards.after_update(step=number, loss=2.0, grad_norm=math.inf, update_norm=0.0, learning_rate=1e-4)

    assert [overflow(number) for number in range(1, OVERFLOWS)] == [None] * (OVERFLOWS - 1)
    assert look(guards, OVERFLOWS, S(2.0)) is None  # it found its scale
    trips = [overflow(number) for number in range(OVERFLOWS)]
    last = trips.pop()
    assert not any(trips) and last and last.kind == "gradient_not_finite"


# What is remembered


def test_a_step_that_tripped_is_forgotten() -> None:
    guards = Guards(SETTINGS)
    for number, step in enumerate(sound(30), 1):
        look(guards, number, step)
    for number in range(31, 131):  # it would be the usual by now
        trip = look(guards, number, S(1.0, 1000.0))
        assert trip and trip.kind == "gradient_spike"
    assert look(guards, 131, S(1.0)) is None


FAULTY = {
    "explosion": [*sound(20), *(S(9.0 + i) for i in range(10))],
    "spike": [*sound(20), S(1.0, 1000.0), *sound(3, 1), S(1.0, 900.0)],
    "on the very edge": [*sound(12), S(1.0, 1.2345634), S(1.0, 1.234562 * SETTINGS.spike)],  # 1.23456 in the log
    "large update": [S(6.0, update_norm=1.7), S(6.1, update_norm=1.7), *(S(8.0 + i) for i in range(8))],
    "dead": [*sound(12), *(S(1.0 + i, 0.5, 1e-11) for i in range(8))],
    "flat": [*sound(12), *(S(LN2) for _ in range(15))],
    "overflow": [*sound(3), *(S(2.0, math.inf, 0.0) for _ in range(25))],
    "clean": sound(120),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_decisions_after_a_resume_are_those_of_a_run_never_interrupted(fault: str) -> None:
    overflow = fault == "overflow"

    def decide(guards: Guards, number: int, step: S) -> Trip | None:
        if overflow:  # the scaler's business: the guards are not asked before
            return guards.after_update(
                step=number, loss=step.loss, grad_norm=step.grad_norm, update_norm=0.0, learning_rate=1e-4
            )
        return look(guards, number, step)

    whole, trips, log = Guards(SETTINGS), [], [json.dumps({"step": 0, "epoch": 0.0, "eval_loss": 1.0})]
    for number, step in enumerate(FAULTY[fault], 1):
        trip = decide(whole, number, step)
        trips.append(trip)
        figures = {key: float(f"{value:.6g}") for key, value in vars(step).items()}
        tripped = {"trip": trip.kind} if trip and trip.kind in ("loss_explosion", "gradient_spike") else {}
        log.append(json.dumps({"step": number, **figures, **tripped}))  # the others are found after the update
    assert any(trips) == (fault != "clean")
    for stopped in range(len(trips)):
        resumed = Guards(SETTINGS, [json.loads(line) for line in log[: stopped + 1]])
        assert decide(resumed, stopped + 1, FAULTY[fault][stopped]) == trips[stopped]


def test_every_kind_of_trip_has_its_planted_fault() -> None:
    planted = [first_trip(steps) for steps in FAULTY.values()]
    planted += [
        first_trip([S(math.nan)]),
        first_trip([S(1.0, math.nan)]),
        first_trip([S(1.0, supervised=0)]),
        first_trip([S(1.0, 0.5, math.nan)]),
    ]
    assert {trip[1] for trip in planted if trip} == set(get_args(Kind))
