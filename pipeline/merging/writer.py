"""A file on its way to the disk: written and hashed by a thread of its own, what waits for that in memory of its own."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

CHUNK = 1 << 22  # bytes copied or written at once
SYNCED = 1 << 24  # bytes written between two syncs
ALIGNED = 64  # bytes: each piece that waits begins at a multiple of it, as torch's own tensors do
WAITING = 1 << 26  # bytes that may wait to be written, at least


class Writer:
    """A file written and hashed by a second thread; a third brings it to the disk.

    What is to be written waits in `room`, of `waiting` bytes or WAITING. The page cache holds little of the file at any
    time, so what is read back of it comes from the disk. When it is closed, all of it is there; where anything raises,
    in the `with` or in a thread, nothing more is written.
    """

    def __init__(self, path: Path, waiting: int = 0) -> None:
        import torch

        self._file, self._digest = path.open("wb"), hashlib.sha256()
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._memory = torch.empty(max(waiting, WAITING), dtype=torch.uint8).numpy()
        self._room = slice(0, 0)  # of the memory: what was given last
        self._writing = deque[tuple[slice, Future[None]]]()
        self._synced: Future[None] | None = None
        self._given_up = False
        self._asked = 0  # bytes that the third thread knows of
        self.on_disk = 0  # bytes from the file's beginning

    def room(self, length: int) -> Any:
        """Memory for what is written next, whatever is in it. Waits for the writing of what was in it."""
        assert length <= len(self._memory)
        start = -(-self._room.stop // ALIGNED) * ALIGNED
        start = start if start + length <= len(self._memory) else 0
        self._room = slice(start, start + length)
        while any(start < taken.stop and taken.start < start + length for taken, _ in self._writing):
            self._wait(self._writing.popleft()[1])
        return self._memory[self._room]

    def write(self, values: Any) -> None:
        """Bytes, which must not change any more. Raises what went wrong with those before."""
        while self._writing and self._writing[0][1].done():
            self._wait(self._writing.popleft()[1])
        self._writing.append((self._room, self._writer.submit(self._put, memoryview(values))))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._naming_the_file(), self._file, self._syncer, self._writer:
            if kind:
                self._given_up = True
            else:
                while self._writing:
                    self._wait(self._writing.popleft()[1])
                self._sync()
                self._wait(self._synced)

    def _wait(self, work: Future[None] | None) -> None:
        with self._naming_the_file():
            if work:
                work.result()

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk does not say which file
            error.filename = error.filename or self._file.name
            raise

    def _put(self, values: memoryview) -> None:
        try:
            for at in range(0, len(values), CHUNK):
                if self._given_up:
                    return
                chunk = values[at : at + CHUNK]
                self._file.write(chunk)
                self._digest.update(chunk)
                if self._file.tell() - self._asked >= SYNCED:
                    self._sync()
        except BaseException:
            self._given_up = True  # what follows would not be where it belongs
            raise

    def _sync(self) -> None:
        """Has what was written brought to the disk, once what was before it is there."""
        self._wait(self._synced)
        self._file.flush()
        self._asked = self._file.tell()
        self._synced = self._syncer.submit(self._bring, self._asked)

    def _bring(self, end: int) -> None:
        os.fsync(self._file.fileno())
        drop(self._file, self.on_disk, end)
        self.on_disk = end


def drop(file: BinaryIO, start: int, end: int) -> None:
    """Lets the system forget what it holds of the file in memory, where it takes such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """What was written to the file, or the folder's list of files, is on the disk after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
