"""One row as it was found, before anything is known of its shape; and why it could not be read, where it could not."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.data.rows import RowFault
from pipeline.progress import say


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as it was found."""

    line: int  # 1-based: where the row begins; in Parquet and a hub's data sets, which hold no lines, the row's number
    values: dict[str, Any] | None
    fault: RowFault | None = None  # where there are no values


def broken(line: int, rule: str, what: str, remedy: str = "") -> Raw:
    return Raw(line, None, RowFault(rule, what, remedy))


def encoding_fault(text: str) -> RowFault | None:
    """Of text that was decoded with `surrogateescape`, where a byte that is not UTF-8 stands as half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = len(text[: error.start].encode("utf-8", "surrogateescape")) + 1
        return RowFault("encoding", f"is not UTF-8 (byte {place})")
    return None


@cache
def say_once(about: str, text: str) -> None:
    """A note on what a path or a data set holds: a command reads it more than once, and the person needs to hear it once."""
    say(f"{about}: {text}")
