"""Markdown from records: templates, and what a value must go through so that it stays text wherever it is pasted."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.records.file import write_atomically
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

MAX_CELL = 80  # characters
_SPECIAL = re.compile(r"([\\`*\[\]|~])|(?<![^\W_])(_)|(_)(?![^\W_])|(<)|(&)(?=#|\w+;)|([\r\n\x85\u2028\u2029]+\s*)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def render(template: str, **values: Any) -> str:
    """A template of this folder; the values go in through the filters `plain`, `quoted` and `outline`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "quoted": quoted, "outline": outline}
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plain(value: Any) -> str:
    """A value within a line or a table's cell, as it reads: no pipe, tag or star of it is markup, no line break ends it."""

    def escape(match: re.Match[str]) -> str:
        special = match[0]
        if special == "<":
            return "&lt;"
        if special == "&":
            return "&amp;"
        return f"\\{special}" if special.strip() else " "

    return _SPECIAL.sub(escape, "" if value is None else str(value).strip())


def prose(text: str) -> str:
    """What a person wrote, its Markdown left to work; HTML in it shows as it reads instead of taking over the page."""
    return _TAG.sub("&lt;", text) if _holds_html(text) else text


def quoted(text: str) -> str:
    """A person's words as a quotation: nothing that they open (a fence, a list, a comment) reaches beyond it."""
    return "\n".join(f"> {line}".rstrip() for line in prose(text).splitlines())


def outline(value: Any) -> str:
    """Any value that a YAML file can hold, whole: a text as a quotation, rows as a table, the rest as nested bullets."""
    if isinstance(value, list) and len(value) > 1 and all(_is_row(entry) for entry in value):
        return "\n".join(_table(value))
    if isinstance(value, dict | list):
        return "\n".join(_bullets(value, ""))
    return quoted(str(value)) if isinstance(value, str) else plain(value)


def label(key: Any) -> str:
    """`did_not_work` → `Did not work`; a dotted path stays as it is."""
    if "." in str(key):
        return plain(key)
    words = plain(str(key).replace("_", " "))
    return words[:1].upper() + words[1:]


def write_page(workspace: Workspace, path: Path, text: str, force: bool, facts: Facts | None) -> str:
    """Returns the path as shown. Raises `UserError` where it is there already, or is a file whose hash a record keeps."""
    shown = workspace.shown(path)
    kept = {workspace.path(artifact.path).resolve() for artifact in facts.artifacts} if facts else set()
    if path.resolve() in kept:
        raise UserError(
            "is an artifact of the record, whose hash would no longer be true", where=shown, remedy="--output elsewhere"
        )
    if path.resolve().parent == workspace.experiments.resolve() and path.suffix in (".yaml", ".yml"):
        raise UserError("is a record's place", where=shown, remedy="--output elsewhere")
    if path.exists() and not force:
        raise UserError("is there already", where=shown, remedy="--force, or --output elsewhere")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=shown) from None
    return shown


def place(output: Path | None, default: Path, name: str) -> Path:
    """Where a page goes: `output` is a folder where it has no suffix or is one already."""
    if output is None:
        return default
    output = output.expanduser().absolute()
    return output / name if output.is_dir() or not output.suffix else output


def _is_row(value: Any) -> bool:
    """A mapping whose values each fit into a cell."""
    if not isinstance(value, dict) or not value:
        return False
    return all(not isinstance(cell, dict | list) and len(str(cell)) <= MAX_CELL for cell in value.values())


def _table(rows: list[dict[Any, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield f"| {' | '.join(map(label, columns))} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(plain(row.get(column)) for column in columns)} |"


def _bullets(value: Any, indent: str) -> Iterator[str]:
    pairs = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
    for number, (key, child) in enumerate(pairs, 1):
        name = "" if key is None else f"**{label(key)}:** "
        if isinstance(child, dict | list) and child:
            yield f"{indent}- {name or f'**{number}.**'}".rstrip()
            yield from _bullets(child, f"{indent}  ")
            continue
        text = str(child).strip()
        if "\n" in text:
            yield f"{indent}- {name or f'**{number}.**'}".rstrip()
            yield from (f"{indent}  {line}" for line in quoted(text).splitlines())
        else:
            shown = "none" if child in (None, [], {}) else prose(text) if isinstance(child, str) else plain(text)
            yield f"{indent}- {name}{shown}".rstrip()


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark")


def _holds_html(text: str) -> bool:
    tokens = _parser().parse(text)
    return any(t.type == "html_block" or any(c.type == "html_inline" for c in t.children or ()) for t in tokens)
