"""Rows of tables: CSV and TSV with a header, and Parquet. An empty cell is a field that the row does not have.

A cell of CSV is text. Where a field wants a list (messages, choices, …) and the cell holds one as JSON, it is read as that.
"""

import csv
import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from pipeline.data.json_rows import Decoder
from pipeline.data.raw import Raw, broken, encoding_fault
from pipeline.data.rows import RowFault

CELL = 1 << 27  # characters of the largest cell; csv's own limit is 131,072
BATCH = 256  # rows of Parquet held at a time
_MESSAGES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "history")
_LISTS = ("choices", "key_points", "must_not")


def csv_rows(text: TextIO, delimiter: str) -> Iterator[Raw]:
    """Each row with the line it begins on. `text` keeps its line ends (`newline=""`): a cell may hold some."""
    csv.field_size_limit(CELL)  # the module's own setting: there is none for a reader
    reader = csv.reader(text, delimiter=delimiter, strict=True)
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
    """A row out of Arrow as JSON would have it: nothing that is null, and texts for dates."""
    if isinstance(values, RowFault):
        return Raw(number, None, values)
    try:
        return Raw(number, {key: _plain(value, key) for key, value in values.items() if not _null(value)})
    except RowFault as fault:
        return Raw(number, None, fault)


def _row(line: int, header: list[str], cells: list[str]) -> Raw | None:
    if not cells:
        return None  # a blank line
    wrong = encoding_fault("".join(cells))
    if wrong:
        return Raw(line, None, RowFault("encoding", "is not UTF-8"))
    if len(cells) != len(header):
        return broken(line, "broken-json", f"has {len(cells)} cells, and the header {len(header)}", "quote the cells")
    values: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    fault = None
    for name in values.keys() & _DECODED:
        values[name], wrong = _decoded(name, values[name])
        fault = fault or wrong
    if "choices" in values and str(values.get("answer", "")).strip().isdecimal():
        values["answer"] = int(values["answer"])
    return Raw(line, None, fault) if fault else Raw(line, values)


_DECODED = frozenset([*_MESSAGES, *_LISTS])


def _decoded(name: str, cell: str) -> tuple[Any, RowFault | None]:
    """A list where the cell holds the one that the field wants, else the text: a prompt may well begin with a bracket."""
    if cell.lstrip()[:1] not in ("[", "{"):
        return cell, None
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
    if encoding_fault("".join(header)):
        return RowFault("broken-file", "is not read: its header is not UTF-8", "save the file as UTF-8")
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
    raise RowFault("wrong-type", f"{name}: is a {type(value).__name__}, not text", "drop the column, or make it text")
