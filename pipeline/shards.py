"""A model's weights on disk: the safetensors files it is made of, read and written a tensor at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    """The weight files that the model is made of: those of the index where there is one."""
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(shard.stat().st_size for shard in shards(folder))


def tensor_names(folder: Path) -> list[str]:
    """Of every tensor of the model, sorted."""
    return sorted(name for name, _ in _slices(folder))


def stored_dtypes(folder: Path) -> set[str]:
    """As safetensors names them: F32, BF16."""
    return {tensor.get_dtype() for _, tensor in _slices(folder)}


def read_tensor(folder: Path, name: str) -> Any:
    """One tensor. Raises `KeyError` where the model has none of that name."""
    from safetensors import safe_open

    for shard in shards(folder):
        with safe_open(shard, framework="pt") as stored:
            if name in stored.keys():  # noqa: SIM118  (not a dict)
                return stored.get_tensor(name)
    raise KeyError(name)


def rewrite(base: Path, folder: Path, change: Callable[[str, Any], Any]) -> Iterator[str]:
    """Writes every weight file of `base` into `folder`, each tensor as `change(name, tensor)` gives it; yields names.

    Shapes and dtypes stay, so the files keep their headers, and one tensor at a time is in memory.
    """
    import torch
    from safetensors import safe_open

    for shard in shards(base):
        with (
            safe_open(shard, framework="pt") as stored,
            shard.open("rb") as old,
            (folder / shard.name).open("wb") as new,
        ):
            length = old.read(8)  # the format: the header's length, the header, the tensors' bytes without a gap
            header = old.read(int.from_bytes(length, "little"))
            new.write(length + header)
            places = {name: at["data_offsets"] for name, at in json.loads(header).items() if name != "__metadata__"}
            for name in sorted(places, key=places.__getitem__):
                tensor = stored.get_tensor(name)
                changed = change(name, tensor)
                if (changed.dtype, changed.shape) != (tensor.dtype, tensor.shape):
                    raise ValueError(f"{name} would become {changed.dtype} {tuple(changed.shape)}")
                new.write(changed.flatten().view(torch.uint8).numpy())
                yield name
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, folder / INDEX)


def _slices(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and `PySafeSlice` (dtype and shape, without the values) of every tensor."""
    from safetensors import safe_open

    for shard in shards(folder):
        with safe_open(shard, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict)
                yield name, stored.get_slice(name)
