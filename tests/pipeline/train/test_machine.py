"""The machine at hand, and the pace of past records on it."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.train.footprint import Shape
from pipeline.train.machine import CARD, MOST_PAST, Machine, past, this_machine
from pipeline.workspace import Workspace

HERE = Machine("cpu", socket.gethostname(), 10**9)
CONFIGURATION = {"device": "auto", "sft_config": {"batch_size": 2, "gradient_accumulation": 3}}
TRAINING = {"seconds": 20.0, "steps": 5, "predicted": {"flops": 4e9, "memory_gb_by_shape": 0.5, "memory_gb": 9.0}}
USED = {"peak_memory_gb": 0.6, "gpu_peak_memory_gb": 0.4, "wall_seconds": 40.0, "energy": {"kwh": 1e-4}}


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    (tmp_path / "experiments").mkdir()
    return Workspace(tmp_path)


@pytest.fixture
def trained(place: Workspace) -> Callable[..., str]:
    """`trained(3, training={…}, status="failed")`: a record with the number 3, of this machine; its id."""

    def make(number: int, training: Any = TRAINING, **facts: Any) -> str:
        file = RecordFile(place.experiments / f"EXP-2026-11-20-{number:03d}.yaml")
        file.path.write_bytes(b"# mine\n")
        whole = {"status": "complete", "stage": "sft", "profile": "small", "resources": USED}
        whole |= {"configuration": CONFIGURATION, "environment": {"host": HERE.name}}
        file.write(Facts(**whole | {"results": {"training": training}} | facts))
        return file.id

    return make


def test_a_record_tells_pace_memory_and_power(place: Workspace, trained: Callable[..., str]) -> None:
    name = trained(1)
    [found] = past(place, "small", "sft", HERE)
    assert found.id == name
    assert found.memory == pytest.approx(0.6 / 0.5)  # of what the shape had said, not of what was already corrected
    assert found.rate == pytest.approx(4e9 / 20)
    assert found.seconds_a_row == pytest.approx(20 / (5 * 2 * 3))
    assert found.watts == pytest.approx(1e-4 * 3.6e6 / 40)


def test_an_older_record_still_tells_its_pace(place: Workspace, trained: Callable[..., str]) -> None:
    trained(1, training={"seconds": 20.0, "steps": 5})
    [found] = past(place, "small", "sft", HERE)
    assert (found.memory, found.rate) == (None, None)
    assert found.seconds_a_row == pytest.approx(20 / 30)


def test_only_runs_like_this_one_count(place: Workspace, trained: Callable[..., str]) -> None:
    trained(1, status="failed")
    trained(2, stage="dpo")
    trained(3, profile="other")
    trained(4, environment={"host": "elsewhere"})
    trained(5, environment={"host": HERE.name, "gpus": ["NVIDIA H200"]})
    on_cpu = trained(6, environment={"host": HERE.name, "gpus": ["NVIDIA H200"]}, configuration={"device": "cpu"})
    assert [p.id for p in past(place, "small", "sft", HERE)] == [on_cpu]


def test_on_a_gpu_its_name_counts_and_its_own_memory(place: Workspace, trained: Callable[..., str]) -> None:
    trained(1)
    there = trained(2, environment={"host": "elsewhere", "gpus": ["NVIDIA H200"]})
    trained(3, environment={"host": HERE.name, "gpus": ["NVIDIA L4"]})
    [found] = past(place, "small", "sft", Machine("cuda", "NVIDIA H200", 10**11))
    assert (found.id, found.memory) == (there, pytest.approx(0.4 / 0.5))
    assert past(place, "small", "sft", CARD) == []


def test_the_newest_few_count(place: Workspace, trained: Callable[..., str]) -> None:
    ids = [trained(number) for number in range(1, MOST_PAST + 3)]
    assert [p.id for p in past(place, "small", "sft", HERE)] == ids[:-6:-1]


def test_a_peak_that_may_be_an_earlier_stages_is_not_taken(place: Workspace, trained: Callable[..., str]) -> None:
    trained(1, resources=USED | {"peak_memory_note": "of the process since it started, earlier stages included"})
    assert past(place, "small", "sft", HERE)[0].memory is None


@pytest.mark.parametrize(
    "training", [None, 5, [1], {}, {"seconds": "x", "steps": 0}, {"seconds": 0, "predicted": 3}, {"predicted": {}}]
)
def test_a_record_of_odd_results_tells_nothing(place: Workspace, trained: Callable[..., str], training: Any) -> None:
    trained(1, training=training, resources={"energy": [], "wall_seconds": 0}, configuration={"sft_config": 1})
    [found] = past(place, "small", "sft", HERE)
    assert (found.memory, found.rate, found.seconds_a_row, found.watts) == (None, None, None, None)


def test_a_cpu_is_what_this_one_has() -> None:
    machine = this_machine("cpu")
    assert (machine.device, machine.name, machine.here) == ("cpu", socket.gethostname(), True)
    assert 0 < machine.memory < psutil.virtual_memory().total
    assert machine.watts == 10.0 * machine.threads


def test_a_gpu_that_is_not_there_is_reckoned_with_and_not_measured() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert this_machine("cuda") is CARD
    assert this_machine("auto").device == "cpu"


def test_the_rate_is_measured_at_once_and_of_the_right_size() -> None:
    import time

    import torch

    def shape(hidden: int, ffn: int) -> Shape:
        return Shape(1, (), 1, hidden, ffn, 1, hidden, hidden, 1, "fp32")

    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    a @ b
    taken = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - started)
    started = time.perf_counter()
    rate = HERE.rate(shape(1024, 1024), "fp32")
    assert time.perf_counter() - started < 2
    assert rate is not None
    assert 0.2 < rate / (2 * 1024**3 / min(taken)) < 5
    assert CARD.rate(shape(1024, 1024), "fp32") is None
