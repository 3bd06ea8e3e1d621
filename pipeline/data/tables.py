"""Rows of tables: CSV and TSV with a header, and Parquet. An empty cell is a field that is null.

A cell of CSV is text. Where a field wants a list (messages, choices, …) and the cell holds one as JSON, it is read as that.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from pipeline.data.formats import FIELDS
from pipeline.data.json_rows import Decoder
from pipeline.data.raw import Raw, and_looks_like, broken, called, encoding_fault
from pipeline.data.rows import RowFault

CELL = 1 << 27  # characters of the largest cell; csv's own limit is 131,072
BATCH = 256  # rows of Parquet held at a time
_MESSAGES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "history")
_LISTS = ("choices", "key_points", "must_not")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_NAME = 40  # characters of a column's name: a longer one is rather a text


def delimited(text: TextIO, usual: str, note: Callable[[str], None]) -> tuple[Iterable[str], str]:
    """The same lines, and what their cells stand between: the usual, unless the header is one cell that another takes apart."""
    blank = list[str]()
    for line in text:
        if not line.isspace():
            break
        blank.append(line)
    else:
        return blank, usual
    delimiter = usual
    if len(_cells(line, usual)) == 1 and FIELDS.isdisjoint(_cells(line, usual)):
        delimiter = max((usual, *_DELIMITERS), key=lambda other: len(_cells(line, other)))
    if delimiter != usual:
        note(f"its cells stand between {_DELIMITERS[delimiter]}, not {_DELIMITERS[usual]}, and it is read so")
    return chain(blank, [line], text), delimiter


def _cells(line: str, delimiter: str) -> list[str]:
    with suppress(csv.Error):
        return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    return []


def _is_said(name: str) -> bool:
    """Rather a text than a column's name."""
    return len(name) > _NAME or name.endswith((".", "?", "!"))


def csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[Raw]:
    """Each row with the line it begins on. Lines keep their ends (`newline=""`): a cell may hold some."""
    csv.field_size_limit(CELL)  # the module's own setting: there is none for a reader
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                yield broken(line, "broken-file", "is not read from here on: a quote is never closed", "close it")
                return
            yield broken(line, "broken-json", f"is not CSV: {error}", "double each quote that stands in a cell")
        else:
            if cells is None:
                return
            if header:
                raw = _row(line, header, cells)
                if raw:
                    yield raw
            elif any(cells):
                header = [name.strip() or f"column_{number}" for number, name in enumerate(cells, 1)]
                wrong = _header_fault(header)
                if wrong:
                    yield Raw(line, None, wrong)
                    return
        line = reader.line_num + 1


def parquet_rows(path: Path) -> Iterator[tuple[Raw, float]]:
    """Each row with its number, and how much of the file is read then. Raises `OSError`, `pyarrow.ArrowException`."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path, buffer_size=1 << 18, pre_buffer=False) as file:  # else a row group is held whole
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            yield broken(1, "broken-file", f"has the column `{twice}` twice"), 1.0
            return
        number, rows = 0, file.metadata.num_rows
        for batch in file.iter_batches(BATCH):
            for values in _values(batch):
                number += 1
                yield plain_row(number, values), number / rows


def plain_row(number: int, values: dict[str, Any] | RowFault) -> Raw:
    """A row out of Arrow as JSON would have it: null for NaN, no null deeper inside, and texts for dates."""
    if isinstance(values, RowFault):
        return Raw(number, None, values)
    try:
        return Raw(number, {key: None if _null(value) else _plain(value, key) for key, value in values.items()})
    except RowFault as fault:
        return Raw(number, None, fault)


def _row(line: int, header: list[str], cells: list[str]) -> Raw | None:
    if not cells:
        return None  # a blank line
    whole = "".join(cells)
    if encoding_fault(whole):
        return Raw(line, None, RowFault("encoding", f"is not UTF-8{and_looks_like(whole)}"))
    if len(cells) != len(header):
        count = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
        return broken(line, "broken-json", f"has {count}, and the header {len(header)}", "quote the cells")
    values: dict[str, Any] = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    fault = None
    for name in values.keys() & _DECODED:
        values[name], wrong = _decoded(name, values[name] or "")
        fault = fault or wrong
    if values.get("choices") and str(values.get("answer", "")).strip().isdecimal():
        values["answer"] = int(values["answer"])
    return Raw(line, None, fault) if fault else Raw(line, values)


_DECODED = frozenset([*_MESSAGES, *_LISTS])


def _decoded(name: str, cell: str) -> tuple[Any, RowFault | None]:
    """A list where the cell holds the one that the field wants, else the text: a prompt may well begin with a bracket."""
    if cell.lstrip()[:1] not in ("[", "{"):
        return cell or None, None
    decoder = Decoder()
    try:
        value = decoder.decode(cell)
    except (ValueError, RecursionError):
        return cell, None
    inner = value if isinstance(value, list) else [value]
    if name in _MESSAGES and not all(isinstance(item, dict | list) for item in inner):
        return cell, None
    return value, decoder.fault


def _header_fault(header: list[str]) -> RowFault | None:
    whole = "".join(header)
    if encoding_fault(whole):
        what = f"is not read: its header is not UTF-8{and_looks_like(whole)}"
        return RowFault("broken-file", what, "save the file as UTF-8")
    if FIELDS.isdisjoint(map(str.lower, header)) and (said := next(filter(_is_said, header), "")):
        what = f"is not read: has no header row? Its first row says `{said[:_NAME]}{'…' * (len(said) > _NAME)}`"
        return RowFault("broken-file", what, "write the names of the fields above it, such as prompt and completion")
    twice = next((name for name in header if header.count(name) > 1), None)
    return RowFault("broken-file", f"is not read: it has the column `{twice}` twice") if twice else None


def _values(batch: Any) -> Iterator[dict[str, Any] | RowFault]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                yield RowFault("encoding", "is not UTF-8")


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN for none


def _plain(value: Any, name: str) -> Any:
    """Raises `RowFault` for what is no text, number or list of them."""
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise RowFault("wrong-type", f"{name}: is infinite")
        return value
    if isinstance(value, dict):
        return {key: _plain(inner, f"{name}.{key}") for key, inner in value.items() if not _null(inner)}
    if isinstance(value, list | tuple):
        return [None if _null(inner) else _plain(inner, name) for inner in value]
    if isinstance(value, datetime) and value.time() == time() and value.tzinfo is None:
        return value.date().isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise RowFault("wrong-type", f"{name}: is {called(value)}, not text", "drop the column, or make it text")
