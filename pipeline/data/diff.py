"""What two sets of rows differ in: by content, whatever their order or file.

A row is changed when its own id, or else its prompt, stands on both sides with another content.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.data.rows import Row


@dataclass(frozen=True)
class Item:
    """A row of one side. `row` is None where only its hash is left."""

    sha256: str
    id: str
    part: str = ""  # of a record: train, held_out, …
    row: Row | None = None

    @property
    def own_id(self) -> str | None:
        """None where the place gave it."""
        return None if self.row is not None and self.id == self.row.where else self.id


@dataclass(frozen=True)
class Difference:
    same: int
    added: list[Item]
    removed: list[Item]
    changed: list[tuple[Item, Item]]
    moved: list[tuple[Item, Item]]  # the same row in another part


def difference(before: Iterable[Item], after: Iterable[Item]) -> Difference:
    """Each row is paired once: of a row that stands twice on one side and once on the other, one is added or removed."""
    old, new = list(before), list(after)
    same, changed = list[tuple[Item, Item]](), list[tuple[Item, Item]]()
    for pairs, key in ((same, _hash_and_part), (same, _hash), (changed, _own_id), (changed, _prompt)):
        found, old, new = _paired(old, new, key)
        pairs += found
    moved = [(one, other) for one, other in same if one.part != other.part and one.part and other.part]
    return Difference(len(same), new, old, changed, moved)


def fields(before: Row, after: Row) -> list[str]:
    """The names of the fields that differ."""
    old, new = (row.model_dump(exclude={"id"} if row.id == row.where else None) for row in (before, after))
    return [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]


def _paired(
    old: Sequence[Item], new: Sequence[Item], key: Callable[[Item], Hashable]
) -> tuple[list[tuple[Item, Item]], list[Item], list[Item]]:
    """Those of one key, the first with the first, and what is left of each side. A key of None is nobody's."""
    waiting: dict[Hashable, deque[int]] = defaultdict(deque)
    for number, item in enumerate(old):
        waiting[key(item)].append(number)
    waiting[None].clear()
    pairs, taken, left = [], set(), []
    for item in new:
        if twins := waiting.get(key(item)):
            taken.add(number := twins.popleft())
            pairs.append((old[number], item))
        else:
            left.append(item)
    return pairs, [item for number, item in enumerate(old) if number not in taken], left


def _hash_and_part(item: Item) -> Hashable:
    return item.sha256, item.part


def _hash(item: Item) -> Hashable:
    return item.sha256


def _own_id(item: Item) -> Hashable:
    return item.own_id or None


def _prompt(item: Item) -> Hashable:
    return None if item.row is None else (type(item.row).__name__, tuple(item.row.asked))
