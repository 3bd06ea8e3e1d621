"""Promise 5: a run that was interrupted, killed or torn, and resumed, equals the one that was not."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aletheia.cli import main
from pipeline import statistics
from pipeline.errors import Interrupted, UserError
from pipeline.profile import load_profile
from pipeline.progress import Progress
from pipeline.records.file import RecordFile
from pipeline.records.find import records, sha256
from pipeline.records.lifecycle import Record, liveness
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.train import curves, heldout, watch
from pipeline.train.checkpoints import NEEDED, SEAL, newest_sealed
from pipeline.train.trainer import StepTrainer
from pipeline.workspace import Workspace
from tests.forked import Forked

Command = Callable[[], Forked]
DEADLINE = 120.0  # seconds; far more than any machine needs


def wait_until(run: Forked, condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + DEADLINE
    while not condition():
        assert run.poll() is None, f"it ended first: {run.communicate()[1]}"
        assert time.monotonic() < ends
        time.sleep(0.005)


def steps_logged(folder: Path) -> int:
    return sum(len(log.read_text().splitlines()) for log in folder.glob("EXP-*/log.jsonl"))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def curve(folder: Path) -> list[dict[str, Any]]:
    """Every line, a step's and a validation's, but how long it took and in how much memory."""
    clock = ("seconds", "tokens_per_second", "all_tokens_per_second", "memory_gb", "energy_kwh")
    return [{k: v for k, v in line.items() if k not in clock} for line in log_of(folder)]


SETTINGS = (
    *("training_data.validation.fraction=0.34", "sft_config.epochs=2.0"),
    *("sft_config.save_steps=3", "sft_config.lora_dropout=0.2"),
)
"""4 steps an epoch, so that a checkpoint lies in the middle of one."""


def slowly() -> None:
    """The command, so slow that a signal comes in the middle of it, in however few steps: it waits and computes nothing."""
    honest = StepTrainer.training_step

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return honest(self, *arguments, **options)

    StepTrainer.training_step = training_step  # type: ignore[method-assign]
    main()


@pytest.fixture
def sft(small_talk: Workspace, tmp_path: Path) -> Iterator[Command]:
    """The command in a process of its own, to be stopped."""
    started: list[Forked] = []

    def start() -> Forked:
        words = [word for setting in SETTINGS for word in ("--set", setting)]
        environment = os.environ | {"ALETHEIA_ROOT": str(small_talk.root)}
        command = ("sft", "--profile", "small", *words)
        started.append(Forked(tmp_path / "said", *command, environment=environment, main=slowly))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(module_talk: Workspace) -> Record:
    return run_stage(Sft, Job(module_talk, load_profile(module_talk, "small", list(SETTINGS))))


def assert_equals_uninterrupted(resumed: Record, whole: Record) -> None:
    """Bit for bit: the adapter, every step and validation on the way, every held-out row."""
    for path in sorted((whole.output / "adapter").iterdir()):
        assert (resumed.output / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name
    assert curve(resumed.folder) == curve(whole.folder)
    assert (resumed.folder / "heldout.jsonl").read_bytes() == (whole.folder / "heldout.jsonl").read_bytes()

    def told(results: dict[str, Any]) -> dict[str, Any]:
        takes = ("seconds", "predicted", "predicted_and_actual")
        return results | {"training": {k: v for k, v in results["training"].items() if k not in takes}}

    facts, expected = RecordFile(resumed.file.path).facts(), RecordFile(whole.file.path).facts()
    assert facts is not None and expected is not None
    assert told(facts.results) == told(expected.results)
    assert not list(resumed.output.glob("checkpoint-*"))


def test_run_stopped_by_sigterm_and_resumed_equals_uninterrupted(
    small_talk: Workspace, job: Callable[..., Job], sft: Command, uninterrupted: Record
) -> None:
    run = sft()
    wait_until(run, lambda: steps_logged(small_talk.experiments) >= 1)
    run.send_signal(signal.SIGTERM)
    out, errors = run.communicate(timeout=DEADLINE)
    assert run.returncode == 130 and out == ""
    assert errors.splitlines()[-1].startswith("error: interrupted by SIGTERM after step ")
    assert errors.splitlines()[-1].endswith("/8; RESUME=1 (--resume) goes on from there")
    assert next(records(small_talk))[1].status == "cancelled"

    resumed = run_stage(Sft, job(resume=True))
    assert [change.status for change in resumed.facts.history] == ["running", "cancelled", "running", "complete"]
    assert_equals_uninterrupted(resumed, uninterrupted)


def test_killed_run_resumed_past_a_torn_checkpoint_equals_uninterrupted(
    small_talk: Workspace,
    job: Callable[..., Job],
    sft: Command,
    uninterrupted: Record,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = sft()
    wait_until(run, lambda: bool(list(small_talk.checkpoints.glob(f"EXP-*/checkpoint-3/{SEAL}"))))
    run.kill()
    run.communicate(timeout=DEADLINE)
    file, facts = next(records(small_talk))
    assert facts.status == "running" and liveness(facts) == "dead"

    output = small_talk.checkpoints / file.id
    torn = shutil.copytree(output / "checkpoint-3", output / "checkpoint-5")  # sealed, and then cut short
    os.truncate(torn / "optimizer.pt", (torn / "optimizer.pt").stat().st_size // 2)
    with (file.folder / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # the line it was writing
    resumed = run_stage(Sft, job(resume=True))
    assert resumed.id == file.id
    said = capsys.readouterr().err
    assert "note: checkpoint-5 is torn and passed over" in said and "goes on from checkpoint-3" in said
    assert_equals_uninterrupted(resumed, uninterrupted)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "ref").mkdir(parents=True)
    for name in (*NEEDED, "ref/adapter.safetensors"):
        (path / name).write_text(f"{name} at {step}")
    names = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
    (path / SEAL).write_text(json.dumps({name: sha256(path / name) for name in names}))
    return path


TEARS: dict[str, Callable[[Path], Any]] = {
    "no seal": lambda path: (path / SEAL).unlink(),
    "half a seal": lambda path: os.truncate(path / SEAL, 40),
    "a file gone": lambda path: (path / "ref/adapter.safetensors").unlink(),
    "a file cut short": lambda path: os.truncate(path / "optimizer.pt", 3),
    "a byte changed": lambda path: (path / "optimizer.pt").write_text("Optimizer.pt at 100"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_torn_checkpoints_are_passed_over_aloud(tmp_path: Path, tear: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path, 20)
    older, newer = checkpoint(tmp_path, 99), checkpoint(tmp_path, 100)
    assert newest_sealed(tmp_path) == newer  # by number: "99" > "100" as text
    TEARS[tear](newer)
    assert newest_sealed(tmp_path) == older
    assert capsys.readouterr().err == "note: checkpoint-100 is torn and passed over\n"


def test_no_whole_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    assert newest_sealed(tmp_path) is None
    (checkpoint(tmp_path, 3) / SEAL).unlink()
    assert newest_sealed(tmp_path) is None


OWN_BASE = ("base_model=own-base", "sft_config.epochs=1.0", "training_data.max_reject_share=0.5")


@pytest.fixture(scope="module")
def stopped(module_talk: Workspace, shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run on a base of its own, with a row rejected, that was stopped in its first step."""
    root = tmp_path_factory.mktemp("stopped") / "root"
    shutil.copytree(module_talk.root, root, ignore=shutil.ignore_patterns("experiments", "checkpoints"))
    shutil.copytree(shallow, root / "own-base")
    forged = {
        "id": "forged",
        "messages": [{"role": "user", "content": "<|EOT|>"}, {"role": "assistant", "content": "So."}],
    }
    (root / "data/sft/forged.jsonl").write_text(json.dumps(forged) + "\n")
    honest = StepTrainer.training_step

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *arguments, **options)

    workspace = Workspace(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTrainer, "training_step", training_step)
        with pytest.raises(Interrupted, match="after step 1/5"):
            run_stage(Sft, Job(workspace, load_profile(workspace, "small", list(OWN_BASE))))
    return workspace


