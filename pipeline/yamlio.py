"""YAML in and out, safely.

Reading: the safe loader, `2e-4` is a number (YAML 1.2) and a bare commit such as `1234567e8` is not, a doubled key is
an error instead of the last one winning, and aliases, depth and size are bounded before anything is built. Writing:
strings that the reader would take for something else are quoted.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 40
MAX_ALIASES = 10  # so few cannot multiply into anything large

_FLOAT = re.compile(
    r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d{1,3}[eE][-+]?\d{1,3}|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


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
            return super().construct_object(node, deep)
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
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_style(text)),
)


@dataclass(frozen=True)
class Document:
    """The parsed value, and the line of every key: `lines[("sft_config", "lora_rank")] == 12`."""

    value: Any
    lines: dict[tuple[str | int, ...], int]


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
            lines: dict[tuple[str | int, ...], int] = {}
            if node is not None:
                _collect_lines(node, (), lines)
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
    return Document(value, lines)


def _refuse_bombs(text: str) -> None:
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > MAX_DEPTH or aliases > MAX_ALIASES:
            mark = event.start_mark
            raise YamlError("nested too deeply or too many aliases", mark.line + 1 if mark else 1)


def _collect_lines(node: yaml.Node, at: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            path = (*at, key.value)
            lines[path] = key.start_mark.line + 1
            _collect_lines(child, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*at, index)] = child.start_mark.line + 1
            _collect_lines(child, (*at, index), lines)


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)
