"""A file written by a thread of its own holds what it was given."""

import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.merging.writer import Writer
from pipeline.records.find import sha256


def test_what_waits_to_be_written_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of all sizes, made faster than they are written."""
    put = Writer._put

    def slowly(writer: Writer, values: memoryview) -> None:
        time.sleep(0.002)
        put(writer, values)

    monkeypatch.setattr(Writer, "_put", slowly)
    monkeypatch.setattr("pipeline.merging.writer.WAITING", 1000)
    generator = np.random.default_rng(0)
    pieces = [generator.bytes(size) for size in generator.integers(0, 601, size=200)]
    with Writer(tmp_path / "written", largest=600) as writer:
        for piece in pieces:
            room = writer.room(len(piece))
            room[:] = np.frombuffer(piece, np.uint8)
            writer.write(room)
    assert (tmp_path / "written").read_bytes() == b"".join(pieces)
    assert writer.sha256 == sha256(tmp_path / "written") and writer.on_disk == sum(map(len, pieces))
