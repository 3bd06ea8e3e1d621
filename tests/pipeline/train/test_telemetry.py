"""What TensorBoard, MLflow and W&B show of a training: written by the real libraries, and read back through them."""

import json
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import Interrupted, StageFailed
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record, StopRequest
from pipeline.records.schema import Facts, StatusChange
from pipeline.train import telemetry
from pipeline.train.telemetry import GpuSampler, Telemetry
from pipeline.workspace import CHECKOUT, Workspace
from tests.aletheia.exp.test_export_wandb import read as read_wandb

EXP = "EXP-2026-01-01-001"
NOTHING = config.Telemetry(tensorboard=False)
BOARD = config.Telemetry()
MLFLOW = config.Telemetry(tensorboard=False, mlflow="sqlite:///experiments/mlflow.db")
WANDB = config.Telemetry(tensorboard=False, wandb="trials")


def step(number: int, loss: float | None = None) -> dict[str, Any]:
    layers = {"layers.0": 0.25, "other": 0.5}
    return {"step": number, "loss": number / 2 if loss is None else loss, "grad_norm_by_layer": layers}


def validation(number: int) -> dict[str, Any]:
    return {"step": number, "epoch": 1.0, "eval_loss": number / 4, "eval_loss_ci_low": 0.125}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    (tmp_path / "experiments").mkdir()
    weights = {f"R&D, part {n}": 2.0 for n in range(20)}
    sft = config.SftConfig(domain_weights=weights)
    profile = config.Profile(name="small", base_model="tiny", sft_config=sft).model_dump(mode="json")
    history = [StatusChange(status="running", at="2026-01-01T10:00:00Z", host="here")]
    facts = Facts(status="running", stage="sft", profile="small", configuration=profile, history=history)
    return Record(RecordFile(tmp_path / "experiments" / f"{EXP}.yaml"), facts, Workspace(tmp_path), StopRequest())


def train(record: Record, settings: config.Telemetry, lines: list[dict[str, Any]], after: int = 0) -> None:
    """As the trainer does it: the log is cut to the checkpoint, and each line is in it before it is shown."""
    log = record.folder / "log.jsonl"
    kept = [text for text in log.read_text().splitlines() if json.loads(text)["step"] <= after] if log.exists() else []
    log.write_text("".join(f"{text}\n" for text in kept))
    with Telemetry(settings, record) as shown:
        for line in lines:
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
            shown.write(line)


