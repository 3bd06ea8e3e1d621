"""What an evaluation shows: every change in a record's results as a claim, and what its interval makes of it.

    claims(results)     [Claim(name="held-out loss", verdict="better", …), …]

A share that has a chance level, as a win-rate has ½, is a change from that level. A claim is no finding while its interval
holds 0, nor while anything else in the record doubts it: an exact or adjusted p, a judge that prefers an answer to itself, an
advantage that mere length would have, answers without a verdict. What has an unknown shape is passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import statistics
from pipeline.records.metrics import as_metric, benchmark_is_lower_better
from pipeline.statistics import CONFIDENCE, Change, Figure

ALPHA = 1 - CONFIDENCE
FEWEST = 6  # rows; fewer do not tell how many it takes
MOST = 10**9  # rows; what would need more is not decided by more
NOTHING = "no difference shown"
SHARE = "share"
DOMAIN = "by_domain.eval_loss."
LOWER, HIGHER = True, False
# path in the results: name, unit, whether lower is better (None: neither way)
KNOWN: dict[str, tuple[str, str, bool | None]] = {
    "eval_loss": ("held-out loss", "nats a token", LOWER),
    "end_of_turn.surprise": ("surprise at where answers end", "nats an answer", LOWER),
    "stops_by_itself": ("answers that end by themselves", SHARE, HIGHER),
    "technical.change.parses": ("code in answers parses", SHARE, HIGHER),
    "technical.change.passes": ("answers' code passes its tests", SHARE, HIGHER),
    "structure.repeated": ("runs of 8 words said before", SHARE, LOWER),
    "structure.loops": ("answers that go round in circles", SHARE, LOWER),
    "end_of_turn.at_end": ("p(end-of-turn) where an answer ends", SHARE, None),
    "end_of_turn.inside": ("false ends expected in an answer", "ends", None),
    "answer_tokens": ("length of answers", "tokens", None),
    "structure.with_code": ("answers with a code block", SHARE, None),
    "structure.with_heading": ("answers with a heading", SHARE, None),
    "structure.with_list": ("answers with a list", SHARE, None),
    "structure.paragraphs": ("paragraphs", "an answer", None),
    "structure.sentences": ("sentences", "an answer", None),
}
# told elsewhere, or the same rows told a second time
ASIDE = {
    "by_domain", "by_fault", "others", "against", "latency", "parity", "human_review", "guards", "perplexity", "margin",
    "eval_loss_by_token", "answer_length", "end_of_turn", "judges", "ranking", "judging", "win_rate_unknown",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A change and what it says. `doubt`: why it is no finding even outside its noise; `needed`: n that is known already."""

    path: str
    name: str
    unit: str
    lower_is_better: bool | None
    change: Change
    doubt: str = ""
    needed: int | None = None
    chance: float | None = None  # the change is from here

    @property
    def verdict(self) -> str:
        return NOTHING if self.doubt else self.change.verdict(self.lower_is_better)

    @property
    def rows_needed(self) -> int | None:
        """That would decide it, were the difference to stay; None where that cannot be told, or no n would."""
        if self.needed is not None or (self.doubt and self.change.verdict(self.lower_is_better) != NOTHING):
            return self.needed
        share = self.change.after.value if self.chance is not None else 0.0
        return rows_that_decide(self.change.delta, max(0.0, share * (1 - share)) ** 0.5)

    @property
    def open(self) -> str:
        """Of a claim that shows nothing: why, and what would decide it."""
        delta, needed = self.change.delta, self.rows_needed
        if self.doubt and needed is None:
            return self.doubt
        if needed is not None:
            return f"about {needed:,} rows would decide it"
        if delta.n < FEWEST:
            return f"{delta.n} {'row is' if delta.n == 1 else 'rows are'} too few to say how many would decide it"
        if delta.ci_low is None:
            return "all rows alike: no interval, and no n to name"
        return "so near to none that no n within reach decides it"


def claims(results: dict[str, Any]) -> list[Claim]:
    """Those of the model against its base, the known ones first."""
    found = [*_rates(results), *_known(results), *_benchmarks(results)]
    told = {claim.path for claim in found}
    return found + [claim for claim in _unknown(results, "") if claim.path not in told]


def by_domain(results: dict[str, Any]) -> list[Claim]:
    """The held-out loss of each domain; not counted among the claims, whose rows they are."""
    found = part(results, "by_domain", "eval_loss")
    domains = found.items() if isinstance(found, dict) else ()
    changes = {str(name): (as_change(facts), facts) for name, facts in domains}
    return [
        Claim(f"{DOMAIN}{name}", f"… {name}", "nats a token", LOWER, change, doubt_of(facts))
        for name, (change, facts) in changes.items()
        if change
    ]


def rows_that_decide(delta: Figure, least: float = 0.0) -> int | None:
    """`statistics.rows_needed`, with the spread that the figure's own interval tells; None where nothing can be told.

    `least`: a share's own spread. Wilson's interval is narrower than that at small n, and would name too few rows.
    """
    deviation = spread(delta)
    deviation = None if deviation is None else max(deviation, least)
    if deviation is None or delta.n < FEWEST or not delta.value or abs(delta.value) * MOST < deviation:
        return None
    needed = statistics.rows_needed(delta.value, deviation)
    return needed if delta.n < needed <= MOST else None


def spread(figure: Figure) -> float | None:
    """The standard deviation over rows, from the width of the interval."""
    from scipy.special import stdtrit

    if figure.ci_low is None or figure.ci_high is None or figure.n < 2:
        return None
    half = (figure.ci_high - figure.ci_low) / 2
    return half * figure.n**0.5 / float(stdtrit(figure.n - 1, (1 + CONFIDENCE) / 2))


