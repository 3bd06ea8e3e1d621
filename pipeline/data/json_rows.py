"""Rows of JSON: one a line (JSONL), or a document that holds a list of them. Both are read a piece at a time.

JSON's silent readings are faults here: a key that stands twice in an object (Python keeps the last), and NaN and
Infinity, which are no JSON.

Text comes decoded with `surrogateescape`, so that a byte that is not UTF-8 costs its own row alone.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, TextIO

from pipeline.data.formats import FIELDS
from pipeline.data.raw import Raw, broken, called, encoding_fault
from pipeline.data.rows import RowFault

CHUNK = 1 << 16  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_CUT = 12  # characters before the end of a piece in which a literal, an escape or a number may be cut
LONGEST = 128_000_000  # characters of a row
_AHEAD = 200  # lines that are read to tell a document from rows


class Decoder:
    """Python's, and what that passes over in silence: `fault` is what is wrong with the value decoded last."""

    def __init__(self) -> None:
        self.fault: RowFault | None = None
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str) -> Any:
        """The one value of a text. Raises `ValueError`, `RecursionError`."""
        self.fault = None
        return self._json.decode(text)

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins there, and where it ends. Raises as `decode`."""
        self.fault = None
        return self._json.raw_decode(text, start)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._found(f"has the key `{twice}` twice")
        return values

    def _constant(self, name: str) -> float:
        self._found(f"is not JSON: it holds {name}")
        return math.nan

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._found(f"holds a number that is too large: {digits[:40]}")
        return value

    def _found(self, what: str) -> None:
        self.fault = self.fault or RowFault("broken-json", what)


def json_lines(text: TextIO) -> Iterator[Raw]:
    """One object a line; blank lines are passed over. A JSON document is one fault, not a fault a line."""
    decoder = Decoder()
    blank = list[str]()
    lines = _bounded(text)
    for line in lines:
        if not line.isspace():
            break
        blank.append(line)
    else:
        return
    ahead = [line] if _is_object(line, decoder) else [line, *islice(lines, _AHEAD)]
    what = _is_document(ahead, decoder) if len(ahead) > 1 or line.lstrip()[:1] == "[" else ""
    if what:
        yield broken(len(blank) + 1, "broken-file", f"{what}, not an object a line", "name it .json")
        return
    yield from _json_lines(chain(blank, ahead, lines), decoder)


def _bounded(text: TextIO) -> Iterator[str]:
    """Lines, of one that is too long its beginning: a small compressed file may hold one of many GB."""
    while line := text.readline(LONGEST):
        yield line
        while len(line) >= LONGEST and line[-1] != "\n":
            line = text.readline(LONGEST)
            if len(line) < LONGEST:
                break


def _is_object(line: str, decoder: Decoder) -> bool:
    try:
        return isinstance(decoder.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_document(ahead: list[str], decoder: Decoder) -> str:
    """What a file is that begins with these lines, where it is no JSONL; "" where it is, whatever is wrong with it."""
    text = "".join(ahead).strip()
    array = re.match(r"\[\s*\{", text)
    if not array and text[:1] != "{":
        return ""
    try:
        _, end = decoder.decode_at(text, 0)
    except json.JSONDecodeError as error:
        if error.pos < len(text):  # else it goes on
            return ""
        end = len(text)
    except (ValueError, RecursionError):
        return ""
    if end <= len(ahead[0].strip()) and not (array and end == len(text)):
        return ""
    return "is one JSON array" if array else "holds objects of several lines each"


def _json_lines(lines: Iterable[str], decoder: Decoder) -> Iterator[Raw]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        if len(line) >= LONGEST:
            yield broken(number, "broken-json", f"is a line of more than {LONGEST / 1e6:,.0f} million characters")
            continue
        fault = encoding_fault(line)
        if fault:
            yield Raw(number, None, fault)
            continue
        try:
            values = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            yield broken(number, "broken-json", f"is {_said(error)}")
            continue
        yield _row(number, values, decoder.fault)


def json_document(text: TextIO) -> Iterator[Raw]:
    """A list of objects, an object that holds one such list under some name (`{"data": [...]}`), or objects one after another.

    What follows a syntax error cannot be told apart into rows, so such an error ends the file.
    """
    document = _Document(text)
    try:
        yield from _document(document)
    except (ValueError, RecursionError) as error:
        remedy = error.remedy if isinstance(error, _Unreadable) else ""
        yield broken(document.line, "broken-file", f"cannot be read from here on: {_said(error)}", remedy)


class _Unreadable(ValueError):
    """Why a document cannot be read any further."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


