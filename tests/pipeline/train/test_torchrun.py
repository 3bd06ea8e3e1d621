"""The command under torchrun: two ranks, one record, one adapter."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.profile import load_profile
from pipeline.records.file import RecordFile
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train.trainer import StepTrainer
from pipeline.workspace import CHECKOUT, Workspace
from tests.forked import Forked

EPOCHS, STEPS = "sft_config.epochs=2.0", 10
TWO = ("--standalone", "--nproc-per-node", "2")
Start = Callable[..., Forked]


def rank(*words: str) -> None:
    """`python -m aletheia`, but for the imports; it waits before each step, unless it is the resume, to be stopped in time."""
    from aletheia.cli import main

    if "--resume" not in words:
        honest = StepTrainer.training_step

        def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
            time.sleep(0.2)
            return honest(self, *arguments, **options)

        StepTrainer.training_step = training_step  # type: ignore[method-assign]
    sys.argv = ["aletheia", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


def torchrun() -> None:
    """torchrun itself, which makes a rank with `fork` where it would start an interpreter."""
    from torch.distributed import run

    honest, words = run.config_from_args, sys.argv[1:]
    run.config_from_args = lambda arguments: (honest(arguments)[0], rank, words)
    run.main([*TWO, "--start-method", "fork", "-m", "aletheia", *words])


@pytest.fixture
def two_ranks(small_talk: Workspace, tmp_path: Path) -> Iterator[Start]:
    started: list[Forked] = []

    def start(*arguments: str) -> Forked:
        environment = os.environ | {"ALETHEIA_ROOT": str(small_talk.root)}
        said = tmp_path / f"said-{len(started)}"
        started.append(Forked(said, *arguments, environment=environment, main=torchrun))
        return started[-1]

    yield start
    for process in started:
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
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    second = max(psutil.Process(running.pid).children(), key=lambda worker: worker.pid)
    second.send_signal(signal.SIGTERM)  # to the rank that keeps no record
    out, err = running.communicate(timeout=120)
    assert err.count("error: interrupted by SIGTERM after step") == 1 and not out
    facts = record.facts()
    assert facts and facts.status == "cancelled"
    done = steps(record.folder / "log.jsonl")
    assert 3 <= done < STEPS and (small_talk.checkpoints / record.id / f"checkpoint-{done}").is_dir()

    resumed = two_ranks("sft", "--profile", "small", "--resume")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert out == f"experiments/{record.id}.yaml\n" and f"goes on from checkpoint-{done}" in err
    facts = record.facts()
    assert facts and facts.status == "complete" and facts.results["training"]["ranks"] == 2
    assert steps(record.folder / "log.jsonl") == facts.results["training"]["steps"] == STEPS
    one, two = adapter(small_talk, alone), adapter(small_talk, record.id)
    assert (one - two).norm() < 1e-3 * one.norm()
    left = {path.name for folder in (small_talk.experiments, small_talk.checkpoints) for path in folder.glob("EXP-*")}
    assert left == {alone, record.id, f"{alone}.yaml", f"{record.id}.yaml"}


def test_a_command_that_runs_in_one_process_is_refused_on_two(workspace: Workspace) -> None:
    """As a person starts it: interpreters of their own."""
    words = ["torch.distributed.run", *TWO, "-m", "aletheia", "merge", "--profile", "small"]
    environment = os.environ | {"ALETHEIA_ROOT": str(workspace.root)}
    refused = subprocess.run(
        [sys.executable, "-m", *words], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode and refused.stderr.count("error: merge runs in one process; try") == 1
    assert not refused.stdout
