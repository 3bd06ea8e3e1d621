"""Promise 5 for the merge: killed at any moment it leaves nothing that looks finished, and goes on to the same bytes."""

import io
import json
import os
import pydoc
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted, StageFailed, UserError
from pipeline.merge import Merge
from pipeline.merging.shards import shards
from pipeline.model import Base
from pipeline.records import find
from pipeline.records.find import artifacts, records
from pipeline.records.lifecycle import liveness
from pipeline.stage import Job, run_stage
from tests import forked

SETTINGS = ("merge_config.check_logits=false",)
ROOM = 500_000  # bytes of a file, where the disk is full: too few for one with weights


@dataclass(frozen=True)
class Moment:
    """Before (or after) the nth call of a function, of those with an argument that ends so."""

    function: str
    nth: int = 1
    of: str = ""
    after: bool = False
    by: int = signal.SIGKILL
    named: bool = False  # the folder has its name by then


CHECKED = "pipeline.merging.receipt.WeightCheck.receipt"  # all tensors have passed
CHECKER = "pipeline.merging.receipt.WeightCheck.compare"  # in a process of its own, which is killed then

# in the order of a merge, each run going on from where the one before was stopped
MOMENTS = [
    Moment("pipeline.merging.shards._changed", nth=3),  # in the middle of the second file; of the first nothing changes
    Moment("pipeline.merging.shards.Journal.add"),  # it is on the disk, and nothing says so
    Moment("os.replace", of="merge.json"),
    Moment("os.replace", of="merge.json", after=True),
    Moment("pipeline.merging.shards._changed", nth=2, by=signal.SIGTERM),
    Moment("a full disk"),
    Moment("pipeline.merging.shards.Journal.add", after=True),
    Moment("pipeline.merge.Merge._write_the_rest", after=True),
    Moment("pipeline.progress.Progress.advance", nth=5),  # tensors that have passed
    Moment(CHECKER),
    Moment("os.rename", of="/model"),
    Moment("os.rename", of="/model", after=True, named=True),
    Moment("pipeline.merge._put", after=True, by=signal.SIGTERM, named=True),
]


