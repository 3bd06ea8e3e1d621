"""Promise 5: a run that was interrupted, killed or torn, and resumed, equals the one that was not."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted, UserError
from pipeline.model import Base
from pipeline.records.file import RecordFile
from pipeline.records.find import records, sha256
from pipeline.records.lifecycle import Record, liveness
from pipeline.sft import Sft
from pipeline.stage import Job, run_stage
from pipeline.training import SEAL, newest_sealed
from pipeline.workspace import Workspace

Command = Callable[..., "subprocess.Popen[str]"]
DEADLINE = 120.0  # seconds; far more than any machine needs


def wait_until(run: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + DEADLINE
    while not condition():
        assert run.poll() is None, f"it ended first: {run.communicate()[1]}"
        assert time.monotonic() < ends
        time.sleep(0.005)


def steps_logged(folder: Path) -> int:
    return sum(len(log.read_text().splitlines()) for log in folder.glob("EXP-*/log.jsonl"))


def curve(folder: Path) -> list[dict[str, Any]]:
    """Step, loss and rate of each step; not how long they took."""
    entries = map(json.loads, (folder / "log.jsonl").read_text("utf-8").splitlines())
    return [{key: e[key] for key in ("step", "loss", "learning_rate", "grad_norm")} for e in entries if "loss" in e]


def assert_equals_uninterrupted(resumed: Record, trained: Any) -> None:
    """Bit for bit: the adapter, every loss on the way, every held-out row."""
    whole = trained.record("sft")
    for path in sorted(trained.output("sft").iterdir()):
        assert (resumed.output / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name
    assert curve(resumed.folder) == curve(whole.folder)
    assert (resumed.folder / "heldout.jsonl").read_bytes() == (whole.folder / "heldout.jsonl").read_bytes()

    def told(results: dict[str, Any]) -> dict[str, Any]:
        return results | {"training": {k: v for k, v in results["training"].items() if k != "seconds"}}

    facts = RecordFile(resumed.file.path).facts()
    assert facts is not None
    assert told(facts.results) == told(whole.facts().results)
    assert not list(resumed.output.glob("checkpoint-*"))


def test_run_stopped_by_sigterm_and_resumed_equals_uninterrupted(
    workspace: Workspace, job: Callable[..., Job], command: Command, trained: Any
) -> None:
    run = command("sft", "--profile", "small")
    wait_until(run, lambda: steps_logged(workspace.experiments) >= 1)
    run.send_signal(signal.SIGTERM)
    out, errors = run.communicate(timeout=DEADLINE)
    assert run.returncode == 130 and out == ""
    assert errors.splitlines()[-1].startswith("error: interrupted by SIGTERM after step ")
    assert errors.splitlines()[-1].endswith("/10; RESUME=1 goes on from there")
    assert next(records(workspace))[1].status == "cancelled"

    resumed = run_stage(Sft, job(resume=True))
    assert [change.status for change in resumed.facts.history] == ["running", "cancelled", "running", "complete"]
    assert_equals_uninterrupted(resumed, trained)


def test_killed_run_resumed_past_a_torn_checkpoint_equals_uninterrupted(
    workspace: Workspace,
    job: Callable[..., Job],
    command: Command,
    trained: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = command("sft", "--profile", "small")
    wait_until(run, lambda: bool(list(workspace.checkpoints.glob(f"EXP-*/checkpoint-4/{SEAL}"))))
    run.kill()
    run.communicate(timeout=DEADLINE)
    file, facts = next(records(workspace))
    assert facts.status == "running" and liveness(facts) == "dead"

    output = workspace.checkpoints / file.id
    torn = shutil.copytree(output / "checkpoint-4", output / "checkpoint-7")  # sealed, and then cut short
    os.truncate(torn / "optimizer.pt", (torn / "optimizer.pt").stat().st_size // 2)
    with (file.folder / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')  # the line it was writing
    resumed = run_stage(Sft, job(resume=True))
    assert resumed.id == file.id
    said = capsys.readouterr().err
    assert "note: checkpoint-7 is torn and passed over" in said and "goes on from checkpoint-4" in said
    assert_equals_uninterrupted(resumed, trained)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "ref").mkdir(parents=True)
    for name in ("adapter.safetensors", "optimizer.pt", "ref/adapter.safetensors"):
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


@pytest.fixture
def interrupted(small_talk: Workspace, job: Callable[..., Job], base: Base, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on a base of its own, with a row rejected, that was stopped in its first step. Returns the base's folder."""
    from trl import SFTTrainer

    folder = shutil.copytree(base.folder, small_talk.root / "own-base")
    forged = {
        "id": "forged",
        "messages": [{"role": "user", "content": "<|EOT|>"}, {"role": "assistant", "content": "So."}],
    }
    (small_talk.root / "data/sft/forged.jsonl").write_text(json.dumps(forged) + "\n")
    honest = SFTTrainer.training_step

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", training_step)
        with pytest.raises(Interrupted, match="after step 1/5"):
            run_stage(Sft, job(*OWN_BASE))
    return folder


OWN_BASE = ("base_model=own-base", "sft_config.epochs=1.0", "training_data.max_reject_share=0.5")


def test_a_resume_takes_up_its_overrides_and_counts_nothing_twice(
    interrupted: Path, small_talk: Workspace, job: Callable[..., Job]
) -> None:
    resumed = run_stage(Sft, job(resume=True))
    assert resumed.facts.overrides == job(*OWN_BASE).profile.overrides
    assert [entry["step"] for entry in curve(resumed.folder)] == [1, 2, 3, 4, 5]
    assert len((resumed.folder / "rejects.jsonl").read_text().splitlines()) == 1
    assert resumed.facts.data["rejected"] == 1
    with pytest.raises(
        UserError, match=r"nothing to resume: it is complete; try make sft PROFILE=small, without RESUME"
    ):
        run_stage(Sft, job(resume=True))


@pytest.mark.parametrize("changed", ["rows", "base", "setting"])
def test_a_resume_of_what_has_changed_since_is_refused(
    interrupted: Path, small_talk: Workspace, job: Callable[..., Job], changed: str
) -> None:
    assignments: tuple[str, ...] = ()
    if changed == "rows":
        rows = small_talk.root / "data/sft/few.jsonl"
        rows.write_text("".join(rows.read_text("utf-8").splitlines(keepends=True)[1:]), "utf-8")
        said = r"the train rows changed since the run began \(11 rows then, 10 now\)"
    elif changed == "base":
        weights = bytearray((interrupted / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (interrupted / "model.safetensors").write_bytes(weights)
        said = "the weights of own-base changed since the run began"
    else:
        assignments, said = (*OWN_BASE, "seed=7"), "seed is 7, the run to resume has 42"
    with pytest.raises(UserError, match=said):
        run_stage(Sft, job(*assignments, resume=True))
