"""Weights on disk are written a tensor at a time into the files they came in."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.merging.safetensors_header import BITS
from pipeline.merging.shards import (
    INDEX,
    SINGLE,
    Journal,
    rewrite,
    same_bytes,
    shards,
    size,
    stored,
    stored_dtypes,
    tensors,
)
from pipeline.records.find import sha256
from pipeline.workspace import CHECKOUT

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
    for shard, given in TENSORS.items():
        save_file(given, folder / f"{shard}.safetensors", metadata={"format": "pt", "of": shard})
    where = {name: f"{shard}.safetensors" for shard, given in TENSORS.items() for name in given}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_unchanged_tensors_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    assert sorted(rewrite(model, out, {})) == list(tensors(model))
    for file in [*shards(model), model / INDEX]:
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_only_what_was_changed_differs(model: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    list(rewrite(model, out, dict.fromkeys("bc", lambda weight, out: weight[:].t().mul(2).t())))
    for shard, given in TENSORS.items():
        found = load_file(out / f"{shard}.safetensors")
        for name, tensor in given.items():
            assert torch.equal(found[name], tensor * 2 if name in "bc" else tensor)
            assert same_bytes(tensors(model)[name], tensors(out)[name]) == (name not in "bc")
        with safe_open(out / f"{shard}.safetensors", framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "of": shard}


def test_a_header_may_name_the_tensors_in_any_order(tmp_path: Path) -> None:
    for folder in ("model", "out"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "model" / "model.safetensors"
    places = {"last": [8, 16], "first": [0, 8]}
    header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in places.items()}).encode()
    values = torch.arange(4.0).numpy().tobytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header + values)
    assert list(rewrite(file.parent, tmp_path / "out", {})) == ["first", "last"]
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_values_in_the_memory_given_are_not_overwritten_by_the_next(tmp_path: Path) -> None:
    """They are still being written when the next tensor's are computed."""
    for folder in (model := tmp_path / "large", out := tmp_path / "out"):
        folder.mkdir()
    large = {str(number): torch.full((2**21,), float(number)) for number in range(4)}
    save_file(large, model / "model.safetensors")
    list(rewrite(model, out, dict.fromkeys(large, lambda weight, out: out.copy_(weight[:]))))
    assert sha256(out / "model.safetensors") == sha256(model / "model.safetensors")


@pytest.mark.parametrize("change", [lambda weight, _: weight[:].double(), lambda weight, _: weight[:2]])
def test_a_tensor_of_another_size_is_no_rewrite(model: Path, tmp_path: Path, change: Callable[[Any, Any], Any]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="b would become"):
        list(rewrite(model, tmp_path / "out", {"b": change}))


