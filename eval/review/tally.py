"""Votes into verdicts, one a prompt, and whether they are enough to open the review.

A prompt's verdict is that of the first `votes_each` people, and then stays: were it to change with every further vote,
evidence that may be looked at at any time (`eval/statistics/sequential.py`) would be looked at anew each time. Who skips
gives up their place, so that a plan comes to its end; a prompt that nobody voted on has no verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from eval.review import blind, store
from eval.review.store import Line, Plan
from eval.statistics.sequential import may_open

Verdict = Literal["win", "loss", "tie", "bad"]  # of the model against the other; `bad`: both are
SCORE: dict[Verdict, float] = {"win": 1.0, "loss": 0.0, "tie": 0.5, "bad": 0.5}


@dataclass(frozen=True)
class Vote:
    """One that stands. `verdict` is None for a skip."""

    reviewer: str
    item: blind.Item
    verdict: Verdict | None
    line: Line


@dataclass(frozen=True)
class Tally:
    planned: int
    votes: list[Vote]  # repeats among them
    verdicts: dict[str, Verdict]  # by prompt
    skipped: int  # prompts whose places were all given up

    def number(self, verdict: Verdict) -> int:
        return sum(found == verdict for found in self.verdicts.values())

    @property
    def complete(self) -> bool:
        return len(self.verdicts) + self.skipped >= self.planned

    @property
    def may_open(self) -> bool:
        wins, losses = self.number("win"), self.number("loss")
        return may_open(wins, losses, len(self.verdicts) - wins - losses, self.planned - self.skipped)


def count(queue: Callable[[str], Sequence[blind.Item]], lines: Sequence[Line], plan: Plan) -> Tally:
    """`queue`: what a reviewer is shown."""
    votes = _votes(queue, lines)
    cast: dict[str, list[Verdict | None]] = {}
    verdicts: dict[str, Verdict] = {}
    for vote in votes:
        prompt = vote.item.prompt
        if vote.item.repeat or prompt in verdicts:
            continue
        of_prompt = cast.setdefault(prompt, [])
        of_prompt.append(vote.verdict)
        told = [verdict for verdict in of_prompt if verdict]
        if told and len(of_prompt) >= plan.votes_each:
            verdicts[prompt] = majority(told)
    skipped = sum(len(of) >= plan.votes_each for prompt, of in cast.items() if prompt not in verdicts)
    return Tally(plan.planned, votes, verdicts, skipped)


def majority(told: Sequence[Verdict]) -> Verdict:
    """The side that most of the decisive ones name; where neither, a tie, or both bad where more said that."""
    wins, losses, ties = (told.count(verdict) for verdict in ("win", "loss", "tie"))
    if wins != losses:
        return "win" if wins > losses else "loss"
    return "bad" if told.count("bad") > ties else "tie"


def _votes(queue: Callable[[str], Sequence[blind.Item]], lines: Sequence[Line]) -> list[Vote]:
    """Those that stand, in the order in which they came."""
    queues: dict[str, dict[str, blind.Item]] = {}
    kept: dict[tuple[str, str], Line] = {}
    for line in lines:
        if line.reviewer not in queues:
            queues[line.reviewer] = {item.id: item for item in queue(line.reviewer)}
        if line.item not in queues[line.reviewer]:
            continue  # written by no server of this review
        kept.pop((line.reviewer, line.item), None)
        if line.choice != store.UNDO:
            kept[line.reviewer, line.item] = line
    found = ((reviewer, queues[reviewer][item], line) for (reviewer, item), line in kept.items())
    return [Vote(reviewer, item, _verdict(line.choice, item.model_left), line) for reviewer, item, line in found]


def _verdict(choice: str, model_left: bool) -> Verdict | None:
    if choice == store.SKIP:
        return None
    if choice in ("tie", "bad"):
        return "tie" if choice == "tie" else "bad"
    return "win" if (choice == "left") == model_left else "loss"