class _Document:
    """A text of which only the part around the place that is read is held."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._decoder = text, Decoder()
        self._held, self._at, self._ended = "", 0, False
        self._line, self._counted = 1, 0  # the line at the place in `_held` up to which line ends were counted

    @property
    def line(self) -> int:
        """Of the place that is read."""
        self._line += self._held.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """The next character that is not white space, which stays; "" at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more(CHUNK):
                return ""

    def is_list_of_objects(self) -> bool:
        """Whether what comes next is a list whose first is an object."""
        if self.peek() != "[":
            return False
        while True:
            inside = _SPACE.match(self._held, self._at + 1).end()  # type: ignore[union-attr]
            if inside < len(self._held) or not self._more(CHUNK):
                return self._held[inside : inside + 1] == "{"

    def take(self, wanted: str) -> None:
        """Goes past one character. Raises `ValueError` when it is another."""
        found = self.peek()
        if found != wanted:
            raise ValueError(
                f"`{wanted}` expected, and {f'`{found}`' if found else 'the end'} found (line {self.line})"
            )
        self._at += 1

    def value(self) -> tuple[Any, RowFault | None]:
        """The next value whole, and what is wrong with it. Raises `ValueError`, `RecursionError`."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.decode_at(self._held, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._held) - _CUT or error.msg.startswith("Unterminated string")
                if not cut or not self._more(max(CHUNK, len(self._held) - self._at)):  # twice as much: linear in all
                    line = self.line + self._held.count("\n", self._at, error.pos)
                    raise _Unreadable(f"not JSON: {error.msg} (line {line})") from None
                continue
            if end == len(self._held) and self._more(CHUNK):
                continue  # a number may go on
            fault = encoding_fault(self._held[self._at : end]) or self._decoder.fault
            self._at = end
            return value, fault

    def _more(self, characters: int) -> bool:
        if self._ended:
            return False
        _ = self.line
        more = self._text.read(characters)
        self._held, self._at, self._counted = self._held[self._at :] + more, 0, 0
        self._ended = not more
        return bool(more)


def _document(document: _Document) -> Iterator[Raw]:
    first = document.peek()
    if first == "[":
        yield from _list(document)
    elif first == "{":
        yield from _object(document)
    while document.peek():
        if first == "[":
            raise _Unreadable(f"more stands after the list of rows (line {document.line})")
        yield _next(document)


def _list(document: _Document) -> Iterator[Raw]:
    document.take("[")
    while document.peek() != "]":
        yield _next(document)
        if document.peek() != "]":
            document.take(",")
    document.take("]")


def _object(document: _Document) -> Iterator[Raw]:
    """The first object: a row, or what the rows are in, under a name that is no field of a known format."""
    line, values, fault, rows_in = document.line, dict[str, Any](), None, ""
    document.take("{")
    while document.peek() != "}":
        key, wrong = document.value()
        if not isinstance(key, str):
            raise _Unreadable(f"not JSON: a name in double quotes expected, and {key} found (line {document.line})")
        fault = fault or wrong
        if key in values or key == rows_in:
            fault = fault or RowFault("broken-json", f"has the key `{key}` twice")
        document.take(":")
        if FIELDS.isdisjoint([key, *values]) and document.is_list_of_objects():
            if rows_in:
                what = f"it holds two lists of rows, `{rows_in}` and `{key}`, of which the first was read"
                raise _Unreadable(what, "write each list to a file of its own")
            rows_in = key
            yield from _list(document)
        else:
            values[key], wrong = document.value()
            fault = fault or wrong
        if document.peek() != "}":
            document.take(",")
    document.take("}")
    fields = sorted(FIELDS.intersection(values))
    if rows_in and fields:
        what = f"holds a list of objects, `{rows_in}`, beside fields of a row: {', '.join(fields)}"
        yield broken(line, "wrong-type", what, "a list of rows, or a row a line in a .jsonl file")
    elif fault:
        yield Raw(line, None, fault)
    elif not rows_in:
        yield Raw(line, values)


def _next(document: _Document) -> Raw:
    document.peek()
    line = document.line
    return _row(line, *document.value())


def _row(line: int, values: Any, fault: RowFault | None) -> Raw:
    if fault:
        return Raw(line, None, fault)
    if not isinstance(values, dict):
        return broken(line, "wrong-type", f"is {called(values)}, not an object")
    return Raw(line, values)


def _said(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        if error.pos >= len(error.doc.rstrip()):
            return f"not JSON: it breaks off after column {len(error.doc.rstrip())}"
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, _Unreadable):
        return str(error)
    return f"not JSON: {error}"
