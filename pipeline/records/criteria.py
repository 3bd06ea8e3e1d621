"""Success criteria: `METRIC OP NUMBER`, parsed and never evaluated as code, frozen at the start and judged at the end.

    eval_loss < 5.5                   the figure's whole interval must lie below
    eval_loss.delta.ci_high < 0       the same said of the interval's end
    eval.eval_loss.delta < 0          in a pipeline experiment: a figure of its stage `eval`

A figure with an interval supports a criterion when all of the interval fulfils it, refutes it when none does, and is
inconclusive between; then `n_needed` is the number of rows at which the interval, narrowing as 1/√n around the same
value, would no longer hold the number.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.errors import UserError
from pipeline.records.metrics import Metric, metrics, resolve
from pipeline.records.schema import Criterion, Finding, Judged, Verdict
from pipeline.yamlio import KeyPath

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
MOST = 1e12  # rows; what would need more is not decided by more
_FORM = re.compile(
    r"\s*(?P<path>[A-Za-z_](?:[\w./-]{0,198}[\w/-])?)\s*(?P<op><=|>=|==|<|>)\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)\s*"
)


@dataclass(frozen=True)
class Parsed:
    path: str
    op: str
    number: float

    def holds(self, value: float) -> bool:
        return OPERATORS[self.op](value, self.number)

    @property
    def bound(self) -> str:
        """`< 1.2`, with every digit that was written."""
        return f"{self.op} {_written(self.number)}"


def parse(text: str, where: str = "") -> Parsed:
    """Raises `UserError` for anything that is not METRIC OP NUMBER."""
    match = _FORM.fullmatch(text)
    if not match:
        form = f"METRIC OP NUMBER with OP one of {' '.join(OPERATORS)}, such as `eval_loss.delta.ci_high < 0`"
        raise UserError(f"`{text[:80]}` is no criterion", where=where, remedy=form)
    number = float(match["number"])
    if math.isinf(number):
        raise UserError(f"`{text[:80]}`: the number is too large", where=where)
    return Parsed(match["path"], match["op"], number)


def read(values: Any, where: str = "", lines: Mapping[KeyPath, int] | None = None) -> list[Criterion]:
    """The person's `success_criteria`: lines of text, or mappings with criterion, role and min_n.

    Raises `UserError` at `where`; `lines` (of the document) tell the line.
    """
    if values is None:
        return []

    def place(*path: int) -> str:
        line = (lines or {}).get(("success_criteria", *path))
        key = "success_criteria" + "".join(f"[{number + 1}]" for number in path)
        return ": ".join(filter(None, [f"{where}:{line}" if line else where, key]))

    if not isinstance(values, list):
        raise UserError("is no list", where=place(), remedy='`success_criteria: ["eval_loss < 1.20"]`')
    criteria = []
    for number, value in enumerate(values):
        try:
            criterion = Criterion(criterion=value) if isinstance(value, str) else Criterion.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{key + ': ' if key else ''}{first['msg']}", where=place(number)) from None
        parse(criterion.criterion, place(number))
        criteria.append(criterion)
    return criteria


def changes(frozen: Sequence[Criterion], now: Sequence[Criterion]) -> list[str]:
    """What was changed above the line since the start, in words."""
    then_texts, now_texts = ([_text(criterion) for criterion in side] for side in (frozen, now))
    return [
        *(f"taken out: {text}" for text in then_texts if text not in now_texts),
        *(f"added: {text}" for text in now_texts if text not in then_texts),
    ]


def judge(verdict: Verdict, results: dict[str, Any]) -> Verdict:
    """The verdict on the frozen criteria: the worst finding of the primary ones.

    A guardrail can only take away: refuted or not evaluable it decides, inconclusive it is shown and does not.
    """
    judged = [_judge(criterion, results) for criterion in [*verdict.criteria, *verdict.of_profile]]
    primary = [one for one in judged if one.role == "primary"]
    guards = [one for one in judged if one.role == "guardrail" and (not primary or one.finding != "inconclusive")]
    findings = {one.finding for one in [*primary, *guards]}
    order: tuple[Finding, ...] = ("refuted", "not evaluable", "inconclusive", "supported")
    overall = next((finding for finding in order if finding in findings), None)
    return verdict.model_copy(update={"judged": judged, "finding": overall})


def _judge(criterion: Criterion, results: dict[str, Any]) -> Judged:
    try:
        wanted = parse(criterion.criterion)
    except UserError as error:  # frozen by another version
        return Judged(**criterion.model_dump(), finding="not evaluable", observed="nothing", why=error.what)
    path, _, end = wanted.path.rpartition(".")
    if end not in ("ci_low", "ci_high"):
        path, end = wanted.path, ""
    figure = resolve(results, path)

    def found(finding: Finding, why: str, n_needed: int | None = None) -> Judged:
        observed = figure.text() if figure else "nothing"
        return Judged(**criterion.model_dump(), finding=finding, observed=observed, why=why, n_needed=n_needed)

    if figure is None:
        near = difflib.get_close_matches(path, metrics(results), 3, cutoff=0.4)
        return found("not evaluable", f"there is no figure `{path}`{'; there is ' + ', '.join(near) if near else ''}")
    if criterion.min_n is not None and (figure.n or 0) < criterion.min_n:
        rows = "the number of rows behind it is not known" if figure.n is None else f"n is {figure.n}"
        return found("inconclusive", f"{rows}, min_n asks for {criterion.min_n}", criterion.min_n)
    if figure.ci_low is None or figure.ci_high is None:
        if end:
            return found("not evaluable", f"`{path}` has no interval")
        if figure.n is not None:
            return found("inconclusive", f"n = {figure.n} gives no interval")
        holds = wanted.holds(figure.value)
        return found("supported" if holds else "refuted", "a number without an interval, compared as it is")
    if wanted.op == "==":
        return found("not evaluable", "a figure with an interval equals no number; two criteria can bound it")
    return _within_noise(wanted, end, figure, found)


def _within_noise(wanted: Parsed, end: str, figure: Metric, found: Callable[..., Judged]) -> Judged:
    assert figure.ci_low is not None and figure.ci_high is not None
    below = wanted.op in ("<", "<=")
    favourable, adverse = (figure.ci_low, figure.ci_high) if below else (figure.ci_high, figure.ci_low)
    if end == ("ci_low" if below else "ci_high"):  # asks only that it be possible
        holds = wanted.holds(favourable)
        return found("supported" if holds else "refuted", "the interval's favourable end, compared as it is")
    if wanted.holds(adverse):
        return found("supported", f"the whole interval is {wanted.bound}")
    if not wanted.holds(favourable):
        return found("refuted", f"no part of the interval is {wanted.bound}")
    needed = _n_needed(figure, wanted.number)
    return found(
        "inconclusive",
        f"the interval holds {_written(wanted.number)}"
        + (
            f"; about {needed} rows would decide it, were the value to stay"
            if needed
            else "; no n is known to decide it"
        ),
        needed,
    )


def _n_needed(figure: Metric, number: float) -> int | None:
    """More than n·(half width towards the number / distance to it)²: intervals narrow as 1/√n."""
    assert figure.ci_low is not None and figure.ci_high is not None
    distance = abs(figure.value - number)
    half = figure.ci_high - figure.value if number > figure.value else figure.value - figure.ci_low
    if figure.n is None or not 0 < figure.n < MOST or distance == 0:
        return None
    needed = figure.n * (half / distance) * (half / distance)  # a square would overflow with an error
    return max(figure.n, math.floor(needed)) + 1 if needed < MOST else None


def _text(criterion: Criterion) -> str:
    wanted = parse(criterion.criterion)
    extra: list[str] = [criterion.role] if criterion.role != "primary" else []
    extra += [f"min_n {criterion.min_n}"] if criterion.min_n is not None else []
    return f"{wanted.path} {wanted.bound}" + (f" ({', '.join(extra)})" if extra else "")


def _written(number: float) -> str:
    return repr(number).removesuffix(".0")
