"""What a model and its evaluation cost, in money and energy, and what that is for each point gained.

A point is 1 % of held-out perplexity lost, or 1 percentage point of a win-rate or benchmark gained. Costs are divided by gains
that are outside their noise alone. Counted are the runs that led to the model; what was tried beside them is not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.page.claims import SHARE, Claim, part
from pipeline.errors import UserError
from pipeline.records import find
from pipeline.records.file import RecordFile
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

DIVIDED = ("eval_loss", "win_rate", "human_review.share_of_wins", "technical.change.passes", "benchmarks.")


@dataclass(frozen=True)
class Run:
    """None: the record does not say."""

    id: str
    stage: str
    seconds: float | None
    kwh: float | None
    cost: float | None
    currency: str


@dataclass
class Spent:
    runs: list[Run] = field(default_factory=list)
    gone: str = ""  # why the lineage breaks off
    how: str = ""  # what the energy rests on

    @property
    def kwh(self) -> float | None:
        return _sum([run.kwh for run in self.runs])

    @property
    def cost(self) -> tuple[float, str] | None:
        """Amount and currency; None where they do not add up."""
        currencies = {run.currency for run in self.runs}
        total = _sum([run.cost for run in self.runs])
        return (total, currencies.pop()) if total is not None and len(currencies) == 1 else None


@dataclass(frozen=True)
class PerPoint:
    """`points` with its interval; `cost` and `kwh` of one, each with the interval that this gives."""

    name: str
    what: str
    points: tuple[float, float, float]

    def of(self, total: float) -> tuple[float, float, float]:
        value, low, high = self.points
        return total / value, total / high, total / low


def spent(file: RecordFile, facts: Facts) -> Spent:
    """Of the evaluation, and of the records from which its model came."""
    found = Spent([_run(file.id, facts)])
    found.how = str(part(facts.resources, "energy", "how") or "")
    workspace = Workspace(file.path.parent.parent)
    try:
        for taken in facts.lineage.inputs[:1]:  # the judged model; the others are compared with, not paid for
            start = find.named(workspace, taken.id)
            known = start.facts()
            if known:
                found.runs += [_run(its.id, its_facts) for its, its_facts in find.lineage(workspace, start, known)]
    except (UserError, OSError) as error:
        found.gone = error.what if isinstance(error, UserError) else str(error)
    return found


def per_point(claims: list[Claim]) -> Iterator[PerPoint]:
    """Of each gain that is shown."""
    for claim in claims:
        delta = claim.change.delta
        if not claim.path.startswith(DIVIDED) or claim.verdict != "better" or delta.ci_low is None:
            continue
        assert delta.ci_high is not None
        if claim.path == "eval_loss":
            worth = [100 * (1 - math.exp(min(end, 0.0))) for end in (delta.value, delta.ci_low, delta.ci_high)]
            what = "1 % of held-out perplexity lost"
        elif claim.unit == SHARE:
            worth = [100 * abs(end) for end in (delta.value, delta.ci_low, delta.ci_high)]
            what = f"1 percentage point of {claim.name}"
        else:
            continue
        value, low, high = worth[0], min(worth[1:]), max(worth[1:])
        if low > 0:
            yield PerPoint(claim.name, what, (value, low, high))


def _run(name: str, facts: Facts) -> Run:
    resources: Any = facts.resources
    numbers = [as_metric(part(resources, *keys)) for keys in (("wall_seconds",), ("energy", "kwh"), ("cost", "amount"))]
    seconds, kwh, cost = (found.value if found else None for found in numbers)
    return Run(name, facts.stage, seconds, kwh, cost, str(part(resources, "cost", "currency") or ""))


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None