@pytest.fixture
def interrupted(stopped: Workspace, tmp_path: Path) -> Workspace:
    """That run, to go on with."""
    return Workspace(shutil.copytree(stopped.root, tmp_path / "interrupted", symlinks=True))


def of(workspace: Workspace, *assignments: str) -> Job:
    """To resume what was stopped there."""
    return Job(workspace, load_profile(workspace, "small", list(assignments)), resume=True)


def test_a_resume_takes_up_its_overrides_and_counts_nothing_twice(interrupted: Workspace) -> None:
    resumed = run_stage(Sft, of(interrupted))
    assert resumed.facts.overrides == of(interrupted, *OWN_BASE).profile.overrides
    assert [line["step"] for line in curve(resumed.folder)] == [1, 2, 3, 4, 5]
    assert curve(resumed.folder)[-1]["tokens"] == resumed.facts.results["training"]["trained_tokens_an_epoch"]
    assert len((resumed.folder / "rejects.jsonl").read_text().splitlines()) == 1
    assert resumed.facts.data["rejected"] == 1
    with pytest.raises(
        UserError, match=r"nothing to resume: it is complete; try make sft PROFILE=small, without RESUME"
    ):
        run_stage(Sft, of(interrupted))


@pytest.mark.parametrize("changed", ["rows", "base", "setting"])
def test_a_resume_of_what_has_changed_since_is_refused(interrupted: Workspace, changed: str) -> None:
    assignments: tuple[str, ...] = ()
    if changed == "rows":
        rows = interrupted.root / "data/sft/few.jsonl"
        rows.write_text("".join(rows.read_text("utf-8").splitlines(keepends=True)[1:]), "utf-8")
        said = r"the train rows changed since the run began \(10 rows then, 9 now\)"
    elif changed == "base":
        path = interrupted.root / "own-base/model.safetensors"
        weights = bytearray(path.read_bytes())
        weights[-1] ^= 1
        path.write_bytes(weights)
        said = "the weights of own-base changed since the run began"
    else:
        assignments, said = (*OWN_BASE, "seed=7"), "seed is 7, the run to resume has 42"
    with pytest.raises(UserError, match=said):
        run_stage(Sft, of(interrupted, *assignments))


