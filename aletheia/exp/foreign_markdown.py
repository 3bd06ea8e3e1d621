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
from markdown_it.rules_block.table import escapedSplit
from markdown_it.tree import SyntaxTreeNode as Node

from aletheia.exp.foreign import GROUPS, INNER, Log, as_date, inner, number, plain, target
from aletheia.exp.foreign_yaml import load
from pipeline import yamlio

MAPPINGS = {"hyperparameters", "set_up", "splits", "search", "tracking", "code_version", "compute", "deployment"}
FIGURES = {"metrics", "epochs.best", "epochs.latest", "epochs.history", "per_group", "baselines"}
TOLD = {"conclusion", "observations", "analysis", "insights", "issues", "learnings", "next_steps"}  # beside figures
_NUMBERED = re.compile(r"((?:experiment|exp|run|trial|milestone)\s*#?\s*\d[\w.]*)\s*[:.–—-]*\s*(.*)", re.IGNORECASE)
_IDENTIFIED = re.compile(r"(EXP-[\w-]*\w|\d{8}_\d{6}(?:_\w+)?)\b\s*[:–—-]*\s*(.*)")
_DAY = r"(\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4})"
_DATED = re.compile(rf"{_DAY}\b\s*[:–—-]*\s*(.*)")
_DATE_IN = re.compile(rf"[(\[]\s*{_DAY}\s*[)\]]|[,:|–—-]\s+{_DAY}$")
_LINE = re.compile(
    r"(?:\*\*|__)(?P<bold>[^*_:]{1,60}?)\s*(?::(?:\*\*|__)|(?:\*\*|__)\s*:)\s*(?P<after>.*)|(?P<key>[^:*]{1,60}?):\s+(?P<value>.*)"
)
_PLAIN = re.compile(r"(?P<key>\w[\w/().%-]*(?: [\w/().%-]+){0,3})\s*(?::\s|\s=\s|=(?!=))\s*(?P<value>.*)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^()\s]+)(?:\s+\"([^\"]*)\")?\)\s*(.*)")
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
    found[0].outside |= front | _outside(heads, root, lines)
    return found


def _front_matter(lines: list[str]) -> tuple[dict[str, Any], int]:
    """The mapping between `---` and `---` at the top, and the line after it."""
    end = lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0
    try:
        value = load("\n".join(lines[1:end])).value
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


def _date_in(title: str) -> str | None:
    match = _DATE_IN.search(title)
    day = (match[1] or match[2]) if match else None
    return day if day and as_date(day) else None


def _is_journal(heads: list[Section]) -> bool:
    """Dated headings over what a journal's entries hold."""
    below = {inner("journal", child.title) for head in heads for child in head.children}
    return all(_is_dated(head) for head in heads) and bool(below & (INNER["journal"].keys() - {"date"}))


def _is_dated(section: Section) -> bool:
    name = _name(section.title)
    return name is not None and name.date is not None


