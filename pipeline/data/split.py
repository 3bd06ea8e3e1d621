"""Rows into those that are trained and those that are held out; and answers shuffled between rows, the control."""

import difflib
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.config import Validation
from pipeline.data.rows import AnyRow, Conversation, PreferencePair, Row, row_hash, text_digest
from pipeline.errors import UserError
from pipeline.progress import say


def split(rows: Sequence[AnyRow], validation: Validation) -> tuple[list[AnyRow], list[AnyRow]]:
    """Training rows and held-out rows, each in the order they came in. Rows of equal text are never parted.

    Which rows are held out depends on their content and the seed, not on their order. Where no texts are equal, adding a
    row moves at most one other (random, temporal), or one of its domain and one of another (stratified); adding to a family
    may move whole families (group). Says so where nothing is held out. Raises `UserError` where rows lack what the strategy
    needs.
    """
    chosen = _STRATEGIES[validation.strategy](rows, validation)
    if rows and validation.fraction and not chosen:
        wanted = _share(rows, validation)
        few = f"{len(rows)} rows × {validation.fraction:g} is at most half a row"
        large = f"rows that stay together are more than twice the {wanted} to be held out"
        say(f"note: no row is held out: {large if wanted else few}")
    held_out = {id(row) for row in chosen}
    return [r for r in rows if id(r) not in held_out], [r for r in rows if id(r) in held_out]


def sample(rows: list[AnyRow], wanted: int | None) -> list[AnyRow]:
    """So many of them, the same ones every time and the same share of each domain; all where `wanted` is none."""
    if wanted is None or wanted >= len(rows):
        return rows
    return split(rows, Validation(fraction=wanted / len(rows), strategy="stratified", seed=0))[1]


def described(validation: Validation) -> dict[str, Any]:
    """How rows are split, for a record."""
    if validation.path:
        return {"path": validation.path}
    field = {"group": "group_by", "temporal": "time_by"}.get(validation.strategy)
    return validation.model_dump(include={"strategy", "fraction", "seed", *([field] if field else [])})


def _random(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    return _until(_ranked(_alike(rows), validation.seed), _share(rows, validation))


def _stratified(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    """The share of each domain."""
    domains: dict[str, list[list[AnyRow]]] = defaultdict(list)
    for alike in _alike(rows):
        domains[alike[0].domain].append(alike)
    shares = _apportioned({name: sum(map(len, units)) for name, units in domains.items()}, validation)
    return [row for name, units in domains.items() for row in _until(_ranked(units, validation.seed), shares[name])]


def _apportioned(sizes: Mapping[str, int], validation: Validation) -> dict[str, int]:
    """The share of all over domains, by largest remainder (Hamilton): small ones get some too. The seed decides ties."""
    exact = {name: size * validation.fraction for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = round(sum(sizes.values()) * validation.fraction) - sum(shares.values())
    for name in sorted(sizes, key=lambda n: (shares[n] - exact[n], _rank(n, validation.seed)))[:left]:
        shares[name] += 1
    return shares


def _group(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    """Whole families. Two that have a text in common are one."""
    _check_group(rows, validation.group_by)
    names = {id(row): _family(row, validation.group_by) for row in rows}
    families = _joined(rows, lambda row: (names[id(row)], text_digest(row)))
    families.sort(key=lambda family: _rank(min(names[id(row)] for row in family), validation.seed))
    return _until(families, _share(rows, validation))


def _temporal(rows: Sequence[AnyRow], validation: Validation) -> list[AnyRow]:
    """The latest rows; of one instant, those that the seed ranks first. Rows of equal text are as old as the oldest."""
    wanted, held_out = _share(rows, validation), list[AnyRow]()
    for alike in sorted(
        _ranked(_alike(rows), validation.seed), key=lambda alike: -min(_time(row, validation.time_by) for row in alike)
    ):
        if len(held_out) < wanted:
            held_out += alike
    return held_out


_STRATEGIES: dict[str, Callable[[Sequence[AnyRow], Validation], list[AnyRow]]] = {
    "random": _random,
    "stratified": _stratified,
    "group": _group,
    "temporal": _temporal,
}


def _share(rows: Sequence[Row], validation: Validation) -> int:
    return round(len(rows) * validation.fraction)


def _until(units: Iterable[Sequence[AnyRow]], wanted: int) -> list[AnyRow]:
    """Whole units, until the share is reached: the one that would pass it by more than it falls short stays."""
    taken = list[AnyRow]()
    for unit in units:
        if len(taken) + len(unit) / 2 <= wanted:
            taken += unit
    return taken


def _ranked(alike: Iterable[list[AnyRow]], seed: int) -> list[list[AnyRow]]:
    return sorted(alike, key=lambda rows: _rank(row_hash(rows[0]), seed))


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()


def _alike(rows: Iterable[AnyRow]) -> list[list[AnyRow]]:
    """Rows of equal text together, in an order that is not the rows'."""
    units = _joined(rows, lambda row: (text_digest(row),))
    return [sorted(unit, key=row_hash) if len(unit) > 1 else unit for unit in units]


def _joined(rows: Iterable[AnyRow], keys: Callable[[AnyRow], Sequence[Hashable]]) -> list[list[AnyRow]]:
    """Rows that share a key together, and so those that share one with them (union-find)."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    firsts = []
    for row in rows:
        first, *others = keys(row)
        firsts.append((first, row))
        for other in others:
            parent[root(other)] = root(first)
    units: dict[Hashable, list[AnyRow]] = defaultdict(list)
    for first, row in firsts:
        units[root(first)].append(row)
    return list(units.values())


def _value(row: Row, field: str) -> Any:
    """What the row says of itself; None where it does not, or only what every row says that does not."""
    extra = (row.model_extra or {}).get(field)
    declared = type(row).model_fields.get(field)
    if extra is not None or declared is None:
        return extra
    value = getattr(row, field)
    return None if value == declared.default else value


def _check_group(rows: Sequence[Row], field: str) -> None:
    """Says how many rows name their family. Raises `UserError` where none does, though a profile names the field."""
    named = sum(_value(row, field) is not None for row in rows)
    if rows and not named and field != Validation.model_fields["group_by"].default:
        there = sorted({name for row in rows for name in row.model_extra or {}})
        near = difflib.get_close_matches(field, there, 1)
        setting = "training_data.validation.group_by"
        remedy = f"{setting}: {near[0]}" if near else f"another {setting}"
        raise UserError(f"no row has `{field}`", where=f"{setting}: {field}", remedy=remedy)
    if 0 < named < len(rows):
        say(f"note: {named} of {len(rows)} rows have `{field}`; the others are grouped by their prompt")


def _family(row: Row, field: str) -> str:
    """What its field says, else the words of its first question: numbers, names in code and punctuation apart."""
    value = _value(row, field)
    if value is not None:
        return f"{field}={value}"
    words = re.findall(r"[^\W\d_]+", re.sub(r"```.*?```|`[^`]*`", " ", _question(row).lower(), flags=re.DOTALL))
    return " ".join(words) or row_hash(row)


def _question(row: Row) -> str:
    """The first that is asked, whatever the system says before it."""
    if isinstance(row, Conversation | PreferencePair):
        messages = row.messages if isinstance(row, Conversation) else row.prompt
        return next(m.content for m in messages if m.role == "user")
    return row.asked[0]


def _time(row: Row, field: str) -> float:
    """Seconds since 1970; a date without an offset is UTC's. Raises `UserError`."""
    value = _value(row, field)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            found = datetime.fromisoformat(value)
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
