"""A win-rate with its interval, its controls, and no "better" that a coin could have given."""

from math import comb

import pytest

from eval.judges import key_points
from eval.winrate.win_rate import WinRate, planned_precision, win_rate
from pipeline import statistics
from pipeline.data.rows import Question

QUESTION = Question(prompt="?", key_points=["unique index"])
GOOD, POOR, LONG_POOR = "unique", "banana", "banana, banana and banana"


def rate(wins: int, losses: int, ties: int = 0, good: str = GOOD, poor: str = POOR) -> WinRate:
    ours = [good] * wins + [poor] * losses + [good] * ties
    theirs = [poor] * wins + [good] * losses + [good] * ties
    return win_rate([QUESTION] * len(ours), ours, theirs)


def test_rate_counts_a_tie_as_half() -> None:
    result = rate(wins=6, losses=2, ties=4)
    assert (result.wins, result.ties, result.losses) == (6, 4, 2)
    assert result.scores == [1.0] * 6 + [0.0] * 2 + [0.5] * 4
    assert result.rate.value == pytest.approx(8 / 12, abs=1e-6)
    assert result.p_value == pytest.approx(2 * (comb(8, 6) + comb(8, 7) + comb(8, 8)) / 2**8)


def test_interval_is_wilsons_within_0_and_1_and_students_t_stands_beside_it() -> None:
    from scipy import stats

    result = rate(wins=6, losses=2, ties=4)
    low, high = stats.t.interval(0.95, 11, 8 / 12, stats.sem(result.scores))
    assert (result.students_t.ci_low, result.students_t.ci_high) == pytest.approx((low, high), abs=1e-6)
    assert result.rate == statistics.rate(result.scores)
    one_sided = rate(wins=3, losses=0, ties=1)
    assert one_sided.students_t.ci_high > 1 > one_sided.rate.ci_high  # type: ignore[operator]


def test_swapping_the_sides_mirrors_everything() -> None:
    one, other = rate(wins=9, losses=1, ties=2), rate(wins=1, losses=9, ties=2)
    assert one.rate.value == pytest.approx(1 - other.rate.value, abs=1e-6)
    assert one.p_value == pytest.approx(other.p_value)
    assert (one.verdict, other.verdict) == ("more wins by this judge", "fewer wins by this judge")


@pytest.mark.parametrize("n", range(1, 13))
def test_fair_coin_is_called_a_difference_in_at_most_one_of_twenty_runs(n: int) -> None:
    """Exact, over all outcomes of n decisive questions."""
    called = [rate(wins, n - wins).verdict != "no difference shown" for wins in range(n + 1)]
    assert sum(comb(n, wins) for wins in range(n + 1) if called[wins]) / 2**n <= 0.05
    assert any(called) == (n >= 6), "and enough wins are called a difference"


def test_all_ties_show_no_difference() -> None:
    result = rate(wins=0, losses=0, ties=5)
    assert (result.rate.value, result.p_value, result.verdict) == (0.5, 1.0, "no difference shown")
    assert result.agrees_with_longest is None


def test_wins_that_length_alone_would_have_given_show_no_quality() -> None:
    result = rate(wins=12, losses=1, good=GOOD + " and then some more words", poor=POOR)
    assert result.verdict == "more wins, as by length alone: no quality shown"
    assert result.agrees_with_longest is not None and result.agrees_with_longest.value == 1.0


def test_wins_against_longer_answers_are_this_judges_own() -> None:
    result = rate(wins=12, losses=1, poor=LONG_POOR)
    assert result.verdict == "more wins by this judge"
    assert result.longest_wins.value == pytest.approx(1 / 13, abs=1e-6)
    assert result.agrees_with_longest is not None and result.agrees_with_longest.value == 0.0


def test_a_judge_that_prefers_an_answer_to_itself_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that likes what it reads first and reads it in one order alone."""
    assert rate(wins=12, losses=1, poor=LONG_POOR).against_itself.model_dump(exclude_none=True) == {
        "value": 0.5,
        "n": 13,
    }
    monkeypatch.setattr(key_points, "compare", lambda question, first, second: 1.0)
    result = rate(wins=12, losses=0)
    assert result.against_itself.value == 1.0
    assert result.verdict == "the judge prefers an answer to itself: nothing shown"


def test_one_question_shows_nothing() -> None:
    result = rate(wins=1, losses=0)
    assert (result.rate.value, result.rate.n) == (1.0, 1) and result.verdict == "no difference shown"


def test_answers_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one answer of each side"):
        win_rate([QUESTION], [GOOD], [])
    with pytest.raises(ValueError):
        win_rate([], [], [])


def test_precision_is_said_before_the_run() -> None:
    assert (
        planned_precision(30) == "30 questions can show a win-rate that differs from 0.5 by 0.21 or more (80 % power)"
    )