class _Reader:
    """Reads a section as a mapping; `sources` collects the text behind each key.

    `elsewhere` is what stands under one of our keys and belongs to another, `outside` what could not be read.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.sources: dict[tuple[str, ...], str] = {}
        self.elsewhere: dict[str, Any] = {}
        self.outside: dict[str, Any] = {}

    def log(self, section: Section) -> Log:
        name = _name(section.title)
        values: dict[str, Any] = {}
        if title := (name.title if name else section.title):
            values["title"] = title
        if name and (name.foreign_id or "").lower().startswith("milestone"):
            values["milestone"] = name.foreign_id
        for key, value in self._own(section).items():
            _add(values, key, value)
        for key, value in self._children(section, ()).items():
            _add(values, key, value)
        for key, value in self.elsewhere.items():
            _add(values, key, value)
        if day := (name and name.date) or _date_in(section.title):
            values["heading date" if "date" in values else "date"] = day
        text = "\n".join(self.lines[section.start : section.end])
        return Log(values, section.start + 1, text, name.foreign_id if name else None, self.sources, self.outside)

    def _own(self, section: Section) -> dict[str, Any]:
        """What stands right below an experiment's heading: keys and values, tables by their columns, and text."""
        values: dict[str, Any] = {}
        for block in section.blocks:
            value = self._block(block, "", own=True)
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
        if text is not None:
            entry["text"] = text
        return _both(entry, self._children(section, (section.title,)))

    def _content(self, section: Section, path: tuple[str, ...]) -> Any:
        near = next((ours for title in reversed(path) if (ours := target(title) or GROUPS.get(plain(title)))), "")
        key = target(section.title) or (near if near in FIGURES else "")
        own = self._blocks(section.blocks, key)
        if not section.children:
            return own
        below = self._children(section, path)
        if isinstance(own, dict):
            return _both(own, below)
        return below if own is None else _both({section.title: own}, below)

    def _blocks(self, blocks: list[Node], key: str) -> Any:
        """One block is its own value. Several: mappings join; the rest is a list of points."""
        values = [value for block in blocks if (value := self._block(block, key)) is not None]
        if len(values) < 2:
            return values[0] if values else None
        mappings = [value for value in values if isinstance(value, dict)]
        others = [value for value in values if not isinstance(value, dict)]
        if key in FIGURES and any(isinstance(value, list) and isinstance(value[0], dict) for value in others if value):
            others += [[{"name": name, "value": its} for name, its in mapping.items()] for mapping in mappings]
            mappings = []
        points = [point for value in others for point in (value if isinstance(value, list) else [value])]
        if not mappings:
            return points
        joined: dict[str, Any] = {}
        for mapping in mappings:
            joined = _both(joined, mapping)
        return _both(joined, {"notes": points} if points else {})

    def _block(self, block: Node, key: str, own: bool = False) -> Any:
        mixed = own or key in FIGURES  # things that belong to other keys stand there too
        if block.type == "paragraph":
            text = self._left(_text(block)) if mixed else _text(block)
            return _paragraph(text, "description" if own else "notes", key in MAPPINGS, mixed) if text else None
        if block.type in ("bullet_list", "ordered_list"):
            return self._list(block, key, mixed)
        if block.type == "table":
            self._keep_surplus(block)
            return _table(block, key)
        if block.type == "fence" and (language := block.info.strip().lower()) in ("yaml", "yml", "json"):
            try:
                return load(block.content).value
            except yamlio.YamlError as error:
                line = (block.map[0] if block.map else 0) + 1
                self.outside[f"{language} block at line {line} ({error.what})"] = self._source(block)
                return None
        return None if block.type == "hr" else self._source(block)

    def _source(self, block: Node) -> str:
        start, end = block.map or (0, 0)
        return "\n".join(self.lines[start:end]).strip()

    def _keep_surplus(self, table: Node) -> None:
        """Cells beyond the last column: the parser leaves them out."""
        for row in (row for part in table.children for row in part.children):
            number_of = row.map[0] if row.map else 0
            line = self.lines[number_of].strip()
            cells = [cell.strip() for cell in escapedSplit(line.removeprefix("|"))]
            cells = cells[:-1] if cells and not cells[-1] else cells
            if any(surplus := cells[len(row.children) :]):
                self.outside[f"cells beyond the columns at line {number_of + 1}"] = [_cell(cell) for cell in surplus]

    def _left(self, text: str) -> str:
        """The text without what belongs elsewhere: an image, an open box, `Conclusion: …` and what follows on it."""
        groups: list[list[str]] = [[]]
        for line in text.split("\n"):
            for part in re.split(r"(?=!\[)", line) if line.startswith("![") else [line]:
                if _elsewhere(part.strip()) or _pair(part, False) or _PLAIN.fullmatch(part):
                    groups.append([])
                groups[-1] += [part] if part.strip() else []
        left = [group for group in groups if group and not self._move(" ".join(part.strip() for part in group))]
        return "\n".join(line for group in left for line in group)

    def _move(self, item: Any) -> bool:
        found = _elsewhere(item)
        if found:
            _add(self.elsewhere, *found)
        return found is not None

    def _list(self, block: Node, key: str, mixed: bool) -> Any:
        items = [self._item(item) for item in block.children]
        items = [item for item in items if not (mixed and self._move(item))]
        if not items:
            return None
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
        shown = [self._block(child, "") for child in item.children if child.type != "paragraph"]
        below = [value for value in shown if value is not None]
        text = "\n\n".join(texts)
        if not below:
            return text
        return {text: below[0] if len(below) == 1 else below} if text else below


