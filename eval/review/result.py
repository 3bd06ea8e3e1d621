"""What people said, once the review may be opened: who is better, how far they agree, and what judges are worth beside them.

`share_of_wins` alone has an interval that holds however often one looks. All others hold for a plan that was kept; of a
review opened before its planned end they are told, but for the rate corrected with judges, which is not.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eval.review import store
from eval.review.tally import SCORE, Tally, Verdict, Vote
from eval.statistics import agreement, prediction_powered, sequential
from eval.statistics.agreement import WithPeople
from eval.statistics.prediction_powered import Corrected
from eval.winrate.told import key
from pipeline import statistics
from pipeline.statistics import Change, Figure

OPENED = {True: "at the planned number of prompts", False: "as soon as the evidence was enough"}
EARLY = "before its plan allowed, because someone asked for it"
MOST = 1e9  # of an e-value that is shown
FAR = 1e7  # prompts; what needs more is not told


@dataclass(frozen=True)
class Judge:
    """An automatic judge beside the people: on what both judged, and the win-rate from both, or why there is none."""

    with_people: WithPeople
    corrected: Corrected | None
    without: str = ""


@dataclass(frozen=True)
class Result:
    opened: str
    planned: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    skipped: int
    share_of_wins: Figure | None  # among decisive prompts; None where there is none
    e_value: float  # against the two being equally good
    decisive_needed: int | None  # prompts that would be enough, were the share to stay; None: enough, or never
    votes: int  # of people, repeats aside
    reviewers: int
    agreement: Figure | None  # Krippendorff's alpha among them; None for one, or where all say the same
    self_consistency: Figure | None  # same verdict on a prompt shown again with the sides swapped
    left: Figure | None  # share of decisive votes that named the left side: ½ where the side did not matter
    ratings: dict[str, Change] = field(default_factory=dict)  # before: the other's, after: the model's
    judges: dict[str, Judge] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        judges = {key(name): asdict(judge) for name, judge in self.judges.items()}
        return statistics.as_record(_plain(asdict(self) | {"ratings": self.ratings, "judges": judges}))

    @property
    def verdict(self) -> str:
        share = self.share_of_wins
        if share is None or share.ci_low is None or share.ci_high is None or share.ci_low <= 0.5 <= share.ci_high:
            return "no difference shown"
        return "better" if share.value > 0.5 else "worse"


def result(tally: Tally, judges: Mapping[str, Mapping[str, float]]) -> Result:
    """`judges`: scores of 1 to 0 for the model by prompt, by judge. Says what is known now, opened or not: ask first."""
    wins, losses = tally.number("win"), tally.number("loss")
    voted = [vote for vote in tally.votes if vote.verdict]
    first = [vote for vote in voted if not vote.item.repeat]
    return Result(
        opened=OPENED[tally.complete] if tally.may_open else EARLY,
        planned=tally.planned,
        wins=wins,
        losses=losses,
        ties=tally.number("tie"),
        both_bad=tally.number("bad"),
        skipped=tally.skipped,
        share_of_wins=sequential.share_of_wins(wins, losses) if wins + losses else None,
        e_value=float(f"{min(MOST, math.exp(min(700, sequential.log_e_value(wins, losses)))):.4g}"),
        decisive_needed=_needed(wins, losses),
        votes=len(first),
        reviewers=len({vote.reviewer for vote in first}),
        agreement=agreement.alpha(list(_by_prompt(first).values()), "ordinal"),
        self_consistency=_self_consistency(voted),
        left=_left(first),
        ratings=_ratings(first),
        judges={name: _judge(scores, tally, first) for name, scores in judges.items()},
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is not known; figures within stay figures."""
    kept = {name: _plain(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in kept.items() if value not in (None, "", {})}


def _needed(wins: int, losses: int) -> int | None:
    """The smallest number of decisive prompts at which this share opens a review."""
    votes = wins + losses
    if wins == losses or sequential.log_e_value(wins, losses) >= sequential.ENOUGH:
        return None
    low, high = float(votes), float(votes)
    while sequential.log_e_value(wins / votes * high, losses / votes * high) < sequential.ENOUGH:
        low, high = high, 2 * high
        if high > FAR:
            return None
    while high - low > 0.5:
        middle = (low + high) / 2
        enough = sequential.log_e_value(wins / votes * middle, losses / votes * middle) >= sequential.ENOUGH
        low, high = (low, middle) if enough else (middle, high)
    return math.ceil(high)


def _by_prompt(votes: Sequence[Vote]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        found[vote.item.prompt].append(_score(vote))
    return dict(found)


def _score(vote: Vote) -> float:
    assert vote.verdict is not None
    return SCORE[vote.verdict]


def _self_consistency(votes: Sequence[Vote]) -> Figure | None:
    said: dict[tuple[str, str], dict[bool, Verdict]] = defaultdict(dict)
    for vote in votes:
        assert vote.verdict is not None
        said[vote.reviewer, vote.item.prompt][vote.item.repeat] = vote.verdict
    twice = [both[False] == both[True] for both in said.values() if len(both) == 2]
    return statistics.proportion(sum(twice), len(twice)) if twice else None


def _left(votes: Sequence[Vote]) -> Figure | None:
    sides = [vote.line.choice for vote in votes if vote.line.choice in store.SIDES]
    return statistics.proportion(sides.count("left"), len(sides)) if sides else None


def _ratings(votes: Sequence[Vote]) -> dict[str, Change]:
    """Paired by prompt: of several reviewers who rated both sides of it, their mean is the prompt's."""
    found: dict[str, Change] = {}
    for name in store.RATINGS:
        of_prompts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for vote in votes:
            ours, theirs = store.SIDES if vote.item.model_left else store.SIDES[::-1]
            both = [vote.line.ratings.get(side, {}).get(name) for side in (theirs, ours)]
            if both[0] is not None and both[1] is not None:
                of_prompts[vote.item.prompt].append((both[0], both[1]))
        if of_prompts:
            before, after = ([sum(r[end] for r in rs) / len(rs) for rs in of_prompts.values()] for end in (0, 1))
            found[name] = statistics.paired(before, after)
    return found


def _judge(scores: Mapping[str, float], tally: Tally, votes: Sequence[Vote]) -> Judge:
    """Verdicts are compared as sides, so ¾ of a judge that was asked twice is a win; the win-rate takes the scores."""
    people = _by_prompt(votes)
    judged = [prompt for prompt in people if prompt in scores]
    sides = [0.5 if scores[prompt] == 0.5 else float(scores[prompt] > 0.5) for prompt in judged]
    beside = agreement.with_people(sides, [people[prompt] for prompt in judged])
    both = [prompt for prompt in tally.verdicts if prompt in scores]
    elsewhere = [score for prompt, score in scores.items() if prompt not in tally.verdicts]
    if not tally.complete:
        return Judge(beside, None, "its interval is for a plan that was kept, and the review was opened before its end")
    try:
        rate = prediction_powered.corrected(
            [SCORE[tally.verdicts[prompt]] for prompt in both], [scores[prompt] for prompt in both], elsewhere
        )
    except ValueError as error:
        return Judge(beside, None, f"needs {error}")
    return Judge(beside, rate)


def judged_at_all(judges: Mapping[str, Mapping[str, float]], tally: Tally) -> dict[str, Mapping[str, float]]:
    """Those judges that scored a prompt which people voted on: of others nothing can be told."""
    voted = {vote.item.prompt for vote in tally.votes if vote.verdict and not vote.item.repeat}
    return {name: scores for name, scores in judges.items() if voted & scores.keys()}