HELD_OUT = ("training_data.validation.fraction=0.3", "sft_config.save_steps=100", "sft_config.lora_dropout=0.3")
"""7 rows to train in 4 steps an epoch, 3 held out; with dropout, so that a draw more or less would show."""


def run(job: Callable[..., Job], *assignments: str, **options: Any) -> Record:
    return run_stage(Sft, job(*HELD_OUT, *assignments, **options))


A_ROW_A_PASS = ("sft_config.epochs=2.0", "sft_config.pass_tokens=1")


@pytest.fixture(scope="module")
def whole(module_talk: Workspace) -> Record:
    """Two epochs, not interrupted; each row has a pass of its own."""
    return run_stage(Sft, Job(module_talk, load_profile(module_talk, "small", [*HELD_OUT, *A_ROW_A_PASS])))


def adapter(record: Record) -> bytes:
    return (record.output / "adapter" / "adapter_model.safetensors").read_bytes()


def validations(record: Record) -> list[dict[str, Any]]:
    return [line for line in log_of(record.folder) if "eval_loss" in line]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The held-out rows' losses, a list each time they are measured."""
    honest, seen = heldout.losses, list[list[float]]()

    def losses(*arguments: Any) -> list[float]:
        seen.append(honest(*arguments))
        return seen[-1]

    monkeypatch.setattr(heldout, "losses", losses)
    return seen


def test_every_epoch_is_validated_once_and_changes_nothing(
    small_talk: Workspace, job: Callable[..., Job], measured: list[list[float]]
) -> None:
    record = run(job, "sft_config.epochs=3.0")
    before, *epochs = measured
    found = validations(record)
    assert [(line["epoch"], line["step"], line["eval_n"]) for line in found] == [(1.0, 4, 3), (2.0, 8, 3), (3.0, 12, 3)]
    for line, losses in zip(found, epochs, strict=True):  # the last is the figure after, and measured once
        figure = statistics.mean(losses)
        assert [line["eval_loss"], line["eval_loss_ci_low"], line["eval_loss_ci_high"]] == [
            figure.value,
            figure.ci_low,
            figure.ci_high,
        ]
    results = record.facts.results
    assert results["eval_loss"]["before"]["value"] == statistics.mean(before).value
    assert results["eval_loss"]["after"]["value"] == found[-1]["eval_loss"]
    assert results["training"]["latest"] == {key: found[-1][key] for key in ("epoch", "step", "eval_loss")}
    assert results["training"]["best"]["eval_loss"] == min(line["eval_loss"] for line in found)

    measured.clear()
    unwatched = run(job, "sft_config.epochs=3.0", "sft_config.evaluate_each_epoch=false")
    assert [line["step"] for line in validations(unwatched)] == [12] and len(measured) == 2
    assert adapter(unwatched) == adapter(record)
    assert validations(unwatched) == found[-1:]


def test_nothing_held_out_is_nothing_validated(small_talk: Workspace, job: Callable[..., Job]) -> None:
    record = run(job, "training_data.validation.fraction=0.0", "sft_config.epochs=1.0")
    assert validations(record) == [] and not {"best", "latest"} & record.facts.results["training"].keys()


