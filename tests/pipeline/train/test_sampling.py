"""Sampling by domain in real trainings: rows met, steps announced and taken, an interrupted run like an uninterrupted one."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pipeline.dpo import Dpo
from pipeline.errors import Interrupted
from pipeline.records.lifecycle import Record
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train.trainer import StepTrainer
from pipeline.workspace import Workspace

SAMPLED = ("sft_config.domain_sampling={often: 2.0, seldom: 0.5}", "sft_config.epochs=2.0")
"""4 rows of `often`, 4 of `seldom`, 2 of `plain`: 8 + 2 + 2 an epoch, in 6 steps of two."""


def label(path: Path, domains: list[str]) -> None:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [json.dumps(row | {"domain": domain}) + "\n" for row, domain in zip(rows, domains, strict=True)]
    path.write_text("".join(lines), "utf-8")


@pytest.fixture
def domains(small_talk: Workspace) -> Workspace:
    for kind, rest in (("sft", 2), ("dpo", 1)):
        sizes = {"often": 4, "seldom": 4, "plain": rest} if kind == "sft" else {"often": 2, "seldom": 3, "plain": rest}
        label(small_talk.root / f"data/{kind}/few.jsonl", list(Counter(sizes).elements()))
    return small_talk


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each step that is taken."""
    honest, seen = StepTrainer.training_step, list[list[int]]()

    def training_step(self: Any, model: Any, rows: list[int], *arguments: Any) -> Any:
        seen.append(rows)
        return honest(self, model, rows, *arguments)

    monkeypatch.setattr(StepTrainer, "training_step", training_step)
    return seen


def steps(record: Record) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (record.folder / "log.jsonl").read_text("utf-8").splitlines()]


def test_what_is_announced_is_what_is_trained(
    domains: Workspace, job: Callable[..., Job], met: list[list[int]]
) -> None:
    announced = dict(Sft.prepare(job(*SAMPLED)).plan())
    assert announced["sampling"] == "often × 2, seldom × 0.5: an epoch meets 12 rows, of 10 to train"
    assert announced["steps"].startswith("12 of 2 rows, the first 1 warm up")
    record = run_stage(Sft, job(*SAMPLED))
    told = record.facts.results["training"]
    assert told["steps"] == len(met) == 12
    assert [step["epoch"] for step in steps(record)][5::6] == [1.0, 2.0]
    assert told["rows_met"] == {"often": 16, "plain": 4, "seldom": 4}
    assert steps(record)[5]["tokens"] == told["trained_tokens_an_epoch"]
    times_met = Counter(chain(*met))
    often, plain, seldom = ({row for row, times in times_met.items() if times == n} for n in (4, 2, 1))
    assert (len(often), len(plain), len(seldom)) == (4, 2, 4)  # all of the seldom ones, half in each epoch
    assert announced["tokens"].endswith(f", {2 * told['trained_tokens_an_epoch']} of them supervised")


def test_without_sampling_nothing_is_said_of_it(domains: Workspace, job: Callable[..., Job]) -> None:
    assert "sampling" not in dict(Sft.prepare(job()).plan())


def test_a_sampled_run_that_was_interrupted_goes_on_with_its_rows(
    domains: Workspace, job: Callable[..., Job], met: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SAMPLED, "sft_config.lora_dropout=0.3")
    whole = run_stage(Sft, job(*settings))
    rows, met[:] = met[:], []
    taken = StepTrainer.training_step

    def training_step(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "training_step", training_step)
        with pytest.raises(Interrupted, match="after step 8/12"):
            run_stage(Sft, job(*settings))
    resumed = run_stage(Sft, job(resume=True))
    assert met == rows
    assert [step["loss"] for step in steps(resumed)] == [step["loss"] for step in steps(whole)]
    assert resumed.facts.results["training"]["rows_met"] == whole.facts.results["training"]["rows_met"]
    first, second = (r.output / "adapter" / "adapter_model.safetensors" for r in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()


def test_pairs_are_sampled_too(domains: Workspace, job: Callable[..., Job], met: list[list[int]]) -> None:
    """2 × 3 and 3 / 3 and 1: 8 pairs, in 4 steps."""
    sampling = "dpo_config.domain_sampling={often: 3.0, seldom: 0.34}"
    record = run_stage(Dpo, job(sampling, source="base"))
    assert record.facts.results["training"]["rows_met"] == {"often": 6, "plain": 1, "seldom": 1}
    assert len(met) == 4 and all(len(set(step)) == 2 for step in met)
