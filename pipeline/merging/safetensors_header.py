"""A safetensors file's header: what the file says it holds, believed only where it adds up.

A length of 8 bytes, JSON of that length, then the tensors, end to end (github.com/huggingface/safetensors, its format).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
LONGEST = 100_000_000  # bytes of a header that safetensors reads
AGAIN = "fetching it again"


class Entry(NamedTuple):
    """A tensor: its bytes lie from `start` to `end` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def entries(file: Path) -> Iterator[Entry]:
    """Every tensor, in the order of their bytes. Raises `UserError` for what safetensors would not read."""
    with file.open("rb") as opened:
        begin = 8 + (length := int.from_bytes(opened.read(8), "little"))
        if begin > (whole := file.stat().st_size) or length > LONGEST:
            raise cut_off(file)
        try:
            found = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            raise cut_off(file) from None
    if not isinstance(found, dict) or not texts(found.pop("__metadata__", None) or {}):
        raise cut_off(file)
    for name, entry in found.items():
        if fault := _fault(entry):
            raise UserError(f"its tensor {name!r} {fault}", where=str(file), remedy=AGAIN)
    at = begin
    for name, entry in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = (begin + offset for offset in entry["data_offsets"])
        if end > whole:
            raise cut_off(file)
        if start != at:
            how = f"{abs(start - at)} bytes {'before' if start < at else 'after'} the end of the one before it"
            raise UserError(f"its tensor {name!r} begins {how}", where=str(file), remedy=AGAIN)
        yield Entry(name, entry["dtype"], tuple(entry["shape"]), start, end)
        at = end
    if at != whole:
        raise UserError(f"holds {whole - at} bytes that are no tensor's", where=str(file), remedy=AGAIN)


def cut_off(file: Path) -> UserError:
    return UserError("is cut off, or no safetensors file", where=str(file), remedy=AGAIN)


def texts(values: Any) -> bool:
    """Whether it is a mapping of texts."""
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _fault(entry: Any) -> str:
    """What is wrong with a tensor's entry by itself; empty: nothing."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        return "lacks its dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"is of a dtype that is not known: {dtype!r}"
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return "has a shape or data_offsets other than whole numbers from 0"
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        return f"has {offsets[1] - offsets[0]} bytes, too few or too many for {tuple(shape)} of {dtype}"
    return ""


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
