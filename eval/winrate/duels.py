"""Every pair of contestants before every judge, question by question, in both orders.

Beside them the base's answers against themselves, in one order and on a few questions: a judge that prefers the first of two
same texts shows how much it likes a place. Both orders of these would be the same request twice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from eval.judges.judge import Duel, Judge, Verdict
from eval.names import BASE, MODEL
from eval.statistics.bradley_terry import Ranking, Vote, rank
from eval.winrate.win_rate import Judged, families_of
from pipeline.data.rows import Question

ITSELF = 20  # questions on which the base meets itself, at most
Texts = Mapping[str, Sequence[str]]  # answers by contestant, in the order of the questions
Pair = tuple[str, str]


@dataclass
class Duels:
    """What one judge said: `pairs` by the two contestants, the scores being those of the first named."""

    judge: Judge
    questions: Sequence[Question]
    pairs: dict[Pair, tuple[list[Verdict], list[Verdict]]]  # the first named shown first, and shown second
    itself: dict[str, Verdict]  # by question

    def judged(self, ours: str, theirs: str) -> Judged:
        """The scores of `ours`."""
        first, second = self.pairs[ours, theirs]
        itself = [verdict.score for verdict in self.itself.values() if verdict.score is not None]
        return Judged([v.score for v in first], [_other_side(v) for v in second], itself if theirs == BASE else ())

    def rows(self) -> Iterator[dict[str, Any]]:
        """For `verdicts.jsonl`: one a question and pair; the base beside itself has been shown in one order alone."""
        for (ours, theirs), (first, second) in self.pairs.items():
            scores = self.judged(ours, theirs).scores
            for question, a, b, score in zip(self.questions, first, second, scores, strict=True):
                yield self._row(question.id, ours, theirs, a.score, _other_side(b), score, [a.why, b.why])
        for name, verdict in self.itself.items():
            yield self._row(name, BASE, BASE, verdict.score, None, None, [verdict.why])

    def _row(self, name: str, ours: str, theirs: str, first: Any, second: Any, score: Any, why: Any) -> dict[str, Any]:
        return {
            "id": name, "judge": self.judge.name, "model": ours, "against": theirs,
            "shown_first": first, "shown_second": second, "score": score, "why": why,
        }  # fmt: skip

    def ranking(self) -> Ranking | None:
        """Of three contestants or more; the unit is the question, or its family. None where they cannot be compared."""
        units = families_of(self.questions) or range(len(self.questions))
        votes = [
            Vote(ours, theirs, score, unit)
            for ours, theirs in self.pairs
            for first, second, unit in zip(*self._scores(ours, theirs), units, strict=True)
            for score in (first, second)
            if score is not None
        ]
        try:
            return rank(votes) if len(self.pairs) > 1 else None
        except ValueError:  # some were never compared: all of their duels are unscored
            return None

    def _scores(self, ours: str, theirs: str) -> tuple[Sequence[float | None], Sequence[float | None]]:
        judged = self.judged(ours, theirs)
        return judged.shown_first, judged.shown_second


def pairs_of(contestants: Sequence[str]) -> list[Pair]:
    """Each with each; the judged model is the first named of its pairs."""
    ordered = sorted(contestants, key=lambda name: name != MODEL)
    return list(combinations(ordered, 2))


def laid_out(questions: Sequence[Question], texts: Texts) -> tuple[list[Pair], list[Duel], Sequence[Question]]:
    """The pairs, all that a judge is asked of them, and the questions on which the base meets itself."""
    pairs, alone = pairs_of(list(texts)), questions[:: math.ceil(len(questions) / ITSELF)]
    duels = [
        Duel(question, texts[first][i], texts[second][i])
        for ours, theirs in pairs
        for first, second in ((ours, theirs), (theirs, ours))
        for i, question in enumerate(questions)
    ]
    of_base = {question.id: text for question, text in zip(questions, texts[BASE], strict=True)}
    return pairs, duels + [Duel(q, of_base[q.id], of_base[q.id]) for q in alone], alone


def ask(judge: Judge, questions: Sequence[Question], texts: Texts) -> Duels:
    pairs, duels, alone = laid_out(questions, texts)
    verdicts, n = iter(judge.judge(duels)), len(questions)
    found = {pair: ([next(verdicts) for _ in range(n)], [next(verdicts) for _ in range(n)]) for pair in pairs}
    return Duels(judge, questions, found, {question.id: next(verdicts) for question in alone})


def forecast(judge: Judge, questions: Sequence[Question], contestants: Sequence[str], answer: str) -> str:
    """What `ask` will take, were every answer as long as `answer`."""
    return judge.forecast(laid_out(questions, {name: [answer] * len(questions) for name in contestants})[1])


def _other_side(verdict: Verdict) -> float | None:
    return None if verdict.score is None else 1 - verdict.score
