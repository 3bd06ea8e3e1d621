"""What the commands that read records share: a record read as far as it can be, and its values as short text."""

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from aletheia.output import print_table
from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.records import find
from pipeline.records.file import Reading, RecordFile
from pipeline.records.metrics import Metric
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

_DIGEST = re.compile(r"^[0-9a-f]{40}$|^[0-9a-f]{64}$")


WIDTH = 100  # of running text
SHORT = 90  # of one value among many


def read(workspace: Workspace, name: str) -> tuple[RecordFile, Reading]:
    """A record as far as it can be read. Raises `UserError` where there is no such record, or nothing in it to show."""
    file = find.named(workspace, name)
    reading = file.read()
    mistake = reading.damage or reading.mistake
    if mistake and not reading.facts and not reading.person:
        raise mistake
    return file, reading


def read_facts(workspace: Workspace, name: str) -> tuple[RecordFile, Facts]:
    """Of a record that has run. Raises `UserError` for a plan, and for one that cannot be read."""
    file = find.named(workspace, name)
    facts = file.facts()
    if facts is None:
        raise UserError(
            "is a plan: nothing has run", where=workspace.shown(file.path), remedy=f"make run EXP={file.id}"
        )
    return file, facts


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their dotted path; a list is a leaf."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(value: float, sign: str = "") -> str:
    """Four digits; whole numbers whole."""
    if abs(value) < 1e15 and (value == int(value) or abs(value) >= 1e4):
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.4g}"


def interval(metric: Metric, sign: str = "") -> str:
    if metric.ci_low is None or metric.ci_high is None:
        return ""
    return f"[{number(metric.ci_low, sign)}, {number(metric.ci_high, sign)}]"


def figure(metric: Metric) -> str:
    """`5.434 [5.345, 5.523] n=25`."""
    n = "" if metric.n is None else f"n={metric.n}"
    return " ".join(filter(None, (number(metric.value), interval(metric), n)))


def brief(value: Any) -> str:
    """A value in a line: hashes by their first digits, mappings and long lists by their size."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return f"{len(value)} keys" if value else "–"
    if isinstance(value, list):
        short = len(value) <= 6 and all(isinstance(v, str | int | float) for v in value)
        return (", ".join(map(brief, value)) or "–") if short else f"{len(value)} entries"
    text = str(value)
    return text[:12] if _DIGEST.match(text) else text


def short(value: Any) -> str:
    """`brief`, and no longer than a line; what was cut off ends in `…`."""
    text = " ".join(brief(value).split())
    return text if len(text) <= SHORT else f"{text[: SHORT - 1]}…"


def wrapped(value: Any) -> list[str]:
    """What a person wrote, wrapped; lists and mappings as YAML; no lines for nothing."""
    if value in (None, "", [], {}):
        return []
    text = yamlio.dump(value) if isinstance(value, dict | list) else str(value)
    return [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""]]


def short_hash(digest: Any) -> str:
    return digest[:12] if isinstance(digest, str) else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """An aligned table as lines, to stand inside a page; empty columns are left out, and a header without words."""
    filled = [i for i in range(len(header)) if any(row[i] != "" for row in rows)]
    if not filled:
        return []
    body = [[row[i] for i in filled] for row in rows]
    if any(header):
        body.insert(0, [header[i] for i in filled])
    out = io.StringIO()
    print_table(body[0], body[1:], out)
    return out.getvalue().splitlines()


def plain(value: Any) -> Any:
    """As JSON can hold it: keys are text, what is not finite is null, and a lone surrogate is a question mark."""
    if isinstance(value, dict):
        return {plain(str(key)): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
