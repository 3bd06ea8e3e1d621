"""The command under torchrun: two ranks, one record, one adapter."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.profile import load_profile
from pipeline.records.file import RecordFile
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.workspace import CHECKOUT, Workspace

EPOCHS = "sft_config.epochs=5.0"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def two_ranks(small_talk: Workspace) -> Iterator[Start]:
    started = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [*torchrun, "-m", "aletheia", *arguments],
            cwd=CHECKOUT,
            env=os.environ | {"ALETHEIA_ROOT": str(small_talk.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def adapter(workspace: Workspace, record: str) -> torch.Tensor:
    tensors = load_file(workspace.checkpoints / record / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def steps(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_ranks_stop_together_go_on_and_learn_what_one_process_learns(
    small_talk: Workspace, two_ranks: Start
) -> None:
    alone = run_stage(Sft, Job(small_talk, load_profile(small_talk, "small", [EPOCHS]))).id
    running = two_ranks("sft", "--profile", "small", "--set", EPOCHS)
    record = RecordFile(small_talk.experiments / f"{alone[:-3]}002.yaml")
    while steps(record.folder / "log.jsonl") < 3:
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        time.sleep(0.05)
    second = max(psutil.Process(running.pid).children(), key=lambda worker: worker.pid)
    second.send_signal(signal.SIGTERM)  # to the rank that keeps no record
    out, err = running.communicate(timeout=120)
    assert err.count("error: interrupted by SIGTERM after step") == 1 and not out
    facts = record.facts()
    assert facts and facts.status == "cancelled"
    done = steps(record.folder / "log.jsonl")
    assert 3 <= done < 25 and (small_talk.checkpoints / record.id / f"checkpoint-{done}").is_dir()

    resumed = two_ranks("sft", "--profile", "small", "--resume")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert out == f"experiments/{record.id}.yaml\n" and f"goes on from checkpoint-{done}" in err
    facts = record.facts()
    assert facts and facts.status == "complete" and facts.results["training"]["ranks"] == 2
    assert steps(record.folder / "log.jsonl") == facts.results["training"]["steps"] == 25
    one, two = adapter(small_talk, alone), adapter(small_talk, record.id)
    assert (one - two).norm() < 1e-3 * one.norm()
    left = {path.name for folder in (small_talk.experiments, small_talk.checkpoints) for path in folder.glob("EXP-*")}
    assert left == {alone, record.id, f"{alone}.yaml", f"{record.id}.yaml"}


def test_a_command_that_runs_in_one_process_is_refused_on_two(two_ranks: Start) -> None:
    refused = two_ranks("merge", "--profile", "small")
    out, err = refused.communicate(timeout=60)
    assert refused.returncode and err.count("error: merge runs in one process; try") == 1 and not out
