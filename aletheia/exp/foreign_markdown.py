"""A Markdown log: one record for each heading that names an experiment, by its id, its number or its date.

`## Experiment 3: …`, `## EXP-…`, `### 20240131_142233_j123456`, `## Milestone 2: …`, `## 2024-03-12 …`. The headings below it
are its keys. Lists become lists, check boxes steps, tables rows, YAML blocks mappings, `**Key:** value` lines keys; a text
stays one. Dated headings over what was learned, difficult or open are entries of one journal instead.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode as Node

from aletheia.exp.foreign import INNER, Log, as_date, inner, number, plain, target
from pipeline import yamlio

MAPPINGS = {"hyperparameters", "set_up", "splits", "search", "tracking", "code_version", "compute", "deployment"}
_NUMBERED = re.compile(r"((?:experiment|exp|run|trial|milestone)\s*#?\s*\d[\w.]*)\s*[:.–—-]*\s*(.*)", re.IGNORECASE)
_IDENTIFIED = re.compile(r"(EXP-[\w-]*\w|\d{8}_\d{6}(?:_\w+)?)\b\s*[:–—-]*\s*(.*)")
_DATED = re.compile(r"(\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4})\b\s*[:–—-]*\s*(.*)")
_LINE = re.compile(
    r"(?:\*\*|__)(?P<bold>[^*_:]{1,60}?)\s*(?::(?:\*\*|__)|(?:\*\*|__)\s*:)\s*(?P<after>.*)|(?P<key>[^:*]{1,60}?):\s+(?P<value>.*)"
)
_BOX = re.compile(r"\[([ xX])\]\s+")
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^()\s]+)\)")
_EMPTY = re.compile(r"[-–—]?")


@dataclass(eq=False)
class Section:
    """A heading and what stands below it, up to the next of its level. Lines count from 0; `end` is not in it."""

    title: str
    level: int
    start: int
    end: int
    blocks: list[Node] = field(default_factory=list)
    children: list["Section"] = field(default_factory=list)

    def all(self) -> Iterator["Section"]:
        yield self
        for child in self.children:
            yield from child.all()


@dataclass(frozen=True)
class Name:
    """How a heading names an experiment."""

    foreign_id: str | None
    title: str
    date: str | None = None


def logs(text: str) -> list[Log]:
    lines = text.removeprefix("\ufeff").splitlines()
    front, begins = _front_matter(lines)
    lines = [""] * begins + lines[begins:]
    root = _sections(lines)
    heads = [section for section in root.all() if section.level and _name(section.title)]
    level = min((section.level for section in heads), default=0)
    heads = [section for section in heads if section.level == level]
    if not heads or _is_journal(heads) or _is_one(root, heads):
        log = _whole(root, lines)
        for key, value in front.items():
            _add(log.values, key if key not in log.values else f"front matter {key}", value)
        log.text = text
        return [log]
    found = [_Reader(lines).log(section) for section in heads]
    found[0].outside = front | _outside(heads, root, lines)
    return found


def _front_matter(lines: list[str]) -> tuple[dict[str, Any], int]:
    """The mapping between `---` and `---` at the top, and the line after it."""
    end = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0
    try:
        value = yamlio.load("\n".join(lines[1:end])).value
    except yamlio.YamlError:
        return {}, 0
    return ({str(key): its for key, its in value.items()}, end + 1) if isinstance(value, dict) else ({}, 0)


def _is_one(root: Section, heads: list[Section]) -> bool:
    """A hypothesis above all of them: they are the runs of one experiment."""
    inside = {id(section) for head in heads for section in head.all()}
    return any(target(section.title) == "hypothesis" and id(section) not in inside for section in root.all())


def _whole(root: Section, lines: list[str]) -> Log:
    """A file that is one experiment: its only top heading is the title."""
    top = root.children[0] if len(root.children) == 1 and not root.blocks else root
    log = _Reader(lines).log(top)
    log.line = 1
    return log


def _outside(heads: list[Section], root: Section, lines: list[str]) -> dict[str, Any]:
    """What stands before, between and after the experiments, by the first heading in it."""
    starts = {section.start: section.title for section in root.all() if section.level}
    found: dict[str, Any] = {}
    begin = 0
    for head in [*heads, Section("", 0, len(lines), len(lines))]:
        rest = "\n".join(lines[begin : head.start]).strip()
        title = next((starts[line] for line in range(begin, head.start) if line in starts), "before the first heading")
        if rest:
            found[title if title not in found else f"{title} (line {begin + 1})"] = rest
        begin = head.end
    return found


def _sections(lines: list[str]) -> Section:
    root = Section("", 0, 0, len(lines))
    stack = [root]
    for block in Node(MarkdownIt("commonmark").enable("table").parse("\n".join(lines))).children:
        if block.type != "heading":
            stack[-1].blocks.append(block)
            continue
        level, start = int(block.tag[1]), block.map[0] if block.map else 0
        while stack[-1].level >= level:
            stack.pop().end = start
        section = Section(_text(block), level, start, len(lines))
        stack[-1].children.append(section)
        stack.append(section)
    return root


def _name(title: str) -> Name | None:
    title = re.sub(r"^[^\w\[]+", "", title).strip()
    for pattern in (_NUMBERED, _IDENTIFIED):
        if match := pattern.fullmatch(title):
            return Name(match[1], match[2])
    match = _DATED.fullmatch(title)
    return Name(None, match[2], match[1]) if match and as_date(match[1]) else None


def _is_journal(heads: list[Section]) -> bool:
    """Dated headings over what a journal's entries hold."""
    below = {inner("journal", child.title) for head in heads for child in head.children}
    return all(_is_dated(head) for head in heads) and bool(below & (INNER["journal"].keys() - {"date"}))


