"""A model's weights on disk: the safetensors files it is made of, read and written a tensor at a time.

Files are read, not mapped: what is mapped of a shard counts as this process's memory until the shard is closed.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError
from pipeline.merging.blocks import Memory
from pipeline.merging.safetensors_header import AGAIN, cut_off, entries, texts
from pipeline.merging.writer import ALIGNED, CHUNK, Writer, drop, sync
from pipeline.records.find import sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name: torch's


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as safetensors names it, and its bytes from `start` to `end`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def float_type(self) -> Any:
        """torch's name of its dtype, one of FLOATS."""
        import torch

        return getattr(torch, FLOATS[self.dtype])

    def read(self, memory: Memory | None = None) -> Any:
        """The tensor, else in memory of its own. Floating point only; raises `UserError` where the file ends early."""
        import torch

        raw = (memory or Memory()).take(torch.uint8, [self.end - self.start])
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(raw.numpy()) < len(raw):
                raise cut_off(self.file)
        return raw.view(self.float_type).reshape(self.shape)

    def forget(self) -> None:
        """Lets the system forget what it holds of it in memory, where it takes such advice."""
        if hasattr(os, "posix_fadvise"):
            with self.file.open("rb") as file:
                drop(file, self.start, self.end)

    def chunks(self, file: BufferedReader, memory: Callable[[int], Any] = bytearray) -> Iterator[Any]:
        """Its bytes as they lie in `file`, of any dtype, in `memory` for so many bytes."""
        file.seek(self.start)
        for at in range(self.start, self.end, CHUNK):
            chunk = memory(min(CHUNK, self.end - at))
            if file.readinto(chunk) < len(chunk):
                raise cut_off(self.file)
            yield chunk


class OnDisk:
    """Stands for a stored tensor of floating point where blocks of its rows are all that is asked for: each is read then.

    `file` is its file, open; several threads may read at once. A number alone is a row of one.
    """

    def __init__(self, stored: Stored, file: BinaryIO) -> None:
        import torch

        self.stored, self._file = stored, file
        self.dtype = stored.float_type
        self.shape = torch.Size(stored.shape or (1,))

    def __len__(self) -> int:
        return int(self.shape[0])

    def numel(self) -> int:
        return int(self.shape.numel())

    def __getitem__(self, rows: slice) -> Any:
        """Raises `UserError` where the file ends early."""
        return self.read(rows, Memory())

    def read(self, rows: slice, memory: Memory) -> Any:
        import torch

        first, last, _ = rows.indices(len(self))
        each = (self.stored.end - self.stored.start) // max(1, len(self))
        raw = memory.take(torch.uint8, [(last - first) * each])
        start, read = self.stored.start + first * each, 0
        while read < len(raw):  # 2 GB at most are given at once
            got = os.preadv(self._file.fileno(), [raw.numpy()[read:]], start + read)
            if not got:
                raise cut_off(self.stored.file)
            read += got
        return raw.view(self.dtype).reshape(last - first, *self.shape[1:])