def test_the_model_is_made_of_the_files_its_index_names(model: Path) -> None:
    save_file({"old": torch.ones(2)}, model / "consolidated.safetensors")
    assert [shard.stem for shard in shards(model)] == ["one", "two"]
    assert list(tensors(model)) == ["a", "b", "c", "none", "scalar", "yes"]
    assert size(model) == sum((model / f"{shard}.safetensors").stat().st_size for shard in TENSORS)
    assert stored_dtypes(model) == {"BF16", "I64", "F32", "BOOL"}
    for name, tensor in (TENSORS["one"] | TENSORS["two"]).items():
        if tensor.is_floating_point():
            assert torch.equal(tensors(model)[name].read(), tensor)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", "{}", "loaded with that adapter"),
        ("config.json", '{"transformers_weights": "other.safetensors"}', "transformers_weights"),
        (INDEX, "{", "no JSON"),
        (INDEX, "[]", "no index"),
        (INDEX, '{"metadata": {}}', "no index"),
        (INDEX, '{"weight_map": {"a": "one.safetensors"}}', "no `metadata`"),  # transformers: KeyError
        (INDEX, '{"metadata": {}, "weight_map": {"a": 1}}', "not of tensors to files"),
        (INDEX, '{"metadata": {}, "weight_map": {"a": "three.safetensors"}}', "three.safetensors, which is not there"),
        (INDEX, '{"metadata": {}, "weight_map": {"a": "/one.safetensors"}}', "'/one.safetensors', which is no"),
        (INDEX, '{"metadata": {}, "weight_map": {"a": "../model/one.safetensors"}}', "in its own folder"),
        (INDEX, '{"metadata": {}, "weight_map": {"a": "sub/one.safetensors"}}', "in its own folder"),
        (INDEX, '{"metadata": {}, "weight_map": {"a": "config.json"}}', "no safetensors file"),
        (INDEX, None, "neither model.safetensors nor"),
    ],
)
def test_a_folder_that_transformers_would_load_otherwise_is_refused(
    model: Path, file: str, content: str | None, said: str
) -> None:
    (model / file).unlink() if content is None else (model / file).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        shards(model)
    assert str(model) in str(error.value) and "; try " in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_in_two_files_is_named_with_both(model: Path) -> None:
    save_file(TENSORS["two"] | {"a": torch.ones(7)}, model / "two.safetensors")
    with pytest.raises(UserError, match=r"'a' is in one\.safetensors and in two\.safetensors"):
        tensors(model)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([], "no safetensors file"),
        ({"__metadata__": {"x": 1}, "a": entry()}, "no safetensors file"),
        ({"a": 3}, "'a' lacks its dtype"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "'a' lacks its dtype"),
        ({"a": entry(dtype="F33")}, "'a' is of a dtype that is not known: 'F33'"),
        ({"a": entry(shape=[3])}, r"'a' has 8 bytes, too few or too many for \(3,\) of F32"),
        ({"a": entry(dtype="F16")}, "'a' has 8 bytes"),
        ({"a": entry(shape=[-2])}, "'a' has a shape or data_offsets other than"),
        ({"a": entry(shape="2")}, "'a' has a shape or data_offsets other than"),
        ({"a": entry(data_offsets=[-8, 0])}, "'a' has a shape or data_offsets other than"),
        ({"a": entry(data_offsets=[8, 0])}, "'a' has -8 bytes"),
        ({"a": entry(), "b": entry()}, "'b' begins 8 bytes before the end"),
        ({"a": entry(data_offsets=[4, 8], shape=[1])}, "'a' begins 4 bytes after the end"),
        ({"a": entry(data_offsets=[0, 16], shape=[4])}, "cut off"),
        ({"a": entry(data_offsets=[0, 4], shape=[1])}, "4 bytes that are no tensor's"),
    ],
    ids=str,
)
def test_a_header_that_does_not_add_up_is_refused_as_safetensors_does(tmp_path: Path, header: Any, said: str) -> None:
    file = tmp_path / SINGLE
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(SafetensorError):
        safe_open(file, framework="pt")
    with pytest.raises(UserError, match=said) as error:
        stored(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_takes_the_room_that_safetensors_gives_it(tmp_path: Path, dtype: str) -> None:
    text = json.dumps({"a": entry(dtype=dtype, shape=[4], data_offsets=[0, BITS[dtype] // 2])}).encode()
    file = tmp_path / SINGLE
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(BITS[dtype] // 2))
    with safe_open(file, framework="pt") as opened:
        assert list(opened.keys()) == list(stored(file)) == ["a"]


@pytest.mark.parametrize("kept", [5, 60, -3])
def test_a_file_that_is_cut_off_is_said_to_be(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(40, 40), "b": torch.ones(40, 40)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="cut off, or no safetensors file"):
        list(rewrite(tmp_path, tmp_path / "out", {}))
    with pytest.raises(UserError, match="cut off, or no safetensors file"):
        stored(file)["b"].read()


def negated(weight: Any, out: torch.Tensor) -> Any:
    return -weight[:]


def test_what_the_journal_says_is_whole_is_not_written_again(model: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    journal = Journal(tmp_path / "merge.json", "this")
    names = rewrite(model, out, {"c": negated}, journal)
    while not journal.files:
        next(names)
    del names  # the first file is whole, the second is not
    assert journal.files == {"one.safetensors": sha256(out / "one.safetensors")}
    (out / "two.safetensors").write_bytes(b"torn")

    later = Journal(tmp_path / "merge.json", "this")
    later.take_up(out)
    assert later.files == journal.files
    first = (out / "one.safetensors").stat().st_mtime_ns
    assert sorted(rewrite(model, out, {"c": negated}, later)) == list(tensors(model))
    assert (out / "one.safetensors").stat().st_mtime_ns == first
    assert later.files == {shard.name: sha256(out / shard.name) for shard in shards(model)}
    assert torch.equal(load_file(out / "two.safetensors")["c"], -TENSORS["two"]["c"])


@pytest.mark.parametrize("fault", ["another task", "a byte", "gone", "no journal", "a torn journal", "another shape"])
def test_a_journal_is_not_trusted_but_checked(model: Path, tmp_path: Path, fault: str) -> None:
    (out := tmp_path / "out").mkdir()
    journal = Journal(tmp_path / "merge.json", "this")
    list(rewrite(model, out, {}, journal))
    file = out / "one.safetensors"
    if fault == "a byte":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif fault == "gone":
        file.unlink()
    elif fault == "no journal":
        journal.forget()
    elif fault == "a torn journal":
        journal.path.write_bytes(journal.path.read_bytes()[:-20])
    elif fault == "another shape":
        journal.path.write_text("[]")
    later = Journal(journal.path, "that" if fault == "another task" else "this")
    later.take_up(out)
    assert set(later.files) == ({"two.safetensors"} if fault in ("a byte", "gone") else set())


def test_a_file_is_on_the_disk_before_the_journal_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, synced = os.fsync, list[str]()

    def fsync(handle: int) -> None:
        honest(handle)
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    (out := tmp_path / "out").mkdir()
    list(rewrite(model, out, {}, Journal(tmp_path / "merge.json", "this")))
    journal = ["merge.json.partial", tmp_path.name]
    assert synced == ["one.safetensors", *journal, "two.safetensors", *journal]


def test_a_tensor_is_named_once_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third is brought there with the file's end alone, and the disk is full then."""
    for folder in (model := tmp_path / "model", out := tmp_path / "out"):
        folder.mkdir()
    save_file({name: torch.full((1 << 18,), 1.0) for name in "abc"}, model / SINGLE)
    monkeypatch.setattr("pipeline.merging.writer.SYNCED", 2 << 20)
    assert list(rewrite(model, out, {})) == ["a", "b", "c"]

    honest, synced = os.fsync, list[int]()

    def fsync(handle: int) -> None:
        if synced:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)
        synced.append(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    names = []
    with pytest.raises(OSError, match=f"No space left on device.*{SINGLE}"):
        for name in rewrite(model, out, {}):
            names.append(name)
    assert synced and "c" not in names


@pytest.mark.parametrize("size", [10, 1 << 18, 1 << 23], ids=["small", "a megabyte", "several chunks"])
def test_a_full_disk_says_which_file(tmp_path: Path, size: int) -> None:
    """Whether it is met when a chunk is written, or what is left when the file is closed."""
    (out := tmp_path / "out").mkdir()
    save_file({"a": torch.zeros(size)}, tmp_path / SINGLE)
    (out / SINGLE).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device.*out/{SINGLE}"):
        list(rewrite(tmp_path, out, {}))


MEASURED = """
import resource, sys
from itertools import product
from pathlib import Path
import torch
from pipeline.merging import writer
from pipeline.merging.receipt import WeightCheck
from pipeline.merging.shards import rewrite
from pipeline.merging.update import Adapter, Change, Factor, LowRank, Updates

torch.set_num_threads(1)
writer.WAITING = 0  # more than the smaller model has
A, B, M = torch.randn(8, 2048), torch.randn(1024, 8), torch.rand(1024) + 50
CHANGES = {
    "LoRA": Change(lambda: LowRank((Factor(A.clone(), B.clone(), 2.0),))),
    "DoRA": Change(lambda: LowRank((Factor(A.clone(), B.clone(), 2.0),), M.clone())),
}

def merge(base):
    for kind, arithmetic in product(CHANGES, ("float32", "peft")):
        out = base.with_name(f"{base.name}-{kind}-{arithmetic}")
        out.mkdir()
        names = [f"layers.{n}.weight" for n in range(int(base.name))]
        updates = Updates({name: CHANGES[kind] for name in names})
        functions = {n: (lambda w, out, n=n: updates[n].merged(w, arithmetic, out)) for n in names}
        check = WeightCheck(base, out, Adapter(kind, updates), arithmetic)
        assert sorted(check.each(rewrite(base, out, functions))) == sorted(names)
    processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return max(resource.getrusage(one).ru_maxrss for one in processes) * 1024

(torch.randn(1024, 2048) @ torch.randn(2048, 8)).double().norm()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(before, *(merge(Path(sys.argv[1]) / number) for number in ("2", "30")))
"""


def test_memory_is_that_of_a_tensor_however_many_there_are(tmp_path: Path) -> None:
    """Writing and checking a LoRA and a DoRA, in both arithmetics; a tensor is 8 MB in float32, the larger model 120 MB."""
    for number in (2, 30):
        (tmp_path / str(number)).mkdir()
        weights = {f"layers.{n}.weight": torch.full((1024, 2048), 0.5).bfloat16() for n in range(number)}
        save_file(weights, tmp_path / str(number) / "model.safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, small, large = map(int, found.split())
    tensor, model = 8 * 2**20, 30 * 4 * 2**20
    assert small - before < 3 * tensor + 16 * 2**20
    assert large - small < 2 * tensor < model / 4