def _is_dated(section: Section) -> bool:
    name = _name(section.title)
    return name is not None and name.date is not None


class _Reader:
    """Reads a section as a mapping; `sources` collects the text behind each key."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.sources: dict[tuple[str, ...], str] = {}

    def log(self, section: Section) -> Log:
        name = _name(section.title)
        values: dict[str, Any] = {}
        if name and name.date:
            values["date"] = name.date
        if title := (name.title if name else section.title):
            values["title"] = title
        if name and (name.foreign_id or "").lower().startswith("milestone"):
            values["milestone"] = name.foreign_id
        for key, value in self._own(section).items():
            _add(values, key, value)
        for key, value in self._children(section, ()).items():
            _add(values, key, value)
        text = "\n".join(self.lines[section.start : section.end])
        return Log(values, section.start + 1, text, name.foreign_id if name else None, self.sources)

    def _own(self, section: Section) -> dict[str, Any]:
        """What stands right below an experiment's heading: keys and values, tables by their columns, and text."""
        values: dict[str, Any] = {}
        for block in section.blocks:
            value = self._block(block, "", keys_known=True)
            if isinstance(value, dict):
                for key, its_value in value.items():
                    _add(values, key, its_value)
            elif value is not None:
                _add(values, _guess(value), value)
        return values

    def _children(self, section: Section, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        journal = [child for child in section.children if _is_dated(child)]
        if journal and _is_journal(journal):
            values["journal"] = [self._entry(child) for child in journal]
        for child in section.children:
            if "journal" in values and child in journal:
                continue
            here = (*path, child.title)
            self.sources[here] = "\n".join(self.lines[child.start + 1 : child.end]).strip()
            _add(values, child.title, self._content(child, here))
        return values

    def _entry(self, section: Section) -> dict[str, Any]:
        name = _name(section.title)
        entry: dict[str, Any] = {"date": name.date if name else None}
        if name and name.title:
            entry["title"] = name.title
        text = self._blocks(section.blocks, "")
        return entry | ({} if text is None else {"text": text}) | self._children(section, (section.title,))

    def _content(self, section: Section, path: tuple[str, ...]) -> Any:
        key = target(section.title) or ""
        own = self._blocks(section.blocks, key)
        if not section.children:
            return own
        below = self._children(section, path)
        if isinstance(own, dict):
            return own | below
        return below if own is None else {section.title: own} | below

    def _blocks(self, blocks: list[Node], key: str) -> Any:
        """One block is its own value. Several: mappings join; the rest is a list of points."""
        values = [value for block in blocks if (value := self._block(block, key)) is not None]
        if len(values) < 2:
            return values[0] if values else None
        mappings = [value for value in values if isinstance(value, dict)]
        others = [value for value in values if not isinstance(value, dict)]
        points = [point for value in others for point in (value if isinstance(value, list) else [value])]
        if not mappings:
            return points
        joined: dict[str, Any] = {}
        for mapping in mappings:
            for name, value in mapping.items():
                _add(joined, name, value)
        return joined | ({"notes": points} if points else {})

    def _block(self, block: Node, key: str, keys_known: bool = False) -> Any:
        if block.type == "paragraph":
            return _paragraph(_text(block), keys_known or key in MAPPINGS, key in MAPPINGS)
        if block.type in ("bullet_list", "ordered_list"):
            return self._list(block, key)
        if block.type == "table":
            return _table(block, key)
        if block.type == "fence" and block.info.strip().lower() in ("yaml", "yml", "json"):
            try:
                value = yamlio.load(block.content).value
            except yamlio.YamlError:  # not for a machine, then: kept as it stands
                return self._source(block)
            return value
        return None if block.type == "hr" else self._source(block)

    def _source(self, block: Node) -> str:
        start, end = block.map or (0, 0)
        return "\n".join(self.lines[start:end]).strip()

    def _list(self, block: Node, key: str) -> Any:
        items = [self._item(item) for item in block.children]
        pairs = [_pair(item, any_key=key in MAPPINGS) for item in items if isinstance(item, str)]
        if len(pairs) == len(items) and all(pairs):
            values: dict[str, Any] = {}
            for name, value in filter(None, pairs):
                _add(values, name, value)
            return values
        if key == "next_steps":
            return [_step(item) for item in items]
        return [number(item) if isinstance(item, str) and number(item) is not None else item for item in items]

    def _item(self, item: Node) -> Any:
        """Its text; with what is listed or shown below it, a mapping from the text to that."""
        texts = [_text(child) for child in item.children if child.type == "paragraph"]
        below = [self._block(child, "") for child in item.children if child.type != "paragraph"]
        text = "\n\n".join(texts)
        if not below:
            return text
        return {text: below[0] if len(below) == 1 else below} if text else below


def _text(block: Node) -> str:
    """The source of a heading, paragraph or cell, lines joined."""
    inline = next((child for child in block.children if child.type == "inline"), None)
    return inline.content.strip() if inline is not None else ""


def _paragraph(text: str, keys: bool, any_key: bool) -> Any:
    lines = [line.rstrip("\\ ") for line in text.split("\n")]
    pairs = [_pair(line, any_key) for line in lines] if keys else []
    if pairs and all(pairs):
        values: dict[str, Any] = {}
        for name, value in filter(None, pairs):
            _add(values, name, value)
        return values
    return " ".join(line.strip() for line in lines)


def _pair(line: str, any_key: bool) -> tuple[str, Any] | None:
    """`**Key:** value`; `Key: value` where the key is known or any will do."""
    match = _LINE.fullmatch(line)
    if not match:
        return None
    if match["bold"]:
        return match["bold"].strip(), _cell(match["after"])
    known = any_key or target(match["key"]) or plain(match["key"]) == "status"
    return (match["key"].strip(), _cell(match["value"])) if known and not _BOX.match(line) else None


def _step(item: Any) -> Any:
    if isinstance(item, str) and (box := _BOX.match(item)):
        return {"step": item[box.end() :], "done": box[1] != " "}
    if isinstance(item, dict) and len(item) == 1:  # a step with points below it
        (text, below), *_ = item.items()
        step = _step(text)
        return (step if isinstance(step, dict) else {"step": text}) | {"details": below}
    return item


def _cell(text: str) -> Any:
    """A number where it is one; what is set in bold or as code, without the marks around it."""
    text = text.strip()
    if _EMPTY.fullmatch(text):
        return None
    for mark in ("**", "`"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark) and text.count(mark) == 2:
            text = text[len(mark) : -len(mark)].strip()
    found = number(text)
    return text if found is None else found


def _table(block: Node, key: str) -> Any:
    """Rows by column; where our key holds a mapping, by the first column."""
    rows = [[_cell(_text(cell)) for cell in row.children] for part in block.children for row in part.children]
    header, *body = rows
    names = [str(name) if name is not None else "" for name in header]
    columns = [plain(name) for name in names]
    if key in MAPPINGS and len(names) == 2 and columns[0] not in INNER.get(key, {}):
        return {str(row[0]): row[1] for row in body}
    if key in ("epochs.best", "epochs.latest", "confusion_matrix") or (key in MAPPINGS and len(names) > 2):
        return {str(row[0]): dict(zip(names[1:], row[1:], strict=True)) for row in body}
    found = [dict(zip(names, row, strict=True)) for row in body]
    return [_picture(row) for row in found] if key == "plots" or _guess(found) == "plots" else found


def _picture(row: dict[str, Any]) -> dict[str, Any]:
    """A linked file is the file; the link's text is its title."""
    shown = {inner("plots", name): value for name, value in row.items()}
    link = _LINK.fullmatch(str(shown.get("path")))
    return shown | {"path": link[2], "title": link[1]} if link else shown


def _guess(value: Any) -> str:
    """Which of our keys a table or text without a heading of its own belongs to."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        columns = list(value[0])
        if plain(columns[0]) == "epoch":
            return "epochs.history"
        if {"path", "purpose"} <= {inner("plots", name) for name in columns}:
            return "plots"
        if inner("metrics", columns[0]) == "name":
            return "metrics"
        return "table"
    return "description"


def _add(values: dict[str, Any], key: str, value: Any) -> None:
    """Two of the same name: lists and texts join, anything else goes by a name of its own."""
    if key not in values or values[key] is None:
        values[key] = value
    elif isinstance(values[key], list | str):
        before = values[key] if isinstance(values[key], list) else [values[key]]
        values[key] = [*before, *(value if isinstance(value, list) else [value])]
    else:
        number_of = next(n for n in range(2, len(values) + 3) if f"{key} ({n})" not in values)
        values[f"{key} ({number_of})"] = value