def stored(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, by name, in the order of their bytes.

    Raises `UserError`, naming file and tensor, for what safetensors itself would not read.
    """
    return {entry.name: Stored(file, *entry) for entry in entries(file)}


def shards(folder: Path) -> list[Path]:
    """The weight files that `transformers` loads, and no other: `model.safetensors`, else those of the index, sorted.

    Another precision's or format's, such as `model.fp16.safetensors` and `consolidated.safetensors`, may lie beside
    them. Raises `UserError` where there is neither, or where `transformers` would load something else too.
    """
    where = str(folder)
    if (folder / "adapter_config.json").is_file():
        what = "holds adapter_config.json beside the model, which would be loaded with that adapter"
        raise UserError(what, where=where, remedy="moving the adapter to a folder of its own")
    if _named_elsewhere(folder / "config.json"):
        what = "its config.json has `transformers_weights`, which is not followed here"
        raise UserError(what, where=where, remedy=f"calling the file {SINGLE}")
    if (index := index_of(folder)) is not None:
        return _indexed(index)
    if not (folder / SINGLE).is_file():
        raise UserError(f"holds neither {SINGLE} nor {INDEX}", where=where, remedy="a model that transformers saved")
    return [folder / SINGLE]


def index_of(folder: Path) -> Path | None:
    """The index that says which files the weights are in; None where they are in a single one, whatever it says."""
    return folder / INDEX if (folder / INDEX).is_file() and not (folder / SINGLE).is_file() else None


def _named_elsewhere(config: Path) -> bool:
    try:
        known = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):  # transformers says what is wrong with it
        return False
    return isinstance(known, dict) and bool(known.get("transformers_weights"))


def _indexed(index: Path) -> list[Path]:
    """Raises `UserError` for an index that transformers would not read, and for one that names anything but files here."""
    where = str(index)
    try:
        known = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"is no JSON: {error}", where=where, remedy=AGAIN) from None
    if not isinstance(known, dict) or not isinstance(known.get("metadata"), dict) or not known.get("weight_map"):
        raise UserError("is no index: it has no `weight_map` or no `metadata`", where=where, remedy=AGAIN)
    if not texts(known["weight_map"]):
        raise UserError("its `weight_map` is not of tensors to files", where=where, remedy=AGAIN)
    names = sorted(set(known["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            what = f"names {name!r}, which is no safetensors file in its own folder"
            raise UserError(what, where=where, remedy="moving the file beside it and naming it so")
        if not (index.parent / name).is_file():
            raise UserError(f"names {name}, which is not there", where=where, remedy=AGAIN)
    return [index.parent / name for name in names]


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(shard.stat().st_size for shard in shards(folder))


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model, by name, sorted. Raises `UserError` for one that two files hold."""
    found: dict[str, Stored] = {}
    for shard in shards(folder):
        for name, one in stored(shard).items():
            if name in found:
                what = f"{name!r} is in {found[name].file.name} and in {shard.name}"
                raise UserError(what, where=str(folder), remedy=AGAIN)
            found[name] = one
    return dict(sorted(found.items()))


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


def rewrite(
    base: Path, folder: Path, changes: Mapping[str, Callable[[Any, Any], Any]], journal: Journal | None = None
) -> Generator[str, None, None]:
    """Writes every weight file of `base` into `folder`, the tensors named in `changes` as these give them.

    Yields the name of each once it is on the disk. A change is given the tensor on disk and memory for its new values.
    Shapes and dtypes stay, so the files keep their headers; what is not changed is copied byte for byte. One tensor at a
    time is computed. A whole file is added to the journal; one in it is not written again.
    """
    for shard in shards(base):
        if journal and shard.name in journal.files:
            yield from stored(shard)
            continue
        held = stored(shard)
        waiting = max((_waiting(tensor) for name, tensor in held.items() if name in changes), default=0)
        with shard.open("rb") as old, Writer(folder / shard.name, waiting) as new:
            length = old.read(8)
            new.write(length + old.read(int.from_bytes(length, "little")))
            behind = deque[Stored]()
            for name, tensor in held.items():
                if name in changes:
                    new.write(_changed(OnDisk(tensor, old), changes[name], new.room(tensor.end - tensor.start)))
                else:
                    for chunk in tensor.chunks(old, new.room):
                        new.write(chunk)
                behind.append(tensor)
                while behind and behind[0].end <= new.on_disk:
                    yield behind.popleft().name
        if journal:
            journal.add(shard.name, new.sha256)
        yield from (tensor.name for tensor in behind)
    if (index := index_of(base)) is not None:
        (folder / INDEX).write_bytes(index.read_bytes())


def _waiting(tensor: Stored) -> int:
    """Bytes for three such tensors: so one has room beside the one being written, whatever small ones lie between them.

    Of 32 bits or more no more than twice the tensor in float32, or itself.
    """
    size = tensor.end - tensor.start
    return min(3 * size, max(size, 8 * prod(tensor.shape))) + 2 * ALIGNED


def _changed(tensor: OnDisk, change: Callable[[Any, Any], Any], memory: Any) -> Any:
    """The bytes of a tensor's new values. Raises `ValueError` for other values than the header has room for."""
    import torch

    one = tensor.stored
    after = change(tensor, torch.from_numpy(memory).view(tensor.dtype).reshape(one.shape))
    if (after.dtype, after.shape) != (tensor.dtype, one.shape):
        raise ValueError(f"{one.name} would become {after.dtype} {tuple(after.shape)}")
    return after.contiguous().flatten().view(torch.uint8).numpy()