def _text(block: Node) -> str:
    """The source of a heading, paragraph or cell, lines joined."""
    inline = next((child for child in block.children if child.type == "inline"), None)
    return inline.content.strip() if inline is not None else ""


def _paragraph(text: str, rest: str, any_key: bool, mixed: bool) -> Any:
    """Keys and values where they stand line by line, and by the name `rest` the text between; or one text.

    A line on its own needs a key that is known, and to be the first; a line that follows on a text belongs to it.
    """
    lines = [line.rstrip("\\ ").strip() for line in text.split("\n")]
    shaped = [_PLAIN.fullmatch(line) is not None for line in lines]
    if not mixed and not any_key:
        return ("\n" if len(lines) > 1 and all(shaped) else " ").join(lines)
    values: dict[str, Any] = {}
    texts: list[str] = []
    last = None  # the key that the next line may follow on
    for number_of, line in enumerate(lines):
        bold = line.startswith(("**", "__"))
        beside = any(shaped[max(number_of - 1, 0) : number_of]) or any(shaped[number_of + 1 : number_of + 2])
        pair = _pair(line, any_key) if bold or any_key or last is not None or number_of == 0 else None
        if pair is None and shaped[number_of] and beside:
            pair = _plain_pair(line)
        if pair:
            last = pair[0] if pair[0] not in values else None
            _add(values, *pair)
        elif last is not None and isinstance(values[last], str):
            values[last] += f" {line}"
        else:
            texts.append(line)
    if not values:
        return " ".join(lines)
    return _both(values, {rest: " ".join(texts)} if texts else {})


def _plain_pair(line: str) -> tuple[str, Any] | None:
    match = _PLAIN.fullmatch(line)
    return (match["key"].strip(), _cell(match["value"])) if match and not _BOX.match(line) else None


def _elsewhere(item: Any) -> tuple[str, Any] | None:
    """The key of ours that a line or list item beside figures belongs to, and its value there."""
    text = next(iter(item)) if isinstance(item, dict) and len(item) == 1 else item
    if not isinstance(text, str):
        return None
    if (box := _BOX.match(text)) and box[1] == " ":
        return "next_steps", [_step(item)]
    if isinstance(item, dict):
        return None
    if image := _IMAGE.fullmatch(text):
        shown = {"path": image[2], "title": image[1], "purpose": " ".join(filter(None, (image[3], image[4])))}
        return "plots", [{key: value for key, value in shown.items() if value}]
    pair = _pair(text, False)
    if not pair or (key := target(pair[0])) not in TOLD:
        return None
    return ("next_steps", [_step(pair[1])]) if key == "next_steps" else pair


def _pair(line: str, any_key: bool) -> tuple[str, Any] | None:
    """`**Key:** value`; `Key: value` where the key is known or any will do."""
    match = _LINE.fullmatch(line)
    if not match:
        known = _plain_pair(line)
        return known if known and (any_key or target(known[0])) else None
    if match["bold"]:
        return match["bold"].strip(), _cell(match["after"])
    is_known = any_key or target(match["key"]) or plain(match["key"]) == "status"
    return (match["key"].strip(), _cell(match["value"])) if is_known and not _BOX.match(line) else None


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
    names = _distinct([str(name) if name is not None else "" for name in header])
    first = _distinct([str(row[0]) for row in body])
    columns = [plain(name) for name in names]
    if key in MAPPINGS and len(names) == 2 and columns[0] not in INNER.get(key, {}):
        return {name: row[1] for name, row in zip(first, body, strict=True)}
    if key in ("epochs.best", "epochs.latest", "confusion_matrix") or (key in MAPPINGS and len(names) > 2):
        return {name: dict(zip(names[1:], row[1:], strict=True)) for name, row in zip(first, body, strict=True)}
    found = [dict(zip(names, row, strict=True)) for row in body]
    return [_picture(row) for row in found] if key == "plots" or _guess(found) == "plots" else found


def _distinct(names: list[str]) -> list[str]:
    """Two of the same name would be one in a mapping."""
    found: dict[str, None] = {}
    for name in names:
        count = next(
            n for n in range(1, len(names) + len(found) + 2) if (name if n == 1 else f"{name} ({n})") not in found
        )
        found[name if count == 1 else f"{name} ({count})"] = None
    return list(found)


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


def _both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    joined = dict(first)
    for key, value in second.items():
        _add(joined, key, value)
    return joined


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
