"""A model's weights on disk: the safetensors files it is made of, read and written a tensor at a time.

Files are read, not mapped: what is mapped of a shard counts as this process's memory until the shard is closed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from pipeline.errors import UserError
from pipeline.records.find import sha256

INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name: torch's
CHUNK = 1 << 22  # bytes copied at once
SYNCED = 1 << 24  # bytes written between two syncs


class Memory:
    """For one tensor at a time, until the next is read into it: fresh memory takes as long as the reading."""

    def __init__(self) -> None:
        self._bytes: Any = None

    def take(self, length: int) -> Any:
        import torch

        if self._bytes is None or len(self._bytes) < length:
            self._bytes = torch.empty(length, dtype=torch.uint8)
        return self._bytes[:length]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as safetensors names it, and its bytes from `start` to `end`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self, memory: Memory | None = None) -> Any:
        """The tensor, else in memory of its own. Floating point only; raises `UserError` where the file ends early."""
        import torch

        raw = (memory or Memory()).take(self.end - self.start)
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(raw.numpy()) < len(raw):
                raise _cut_off(self.file)
        return raw.view(getattr(torch, FLOATS[self.dtype])).reshape(self.shape)

    def forget(self) -> None:
        """Lets the system forget what it holds of it in memory, where it takes such advice."""
        if hasattr(os, "posix_fadvise"):
            with self.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), self.start, self.end - self.start, os.POSIX_FADV_DONTNEED)

    def chunks(self, file: BinaryIO) -> Iterator[bytes]:
        """Its bytes as they lie in `file`, of any dtype."""
        file.seek(self.start)
        for at in range(self.start, self.end, CHUNK):
            chunk = file.read(min(CHUNK, self.end - at))
            if len(chunk) < min(CHUNK, self.end - at):
                raise _cut_off(self.file)
            yield chunk


def stored(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, by name, in the order of their bytes: its header is JSON after its length."""
    with file.open("rb") as opened:
        begin = 8 + (length := int.from_bytes(opened.read(8), "little"))
        if begin > file.stat().st_size:
            raise _cut_off(file)
        try:
            found = json.loads(opened.read(length))
        except ValueError:
            raise _cut_off(file) from None
    found.pop("__metadata__", None)
    places = sorted(found.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Stored(file, name, at["dtype"], tuple(at["shape"]), *(begin + offset for offset in at["data_offsets"]))
        for name, at in places
    }


def shards(folder: Path) -> list[Path]:
    """The weight files that the model is made of: those of the index where there is one."""
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(shard.stat().st_size for shard in shards(folder))


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model, by name, sorted."""
    return dict(sorted((name, one) for shard in shards(folder) for name, one in stored(shard).items()))


def stored_dtypes(folder: Path) -> set[str]:
    """As safetensors names them: F32, BF16."""
    return {tensor.dtype for tensor in tensors(folder).values()}


def same_bytes(one: Stored, other: Stored) -> bool:
    """Unlike numbers, bytes are equal to themselves also where one is no number."""
    with one.file.open("rb") as first, other.file.open("rb") as second:
        return all(a == b for a, b in zip(one.chunks(first), other.chunks(second), strict=True))


class Journal:
    """Which files of a folder are whole, each by its SHA-256: a line is written once the file is on the disk.

    `task` says what they are made of; a journal of another task counts as none.
    """

    def __init__(self, path: Path, task: str) -> None:
        self.path, self.task = path, task
        self.files: dict[str, str] = {}

    def take_up(self, folder: Path) -> None:
        """Takes over from an earlier journal the files that are still what it says."""
        try:
            known = json.loads(self.path.read_text("utf-8"))
            listed = dict(known["files"]) if known["task"] == self.task else {}
        except (OSError, ValueError, KeyError, TypeError):
            listed = {}
        self.files = {n: d for n, d in listed.items() if (folder / n).is_file() and sha256(folder / n) == d}

    def add(self, name: str, digest: str) -> None:
        self.files[name] = digest
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps({"task": self.task, "files": self.files}, indent=1) + "\n", "utf-8")
        sync(partial)
        os.replace(partial, self.path)
        sync(self.path.parent)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


class Writer:
    """A file written and hashed by a second thread, one piece behind; on the disk, and not in memory, when it is closed.

    The page cache holds little of it at any time, so what is read back of it comes from the disk.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._behind = path.open("wb"), hashlib.sha256(), 0
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, values: Any) -> None:
        """Bytes, which must not change any more. Raises what went wrong with those before."""
        self._wait()
        self._last = self._thread.submit(self._put, memoryview(values))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._file, self._thread:
            if not kind:
                self._wait()
                self._sync()

    def _wait(self) -> None:
        if self._last:
            self._last.result()

    def _put(self, values: memoryview) -> None:
        for at in range(0, len(values), CHUNK):
            chunk = values[at : at + CHUNK]
            self._file.write(chunk)
            self._digest.update(chunk)
            self._behind += len(chunk)
            if self._behind >= SYNCED:
                self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        _drop(self._file)
        self._behind = 0


def rewrite(
    base: Path, folder: Path, changes: Mapping[str, Callable[[Any], Any]], journal: Journal | None = None
) -> Iterator[str]:
    """Writes every weight file of `base` into `folder`, the tensors named in `changes` as these give them; yields names.

    Shapes and dtypes stay, so the files keep their headers; what is not changed is copied byte for byte. One tensor at a
    time is in memory. A file is synced, then added to the journal; those in it already are not written again.
    """
    memory = Memory()
    for shard in shards(base):
        if journal and shard.name in journal.files:
            yield from stored(shard)
            continue
        with shard.open("rb") as old, Writer(folder / shard.name) as new:
            length = old.read(8)
            new.write(length + old.read(int.from_bytes(length, "little")))
            for name, tensor in stored(shard).items():
                if name in changes:
                    new.write(_changed(tensor, changes[name], memory))
                else:
                    for chunk in tensor.chunks(old):
                        new.write(chunk)
                yield name
        if journal:
            journal.add(shard.name, new.sha256)
    if (base / INDEX).exists():
        (folder / INDEX).write_bytes((base / INDEX).read_bytes())


def _changed(tensor: Stored, change: Callable[[Any], Any], memory: Memory) -> Any:
    """The bytes of a tensor's new values. Raises `ValueError` for other values than the header has room for."""
    import torch

    before = tensor.read(memory)
    after = change(before)
    if after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
        after = after.clone()  # the next is read into it, while this one is written
    if (after.dtype, after.shape) != (before.dtype, before.shape):
        raise ValueError(f"{tensor.name} would become {after.dtype} {tuple(after.shape)}")
    return after.contiguous().flatten().view(torch.uint8).numpy()


def _cut_off(file: Path) -> UserError:
    return UserError("is cut off, or no safetensors file", where=str(file), remedy="fetching it again")


def _drop(file: BinaryIO) -> None:
    """Lets the system forget what it holds of the file in memory, where it takes such advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """What was written to the file, or the folder's list of files, is on the disk after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
