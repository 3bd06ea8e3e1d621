"""What two sets of rows differ in: by content, whatever their order or file.

A row is changed when its own id, or else its prompt, stands on both sides with another content.
"""

from collections.abc import Iterable
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
    old, new = ({item.sha256: item for item in side} for side in (before, after))
    both = [(old[sha256], new[sha256]) for sha256 in old if sha256 in new]
    removed = {item.sha256: item for item in old.values() if item.sha256 not in new}
    added = [item for item in new.values() if item.sha256 not in old]
    by_key: dict[object, Item] = {}
    for item in reversed(list(removed.values())):  # of several with one prompt the first
        by_key |= {key: item for key in _keys(item)}
    changed, really_added = [], []
    for item in added:
        twin = next((by_key[key] for key in _keys(item) if key in by_key), None)
        if twin is not None and twin.sha256 in removed:
            changed.append((removed.pop(twin.sha256), item))
        else:
            really_added.append(item)
    moved = [(one, other) for one, other in both if one.part != other.part and one.part and other.part]
    return Difference(len(both), really_added, list(removed.values()), changed, moved)


def fields(before: Row, after: Row) -> list[str]:
    """The names of the fields that differ."""
    old, new = (row.model_dump(exclude={"id"} if row.id == row.where else None) for row in (before, after))
    return [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]


def _keys(item: Item) -> list[object]:
    keys: list[object] = [("id", item.own_id)] if item.own_id else []
    if item.row is not None:
        keys.append((type(item.row).__name__, tuple(item.row.asked)))
    return keys