def on_board(record: Record) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(record.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_every_number_of_the_log(record: Record) -> None:
    odd = {"step": 3, "loss": float("nan"), "epoch": None, "rows": ["a"], "done": True}
    train(record, BOARD, [step(1), step(2), validation(2), odd, {"loss": 1.0}, {"step": "4", "loss": 1.0}])
    found = on_board(record)
    assert [number for number, _ in found["train/loss"]] == [1, 2, 3]
    assert [value for _, value in found["train/loss"]][:2] == [0.5, 1.0]
    assert found["train/loss"][2][1] != found["train/loss"][2][1]  # NaN
    del found["train/loss"]
    assert found == {
        "grad_norm_by_layer/layers.0": [(1, 0.25), (2, 0.25)],
        "grad_norm_by_layer/other": [(1, 0.5), (2, 0.5)],
        "train/epoch": [(2, 1.0)],
        "eval/loss": [(2, 0.5)],
        "eval/loss_ci_low": [(2, 0.125)],
    }


def test_a_step_is_on_the_board_before_the_next_one_begins(record: Record) -> None:
    with Telemetry(BOARD, record) as shown:
        for number in (1, 2):
            shown.write(step(number))
            assert on_board(record)["train/loss"][-1] == (number, number / 2)


def test_steps_that_a_resume_takes_again_stand_once_on_the_board(record: Record) -> None:
    train(record, BOARD, [step(n) for n in range(1, 6)] + [validation(5)])
    (events,) = (record.folder / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-3])  # killed while it wrote
    train(record, BOARD, [step(n, loss=9.0) for n in (4, 5, 6)], after=3)
    found = on_board(record)
    assert found["train/loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0), (5, 9.0), (6, 9.0)]
    assert "eval/loss" not in found or found["eval/loss"] == []
    train(record, BOARD, [step(1, loss=7.0)], after=0)  # no checkpoint was left
    assert on_board(record)["train/loss"] == [(1, 7.0)]


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_said_once_and_stops_nothing(
    record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    with Telemetry(BOARD, record) as shown:
        shown.write(step(1))
        (events,) = (record.folder / "tensorboard").iterdir()
        with no_file_beyond(events.stat().st_size + 20):
            shown.write(step(2))
        for number in range(3, 6):
            shown.write(step(number))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("note: TensorBoard: OSError: ")
    assert on_board(record)["train/loss"] == [(1, 0.5)]  # what was whole is still read


def test_a_folder_that_cannot_be_made_is_said_once(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    (record.folder / "tensorboard").write_text("in the way")
    train(record, BOARD, [step(1), step(2)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("note: TensorBoard: ")


def test_a_stop_request_inside_is_no_failure_of_a_sink(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def signal_arrives(*_: Any) -> None:
        raise Interrupted("interrupted by SIGTERM")

    monkeypatch.setattr(telemetry.EventFile, "write", signal_arrives)
    with Telemetry(BOARD, record) as shown, pytest.raises(Interrupted):
        shown.write(step(1))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: making them takes seconds."""
    from pipeline.train.trackers import mlflow_client

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_runs(record: Record, empty_store: Path) -> Callable[[], list[Any]]:
    shutil.copy(empty_store, record.workspace.experiments / "mlflow.db")

    def runs() -> list[Any]:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{record.workspace.experiments}/mlflow.db")
        experiment = client.get_experiment_by_name("small")
        found = client.search_runs([experiment.experiment_id])
        for run in found:
            history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
            run.curves = {key: [(m.step, m.value) for m in metrics] for key, metrics in history.items()}
        return list(found)

    return runs


def test_mlflow_has_one_run_a_record_named_as_an_export_would_name_it(
    record: Record, mlflow_runs: Callable[[], list[Any]]
) -> None:
    train(record, MLFLOW, [step(1), step(2), validation(2), step(3, loss=float("inf"))])
    (run,) = mlflow_runs()
    assert (run.info.run_name, run.info.status) == (EXP, "FINISHED")
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    started = "2026-01-01T10:00:00Z here"
    assert tags == {"id": EXP, "started": started, "stage": "sft", "profile": "small", "live": "true"}
    assert run.data.params["sft_config.learning_rate"] == "0.0002"
    assert run.data.params["sft_config.domain_weights.R_D_ part 19"] == "2.0"
    assert len(run.data.params) > 100  # more than one request takes
    assert run.curves == {
        "log/loss": [(1, 0.5), (2, 1.0)],
        "log/grad_norm_by_layer.layers.0": [(1, 0.25), (2, 0.25), (3, 0.25)],
        "log/grad_norm_by_layer.other": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "log/epoch": [(2, 1.0)],
        "log/eval_loss": [(2, 0.5)],
        "log/eval_loss_ci_low": [(2, 0.125)],
    }
    where = record.facts.external["mlflow"]
    assert (where["run_id"], where["live"]) == (run.info.run_id, True)
    assert where["uri"] == f"sqlite:///{record.workspace.experiments}/mlflow.db"  # not where one happens to stand


def test_a_resume_goes_on_with_the_same_mlflow_run_and_doubles_no_step(
    record: Record, mlflow_runs: Callable[[], list[Any]]
) -> None:
    with suppress(Interrupted), Telemetry(MLFLOW, record) as shown:
        for number in range(1, 6):
            shown.write(step(number))
        raise Interrupted("interrupted by SIGTERM")
    assert [run.info.status for run in mlflow_runs()] == ["KILLED"]
    train(record, MLFLOW, [step(n) for n in (4, 5)] + [validation(5), step(6)], after=3)
    (run,) = mlflow_runs()
    assert run.info.status == "FINISHED"
    assert run.curves["log/loss"] == [(n, n / 2) for n in range(1, 7)]
    assert run.curves["log/eval_loss"] == [(5, 1.25)]


def test_an_exported_run_is_not_written_into(record: Record, mlflow_runs: Callable[[], list[Any]]) -> None:
    train(record, MLFLOW, [step(1)])
    from mlflow import MlflowClient

    (run,) = mlflow_runs()
    MlflowClient(tracking_uri=record.facts.external["mlflow"]["uri"]).delete_tag(run.info.run_id, "live")
    train(record, MLFLOW, [step(2)], after=1)
    (live,) = (found for found in mlflow_runs() if found.info.run_id != run.info.run_id)
    assert live.curves["log/loss"] == [(1, 0.5), (2, 1.0)]


def test_a_run_that_someone_deleted_is_written_anew_from_the_log(
    record: Record, mlflow_runs: Callable[[], list[Any]]
) -> None:
    train(record, MLFLOW, [step(1), step(2)])
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=record.facts.external["mlflow"]["uri"]).delete_run(mlflow_runs()[0].info.run_id)
    train(record, MLFLOW, [step(3)], after=2)
    (run,) = mlflow_runs()
    assert run.curves["log/loss"] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_a_training_that_fails_is_a_failed_run(record: Record, mlflow_runs: Callable[[], list[Any]]) -> None:
    with suppress(StageFailed), Telemetry(MLFLOW, record) as shown:
        shown.write(step(1))
        raise StageFailed("loss is nan", step=2)
    assert [run.info.status for run in mlflow_runs()] == ["FAILED"]


class Shaky:
    """A server that is down at first, and once more later; it keeps what it was sent."""

    name, key = "Shaky", "shaky"

    def __init__(self) -> None:
        self.fails = iter([True, True, False, True, False])
        self.got: list[tuple[int, bool]] = []

    def load(self) -> None: ...

    def open(self) -> bool:
        self._answer()
        return True

    def send(self, lines: Any) -> None:
        self._answer()
        self.got += [line.place for line in lines]

    def close(self, status: str) -> None: ...

    def where(self) -> None: ...

    def _answer(self) -> None:
        if next(self.fails, False):
            raise ConnectionError("down")


def test_a_server_that_comes_back_gets_what_it_missed_in_order_and_once(
    record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Shaky()
    monkeypatch.setattr(telemetry, "trackers", lambda *_: [server])
    monkeypatch.setattr(telemetry, "AGAIN", 0.05)
    monkeypatch.setattr(telemetry, "EVERY", 0.05)
    with Telemetry(NOTHING, record) as shown:
        shown.write(step(1))
        wait_for(lambda: len(server.got) == 1)
        for line in (step(2), validation(2), step(3)):
            shown.write(line)
        wait_for(lambda: len(server.got) == 4)
    assert server.got == [(1, False), (2, False), (2, True), (3, False)]
    said = capsys.readouterr().err
    assert said == "note: Shaky: ConnectionError: down; the training goes on, and its steps are in log.jsonl\n"


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("uri", ["http://ada:pass-word@127.0.0.1:9", "runs"])
def test_a_server_that_is_not_there_is_said_once_without_its_password(
    record: Record, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = config.Telemetry.model_construct(tensorboard=True, mlflow=uri, wandb=None)
    train(record, settings, [step(1), step(2)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("note: MLflow: ")
    assert "pass-word" not in said
    assert "pass-word" not in json.dumps(record.facts.external)
    assert on_board(record)["train/loss"] == [(1, 0.5), (2, 1.0)]  # the others are not concerned


def test_a_server_that_never_answers_holds_up_neither_a_step_nor_the_end(
    record: Record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = config.Telemetry(tensorboard=False, mlflow=f"http://127.0.0.1:{server.getsockname()[1]}")
        with Telemetry(settings, record) as shown:
            started = time.monotonic()
            for number in range(100):
                shown.write(step(number))
        assert time.monotonic() - started < 2
        said = capsys.readouterr().err
        assert (said.count("\n"), said.startswith("note: MLflow: no answer")) == (1, True)


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    wandb.teardown()  # what it read of the environment in an earlier test
    yield
    wandb.teardown()


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_offline_has_one_run_whose_steps_a_resume_does_not_double(
    record: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    hooks = sys.exit, sys.excepthook
    with suppress(Interrupted), Telemetry(WANDB, record) as shown:
        for line in [step(1), step(2), validation(2), step(3)]:
            with (record.folder / "log.jsonl").open("a") as out:
                out.write(json.dumps(line) + "\n")
            shown.write(line)
        raise Interrupted("interrupted by SIGTERM")
    (first,) = (record.folder / "wandb").glob("offline-run-*")
    assert read_wandb(first)["exit"] == 1
    train(record, WANDB, [step(3), step(4)], after=2)
    (run,) = (record.folder / "wandb").glob("offline-run-*")
    found = read_wandb(run)  # of the name that the first had, where both began within a second
    layers = {"log/grad_norm_by_layer.layers.0": 0.25, "log/grad_norm_by_layer.other": 0.5}
    held_out = {"log/epoch": 1.0, "log/eval_loss": 0.5, "log/eval_loss_ci_low": 0.125}
    assert found["history"] == {
        1: {"log/loss": 0.5} | layers,
        2: {"log/loss": 1.0} | layers | held_out,
        3: {"log/loss": 1.5} | layers,
        4: {"log/loss": 2.0} | layers,
    }
    assert (found["run"].project, found["run"].display_name, found["run"].job_type) == ("trials", EXP, "sft")
    assert found["config"]["sft_config"]["learning_rate"] == 2e-4
    assert found["exit"] == 0
    assert record.facts.external["wandb"] == {
        "project": "trials",
        "run_id": found["run"].run_id,
        "live": True,
        "path": record.workspace.shown(run),
    }
    assert first.name.endswith(found["run"].run_id)
    assert (sys.exit, sys.excepthook) == hooks
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("wandb_offline")
def test_what_was_uploaded_already_is_not_written_again(record: Record) -> None:
    train(record, WANDB, [step(1), step(2)])
    (first,) = (record.folder / "wandb").glob("offline-run-*")
    next(first.glob("*.wandb")).with_suffix(".wandb.synced").touch()
    time.sleep(1.1)  # its folder's name has the second in it
    train(record, WANDB, [step(2), step(3)], after=1)
    (second,) = {*(record.folder / "wandb").glob("offline-run-*")} - {first}
    assert list(read_wandb(second)["history"]) == [3]


@pytest.mark.usefixtures("wandb_offline")
@pytest.mark.parametrize("mode", ["disabled", "online"])
def test_wandb_that_is_off_is_quiet_and_one_without_a_key_is_said_once(
    record: Record, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train(record, WANDB, [step(1), step(2)])
    said = capsys.readouterr().err
    assert said.count("\n") == (mode == "online")
    assert ("no API key" in said) == (mode == "online")
    assert not (record.folder / "wandb").exists()


@pytest.mark.usefixtures("wandb_offline", "mlflow_runs")
def test_nothing_of_it_draws_from_the_generators_that_training_draws_from(record: Record) -> None:
    import numpy
    import torch

    def states() -> tuple[Any, ...]:
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    for thread in threading.enumerate():
        if thread.name.startswith("telemetry "):  # of the test with a server that never answers: its retries draw
            thread.join(60)
    before = states()
    train(record, config.Telemetry(mlflow=MLFLOW.mlflow, wandb="trials"), [step(1), validation(1)])
    assert states() == before
    assert {*record.facts.external} == {"mlflow", "wandb"}
    assert on_board(record)["train/loss"] == [(1, 0.5)]


def test_what_the_profile_does_not_name_is_neither_imported_nor_written(record: Record) -> None:
    train(record, NOTHING, [step(1)])
    assert {path.name for path in record.folder.iterdir()} == {"log.jsonl"}
    script = (
        "import sys; from types import SimpleNamespace; from pathlib import Path\n"
        "from pipeline import config; from pipeline.train.telemetry import GpuSampler, Telemetry\n"
        "with Telemetry(config.Telemetry(), SimpleNamespace(folder=Path(sys.argv[1]))) as shown:\n"
        "    shown.write({'step': 1, 'loss': 2.0} | GpuSampler().read())\n"
        "print(sorted({'mlflow', 'wandb', 'torch', 'tensorflow', 'pandas', 'pynvml'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(record.folder)], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert on_board(record)["train/energy_kwh"]


def test_on_a_cpu_a_step_s_line_has_the_energy_so_far_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.records import energy

    busy = [100.0]
    monkeypatch.setattr(energy, "_cpu_seconds", lambda: busy[0])
    sampler = GpuSampler(before=0.5)
    assert sampler.read() == {"energy_kwh": 0.5}
    busy[0] += 3600  # an hour of one core at 10 W
    sampler.begin()
    assert sampler.read() == {"energy_kwh": 0.51}


class Nvml(SimpleNamespace):
    """A driver with two GPUs, of which torch sees the second: it uses 300 W, the first 5 W."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_GPU_UTILIZATION_SAMPLES = 1
    watts: dict[str, float]
    clock = staticmethod(time.time_ns)

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        tenths = self.clock() // 100_000_000  # it moves ten times a second
        return int(self.watts[gpu] * tenths * 100)  # mJ

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return int(self.watts[gpu] * 1000)

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        return SimpleNamespace(used=17_000_000_000)

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        return SimpleNamespace(gpu=33)

    def nvmlDeviceGetSamples(self, gpu: str, kind: int, since: int) -> Any:
        taken = [(at, value) for at, value in self.samples if at > since]
        if not taken:
            raise self.NVMLError("not found")
        return 1, [SimpleNamespace(timeStamp=at, sampleValue=SimpleNamespace(uiVal=value)) for at, value in taken]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    import torch

    driver = Nvml(watts={"GPU-first": 5.0, "GPU-second": 300.0}, samples=[])
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="second"))
    return driver


@pytest.mark.parametrize("seconds", [0.05, 4.0])
def test_power_and_utilisation_are_those_of_the_step_on_the_gpus_that_torch_sees(
    nvml: Nvml, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_767_261_600_000_000_000]
    nvml.clock = monkeypatch_clock = lambda: now[0]  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(time, "time_ns", monkeypatch_clock)
    sampler = GpuSampler()
    now[0] += 5_000_000_000  # a validation, between two steps
    sampler.begin()
    began = now[0] // 1000
    nvml.samples = [(began - 100, 0), (began + 20_000, 80), (began + 40_000, 100)]
    now[0] += int(seconds * 1e9)
    found = sampler.read()
    assert found["gpu_power_w"] == pytest.approx(300, rel=0.01)
    assert (found["gpu_utilisation"], found["gpu_memory_gb"]) == (90.0, 17.0)
    assert found["energy_kwh"] == pytest.approx(300 * (5 + seconds) / 3.6e6, rel=0.2)
    nvml.samples = []  # a step shorter than the driver's pace: what it says of this moment
    assert sampler.read()["gpu_utilisation"] == 33.0


def test_a_gpu_that_does_not_tell_is_left_out_and_not_counted_as_nothing(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise nvml.NVMLError("not supported")

    for name in ("TotalEnergyConsumption", "PowerUsage", "UtilizationRates"):
        monkeypatch.setattr(Nvml, f"nvmlDeviceGet{name}", refused)
    assert GpuSampler().read() == {}
    monkeypatch.setattr(Nvml, "nvmlDeviceGetHandleByUUID", refused)
    assert GpuSampler().read() == {}
