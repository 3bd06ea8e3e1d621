"""One row as it was found, before anything is known of its shape; and why it could not be read, where it could not."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.data.rows import RowFault
from pipeline.progress import say

# Of a text decoded with `surrogateescape`: what is UTF-8 beyond ASCII, and bytes too close for a Western language
_OTHER_ENCODING = re.compile(r"[^\x00-\x7f\udc80-\udcff]|[\udc80-\udcff]{3}")
_SAID: set[str] = set()


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as it was found."""

    line: int  # 1-based: where the row begins; in Parquet and a hub's data sets, which hold no lines, the row's number
    values: dict[str, Any] | None
    fault: RowFault | None = None  # where there are no values
    item: int = 0  # 1-based, which row of the file: where an earlier one begins on its line; 0 where the line tells it


def broken(line: int, rule: str, what: str, remedy: str = "") -> Raw:
    return Raw(line, None, RowFault(rule, what, remedy))


def encoding_fault(text: str) -> RowFault | None:
    """Of text that was decoded with `surrogateescape`, where a byte that is not UTF-8 stands as half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = len(text[: error.start].encode("utf-8", "surrogateescape")) + 1
        return RowFault("encoding", f"is not UTF-8 (byte {place}){and_looks_like(text)}")
    return None


def and_looks_like(text: str) -> str:
    """The encoding that a text which is not UTF-8 may have; "" where that cannot be told. What is UTF-8 elsewhere is damaged."""
    try:
        text.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeError:
        return ""
    return "" if _OTHER_ENCODING.search(text) else " and looks like Windows-1252: save it as UTF-8"


def called(value: Any) -> str:
    """What a value is, as a person who writes JSON calls it: `a list`, `an object`, `null`."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def say_once(about: str, text: str) -> None:
    """A note on what `about`, a path or a data set, holds: a command reads it more than once, and says it once."""
    if about not in _SAID:
        _SAID.add(about)
        say(text)
