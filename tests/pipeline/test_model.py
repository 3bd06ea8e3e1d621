"""Promise 8 for the base: what is missing is said in one line, before a record exists; and what a base is known by."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.dpo import Dpo
from pipeline.errors import UserError
from pipeline.merge import Merge
from pipeline.merging.shards import INDEX, SINGLE, rewrite, shards, tensors
from pipeline.model import Base, find_base
from pipeline.records.find import sha256
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.workspace import CHECKOUT, Workspace


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def refusal(workspace: Workspace, run: Any) -> str:
    """The one line of a run that must have ended with exit 2, nothing on stdout and no record."""
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 2, errors
    assert out == ""
    assert not workspace.experiments.exists() and not workspace.checkpoints.exists()
    (line,) = errors.splitlines()
    return str(line)


def test_default_profile_without_a_gpu_says_so_in_one_line(workspace: Workspace, command: Callable[..., Any]) -> None:
    shutil.copy(CHECKOUT / "configs/deepseek-coder-7b.yaml", workspace.configs)
    line = refusal(workspace, command("sft", CUDA_VISIBLE_DEVICES=""))
    assert line.startswith("error: configs/deepseek-coder-7b.yaml:")
    assert line.endswith(
        ": device: needs a CUDA GPU and this machine shows none; try PROFILE=tiny, which needs no GPU and no hub"
    )


@pytest.mark.parametrize("offline", ["0", "1"], ids=["unreachable", "offline"])
def test_a_hub_out_of_reach_is_said_in_one_line(
    workspace: Workspace, command: Callable[..., Any], closed_port: str, tmp_path: Path, offline: str
) -> None:
    hub = {"HF_ENDPOINT": closed_port, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": offline}
    line = refusal(workspace, command("sft", "--profile", "small", "--set", "base_model=someone/some-model", **hub))
    assert line.startswith(
        "error: --set: base_model: someone/some-model is not in the local cache and the hub cannot be reached"
    )
    assert "; try a local folder, or PROFILE=tiny" in line


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nowhere", "a/b/c"])
def test_a_base_folder_that_is_not_there_is_refused(job: Callable[..., Job], workspace: Workspace, name: str) -> None:
    with pytest.raises(UserError, match=r"^--set: base_model: there is no folder .*; try a hub name") as caught:
        Sft.prepare(job(f"base_model={name}"))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not workspace.experiments.exists()


def test_a_base_without_safetensors_is_refused(job: Callable[..., Job], workspace: Workspace) -> None:
    """A pickle may run code of its own."""
    folder = workspace.root / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"base_model: .*pickled holds no \.safetensors"):
        Sft.prepare(job("base_model=pickled"))


def test_a_base_is_known_by_its_weights_wherever_it_lies(base: Base, tmp_path: Path) -> None:
    elsewhere = replace(base, folder=shutil.copytree(base.folder, tmp_path / "elsewhere"))
    assert elsewhere.identity() == base.identity()
    weights = load_file(elsewhere.folder / "model.safetensors")
    name = next(iter(weights))
    weights[name].flatten()[0] += 1e-6
    save_file(weights, elsewhere.folder / "model.safetensors", metadata={"format": "pt"})
    assert elsewhere.identity()["sha256"] != base.identity()["sha256"]


def test_a_single_file_goes_before_an_index_as_transformers_loads_them(base: Base, tmp_path: Path) -> None:
    """So does whatever the pipeline reads, hashes and merges; what lies beside it is left where it is."""
    from transformers import AutoModelForCausalLM

    (out := tmp_path / "out").mkdir()
    folder = shutil.copytree(base.folder, tmp_path / "both")
    weights = load_file(folder / SINGLE)
    for beside in ("model-00001-of-00001", "model.fp16", "consolidated"):
        save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / f"{beside}.safetensors")
    where = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert shards(folder) == [folder / SINGLE]
    assert all(torch.equal(one.read(), loaded[name]) for name, one in tensors(folder).items())
    list(rewrite(folder, out, {}))
    assert [file.name for file in out.iterdir()] == [SINGLE]
    assert replace(base, folder=folder).identity() == base.identity()

    (folder / SINGLE).unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert [shard.name for shard in shards(folder)] == ["model-00001-of-00001.safetensors"]
    assert all(torch.equal(one.read(), loaded[name]) for name, one in tensors(folder).items())
    assert replace(base, folder=folder).identity() != base.identity()


def test_a_base_keeps_the_hash_it_had_in_records(base: Base, tmp_path: Path) -> None:
    """Over its weight files and config.json, each by name and SHA-256."""
    folder = shutil.copytree(base.folder, tmp_path / "sharded")
    (folder / SINGLE).rename(folder / "two.safetensors")
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    where = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for at, files in ((base.folder, [SINGLE]), (folder, ["one.safetensors", "two.safetensors"])):
        lines = "".join(f"{name} {sha256(at / name)}\n" for name in (*files, "config.json"))
        assert replace(base, folder=at).identity()["sha256"] == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    ("asked", "dtype", "quantization"),
    [
        ((), None, "none"),
        (("quantization=auto",), None, "auto"),
        (("precision=bf16", "quantization=nf4"), "bfloat16", "nf4"),
    ],
)
def test_precision_and_quantization_follow_the_profile_and_the_machine(
    job: Callable[..., Job], asked: tuple[str, ...], dtype: str | None, quantization: str
) -> None:
    wanted = job(*asked)
    found = find_base(wanted.workspace, wanted.profile)
    assert (found.device, found.dtype, found.quantization) == ("cpu", dtype, quantization)


def test_quantization_auto_is_none_where_the_base_fits(small_talk: Workspace, job: Callable[..., Job]) -> None:
    assert Sft.prepare(job("quantization=auto")).base.quantization == "none"


def test_quantised_training_checks_its_reference_and_merges_into_the_unquantised_base(
    small_talk: Workspace, job: Callable[..., Job], base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    """QLoRA on a CPU: few words, one step of SFT and one of DPO, with a measurement before each."""
    for kind in ("sft", "dpo"):
        file = small_talk.root / "data" / kind / "few.jsonl"
        file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:3]), "utf-8")
    held_out = ("training_data.validation.fraction=0.34", "quantization=nf4")
    one_step = [f"{stage}_config.{key}" for stage in ("sft", "dpo") for key in ("epochs=1.0", "warmup_ratio=0.0")]
    sft, dpo, merge = (run_stage(stage, job(*held_out, *one_step)) for stage in (Sft, Dpo, Merge))

    reference = dpo.facts.results["reference"]
    assert reference["is"] == sft.id and reference["loss_at_step_0"] == pytest.approx(0.693147, abs=1e-4)
    adapters = [load_file(r.output / "adapter" / "adapter_model.safetensors") for r in (sft, dpo)]
    for name, tensor in adapters[0].items():
        assert tensor.dtype == adapters[1][name].dtype == torch.float32  # trl rounds them to bf16
        assert not torch.equal(tensor, adapters[1][name]), name  # gradients reach every layer
        assert "lora_A" in name or not torch.equal(tensor, tensor.bfloat16().float()), name

    before, after = (load_file(folder / "model.safetensors") for folder in (base.folder, merge.output / "model"))
    name = "model.layers.2.mlp.gate_proj.weight"
    a, b = (adapters[1][f"base_model.model.{name.replace('weight', f'lora_{half}.weight')}"] for half in "AB")
    torch.testing.assert_close(after[name], before[name] + 2 * b @ a, rtol=1e-6, atol=1e-7)
    assert after.keys() == before.keys()
