"""The lineage as a picture: base and data → SFT → DPO → merge → serve and eval, laid out here, drawn by the page as SVG.

A family is what grew from one training; families stand below each other, the newest first. A column a stage; a record
stands in the middle of what was built on it. A line is an input that a record names; a dashed one joins a data snapshot
to the trainings whose rows have its hash.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aletheia.report import figures
from aletheia.report.project import Entry, Project, text

LIMIT = 80  # records in the picture
COLUMNS = {"data": 0, "sft": 1, "dpo": 2, "merge": 3}  # what else there is stands behind them
TITLES = ("base, data", "SFT", "DPO", "merge", "serve, eval")
WIDTH, HEIGHT, ACROSS, DOWN, GAP, TOP = 186, 42, 236, 54, 18, 34  # a box, from box to box, between families; pixels
# The figure by which a box is known: the first that the record has.
FIGURES = (
    ("eval_loss.delta", "Δ loss {}"),
    ("preference_accuracy", "accuracy {}"),
    ("win_rate", "win-rate {}"),
    ("eval_loss", "loss {}"),
    ("receipt.modules", "{} modules checked"),
    ("requests", "{} requests"),
    ("rows", "{} rows"),
)


@dataclass(eq=False)
class Box:
    """`entry` is None for a base model, and for a record that others name and that is not there."""

    id: str
    stage: str
    column: int
    line: str
    about: str
    entry: Entry | None = None
    y: float = 0.0
    children: list["Box"] = field(default_factory=list)

    @property
    def x(self) -> int:
        return self.column * ACROSS


@dataclass(frozen=True)
class Edge:
    start: Box
    end: Box
    dashed: bool = False

    @property
    def path(self) -> str:
        height = HEIGHT * (0.75 if self.dashed else 0.5)
        x1, y1, x2, y2 = self.start.x + WIDTH, self.start.y + height, self.end.x, self.end.y + height
        middle = (x1 + x2) / 2
        return f"M{x1} {y1:.0f}C{middle} {y1:.0f} {middle} {y2:.0f} {x2} {y2:.0f}"


@dataclass
class Picture:
    boxes: list[Box] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    not_drawn: int = 0  # older records

    @property
    def width(self) -> int:
        return max((box.x for box in self.boxes), default=0) + WIDTH

    @property
    def height(self) -> float:
        return max((box.y for box in self.boxes), default=0) + HEIGHT

    @property
    def titles(self) -> list[tuple[int, str]]:
        return [(column * ACROSS, title) for column, title in enumerate(TITLES)]


def picture(project: Project) -> Picture:
    """The newest records with a lineage and what they were built on; pipeline experiments only hold these."""
    related = [e for e in project.entries if e.facts and e.stage not in ("pipeline", "data")]
    boxes: dict[str, Box] = {}
    for entry in related:
        if len(boxes) >= LIMIT:
            break
        _add(entry, project, boxes)
    drawn = Picture(not_drawn=sum(entry.id not in boxes for entry in related))
    tops = [box for box in boxes.values() if box.id not in {c.id for b in boxes.values() for c in b.children}]
    y = float(TOP)
    for base, families in _by_base(tops).items():
        for family in families:
            y = _place(family, y) + GAP
        if base:
            drawn.boxes.append(base)
            drawn.edges += [Edge(base, family) for family in families]
    drawn.boxes += boxes.values()
    drawn.edges += [Edge(boxes[taken], box) for box in boxes.values() for taken in _inputs(box.entry) if taken in boxes]
    _add_snapshots(drawn, project)
    _place_sources(drawn)
    return drawn


def _add(entry: Entry, project: Project, boxes: dict[str, Box], depth: int = 0) -> Box:
    """The record's box, and those of what it was built on. Only an older record is taken for a parent: no circles."""
    if entry.id in boxes:
        return boxes[entry.id]
    parents = []
    for taken in entry.facts.lineage.inputs[:LIMIT] if entry.facts else []:
        there = project.by_id.get(taken.id)
        if there is None or depth == LIMIT:
            why = "no such record here" if there is None else "older: not drawn"
            parents.append(boxes.setdefault(taken.id, _box(taken.id, taken.stage, why)))
        elif project.age[there.id] > project.age[entry.id]:
            parents.append(_add(there, project, boxes, depth + 1))
    box = boxes[entry.id] = _box(entry.id, entry.stage, _figure(entry), entry)
    if parents:
        box.column = max(box.column, parents[0].column + 1)
        parents[0].children.append(box)
    return box