def as_figure(value: Any) -> Figure | None:
    """A figure as records hold it; None for anything else."""
    metric = as_metric(value) if isinstance(value, dict) and "value" in value else None
    if metric is None or metric.n is None or not 0 < metric.n < MOST:
        return None
    low, high = metric.ci_low, metric.ci_high
    known = low is not None and high is not None and low <= high
    return Figure(value=metric.value, ci_low=low if known else None, ci_high=high if known else None, n=metric.n)


def as_change(value: Any) -> Change | None:
    if not isinstance(value, dict):
        return None
    ends = [as_figure(value.get(end)) for end in ("before", "after", "delta")]
    before, after, delta = ends
    return Change(before=before, after=after, delta=delta) if before and after and delta else None


def part(values: Any, *keys: str) -> Any:
    """What stands below these keys; None where nothing does."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def doubt_of(facts: Any) -> str:
    """A p in the record that is not below 5 %, where the interval may be outside 0."""
    for key, test in (("holm_p", "Holm, of so many compared"), ("mcnemar_p", "McNemar"), ("sign_test_p", "sign test")):
        p = as_metric(part(facts, key))
        if p and p.value >= ALPHA:
            return f"p = {p.value:.2g} ({test})"
    return ""


def _known(results: dict[str, Any]) -> Iterator[Claim]:
    for path, (name, unit, lower_is_better) in KNOWN.items():
        facts = part(results, *path.split("."))
        if change := as_change(facts):
            yield Claim(path, name, unit, lower_is_better, change, doubt_of(facts))


def _benchmarks(results: dict[str, Any]) -> Iterator[Claim]:
    tasks = part(results, "benchmarks")
    for task, facts in tasks.items() if isinstance(tasks, dict) else ():
        change = as_change(facts)
        if change is None:
            continue
        metric = str(facts.get("metric", ""))
        ends = [
            end for figure in (change.before, change.after) for end in (figure.value, figure.ci_low, figure.ci_high)
        ]
        unit = SHARE if all(end is None or 0 <= end <= 1 for end in ends) else metric
        doubt = doubt_of(facts)
        yield Claim(
            f"benchmarks.{task}", f"{task} {metric}".strip(), unit, benchmark_is_lower_better(metric), change, doubt
        )


def _rates(results: dict[str, Any]) -> Iterator[Claim]:
    win_rate, people = part(results, "win_rate"), part(results, "human_review")
    if figure := as_figure(win_rate):
        judge = part(win_rate, "judge")
        name = f"win-rate, judged by {judge}" if isinstance(judge, str) else "win-rate"
        yield _from_chance("win_rate", name, figure, 0.5, win_rate_doubt(win_rate))
    if figure := as_figure(part(people, "share_of_wins")):
        needed = as_metric(part(people, "decisive_needed"))
        claim = _from_chance("human_review.share_of_wins", "people's decisive votes", figure, 0.5)
        yield Claim(**vars(claim) | {"needed": int(needed.value) if needed else None})
    if figure := as_figure(accuracy := part(results, "preference_accuracy")):
        chance = as_metric(part(accuracy, "chance"))
        yield _from_chance(
            "preference_accuracy",
            "held-out pairs: prefers the chosen more than before",
            figure,
            chance.value if chance else 0.5,
        )


def win_rate_doubt(facts: Any) -> str:
    """Why a rate outside its noise would still show nothing; what the controls beside it say."""
    side = _side(as_figure(facts))
    asked_in_both_orders = part(facts, "positions") is not None  # then what comes first gains nothing by it
    if _side(as_figure(part(facts, "base_against_itself"))) and not asked_in_both_orders:
        return "the judge prefers an answer to itself"
    if doubt := doubt_of(facts):
        return doubt
    for bound in ("if_unscored_lost", "if_unscored_won"):
        found = as_figure(part(facts, bound))
        if found and _side(found) != side:
            return "the answers without a verdict could undo it"
    if side and _side(as_figure(part(facts, "longest_wins"))) == side:
        equal = as_figure(part(facts, "at_equal_length"))
        if _side(equal) != side:
            why = "and is not shown at equal length" if equal else "and length and quality cannot be told apart here"
            return f"the longer answer would win as well, {why}"
    return ""


def _side(figure: Figure | None) -> int:
    """1 above one half, −1 below, 0 where the interval does not say."""
    if figure is None or figure.ci_low is None or figure.ci_high is None:
        return 0
    return int(figure.ci_low > 0.5) - int(figure.ci_high < 0.5)


def _from_chance(path: str, name: str, figure: Figure, chance: float, doubt: str = "") -> Claim:
    low, high = (None if end is None else end - chance for end in (figure.ci_low, figure.ci_high))
    delta = Figure(value=figure.value - chance, ci_low=low, ci_high=high, n=figure.n)
    change = Change(before=Figure(value=chance, n=figure.n), after=figure, delta=delta)
    return Claim(path, name, SHARE, HIGHER, change, doubt, chance=chance)


def _unknown(values: Any, prefix: str) -> Iterator[Claim]:
    """Changes that this page does not know by name: told, and called neither better nor worse."""
    for key, value in values.items() if isinstance(values, dict) else ():
        path = f"{prefix}{key}"
        if path in ASIDE:
            continue
        if change := as_change(value):
            unit = part(value, "unit")
            yield Claim(path, path, unit if isinstance(unit, str) else "", None, change, doubt_of(value))
        elif prefix.count(".") < 4:
            yield from _unknown(value, f"{path}.")
