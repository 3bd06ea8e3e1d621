"""A win-rate at equal length: planted length preference is taken out, planted quality is not."""

import numpy as np
import pytest

from eval.statistics import length_control
from eval.statistics.length_control import FEWEST, length_controlled


@pytest.fixture(autouse=True)
def fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the many runs of a simulation; a deviation needs no more."""
    monkeypatch.setattr(length_control, "SAMPLES", 150)


def simulated(n: int, quality: float, preference: float, rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Scores and length differences of a judge with this log odds at equal length, and for longer answers; with ties.

    The first side writes longer, as a tuned model does.
    """
    difference = rng.normal(60, 100, n)
    chance = 1 / (1 + np.exp(-quality - preference * np.tanh(difference / difference.std())))
    scores = np.where(rng.random(n) < 0.2, 0.5, (rng.random(n) < chance).astype(float))
    return scores.tolist(), difference.tolist()


def found(n: int, quality: float, preference: float, runs: int) -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(n)
    figures = [length_controlled(*simulated(n, quality, preference, rng)) for _ in range(runs)]
    return [(f.value, f.ci_low, f.ci_high) for f in figures if f and f.ci_low is not None and f.ci_high is not None]


@pytest.mark.parametrize("n", [50, 200])
def test_a_judge_that_likes_length_alone_gives_one_half_and_no_difference(n: int) -> None:
    """Where its plain rate is 0.61; the interval covers one half in 93 to 97 of 100 runs, as far as 250 runs tell."""
    runs = found(n, quality=0.0, preference=2.0, runs=250)
    plain = np.mean([np.mean(simulated(n, 0.0, 2.0, np.random.default_rng(seed))[0]) for seed in range(50)])
    assert plain > 0.6
    assert np.mean([value for value, _, _ in runs]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([low <= 0.5 <= high for _, low, high in runs]) >= 0.92


def test_quality_stays_whatever_the_length() -> None:
    """At equal length 0.69 of the decisive questions, a fifth of all ties: 0.65."""
    runs = found(100, quality=0.8, preference=1.0, runs=200)
    expected = 0.2 * 0.5 + 0.8 / (1 + np.exp(-0.8))
    assert np.mean([value for value, _, _ in runs]) == pytest.approx(expected, abs=0.02)
    assert 0.90 <= np.mean([low <= expected <= high for _, low, high in runs]) <= 0.99


def test_swapped_sides_mirror_it() -> None:
    scores, differences = simulated(40, 0.5, 1.0, np.random.default_rng(3))
    one, other = (
        length_controlled(scores, differences),
        length_controlled([1 - s for s in scores], [-d for d in differences]),
    )
    assert one and other and one.value == pytest.approx(1 - other.value, abs=1e-5)
    assert (
        one.ci_low is not None
        and other.ci_high is not None
        and one.ci_low == pytest.approx(1 - other.ci_high, abs=1e-5)
    )


def test_where_every_win_went_with_the_length_the_two_cannot_be_told_apart() -> None:
    assert length_controlled([1.0] * 20, [100.0 + i for i in range(20)]) is None
    assert length_controlled([1.0] * 10 + [0.0] * 10, [50.0] * 10 + [-50.0] * 10) is None
    assert length_controlled([1.0] * 10 + [0.0] * 10, [-50.0] * 10 + [50.0] * 10) is None, "nor with the shorter"
    assert length_controlled([1.0] * 10 + [0.0] * 10, [50.0] * 10 + [-50.0] * 9 + [50.0]) is not None


def test_where_lengths_tell_nothing_there_is_no_figure() -> None:
    assert length_controlled([1.0, 0.0] * 10, [7.0] * 20) is None
    assert length_controlled([1.0] * (FEWEST - 1), list(range(FEWEST - 1))) is None