def _box(name: str, stage: str, line: str, entry: Entry | None = None) -> Box:
    status = entry.status if entry else ""
    about = "\n".join([f"{stage} {name}", status, *(entry.figures if entry else [line])])
    shown = line if status in ("complete", "") else f"{status}{'  ' if line else ''}{line}"
    return Box(name, stage, COLUMNS.get(stage, len(COLUMNS)), shown, about, entry)


def _figure(entry: Entry) -> str:
    for path, form in FIGURES:
        if path in entry.metrics:
            return form.format(figures.text(entry.metrics[path]))
    return ""


def _inputs(entry: Entry | None) -> list[str]:
    return [taken.id for taken in entry.facts.lineage.inputs] if entry and entry.facts else []


def _by_base(tops: list[Box]) -> dict[Box | None, list[Box]]:
    bases: dict[tuple[str, str], Box] = {}
    families: dict[int, tuple[Box | None, list[Box]]] = {}
    for top in tops:
        base = top.entry.facts.lineage.base if top.entry and top.entry.facts else None
        box = None
        if base and base.get("name"):
            name, digest = text(base["name"]), text(base.get("sha256"))[:12]
            key = (name, digest)
            box = bases.setdefault(
                key, Box(name, "base", 0, digest or text(base.get("revision")), f"base model {name}")
            )
        families.setdefault(id(box), (box, []))[1].append(top)
    return {box: tops for box, tops in families.values()}


def _place(box: Box, y: float) -> float:
    """Returns where the next may stand."""
    box.y = y
    if not box.children:
        return y + DOWN
    for child in reversed(box.children):  # they came newest first
        y = _place(child, y)
    box.y = (min(c.y for c in box.children) + max(c.y for c in box.children)) / 2
    return y


def _add_snapshots(drawn: Picture, project: Project) -> None:
    """Snapshots of the rows that drawn trainings learned from: of two with the same rows, the later one before it."""
    waiting = {box.id: (box, digest) for box in drawn.boxes if box.entry for digest in [_rows(box.entry)] if digest}
    for snapshot in project.entries:
        if snapshot.stage != "data" or snapshot.facts is None:
            continue
        digests = set(_hashes(snapshot.facts.data))
        users = [
            box
            for box, digest in waiting.values()
            if digest in digests and project.age[box.id] < project.age[snapshot.id]
        ]
        if users:
            box = _box(snapshot.id, "data", _figure(snapshot), snapshot)
            drawn.boxes.append(box)
            drawn.edges += [Edge(box, user, dashed=True) for user in users]
            waiting = {name: of for name, of in waiting.items() if of[0] not in users}


def _place_sources(drawn: Picture) -> None:
    """Bases and snapshots stand beside the middle of what came from them, one below the other."""

    def middle(box: Box) -> float:
        ends = [edge.end.y for edge in drawn.edges if edge.start is box]
        return (min(ends) + max(ends)) / 2

    y = float(TOP)
    for box in sorted((edge.start for edge in drawn.edges if edge.start.column == 0), key=middle):
        if not box.y:
            box.y = y = max(y, middle(box))
            y += DOWN


def _rows(entry: Entry) -> str:
    train = entry.facts.data.get("train") if entry.facts else None
    return text(train.get("sha256")) if isinstance(train, dict) else ""


def _hashes(data: dict[str, Any]) -> Iterator[str]:
    for part in data.values():
        train = part.get("train") if isinstance(part, dict) else None
        if isinstance(train, dict) and train.get("sha256"):
            yield text(train["sha256"])
