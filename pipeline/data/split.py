"""Rows into those that are trained and those that are held out; and answers shuffled between rows, the control."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime

from pipeline.config import Validation
from pipeline.data.rows import AnyRow, Conversation, Row, row_hash
from pipeline.errors import UserError


def split(rows: Sequence[AnyRow], validation: Validation) -> tuple[list[AnyRow], list[AnyRow]]:
    """Training rows and held-out rows, each in the order they came in.

    Which rows are held out depends on their content and the seed, not on their order: adding a row moves at most one
    other (random, stratified). Raises `UserError` where a row lacks what the strategy needs.
    """
    chosen = _STRATEGIES[validation.strategy](rows, validation)
    held_out = {id(row) for row in chosen}
    return [r for r in rows if id(r) not in held_out], [r for r in rows if id(r) in held_out]


def _random(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    ordered = sorted(rows, key=lambda row: _rank(row_hash(row), validation.seed))
    return ordered[: round(len(rows) * validation.fraction)]


def _stratified(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    """The share of each domain."""
    domains: dict[str, list[AnyRow]] = defaultdict(list)
    for row in rows:
        domains[row.domain].append(row)
    return [row for domain in domains.values() for row in _random(domain, validation)]


def _group(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    """Whole families, until the share is reached: the one that would pass it by more than it falls short stays."""
    families: dict[str, list[AnyRow]] = defaultdict(list)
    for row in rows:
        families[_family(row, validation.group_by)].append(row)
    wanted, held_out = round(len(rows) * validation.fraction), list[AnyRow]()
    for name in sorted(families, key=lambda name: _rank(name, validation.seed)):
        if len(held_out) + len(families[name]) / 2 <= wanted:
            held_out += families[name]
    return held_out


def _temporal(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    """The latest rows; of one instant, those that the seed ranks first."""
    ordered = sorted(rows, key=lambda row: (-_time(row, validation.time_by), _rank(row_hash(row), validation.seed)))
    return ordered[: round(len(rows) * validation.fraction)]


_STRATEGIES: dict[str, Callable[[Sequence[AnyRow], Validation], list[AnyRow]]] = {
    "random": _random,
    "stratified": _stratified,
    "group": _group,
    "temporal": _temporal,
}


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()


def _family(row: Row, field: str) -> str:
    """What its field says, else the words of its prompt: numbers, names in code and punctuation apart."""
    value = getattr(row, field, None)
    if value is not None:
        return f"{field}={value}"
    words = re.findall(r"[^\W\d_]+", re.sub(r"```.*?```|`[^`]*`", " ", row.asked[-1].lower(), flags=re.DOTALL))
    return " ".join(words) or row_hash(row)


def _time(row: Row, field: str) -> float:
    """Seconds since 1970; a date without an offset is UTC's. Raises `UserError`."""
    value = getattr(row, field, None)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            found = datetime.fromisoformat(value)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, date):  # from Parquet
            found = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        pass
    what = f"{field}: {value!r} is no date" if value is not None else f"has no `{field}` to be split by time"
    raise UserError(what, where=row.where, remedy="2026-11-20 or 2026-11-20T09:30:00Z, or another validation.strategy")


def shuffle_answers(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """The control: every answer stands under another row's question. The texts themselves stay as they are.

    Raises `UserError` when the rows are too few for that.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    places = [(row, turn) for row in order for turn, m in enumerate(rows[row].messages) if m.role == "assistant"]
    most = max(Counter(row for row, _ in places).values(), default=0)  # moved so far, no answer stays in its own row
    if 2 * most > len(places):
        raise UserError("too few rows to shuffle answers between them", where=rows[0].where)
    shuffled = [row.model_copy(deep=True) for row in rows]
    for (row, turn), (donor, donor_turn) in zip(places, places[most:] + places[:most], strict=True):
        shuffled[row].messages[turn].content = rows[donor].messages[donor_turn].content
    return shuffled