def merge(job: Job, moment: Moment | None) -> None:
    """In a process of its own, which ends itself at that moment."""
    import torch

    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    if moment and moment.function == "a full disk":
        begin = Merge._begin

        def fill(merge: Merge, *arguments: Any) -> None:
            begin(merge, *arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

        Merge._begin = fill  # type: ignore[assignment, method-assign]
    elif moment:
        end_at(moment)
    try:
        run_stage(Merge, job)
    except (Interrupted, OSError) as error:
        sys.exit(3 if isinstance(error, Interrupted) else 4)


def end_at(moment: Moment) -> None:
    path, name = moment.function.rsplit(".", 1)
    owner = pydoc.locate(path)
    honest, calls = getattr(owner, name), 0

    def ending(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += any(str(argument).endswith(moment.of) for argument in arguments)
        now = calls == moment.nth and any(str(argument).endswith(moment.of) for argument in arguments)
        if now and not moment.after:
            os.kill(os.getpid(), moment.by)
        result = honest(*arguments, **named)
        if now and moment.after:
            os.kill(os.getpid(), moment.by)
        return result

    setattr(owner, name, ending)


def run(job: Job, moment: Moment | None) -> int:
    """Its exit code: negative, the signal that ended it."""
    process = forked.context().Process(target=merge, args=(job, moment))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def in_shards(trained_copy: Any, base: Base, tmp_path: Path) -> Callable[..., Job]:
    """`in_shards("merge_config.…", resume=True)`: a merge into the base in several files, as if trained on it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "in-shards"
    AutoModelForCausalLM.from_pretrained(base.folder).save_pretrained(folder, max_shard_size="2MB")
    base.tokenizer().save_pretrained(folder)
    assert len(shards(folder)) == 3 and all(path.stat().st_size > 2 * ROOM for path in shards(folder))
    for stage in ("sft", "dpo"):
        facts = trained_copy.record(stage).facts()
        facts.lineage.base |= {"sha256": replace(base, folder=folder).identity()["sha256"]}
        trained_copy.record(stage).write(facts)

    def job(*settings: str, **options: Any) -> Job:
        made: Job = trained_copy.job(f"base_model={folder}", *SETTINGS, *settings, **options)
        return made

    return job


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_at_every_stage_of_it_nothing_looks_finished_and_resumed_it_is_the_same_bytes(
    in_shards: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_stage(Merge, in_shards())
    expected = files(whole.output / "model")
    workspace = whole.workspace
    link = workspace.checkpoints / "small-merged"
    known: dict[str, str] = {}
    for number, moment in enumerate(MOMENTS):
        code = run(in_shards(resume=number > 0), moment)
        assert code == {"a full disk": 4, CHECKER: 1}.get(moment.function, 3 if moment.by == signal.SIGTERM else -9), (
            moment
        )
        file, facts = next(records(workspace))
        reads = {-9: "dead", 3: "cancelled", 4: "failed", 1: "failed"}[code]
        assert file.id != whole.id and liveness(facts) == reads, moment
        output = workspace.checkpoints / file.id
        assert (output / "model").exists() == moment.named, moment
        if moment.named:  # whole and checked: only the record does not say so yet
            assert files(output / "model") == expected
        assert link.resolve() == whole.output / "model"  # only what is complete has the name
        assert find.source(workspace, "small", ["merge"], None)[0].id == whole.id  # what serve and eval take
        journal = output / "merge.json"
        if journal.exists():
            now = json.loads(journal.read_text())["files"]
            assert known.items() <= now.items()  # what is whole stays
            known = now
    assert len(known) == len(shards(Path(in_shards().config.base_model)))

    resumed = run_stage(Merge, in_shards(resume=True))
    assert resumed.id == file.id and resumed.facts.status == "complete"
    assert files(resumed.output / "model") == expected
    assert [path.name for path in resumed.output.iterdir()] == ["model"]
    assert resumed.facts.results["receipt"] == whole.facts.results["receipt"]
    assert resumed.facts.data == whole.facts.data
    ours = {Path(a.path).name: a.sha256 for a in resumed.facts.artifacts}
    assert ours == {Path(a.path).name: a.sha256 for a in whole.facts.artifacts}
    assert sum(change.note == "resumed" for change in resumed.facts.history) == len(MOMENTS)
    with pytest.raises(UserError, match="nothing to resume: it is complete"):
        run_stage(Merge, in_shards(resume=True))


def test_files_of_another_adapter_or_arithmetic_or_that_changed_are_not_gone_on_with(
    in_shards: Callable[..., Job], trained_copy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(in_shards(), Moment(CHECKED)) == -signal.SIGKILL
    file, _ = next(records(trained_copy.workspace))
    output = trained_copy.workspace.checkpoints / file.id
    number = len(json.loads((output / "merge.json").read_text())["files"])
    with pytest.raises(UserError, match=r"merge_config\.arithmetic is 'peft', the run to resume has 'float32'"):
        run_stage(Merge, in_shards("merge_config.arithmetic=peft", resume=True))
    with pytest.raises(UserError, match="the run to resume began from"):
        run_stage(Merge, in_shards(resume=True, source=trained_copy.sft))

    torn = sorted(output.glob("model.partial/*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-1])
    assert run(in_shards(resume=True), Moment(CHECKED)) == -signal.SIGKILL
    assert len(json.loads((output / "merge.json").read_text())["files"]) == number
    content = bytearray(torn.read_bytes())
    content[-1] ^= 1
    torn.write_bytes(content)
    capsys.readouterr()
    mended = run_stage(Merge, in_shards(resume=True))
    assert f"goes on with {number - 1} of {number} files, whole by their hashes" in capsys.readouterr().err

    # the adapter was made anew meanwhile
    assert run(in_shards(), Moment(CHECKED)) == -signal.SIGKILL
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(trained_copy.output("sft") / name, trained_copy.output("dpo") / name)
    facts = trained_copy.record("dpo").facts()
    facts.artifacts = artifacts(trained_copy.workspace, trained_copy.output("dpo"))
    trained_copy.record("dpo").write(facts)
    anew = run_stage(Merge, in_shards(resume=True))
    assert f"goes on with 0 of {number} files" in capsys.readouterr().err
    assert anew.id != mended.id and files(anew.output / "model") != files(mended.output / "model")


def test_a_merge_that_its_receipt_refused_is_not_gone_on_with(
    in_shards: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are what the journal says, and wrong."""
    from pipeline.merging.update import LowRank

    honest = LowRank.merged
    monkeypatch.setattr(LowRank, "merged", lambda update, *given: honest(update, *given).mul_(2))
    with pytest.raises(StageFailed, match="away from base"):
        run_stage(Merge, in_shards())
    monkeypatch.undo()
    assert run_stage(Merge, in_shards(resume=True)).facts.status == "complete"
    assert "goes on with 0 of" in capsys.readouterr().err


def test_what_lies_there_by_the_models_name_is_replaced_aloud(
    in_shards: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a record whose file was deleted, say: its id comes again."""
    honest = Merge._begin

    def begin(merge: Merge, folder: Path, *arguments: Any) -> None:
        folder.mkdir()
        (folder / "old.safetensors").write_bytes(b"old")
        honest(merge, folder, *arguments)

    monkeypatch.setattr(Merge, "_begin", begin)
    record = run_stage(Merge, in_shards())
    assert not (record.output / "model" / "old.safetensors").exists()
    assert [path.name for path in record.output.iterdir()] == ["model"]
    assert f"note: replaces {record.output / 'model'}" in capsys.readouterr().err
