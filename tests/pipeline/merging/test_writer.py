"""A file written by a thread of its own holds what it was given."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.merging import shards
from pipeline.merging.shards import SINGLE, Stored
from pipeline.merging.writer import ALIGNED, Writer
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
    with Writer(tmp_path / "written", waiting=1200) as writer:
        for piece in pieces:
            room = writer.room(len(piece))
            assert room.ctypes.data % ALIGNED == 0
            room[:] = np.frombuffer(piece, np.uint8)
            writer.write(room)
    assert (tmp_path / "written").read_bytes() == b"".join(pieces)
    assert writer.sha256 == sha256(tmp_path / "written") and writer.on_disk == sum(map(len, pieces))


def test_what_is_said_to_be_on_the_disk_was_synced_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.merging.writer.SYNCED", 500)
    honest, synced = os.fsync, [0]

    def fsync(handle: int) -> None:
        length = os.fstat(handle).st_size
        assert writer.on_disk <= synced[-1]
        honest(handle)
        synced.append(length)

    monkeypatch.setattr(os, "fsync", fsync)
    with Writer(tmp_path / "written") as writer:
        for _ in range(20):
            writer.write(bytes(300))
    assert writer.on_disk == synced[-1] == 6000 and len(synced) > 5


class Disk:
    """A file that is `full` for its fourth write alone, and whose third waits until it is `open`."""

    def __init__(self, file: Any, full: bool) -> None:
        self.file, self.writes, self.full, self.open = file, 0, full, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, chunk: bytes) -> int:
        self.writes += 1
        if self.writes == 3:
            assert self.open.wait(30)
        if self.writes == 4 and self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(chunk))


def test_after_a_failed_write_nothing_is_written_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room on the disk again: what follows would be taken for what is missing."""
    monkeypatch.setattr("pipeline.merging.writer.SYNCED", 1)
    pieces = [bytes([number]) * 100 for number in range(30)]
    with pytest.raises(OSError, match=r"No space left on device.*written"), Writer(tmp_path / "written") as writer:
        writer._file = disk = Disk(writer._file, full=True)  # type: ignore[assignment]
        for piece in pieces:
            writer.write(piece)
        disk.open.set()
    assert (tmp_path / "written").read_bytes() == b"".join(pieces[:3]) and writer.on_disk <= 300


def test_a_stop_does_not_wait_for_what_waits(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "written") as writer:
        writer._file = disk = Disk(writer._file, full=False)  # type: ignore[assignment]
        for number in range(30):
            writer.write(bytes([number]) * 100)
        threading.Timer(0.2, disk.open.set).start()
        raise KeyboardInterrupt
    assert len((tmp_path / "written").read_bytes()) <= 300


@pytest.mark.parametrize(("dtype", "of_each"), [("BF16", 2), ("F32", 4), ("F64", 8)])
def test_there_is_room_to_compute_a_tensor_while_one_as_large_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, of_each: int
) -> None:
    """With small ones between them, in 16 bits; where each takes more, memory is bounded: by two of them in float32."""
    monkeypatch.setattr("pipeline.merging.writer.WAITING", 0)
    elements, small = 10_000, 500
    waiting = shards._waiting(Stored(tmp_path / SINGLE, "a", dtype, (elements,), 0, elements * of_each))
    assert elements * of_each <= waiting <= 2 * 4 * elements + 2 * ALIGNED
    if dtype != "BF16":
        return
    with Writer(tmp_path / "written", waiting) as writer:
        writer._file = disk = Disk(writer._file, full=False)  # type: ignore[assignment]
        for length in (small, small, elements * of_each, small):  # the third is being written until the disk is open
            writer.write(writer.room(length))
        room = writer.room(elements * of_each)  # else it waits for the disk, in vain
        assert not disk.open.is_set()
        disk.open.set()
        writer.write(room)
