"""Win-rate of one model's answers against another's on the same open questions.

The unit is the question: 1, ½ or 0. The interval is Wilson's for scores with ties, Student's t stands beside it; the
test is the exact sign test on decisive questions. Before it runs it says the smallest difference that so many questions
can show, and beside the judge it shows how the answers fare when the longer simply wins, what would be left were both
equally long, and how the opponent's answers fare against themselves, where neither side must win.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.judges import key_points
from eval.statistics.agreement import on_decisive
from eval.statistics.length_control import length_controlled
from pipeline import statistics
from pipeline.data.rows import Question
from pipeline.statistics import Figure

USUAL_DEVIATION = 0.41  # of per-question scores, as measured in the field; only for planning n


@dataclass(frozen=True)
class WinRate:
    """`rate` with its interval, the counts behind it, and the controls."""

    rate: Figure
    students_t: Figure
    wins: int
    ties: int
    losses: int
    p_value: float
    against_itself: Figure
    longest_wins: Figure
    at_equal_length: Figure | None
    agrees_with_longest: Figure | None
    scores: list[float]

    @property
    def verdict(self) -> str:
        """Outside the noise, and whether mere length would have said the same."""
        if _side(self.against_itself):
            return "the judge prefers an answer to itself: nothing shown"
        side = _side(self.rate)
        if side == 0 or self.p_value >= 1 - statistics.CONFIDENCE:  # both: the interval is no exact test
            return "no difference shown"
        word = "more wins" if side > 0 else "fewer wins"
        if _side(self.longest_wins) != side:
            return f"{word} by this judge"
        if self.at_equal_length and _side(self.at_equal_length) == side:
            return f"{word} by this judge, at equal length too"
        return f"{word}, as by length alone: no quality shown"


def planned_precision(n: int) -> str:
    """What to say before the run."""
    least = statistics.smallest_difference(n, USUAL_DEVIATION)
    return f"{n} questions can show a win-rate that differs from 0.5 by {least:.2f} or more (80 % power)"


def win_rate(questions: Sequence[Question], answers: Sequence[str], opponents: Sequence[str]) -> WinRate:
    """Raises ValueError when the three do not belong together."""
    if not len(questions) == len(answers) == len(opponents):
        raise ValueError("one answer of each side to every question")
    scores = [key_points.compare(q, a, o) for q, a, o in zip(questions, answers, opponents, strict=True)]
    longest = [_longer(a, o) for a, o in zip(answers, opponents, strict=True)]
    wins, losses = scores.count(1.0), scores.count(0.0)
    return WinRate(
        rate=statistics.rate(scores),
        students_t=statistics.mean(scores),
        wins=wins,
        ties=len(scores) - wins - losses,
        losses=losses,
        p_value=statistics.sign_test(wins, losses),
        against_itself=statistics.rate(
            [key_points.compare(q, o, o) for q, o in zip(questions, opponents, strict=True)]
        ),
        longest_wins=statistics.rate(longest),
        at_equal_length=length_controlled(scores, [len(a) - len(o) for a, o in zip(answers, opponents, strict=True)]),
        agrees_with_longest=on_decisive(scores, longest),
        scores=scores,
    )


def _side(rate: Figure) -> int:
    """1 above one half, −1 below, 0 where the interval does not say."""
    if rate.ci_low is None or rate.ci_high is None:
        return 0
    return int(rate.ci_low > 0.5) - int(rate.ci_high < 0.5)


def _longer(answer: str, opponent: str) -> float:
    return 0.5 if len(answer) == len(opponent) else float(len(answer) > len(opponent))
