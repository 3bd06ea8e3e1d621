"""Promise 5, resume is exact: killed outright at ten random moments, and resumed each time, equals uninterrupted."""

import json
import random
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError
from pipeline.records.find import records, resumable
from pipeline.records.lifecycle import Record, liveness
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train.checkpoints import step_of
from pipeline.workspace import Workspace
from tests import forked

KILLS = 10
SETTINGS = ("sft_config.epochs=6.0", "sft_config.save_steps=1", "sft_config.lora_dropout=0.2")
CLOCK = ("seconds", "tokens_per_second", "all_tokens_per_second", "memory_gb", "energy_kwh")


def train(job: Job) -> None:
    import torch

    torch.set_num_threads(1)
    run_stage(Sft, job)


def curve(record: Record) -> list[dict[str, Any]]:
    lines = map(json.loads, (record.folder / "log.jsonl").read_text("utf-8").splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def begun(workspace: Workspace) -> bool:
    try:
        resumable(workspace, "small", "sft")
    except UserError:
        return False
    return True


def saved(workspace: Workspace, whole: Record) -> int:
    """The last step that the killed run has a checkpoint of."""
    found = workspace.checkpoints.glob("EXP-*/checkpoint-*/")
    return max((step_of(folder) for folder in found if folder.parent.name != whole.id), default=0)


def test_killed_at_ten_random_moments_and_resumed_equals_uninterrupted(
    small_talk: Workspace, job: Callable[..., Job]
) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run_stage(Sft, job(*SETTINGS))
        step = whole.facts.resources["wall_seconds"] / 30
        moments = random.Random(7)
        killed = taken_up = 0
        for _ in range(KILLS):
            resume, before = begun(small_talk), saved(small_talk, whole)
            wanted = before + moments.choice((0, 0, 1, 2, 3))  # counted in steps: a slow machine gets as far
            process = forked.context().Process(target=train, args=(job(*SETTINGS, resume=resume),))
            process.start()
            while process.is_alive() and saved(small_talk, whole) < wanted:
                time.sleep(0.03)  # a look costs a millisecond, and a slow machine is looked at for long
            time.sleep(moments.uniform(0, step))
            killed += process.is_alive()
            taken_up += resume and wanted > before
            process.kill()
            process.join()
            if not process.exitcode:
                break  # it was done before
        file, facts = next(records(small_talk))
        if liveness(facts) != "complete":
            run_stage(Sft, job(*SETTINGS, resume=True))
    finally:
        torch.set_num_threads(threads)
    assert killed >= KILLS // 2  # so many were in the middle of it
    resumed = Record(file, file.facts(), small_talk, None)  # type: ignore[arg-type]
    assert file.id != whole.id and sum(c.note == "resumed" for c in resumed.facts.history) >= taken_up > 1
    assert curve(resumed) == curve(whole)
    for path in sorted((whole.output / "adapter").iterdir()):
        assert (resumed.output / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name
