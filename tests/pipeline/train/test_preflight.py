"""A training's needs, predicted: what is said before, what stands in the record, and how it compares afterwards."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.errors import UserError
from pipeline.stage import Job
from pipeline.train import footprint, machine, preflight
from pipeline.train.fit import Lengths
from pipeline.train.footprint import Linear, Shape
from pipeline.train.machine import CARD, Machine, Past
from pipeline.train.plan import plan, steps_in_all
from pipeline.train.preflight import check, check_disk, predict

if TYPE_CHECKING:
    from tests.conftest import Trained

LENGTHS = Lengths([100, 200, 300, 400] * 10, [250] * 6, supervised=5_000)
LINEARS = tuple(
    Linear(f"layers.{i}.{name}", into, out)
    for i in range(4)
    for name, into, out in [("attention.q", 512, 512), ("mlp.up", 512, 1400), ("mlp.down", 1400, 512)]
)
SHAPE = Shape(20_000_000, LINEARS, 4, 512, 1400, 8, 512, 512, 8000, "bf16")
GPU = Machine("cuda", "NVIDIA H200", 10**11, watts=700.0)
RATE = 1e12


@pytest.fixture
def predicted(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> Callable[..., preflight.Prediction]:
    """`predicted("sft_config.epochs=1.0", past=[…])`: on a GPU of 1 TFLOP/s with these past records."""

    def make(*assignments: str, past: Any = (), stage: str = "sft", **options: Any) -> preflight.Prediction:
        monkeypatch.setattr(Machine, "rate", lambda self, shape, precision: RATE if self.here else None)
        monkeypatch.setattr(preflight, "past", lambda *_: list(past))
        given: dict[str, Any] = {"lengths": LENGTHS, "shape": SHAPE, "machine": GPU} | options
        return predict(job(*assignments), stage, **given)

    return make


def test_steps_batch_and_tokens_are_those_that_will_be(predicted: Callable[..., preflight.Prediction]) -> None:
    found = predicted("sft_config.batch_size=3", "sft_config.gradient_accumulation=2", "sft_config.epochs=1.5")
    assert found.steps == len(plan(found.task.config, [""] * 40, seed=0)) == steps_in_all(found.task.config, 40)
    assert (found.tokens, found.supervised) == (15_000, 7_500)
    rows = dict(found.rows())
    assert rows["steps"].startswith(f"{found.steps} of 6 rows, the first 1 warm up; fewer than 20 steps")
    assert rows["tokens"] == "15,000, 7,500 of them supervised"


def test_warm_up_is_what_transformers_makes_of_it(predicted: Callable[..., preflight.Prediction]) -> None:
    from transformers import TrainingArguments

    for ratio in (0.0, 0.05, 0.3):
        found = predicted(f"sft_config.warmup_ratio={ratio}")
        arguments = TrainingArguments(output_dir="nowhere", warmup_steps=ratio, use_cpu=True)
        assert found.warmup_steps == arguments.get_warmup_steps(found.steps)


def test_time_energy_and_cost_follow_from_the_work(predicted: Callable[..., preflight.Prediction]) -> None:
    found = predicted("sft_config.epochs=2.0", "cost.gpu_hour=3.0", "cost.kwh=0.5")
    work = 2 * footprint.training_flops(SHAPE, found.task.lora, found.setup, LENGTHS.train, 5_000)
    assert found.seconds == pytest.approx(work / (0.4 * RATE))
    measured = 3 * footprint.forward_flops(SHAPE, LENGTHS.held_out, 750)  # before, and after each epoch
    in_all = (work + measured) / (0.4 * RATE)
    assert found.seconds_in_all == pytest.approx(in_all)
    assert found.kwh == pytest.approx(in_all * 700 / 3.6e6)
    assert found.cost == pytest.approx(in_all / 3600 * 3.0 + in_all * 700 / 3.6e6 * 0.5)
    assert "at 40% of the measured matmul rate of 1,000 GFLOP/s, assumed" in dict(found.rows())["time"]


def test_the_reference_of_dpo_is_measured_once_and_holds_no_memory(
    predicted: Callable[..., preflight.Prediction],
) -> None:
    found, orpo = predicted(stage="dpo"), predicted("dpo_config.loss_type=orpo", stage="dpo")
    reference = footprint.forward_flops(SHAPE, LENGTHS.train, 5_000)
    assert found.measuring - orpo.measuring == pytest.approx(reference)
    assert found.memory["reference"] == 0


def record(number: int, **told: Any) -> Past:
    return replace(Past(f"EXP-2026-11-20-{number:03d}", None, None, None, None), **told)


def test_past_records_correct_memory_pace_and_power(predicted: Callable[..., preflight.Prediction]) -> None:
    plain = predicted()
    known = [record(3, memory=1.1, rate=5e11), record(2, memory=1.3, rate=7e11, watts=500.0), record(1, memory=9.0)]
    found = predicted(past=known)
    assert found.memory_bytes == pytest.approx(1.3 * plain.memory_bytes)
    assert found.memory == plain.memory
    assert found.seconds == pytest.approx(plain.flops / 6e11)
    assert found.watts == 500.0
    rows = dict(found.rows())
    assert rows["memory from"] == "the model's shape, × 1.30 as measured in EXP-2026-11-20-003 and 2 before it"
    assert rows["time"].endswith("at the pace of EXP-2026-11-20-003 and 1 before it")
    assert rows["energy"].endswith("at 500 W as before")


def test_an_older_records_pace_is_that_of_its_rows(predicted: Callable[..., preflight.Prediction]) -> None:
    found = predicted("sft_config.epochs=3.0", past=[record(1, seconds_a_row=0.5)])
    assert found.seconds == pytest.approx(0.5 * 40 * 3)


def test_without_the_gpu_memory_is_predicted_and_time_is_not(predicted: Callable[..., preflight.Prediction]) -> None:
    found = predicted(machine=CARD)
    rows = dict(found.rows())
    assert rows["memory"].endswith(" of 22.8 GB on a 24 GB card")
    assert rows["time"] == "unknown: there is no such GPU here to measure"
    assert (found.seconds, found.kwh, found.cost) == (None, None, None)
    assert "energy" not in rows and "cost" not in rows


def test_what_has_not_been_counted_is_called_about(predicted: Callable[..., preflight.Prediction]) -> None:
    rows = dict(predicted(lengths=replace(LENGTHS, supervised=None, counted=False)).rows())
    assert rows["tokens"] == "about 20,000"


def test_the_record_holds_what_a_later_prediction_reads(
    predicted: Callable[..., preflight.Prediction], trained_record: Callable[[dict[str, Any]], Past]
) -> None:
    found = predicted(past=[record(1, memory=1.5)])
    read_back = trained_record(found.facts())
    raw = sum(found.memory.values()) / 1e9
    assert read_back.memory == pytest.approx(3.0 / raw, rel=1e-3)
    assert read_back.rate == pytest.approx(found.flops / 60, rel=1e-3)


@pytest.fixture
def trained_record(tmp_path: Path) -> Callable[[dict[str, Any]], Past]:
    """A complete training of 60 s and 3 GB on the GPU, with this prediction in it, as `past` tells of it."""
    from pipeline.records.file import RecordFile
    from pipeline.records.schema import Facts
    from pipeline.workspace import Workspace

    def make(facts: dict[str, Any]) -> Past:
        (tmp_path / "experiments").mkdir()
        file = RecordFile(tmp_path / "experiments" / "EXP-2026-11-20-001.yaml")
        file.path.write_bytes(b"# mine\n")
        results = {"training": {"seconds": 60.0, "predicted": facts}}
        used, where = {"gpu_peak_memory_gb": 3.0}, {"gpus": [GPU.name]}
        file.write(
            Facts(status="complete", stage="sft", profile="p", results=results, resources=used, environment=where)
        )
        [told] = machine.past(Workspace(tmp_path), "p", "sft", GPU)
        return told

    return make


def test_predicted_stands_against_actual(predicted: Callable[..., preflight.Prediction]) -> None:
    found = predicted()
    compared = found.against(memory_gb=found.memory_bytes / 1e9 * 1.25, seconds=2 * (found.seconds or 0))
    assert set(compared) == {"memory_gb", "seconds"}
    assert compared["memory_gb"]["ratio"] == pytest.approx(1.25, rel=1e-3)
    assert compared["seconds"]["ratio"] == pytest.approx(2)
    assert set(found.against(disk_gb=1.0)) == {"disk_gb"}
    assert predicted(machine=CARD).against(seconds=3.0) == {}  # none was predicted


def test_the_disk_is_what_checkpoints_take(predicted: Callable[..., preflight.Prediction]) -> None:
    adapter = 4 * SHAPE.trainable(predicted().task.lora)
    assert predicted().disk_needed() == 3 * (3 * adapter) + 3 * adapter


def test_a_disk_that_is_too_small_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    check_disk(3 * 10**9, tmp_path / "not" / "yet" / "there")
    with pytest.raises(UserError, match=r"checkpoints need 4\.5 GB and 3\.0 GB are free; try freeing 1\.5 GB"):
        check_disk(4_500_000_000, tmp_path / "not" / "yet" / "there")


def test_what_cannot_fit_is_refused_before_anything_is_fetched(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import model

    wanted = job("quantization=none")
    monkeypatch.setattr(model, "read_config", lambda *_: None)
    monkeypatch.setattr(Shape, "of", lambda *_: SHAPE)
    monkeypatch.setattr(preflight, "this_machine", lambda device: GPU)
    check(wanted, "sft")
    monkeypatch.setattr(preflight, "this_machine", lambda device: replace(GPU, memory=10**7))
    with pytest.raises(UserError, match=r"^configs/small.yaml: sft: a row of 2,048 tokens needs .* has 0\.01 GB; try "):
        check(wanted, "sft")
    monkeypatch.setattr(preflight, "this_machine", lambda device: replace(CARD, memory=10**7))
    check(wanted, "sft")  # what is missing is the GPU, and `find_base` says so


def test_a_real_training_takes_about_what_was_predicted(trained: "Trained") -> None:
    """Of a model this small most is the libraries; that the order of magnitude holds is all that can be asked."""
    facts = trained.record("sft").facts()
    assert facts is not None
    training = facts.results["training"]
    predicted, actual = training["predicted"], training["predicted_and_actual"]
    assert predicted["tokens"] > predicted["supervised_tokens"] > 0
    assert 0.3 < actual["memory_gb"]["ratio"] < 5
    assert 0.02 < actual["seconds"]["ratio"] < 50
    assert training["pass_tokens"] <= 2 * 2048
