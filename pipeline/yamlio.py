"""YAML in and out, safely.

Reading: the safe loader, `2e-4` is a number (YAML 1.2) and a bare commit such as `1234567e8` is not, a doubled key is
an error instead of the last one winning, and aliases, depth and size are bounded before anything is built. Writing:
strings that the reader would take for something else are quoted.
"""

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 40
MAX_BITS = 14_000  # of an integer: Python prints up to 4,300 digits
MAX_NODES = 300_000  # values, aliases counted as what they stand for: about two seconds
MAX_ALIASES = 10

_FLOAT = re.compile(
    r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d{1,3}[eE][-+]?\d{1,3}|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


_BASE_60 = re.compile(r"^[-+]?\d[\d_]*(:\d+)+$")
_BASE_8 = re.compile(r"^[-+]?0[0-7_]+$")
_COMMENT = re.compile(r"^[ \t]+#")
_CLEARLY_MEANT = re.compile(
    r"^([ \t]{2,}|\t)#+([ \t]|$)"
)  # a comment as one writes it: two spaces off, one after the #

KeyPath = tuple[str | int, ...]  # of keys and of places in lists


class YamlError(ValueError):
    """`line` and `column` count from 1."""

    def __init__(self, what: str, line: int, column: int = 1) -> None:
        super().__init__(what)
        self.what, self.line, self.column = what, line, column


class _Loader(yaml.CSafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise YamlError(f"the key `{key.value}` stands twice", key.start_mark.line + 1)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value that its type does not have (`2026-02-30`, `!!bool maybe`) is an error at its place."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise ValueError
            return value
        except (YamlError, yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # pyyaml lets out whatever Python raised while converting
            given = f"`{node.value[:40]}`" if isinstance(node, yaml.ScalarNode) else "this"
            what = f"{given} is no {node.tag.rpartition(':')[2]}"
            raise YamlError(what, node.start_mark.line + 1, node.start_mark.column + 1) from error


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _encodable(text: str) -> str:
    """A lone surrogate, as of a file name that is not UTF-8, is no YAML: it is written out as `\\udcff`."""
    return text.encode(errors="backslashreplace").decode()


def _resolve_floats(cls: Any) -> None:
    cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _style(text: str) -> str | None:
    if any(character in text for character in "\x85\u2028\u2029"):
        return '"'  # line breaks to YAML: any other style would fold them
    return "|" if "\n" in text else None


_resolve_floats(_Loader)
_resolve_floats(_Dumper)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", _encodable(text), style=_style(text)),
)


@dataclass(frozen=True)
class Document:
    """The parsed value, and where every key stands: `lines[("sft_config", "lora_rank")] == 12`, and its column."""

    value: Any
    lines: dict[KeyPath, int]
    columns: dict[KeyPath, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Surprise:
    """A plain scalar that YAML reads otherwise than its writer may have meant. `line` and `column` count from 1."""

    path: KeyPath
    line: int
    column: int
    what: str
    remedy: str


def load(text: str) -> Document:
    """Raises `YamlError` with line and column for anything that is not one plain, bounded YAML document."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES // 2**20} MiB", 1)
    try:
        _refuse_bombs(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
            marks: dict[KeyPath, yaml.Mark] = {}
            if node is not None:
                _collect_marks(node, (), marks)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlError(str(error.problem or error.context), line, column) from None
    except yaml.YAMLError as error:
        raise YamlError(str(error).splitlines()[0], 1) from None
    except RecursionError:
        raise YamlError("an alias refers to what it stands in", 1) from None
    except ValueError as error:
        raise error if isinstance(error, YamlError) else YamlError(str(error), 1) from None
    lines = {path: mark.line + 1 for path, mark in marks.items()}
    return Document(value, lines, {path: mark.column + 1 for path, mark in marks.items()})


def surprises(text: str) -> list[Surprise]:
    """Of a text that `load` accepts: `fix #12`, which ends before the #; `12:30:00` and `0123`, which become numbers."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    lines = text.splitlines()
    found = {} if node is None else {n.start_mark.index: _surprise(path, n, lines) for path, n in _plain(node, ())}
    return [surprise for _, surprise in sorted(found.items()) if surprise]


def _refuse_bombs(text: str) -> None:
    aliases = nodes = 0
    opened: list[tuple[str | None, int]] = []  # collections: their anchor, and the nodes before them
    sizes: dict[str | None, int] = {}  # of what has an anchor, with all that its own aliases stand for
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = nodes - before
        if len(opened) > MAX_DEPTH or aliases > MAX_ALIASES or nodes > MAX_NODES:
            mark = event.start_mark
            raise YamlError("nested too deeply or too many aliases or values", mark.line + 1 if mark else 1)


def _collect_marks(node: yaml.Node, at: KeyPath, marks: dict[KeyPath, yaml.Mark]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            path = (*at, key.value)
            marks[path] = key.start_mark
            _collect_marks(child, path, marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            marks[(*at, index)] = child.start_mark
            _collect_marks(child, (*at, index), marks)


def _plain(node: yaml.Node, at: KeyPath) -> Iterator[tuple[KeyPath, yaml.ScalarNode]]:
    """Every value that is written without quotes."""
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            yield from _plain(child, (*at, key.value if isinstance(key, yaml.ScalarNode) else "?"))
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _plain(child, (*at, index))
    elif isinstance(node, yaml.ScalarNode) and not node.style:
        yield at, node


def _surprise(path: KeyPath, node: yaml.ScalarNode, lines: list[str]) -> Surprise | None:
    kind, value, end = node.tag.rpartition(":")[2], node.value, node.end_mark
    place = (path, node.start_mark.line + 1, node.start_mark.column + 1)
    if kind == "int" and (_BASE_60.match(value) or _BASE_8.match(value)):
        base = "base 60" if ":" in value else "base 8"
        return Surprise(*place, f"`{value}` is read as the number {load(value).value}, in {base}", f'"{value}"')
    rest = lines[end.line][end.column :] if end.line < len(lines) else ""
    if kind not in ("str", "null") or not _COMMENT.match(rest) or _CLEARLY_MEANT.match(rest):
        return None
    if kind == "null" and rest.lstrip().startswith("# "):  # `hypothesis: # what you expect`
        return None
    told = f"`{rest.strip()[:40]}` is a comment to YAML and no part of it"
    return Surprise(*place, told, "quotes around the whole, or two spaces before the # of a comment")


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)