def test_a_part_of_an_epoch_is_validated_at_its_end(small_talk: Workspace, job: Callable[..., Job]) -> None:
    record = run(job, "sft_config.epochs=1.5")
    assert [(line["epoch"], line["step"]) for line in validations(record)] == [(1.0, 4), (1.5, 6)]


@pytest.mark.parametrize(("rows", "drawn"), [(1, "true"), (3, "false")])
def test_a_stop_in_a_validation_ends_it_and_a_resume_makes_up_for_it(
    small_talk: Workspace,
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    whole: Record,
    rows: int,
    drawn: str,
) -> None:
    """Stopped after the first row, or after the last, when the measurement is whole."""
    modes = list[bool]()

    class Stopping(Progress):
        def advance(self, done: int | None = None, note: str = "") -> None:
            if self.description == "held-out rows, epoch 1" and done == rows:
                os.kill(os.getpid(), signal.SIGTERM)

    honest = watch.Watch.validate

    def validate(self: Any, model: Any, *arguments: Any) -> Any:
        try:
            return honest(self, model, *arguments)
        finally:
            modes.append(model.training)

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "Progress", Stopping)
        patch.setattr(watch.Watch, "validate", validate)
        with pytest.raises(Interrupted, match=r"interrupted by SIGTERM after step 4/8; RESUME=1"):
            run(job, *A_ROW_A_PASS, f"telemetry.curves={drawn}")
    assert modes == [True]
    file, facts = next(records(small_talk))
    assert facts.status == "cancelled"
    assert [line["step"] for line in log_of(file.folder) if "eval_loss" in line] == [4] * (rows == 3)
    assert facts.results["training"]["steps"] == 4
    pictures = [small_talk.experiments / picture.path for picture in facts.visualizations]
    assert len(pictures) == 4 * (drawn == "true")
    assert all(path.parent == file.folder and path.exists() for path in pictures)

    resumed = run(job, *A_ROW_A_PASS, resume=True)  # nothing is drawn a second time: four seconds
    assert resumed.id == file.id and adapter(resumed) == adapter(whole)
    assert curve(resumed.folder) == curve(whole.folder)
    seconds = [line["seconds"] for line in log_of(resumed.folder) if "loss" in line]
    assert seconds == sorted(seconds) and resumed.facts.results["training"]["seconds"] == round(seconds[-1], 2)
    assert resumed.facts.results["training"]["best"] == whole.facts.results["training"]["best"]


def test_a_run_cut_off_after_its_last_step_is_validated_once_when_it_goes_on(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, whole: Record
) -> None:
    """Its adapter could not be written; nothing is left to train and the log already holds the last validation."""
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("pipeline.train.adapter.keep", full)
        with pytest.raises(OSError, match="No space left"):
            run(job, *A_ROW_A_PASS)
    resumed = run_stage(Sft, job(resume=True))
    assert curve(resumed.folder) == curve(whole.folder)
    assert adapter(resumed) == adapter(whole)
    assert resumed.facts.results["eval_loss"] == whole.facts.results["eval_loss"]


def test_a_line_of_the_log_holds_what_the_step_moved_and_cost(small_talk: Workspace, job: Callable[..., Job]) -> None:
    record = run(job, "sft_config.gradient_accumulation=2", "sft_config.max_grad_norm=0.01", "sft_config.epochs=2.0")
    steps = [line for line in log_of(record.folder) if "loss" in line]
    an_epoch = record.facts.results["training"]["trained_tokens_an_epoch"]
    assert [line["tokens"] for line in steps if line["epoch"].is_integer()] == [an_epoch, 2 * an_epoch]
    for line in steps:
        layers = line["grad_norm_by_layer"]
        assert list(layers) == [f"layers.{n}" for n in range(len(layers))] and len(layers) > 1
        assert math.hypot(*layers.values()) == pytest.approx(line["grad_norm"], rel=1e-4)
        assert line["grad_norm"] > 0.01  # clipped, and told as it was before
        assert line["tokens_per_second"] > 0 and 0.1 < line["memory_gb"] < 100
        assert (line["update_norm"] > 0) == (line["learning_rate"] > 0)


def test_curves_that_cannot_be_drawn_fail_nothing(
    small_talk: Workspace, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(curves, "draw", broken)
    record = run(job, "sft_config.epochs=1.0", "telemetry.curves=true")
    assert record.facts.status == "complete" and record.facts.visualizations == []
    assert "note: the curves could not be drawn (ValueError: no such font)" in capsys.readouterr().err
