"""How two records differ: settings, rows, and figures paired on the items that both were measured on. No printing here."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aletheia.exp.reading import flat, plain
from pipeline import statistics
from pipeline.records import items
from pipeline.records.file import RecordFile
from pipeline.records.metrics import Metric, benchmark_is_lower_better, metrics
from pipeline.records.schema import Facts

LOWER_IS_BETTER = ("loss", "perplexity")
HIGHER_IS_BETTER = ("margin", "preference_accuracy", "win_rate")
MEASURED_ON = {  # of a training, and of an evaluation
    "eval_loss": ("held_out", "conversations"),
    "margin": ("held_out", "pairs"),
    "preference_accuracy": ("held_out", "pairs"),
    "win_rate": ("questions",),
}


@dataclass(frozen=True)
class Side:
    """A record to compare, with what lies beside it."""

    file: RecordFile
    facts: Facts

    @property
    def id(self) -> str:
        return self.file.id

    @cached_property
    def figures(self) -> dict[str, Metric]:
        return metrics(self.facts.results)

    @cached_property
    def values(self) -> dict[str, dict[str, float]]:
        return items.values(self.file.folder, self.facts.stage)

    @cached_property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Sets of rows by name (`train`, `sft.held_out`), as the record describes them."""
        return dict(_parts(self.facts.data))

    @cached_property
    def rows(self) -> dict[str, dict[str, str]]:
        """Hashes by id of those sets whose rows are known; a file of other rows than the record's tells nothing."""
        found = items.rows(self.file.folder)
        return {part: rows for part, rows in found.items() if items.digest(rows.values()) == self._sha256(part)}

    @cached_property
    def hashes(self) -> dict[str, str]:
        return {item: sha256 for rows in self.rows.values() for item, sha256 in rows.items()}

    def measured_on(self, path: str) -> str | None:
        """The hash of the set of rows that a figure was measured on."""
        found = (self._sha256(part) for part in MEASURED_ON.get(path.partition(".")[0], ()))
        return next(filter(None, found), None)

    def _sha256(self, part: str) -> Any:
        return self.parts.get(part, {}).get("sha256")


def settings(blocks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keys whose values differ, with the value of each record that has one. `blocks`: one a record, by id."""
    leaves = {record: dict(flat(plain(block))) for record, block in blocks.items()}
    keys = dict.fromkeys(key for block in leaves.values() for key in block)
    columns = {key: {record: block[key] for record, block in leaves.items() if key in block} for key in keys}
    return {
        key: values
        for key, values in columns.items()
        if len(values) < len(blocks) or any(value != next(iter(values.values())) for value in values.values())
    }


def rows(one: Side, other: Side) -> dict[str, dict[str, Any]]:
    """By set: the same, or what was added, removed and changed on the way from `one` to `other`."""
    return {part: _set(one, other, part) for part in dict.fromkeys([*one.parts, *other.parts])}


def crossed(one: Side, other: Side) -> list[str]:
    """Ids of rows that the one trained on and the other held out."""
    trained = {h for part, found in one.rows.items() if part.endswith("train") for h in found.values()}
    return [
        item
        for part, found in other.rows.items()
        if part.endswith("held_out")
        for item, sha256 in found.items()
        if sha256 in trained
    ]


def difference(path: str, one: Side, other: Side) -> dict[str, Any] | None:
    """`other` − `one` on the items of both, with its interval; None where they share none."""
    before, after = one.values.get(path, {}), other.values.get(path, {})
    named = [item for item in before if item in after]
    shared = [
        i for i in named if one.hashes.get(i) == other.hashes.get(i) or i not in one.hashes or i not in other.hashes
    ]
    if not shared:
        return None
    try:
        ends = [before[i] for i in shared], [after[i] for i in shared]
        change = statistics.paired(*ends, shares={*ends[0], *ends[1]} <= {0.0, 1.0})
    except OverflowError:  # values that no measurement gives
        return None
    found: dict[str, Any] = change.delta.model_dump(exclude_none=True)
    known = all(i in one.hashes and i in other.hashes for i in shared)
    same_set = one.measured_on(path) is not None and one.measured_on(path) == other.measured_on(path)
    same_items = known or same_set
    lower = {_lower_is_better(path, side) for side in (one, other)} if same_items else set()
    found |= {
        "finding": change.verdict(lower.pop() if len(lower) == 1 else None),
        "of": [len(before), len(after)],
        "changed_items": len(named) - len(shared),
    }
    return found | ({} if same_items else {"matched_by": "id alone"})


def _lower_is_better(path: str, side: Side) -> bool | None:
    """None where the direction is not known; a benchmark's is its metric's."""
    name = path.removesuffix(".delta").removesuffix(".before")
    block, _, task = name.partition(".")
    if block == "benchmarks":
        benchmarks = side.facts.results.get(block)
        entry = benchmarks.get(task) if isinstance(benchmarks, dict) else None
        name = str(entry.get("metric")) if isinstance(entry, dict) else ""
        return benchmark_is_lower_better(name)
    return True if name.endswith(LOWER_IS_BETTER) else False if name.endswith(HIGHER_IS_BETTER) else None


def _set(one: Side, other: Side, part: str) -> dict[str, Any]:
    before, after = one.parts.get(part), other.parts.get(part)
    if before is None or after is None:
        return {"only_in": one.id if before else other.id, "rows": (before or after or {}).get("rows")}
    found: dict[str, Any] = {"rows": [before["rows"], after["rows"]]}
    if before.get("sha256") and before.get("sha256") == after.get("sha256"):
        return found | {"same": True}
    if part not in one.rows or part not in other.rows:
        return found | {"same": False}
    removed, added = _surplus(one.rows[part], other.rows[part]), _surplus(other.rows[part], one.rows[part])
    changed = [item for item in removed if item in added]
    return found | {
        "same": False,
        "added": [item for item in added if item not in changed],
        "removed": [item for item in removed if item not in changed],
        "changed": changed,
    }


def _surplus(rows: dict[str, str], other: dict[str, str]) -> list[str]:
    """Ids of rows whose content the other set does not have. An id may be a row's place, which moves: content counts."""
    left = Counter(rows.values()) - Counter(other.values())
    found = []
    for item, sha256 in rows.items():
        if left[sha256] > 0:
            left[sha256] -= 1
            found.append(item)
    return found


def _parts(values: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in values.items():
        if isinstance(value, dict) and "rows" in value:
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _parts(value, f"{prefix}{key}.")
