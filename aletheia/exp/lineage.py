"""The tree that a record belongs to: from the base over what it was built on to all that was built on these since.

    aletheia exp lineage EXP-2026-11-21-006

Of a pipeline experiment: the trees of its stages. A record that others name and that is not there is shown as gone.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from aletheia.exp.reading import plain, read_facts, short, short_hash
from aletheia.output import print_json, print_table
from aletheia.summary import figures
from pipeline.records import index
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Facts, Input
from pipeline.workspace import Workspace

PART = {"": "", "├── ": "│   ", "└── ": "    "}  # a branch, and what stands below it


@dataclass
class Node:
    """A record or a base model. `sha256` is of what it made, by which others took it."""

    id: str
    stage: str
    status: str = ""
    sha256: str = ""
    figures: list[str] = field(default_factory=list)
    asked: bool = False


@dataclass(frozen=True)
class Place:
    """Where a node stands in the tree; `again`: it was told of further up, with what is below it."""

    node: Node
    depth: int
    branch: str
    again: bool


def lineage(workspace: Workspace, name: str, as_json: bool) -> None:
    file, facts = read_facts(workspace, name)
    family = Family(workspace, file.id, facts)
    places = list(_placed(family))
    parent = facts.lineage.parent
    if as_json:
        nodes = [{"depth": p.depth, "again": p.again, **asdict(p.node)} for p in places]
        print_json(plain({"id": file.id, "part_of": parent, "nodes": nodes}))
        return
    if parent:
        above = family.node(parent)
        print_table(("part of", above.id, above.stage, above.status), [], sys.stdout)
        print()
    rows = [_row(place) for place in places]
    print_table(("record", "stage", "status", "made", "figures"), rows, sys.stdout)


def _row(place: Place) -> tuple[str, ...]:
    node = place.node
    mark = "  ◀" if node.asked else ""
    figure = "as above" if place.again else (node.figures or [""])[0]
    return (f"{place.branch}{node.id}{mark}", short(node.stage), node.status, short_hash(node.sha256), figure)


class Family:
    """Who was built on whom: the roots of what was asked for, and below each what took from it."""

    def __init__(self, workspace: Workspace, asked: str, facts: Facts) -> None:
        self.workspace, self.asked = workspace, asked
        self.entries = {entry.id: entry for entry in reversed(index.entries(workspace))}  # oldest first
        self.named: dict[str, Input] = {}  # as those who took from them call them
        self.below: dict[str, list[str]] = defaultdict(list)
        self.bases: dict[str, Node] = {}
        for name in self.entries:
            for taken in self._inputs(name):
                self.named[taken.id] = taken
                if name not in self.below[taken.id]:
                    self.below[taken.id].append(name)
        parts = [
            *facts.lineage.children,
            *(i for i, e in self.entries.items() if e.facts and e.facts.lineage.parent == asked),
        ]
        self.roots = [asked] if parts else []
        self._plant(parts or [asked])

    def node(self, name: str) -> Node:
        if name in self.bases:
            return self.bases[name]
        entry, taken = self.entries.get(name), self.named.get(name)
        node = Node(name, "?", "gone", asked=name == self.asked)
        if taken:
            node.stage, node.sha256 = taken.stage, taken.sha256
        if entry and entry.facts:
            node.stage, node.status, node.figures = entry.stage, liveness(entry.facts), figures(entry.facts)
            node.sha256 = self._made(name) or node.sha256
        elif entry:
            node.status, node.figures = entry.status, entry.problems
        return node

    def _plant(self, parts: list[str]) -> None:
        """Puts the tops of the parts' trees under their bases. A circle has no top: any of its records will do."""
        ancestry = _reach(parts, lambda name: [taken.id for taken in self._inputs(name)])
        reached: set[str] = set()
        for name in sorted(ancestry, key=lambda name: bool(self._inputs(name))):  # tops first
            if name not in reached:
                reached |= set(_reach([name], lambda name: self.below[name]))
                under = self._base(name)
                (self.below[under] if under else self.roots).append(name)

    def _base(self, name: str) -> str | None:
        """The base that it, or where it is gone what took it, was built on; else the pipeline that was asked for."""
        known = (self.entries[i].facts for i in (name, *self.below[name]) if i in self.entries)
        base = next((facts.lineage.base for facts in known if facts), None)
        pipeline = self.roots[0] if self.roots[:1] == [self.asked] and name != self.asked else None
        if not base:
            return pipeline
        node = Node(short(base.get("name")), "base", sha256=str(base.get("sha256") or ""))
        key = f"{node.id} {node.sha256}"
        if key not in self.bases:
            self.bases[key] = node
            (self.below[pipeline] if pipeline else self.roots).append(key)
        return key

    def _inputs(self, name: str) -> list[Input]:
        entry = self.entries.get(name)
        return entry.facts.lineage.inputs if entry and entry.facts else []

    def _made(self, name: str) -> str:
        made = RecordFile(self.workspace.experiments / f"{name}.yaml").read().facts
        digests = "".join(artifact.sha256 for artifact in made.artifacts) if made else ""
        return hashlib.sha256(digests.encode()).hexdigest() if digests else ""


def _placed(family: Family) -> Iterator[Place]:
    """From the top down, each record with what is below it once, however often it is named."""
    told: set[str] = set()
    stack = [(name, 0, "", "") for name in reversed(family.roots)]
    while stack:
        name, depth, indent, branch = stack.pop()
        again = name in told
        told.add(name)
        yield Place(family.node(name), depth, indent + branch, again)
        if not again:
            children = family.below[name]
            branches = ["├── "] * (len(children) - 1) + ["└── "]
            stack += [(c, depth + 1, indent + PART[branch], b) for c, b in zip(children, branches, strict=False)][::-1]


def _reach(start: list[str], next_to: Callable[[str], list[str]]) -> list[str]:
    """All that can be come to, the start included, each once."""
    found = dict.fromkeys(start)
    stack = list(found)
    while stack:
        new = [name for name in next_to(stack.pop()) if name not in found]
        found |= dict.fromkeys(new)
        stack += new
    return list(found)
