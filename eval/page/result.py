"""A record's results, read for a person: what is better, what is worse, what is not known, and what it cost.

    read(facts, spent)     Result(better=[…], worse=[…], unknown=[…], …)

The page and the terminal tell the same `Result`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.page.claims import ALPHA, NOTHING, Claim, by_domain, claims, part
from eval.page.spent import PerPoint, Spent, per_point
from eval.page.tables import Table, criteria, tables
from pipeline.progress import duration
from pipeline.records.metrics import as_metric
from pipeline.records.schema import Facts


@dataclass
class Result:
    """`changed`: outside the noise, without being better or worse; `unclear`: figures of no direction within it."""

    model: str
    against: str
    status: str
    claims: list[Claim] = field(default_factory=list)
    domains: list[Claim] = field(default_factory=list)
    regressed: list[str] = field(default_factory=list)  # guards
    tables: list[Table] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    per_point: list[PerPoint] = field(default_factory=list)
    judging: list[str] = field(default_factory=list)  # what asking the judges took

    @property
    def better(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.verdict == "better"]

    @property
    def worse(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.verdict == "worse"]

    @property
    def unknown(self) -> list[Claim]:
        """Figures with a better direction that show no difference."""
        return [claim for claim in self.claims if claim.verdict == NOTHING and claim.lower_is_better is not None]

    @property
    def changed(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.verdict in ("higher", "lower")]

    @property
    def alike(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.verdict == NOTHING and claim.lower_is_better is None]

    @property
    def headline(self) -> str:
        if not self.claims:
            return "Nothing was compared."
        told = [f"better in {len(self.better)}" if self.better else "better in none"]
        told.append(f"worse in {len(self.worse)}" if self.worse else "worse in none")
        told.append(f"not known of {len(self.unknown)}" if self.unknown else "nothing left open")
        lost = f" A guard was lost: {', '.join(self.regressed)}." if self.regressed else ""
        return f"{', '.join(told).capitalize()}.{lost}"

    @property
    def by_chance(self) -> str:
        """What so many intervals at 95 % would show of two models that are alike."""
        n = len([claim for claim in self.claims if claim.lower_is_better is not None])
        return f"Of {n} figures, chance alone would put about {n * ALPHA:.1f} outside its noise."


def read(facts: Facts, spent: Spent | None = None) -> Result:
    """`spent` is None where only the record itself is at hand: then no cost is told."""
    results: dict[str, Any] = facts.results if isinstance(facts.results, dict) else {}
    found, asked = claims(results), criteria(facts.verdict)
    against, guards = part(results, "against"), part(results, "guards", "tasks")
    return Result(
        model=str(part(results, "model") or facts.profile),
        against=against if isinstance(against, str) else "its base",
        status=facts.status,
        claims=found,
        domains=by_domain(results),
        regressed=[
            str(name)
            for name, said in (guards.items() if isinstance(guards, dict) else ())
            if part(said, "finding") == "regressed"
        ],
        tables=[*([asked] if asked.rows else []), *tables(results)],
        spent=spent or Spent(),
        per_point=list(per_point(found)),
        judging=list(_judging(part(results, "judging"))),
    )


def _judging(found: Any) -> Iterator[str]:
    """Money paid to others: beside the sums, which are of this project's own machines."""
    for judge, took in found.items() if isinstance(found, dict) else ():
        calls, cost = (as_metric(part(took, key)) for key in ("calls", "cost"))
        if calls:
            paid = f", {cost.value:.3g} paid" if cost else ", price not known"
            yield f"Judge {judge}: {calls.value:,.0f} calls{paid}; not in the sums."


def cost_lines(result: Result) -> list[str]:
    """What was spent, and what a point cost; or why that is not told."""
    spent = result.spent
    if not spent.runs:
        return []
    lines = []
    stages = ", ".join(
        f"{run.stage} {duration(run.seconds)}" if run.seconds is not None else f"{run.stage}: not known"
        for run in spent.runs
    )
    lines.append(f"Runs: {stages}.")
    energy = f"{spent.kwh:.3g} kWh" if spent.kwh is not None else "energy not known of every run"
    money = "cost not known of every run, or in several currencies"
    if spent.cost:
        money = f"{spent.cost[0]:.3g} {spent.cost[1]}"
    lines.append(f"Together: {money}; {energy}{f' ({spent.how})' if spent.how else ''}.")
    lines += result.judging
    if spent.gone:
        return [*lines, f"The lineage breaks off: {spent.gone}. What lies beyond is not known, so nothing is divided."]
    if not result.per_point:
        return [*lines, "No gain is shown, so the cost is not divided by one."]
    for gain in result.per_point:
        each = []
        if spent.cost and spent.cost[0]:
            each.append(f"{_three(gain.of(spent.cost[0]))} {spent.cost[1]}")
        if spent.kwh:
            each.append(f"{_three(gain.of(spent.kwh))} kWh")
        points = f"{gain.points[0]:.3g} points"
        lines.append(f"{gain.what}: {' and '.join(each) or 'not known'} ({points} gained).")
    return [*lines, "The runs that led to this model alone; what was tried beside them is not counted."]


def _three(values: tuple[float, float, float]) -> str:
    value, low, high = values
    return f"{value:.2g} [{low:.2g}, {high:.2g}]"
