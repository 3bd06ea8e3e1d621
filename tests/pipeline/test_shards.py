"""Weights on disk are written a tensor at a time into the files they came in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.shards import INDEX, read_tensor, rewrite, shards, size, stored_dtypes, tensor_names

TENSORS = {
    "one": {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "none": torch.ones(0),
    },
    "two": {"c": torch.randn(4, 4), "yes": torch.tensor([True, False])},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for shard, tensors in TENSORS.items():
        save_file(tensors, folder / f"{shard}.safetensors", metadata={"format": "pt", "of": shard})
    where = {name: f"{shard}.safetensors" for shard, tensors in TENSORS.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def test_unchanged_tensors_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    assert sorted(rewrite(model, out, lambda name, tensor: tensor)) == tensor_names(model)
    for file in [*shards(model), model / INDEX]:
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_only_what_was_changed_differs(model: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    list(rewrite(model, out, lambda name, tensor: tensor.t().mul(2).t() if name in "bc" else tensor))
    for shard, tensors in TENSORS.items():
        found = load_file(out / f"{shard}.safetensors")
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor * 2 if name in "bc" else tensor)
        with safe_open(out / f"{shard}.safetensors", framework="pt") as stored:
            assert stored.metadata() == {"format": "pt", "of": shard}


def test_a_header_may_name_the_tensors_in_any_order(tmp_path: Path) -> None:
    for folder in ("model", "out"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "model" / "model.safetensors"
    places = {"last": [8, 16], "first": [0, 8]}
    header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in places.items()}).encode()
    values = torch.arange(4.0).numpy().tobytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header + values)
    assert list(rewrite(file.parent, tmp_path / "out", lambda name, tensor: tensor)) == ["first", "last"]
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda tensor: tensor[:2]])
def test_a_tensor_of_another_size_is_no_rewrite(model: Path, tmp_path: Path, change: object) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="b would become"):
        list(rewrite(model, tmp_path / "out", lambda name, tensor: change(tensor) if name == "b" else tensor))  # type: ignore[operator]


def test_the_model_is_made_of_the_files_its_index_names(model: Path) -> None:
    save_file({"old": torch.ones(2)}, model / "consolidated.safetensors")
    assert [shard.stem for shard in shards(model)] == ["one", "two"]
    assert tensor_names(model) == ["a", "b", "c", "none", "scalar", "yes"]
    assert size(model) == sum((model / f"{shard}.safetensors").stat().st_size for shard in TENSORS)
    assert stored_dtypes(model) == {"BF16", "I64", "F32", "BOOL"}
    assert torch.equal(read_tensor(model, "c"), TENSORS["two"]["c"])
    with pytest.raises(KeyError, match="old"):
        read_tensor(model, "old")
    (model / INDEX).unlink()
    assert len(shards(model)) == 3
