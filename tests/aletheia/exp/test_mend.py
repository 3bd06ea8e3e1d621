import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from aletheia.exp.mend import renumber
from pipeline.errors import UserError
from pipeline.records import find
from pipeline.records.file import LINE, RecordFile, split
from pipeline.records.schema import Artifact, Facts
from pipeline.workspace import Workspace

DAY = "EXP-2026-01-01"
ONE, TWO, THREE, FOUR = (f"{DAY}-00{n}" for n in (1, 2, 3, 4))
MARK = LINE.encode() + b"\n"
Run = Callable[..., Any]
WriteRecord = Callable[..., RecordFile]


def facts_of(file: RecordFile) -> Facts:
    facts = file.facts()
    assert facts is not None
    return facts


def running(**changes: Any) -> dict[str, Any]:
    """Facts of a run, by default of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pid = gone.pid
    change = {
        "status": "running",
        "at": "2026-01-01T00:00:00Z",
        "host": socket.gethostname(),
        "pid": pid,
        "started": 1.0,
    }
    return {"status": "running", "history": [change | changes]}


# ── repair ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_repair_closes_dead_runs_with_their_last_step_and_leaves_the_others(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    me = psutil.Process()
    dead = write_record(
        place, ONE, running() | {"results": {"loss": 2.5}}, log=[{"step": 7}, {"step": 8}, '{"step": 9']
    )
    of_parent = write_record(place, TWO, running() | {"stage": "dpo", "lineage": {"parent": FOUR}})
    alive = write_record(place, THREE, running(pid=me.pid, started=me.create_time()))
    write_record(place, FOUR, {"stage": "pipeline"})
    elsewhere = write_record(place, f"{DAY}-005", running(host="elsewhere"))
    write_record(place, f"{DAY}-006", None)
    before = [file.path.read_bytes() for file in (alive, elsewhere)]
    said = aletheia(place, "exp", "repair")
    assert said.code == 0
    assert [line.split("  ", 1) for line in said.out.splitlines()[1:]] == [
        [f"{DAY}-005", "left as it is: running on elsewhere"],
        [TWO, f"closed as failed; aletheia exp run {FOUR} goes on"],
        [ONE, f"closed as failed after step 8; aletheia exp run {ONE} goes on"],
    ]
    facts = facts_of(dead)
    assert (facts.status, facts.results) == ("failed", {"loss": 2.5})
    assert facts.failure is not None
    assert (facts.failure.kind, facts.failure.step) == ("ProcessGone", 8)
    assert facts_of(of_parent).status == "failed"
    assert [file.path.read_bytes() for file in (alive, elsewhere)] == before
    again = aletheia(place, "exp", "repair")
    assert TWO not in again.out


def test_repair_of_named_records_says_what_it_left(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    write_record(place, ONE)
    write_record(place, TWO, None)
    said = aletheia(place, "exp", "repair", ONE, TWO, "--json")
    assert json.loads(said.out) == [
        {"id": ONE, "done": "left as it is: complete"},
        {"id": TWO, "done": "left as it is: planned"},
    ]
    assert aletheia(place, "exp", "repair").err == "no run is dead\n"
    assert aletheia(place, "exp", "repair", THREE).code == 2


def test_repair_of_a_record_in_mid_edit_waits_beside_it(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    file = write_record(place, ONE, running())
    mid_edit = b"tags: [\n" + file.path.read_bytes()
    file.path.write_bytes(mid_edit)
    assert "closed as failed" in aletheia(place, "exp", "repair").out
    assert file.path.read_bytes() == mid_edit
    assert facts_of(file).status == "failed"
    assert "no run is dead" in aletheia(place, "exp", "repair").err  # and not once more


def test_a_record_that_cannot_be_read_hinders_no_repair(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    write_record(place, ONE, running())
    (place.experiments / f"{TWO}.yaml").write_bytes(b"a: 1\n" + MARK + b"status: fine\n")
    said = aletheia(place, "exp", "repair")
    assert said.code == 0
    assert "cannot be read" in said.out
    assert "closed as failed" in said.out


# ── sync ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sync_completes_what_waited_and_undoes_edits(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    waiting, edited = write_record(place, ONE), write_record(place, TWO)
    whole = [file.path.read_bytes() for file in (waiting, edited)]
    waiting.path.write_bytes(b"tags: [\n" + whole[0])
    waiting.write(Facts(status="failed", stage="sft", profile="small"))
    waiting.path.write_bytes(b"tags: []  # mended\n" + whole[0])
    edited.path.write_bytes(whole[1].replace(b"status: complete", b"status: failed"))
    said = aletheia(place, "exp", "sync")
    assert said.code == 0
    assert [line.split("  ", 1) for line in said.out.splitlines()[1:]] == [
        [TWO, "was edited below the line: undone"],
        [ONE, "completed with what had waited beside it"],
    ]
    assert waiting.path.read_bytes().startswith(
        b"tags: []  # mended\n# mine\n" + MARK + b"schema_version: 1\nstatus: failed\n"
    )
    assert edited.path.read_bytes() == whole[1]
    again = aletheia(place, "exp", "sync", "--json")
    assert (again.code, json.loads(again.out)) == (0, [])
    assert "every record is in step" in aletheia(place, "exp", "sync").err


@pytest.mark.parametrize(
    ("above", "where"),
    [(b"a: 1\ntags: [a\nb: c\n", ":3:2: "), (b"a: 1\na: 2\n", ":2:1: "), (b"a: 1\nb: \xe9\n", ":2:4: is not UTF-8")],
)
def test_sync_tells_where_a_persons_half_keeps_it_from_completing(
    aletheia: Run, place: Workspace, write_record: WriteRecord, above: bytes, where: str
) -> None:
    file = write_record(place, ONE)
    mid_edit = above + file.path.read_bytes()
    file.path.write_bytes(mid_edit)
    file.write(Facts(status="failed", stage="sft", profile="small"))
    said = aletheia(place, "exp", "sync", ONE)
    assert said.code == 2
    assert f"waits: experiments/{file.path.name}{where}" in said.out
    assert file.path.read_bytes() == mid_edit


def test_sync_says_what_it_cannot_put_right(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    edited, damaged = write_record(place, ONE), write_record(place, TWO)
    for file in (edited, damaged):  # as in another checkout: no copies
        shutil.rmtree(file.folder)
    edited.path.write_bytes(edited.path.read_bytes().replace(b"status: complete", b"status: failed"))
    damaged.path.write_bytes(b"a: 1\n" + MARK + b"status: [\n")
    said = aletheia(place, "exp", "sync", "--json")
    assert said.code == 2
    told = {row["id"]: row["done"] for row in json.loads(said.out)}
    assert told[ONE] == "was edited below the line, and no copy is at hand to put it back"
    assert told[TWO].startswith(f"no copy is at hand to put it right: experiments/{TWO}.yaml:")


# ── renumber ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def weights(place: Workspace, name: str, content: str) -> list[Artifact]:
    """A record's output, and the link to it."""
    folder = place.checkpoints / name / "adapter"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    find.link_newest(place, "small-sft", folder)
    return find.artifacts(place, folder)


def taken(name: str, artifacts: list[Artifact]) -> dict[str, Any]:
    return {"id": name, "stage": "sft", "path": f"checkpoints/{name}/adapter", "sha256": find.combined(artifacts)}


def test_renumber_takes_everything_along(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    artifacts = weights(place, ONE, "one")
    person = f"# {ONE} is mine\nexperiment_id:   '{ONE}'   # so\r\nnotes: see {ONE}, not {ONE}7\n"
    facts = {
        "artifacts": [one.model_dump() for one in artifacts],
        "code": {"patch": {"path": f"{ONE}/code.patch"}},
        "history": [{"status": "complete", "at": "then", "note": f"before {ONE}"}],
    }
    write_record(place, ONE, facts, person, log=[{"step": 1}])
    child = write_record(
        place, TWO, {"stage": "dpo", "lineage": {"inputs": [taken(ONE, artifacts)]}}, f"from: {ONE}\r\n"
    )
    parent = write_record(place, THREE, {"stage": "pipeline", "lineage": {"children": [ONE, TWO]}})
    plan = write_record(place, FOUR, None, f"from: {ONE}  # {ONE}7 stays\nrelated: [{ONE}, {TWO}]\n")
    said = aletheia(place, "exp", "renumber", ONE)
    new = f"{DAY}-005"
    assert (said.code, said.out) == (0, f"experiments/{new}.yaml\n")
    assert f"experiments/{TWO}.yaml: refers to {new} now" in said.err
    file = RecordFile(place.experiments / f"{new}.yaml")
    above = file.path.read_bytes().partition(MARK[:-1])[0]
    assert above.decode() == person.replace(f"'{ONE}'", f"'{new}'")
    assert file.read().edited is None
    now = facts_of(file)
    assert now.history[0].note == f"before {ONE}; renumbered from {ONE}"  # what was, was
    assert [one.path for one in now.artifacts] == [f"checkpoints/{new}/adapter/weights"]
    assert now.code["patch"]["path"] == f"{new}/code.patch"
    assert (file.folder / "log.jsonl").exists()
    assert (place.checkpoints / "small-sft").resolve() == place.checkpoints / new / "adapter"
    assert (place.checkpoints / "small-sft" / "weights").read_text() == "one"
    for gone in (place.experiments / f"{ONE}.yaml", place.experiments / ONE, place.checkpoints / ONE):
        assert not gone.exists()
    assert facts_of(child).lineage.inputs[0].model_dump() == taken(new, artifacts)
    assert child.path.read_bytes().startswith(f"from: {new}\r\n".encode() + MARK[:-1] + b"\r\n")
    assert facts_of(parent).lineage.children == [new, TWO]
    assert plan.path.read_text() == f"from: {new}  # {ONE}7 stays\nrelated: [{new}, {TWO}]\n"
    assert not list(place.experiments.rglob("edited-below-*"))
    assert aletheia(place, "exp", "lint").code == 0
    assert (
        aletheia(place, "exp", "renumber", plan.id).out == f"experiments/{DAY}-006.yaml\n"
    )  # the old id is not reused


@pytest.mark.parametrize("name", [f"{ONE}-theirs.yaml", f"{ONE} (copy).yaml", f"{TWO}.yaml"])
@pytest.mark.parametrize("named_by", ["path", "root", "name"])
def test_of_two_files_with_one_id_references_are_told_apart(
    aletheia: Run,
    place: Workspace,
    write_record: WriteRecord,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    named_by: str,
) -> None:
    """Two checkouts made ONE; theirs came in under another name, with its DPO and its parent."""
    ours = weights(place, ONE, "ours")
    theirs = [one.model_copy(update={"sha256": sha256(b"theirs").hexdigest()}) for one in ours]
    mine = write_record(
        place,
        ONE,
        {"artifacts": [one.model_dump() for one in ours], "lineage": {"parent": f"{DAY}-008"}},
        f"experiment_id: {ONE}\n",
    )
    copy = write_record(
        place,
        ONE + "-x",
        {"artifacts": [one.model_dump() for one in theirs], "lineage": {"parent": f"{DAY}-009"}},
        f"experiment_id: {ONE}\n",
    )
    shutil.rmtree(copy.folder)
    copy.path.rename(place.experiments / name)
    dpo_of_mine = write_record(place, f"{DAY}-003", {"stage": "dpo", "lineage": {"inputs": [taken(ONE, ours)]}})
    dpo_of_theirs = write_record(place, f"{DAY}-004", {"stage": "dpo", "lineage": {"inputs": [taken(ONE, theirs)]}})
    parent_of_mine = write_record(place, f"{DAY}-008", {"stage": "pipeline", "lineage": {"children": [ONE]}})
    parent_of_theirs = write_record(place, f"{DAY}-009", {"stage": "pipeline", "lineage": {"children": [ONE]}})
    unclear = write_record(place, f"{DAY}-007", None, f"related: [{ONE}]\n")
    untouched = [file.path.read_bytes() for file in (mine, dpo_of_mine, parent_of_mine, unclear)]

    monkeypatch.chdir(place.root)
    arguments = {"path": str(place.experiments / name), "root": f"experiments/{name}", "name": name}
    said = aletheia(place, "exp", "renumber", arguments[named_by])
    new = f"{DAY}-010"
    assert (said.code, said.out) == (0, f"experiments/{new}.yaml\n"), said.err
    file = RecordFile(place.experiments / f"{new}.yaml")
    assert file.person()["experiment_id"] == new
    assert [one.path for one in facts_of(file).artifacts] == [f"checkpoints/{new}/adapter/weights"]
    assert facts_of(dpo_of_theirs).lineage.inputs[0].id == new
    assert facts_of(parent_of_theirs).lineage.children == [new]
    assert [one.path.read_bytes() for one in (mine, dpo_of_mine, parent_of_mine, unclear)] == untouched
    assert f"{DAY}-007.yaml: names {ONE} above the line; which of the two is meant, only you can tell" in said.err
    assert (place.checkpoints / "small-sft").resolve() == place.checkpoints / ONE / "adapter"  # the folders are ours
    assert not (place.experiments / name).exists()
    assert not list(place.experiments.rglob("edited-below-*"))
    assert aletheia(place, "exp", "lint").code == 0


def test_the_other_one_of_two_may_be_renumbered_as_well(place: Workspace, write_record: WriteRecord) -> None:
    """Ours, with the folders; what names a child as its parent is told apart by the parent's children."""
    facts = {"stage": "pipeline", "lineage": {"children": [THREE]}}
    write_record(place, ONE, facts, f"experiment_id: {ONE}\n")
    write_record(
        place, f"{ONE}-theirs", {"stage": "pipeline", "lineage": {"children": [FOUR]}}, f"experiment_id: {ONE}\n"
    )
    mine = write_record(place, THREE, {"lineage": {"parent": ONE}})
    theirs = write_record(place, FOUR, {"lineage": {"parent": ONE}})
    assert renumber(place, ONE).stem == f"{DAY}-005"
    assert facts_of(mine).lineage.parent == f"{DAY}-005"
    assert facts_of(theirs).lineage.parent == ONE
    assert (place.experiments / f"{DAY}-005").is_dir()


def test_a_reference_that_fits_both_or_neither_is_named_and_left(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    same = weights(place, ONE, "same")
    facts = {
        "artifacts": [one.model_dump() for one in same],
        "lineage": {"parent": THREE, "children": [FOUR]},
    }
    write_record(place, ONE, facts, f"experiment_id: {ONE}\n")
    write_record(place, f"{ONE}-theirs", facts | {"results": {"steps": 1}}, f"experiment_id: {ONE}\n")
    other = [one.model_copy(update={"sha256": sha256(b"other").hexdigest()}) for one in same]
    records = [
        write_record(place, TWO, {"lineage": {"inputs": [taken(ONE, same)]}}),
        write_record(place, f"{DAY}-005", {"lineage": {"inputs": [taken(ONE, other)]}}),
        write_record(place, THREE, {"stage": "pipeline", "lineage": {"children": [ONE]}}),
        write_record(place, FOUR, {"lineage": {"parent": ONE}}),
        write_record(place, f"{DAY}-006", {"stage": "pipeline", "lineage": {"children": [ONE]}}),
    ]
    (place.experiments / f"{DAY}-007.yaml").mkdir()  # which hinders nothing
    before = [file.path.read_bytes() for file in records]
    said = aletheia(place, "exp", "renumber", ONE)
    assert said.code == 0
    assert [file.path.read_bytes() for file in records] == before
    for file in records:
        assert f"{file.path.name}: names {ONE} below the line; which of the two is meant cannot be told" in said.err, (
            file.id
        )


def test_a_copy_that_ran_under_its_own_name_is_no_twin(place: Workspace, write_record: WriteRecord) -> None:
    """`cp` made TWO of ONE, and the id inside was forgotten: what ran since is TWO's, and ONE is another record."""
    write_record(place, ONE, {}, f"experiment_id: {ONE}\n")
    artifacts = weights(place, TWO, "two")
    write_record(place, TWO, {"artifacts": [one.model_dump() for one in artifacts]}, f"experiment_id: {ONE}\n")
    child = write_record(place, THREE, {"lineage": {"inputs": [taken(TWO, artifacts)]}}, f"related: [{ONE}, {TWO}]\n")
    file = RecordFile(renumber(place, TWO))
    assert file.id == FOUR
    assert file.person() == {"experiment_id": FOUR}
    assert facts_of(child).lineage.inputs[0].id == FOUR
    assert child.person() == {"related": [ONE, FOUR]}


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        ({"person": "tags: [\n"}, r":2:1: |:3:1: "),
        ({"facts": "running"}, "is running; try renumbering it when it has ended"),
    ],
)
def test_what_cannot_be_renumbered_stays_as_it_is(
    place: Workspace, write_record: WriteRecord, setup: dict[str, Any], told: str
) -> None:
    me = psutil.Process()
    facts = running(pid=me.pid, started=me.create_time()) if "facts" in setup else None
    file = write_record(place, ONE, facts, setup.get("person", "# mine\n"))
    other = write_record(place, TWO, None, f"related: [{ONE}]\n")
    before = {path: path.read_bytes() for path in place.root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=told):
        renumber(place, ONE)
    assert {path: path.read_bytes() for path in place.root.rglob("*") if path.is_file()} == before
    assert file.path.exists()
    assert other.path.exists()


def test_a_file_that_is_no_record_of_this_place_is_not_renumbered(
    place: Workspace, write_record: WriteRecord, tmp_path: Path
) -> None:
    elsewhere = tmp_path / f"{ONE}.yaml"
    elsewhere.write_text("a: 1\n")
    with pytest.raises(UserError, match="there is no record"):
        renumber(place, str(elsewhere))
    notes = place.experiments / "EXP-notes.yaml"
    notes.write_text("a: 1\n")
    with pytest.raises(UserError, match="has no id to be renumbered from"):
        renumber(place, "experiments/EXP-notes.yaml")
    assert elsewhere.exists()
    assert notes.exists()
    write_record(place, ONE)
    assert renumber(place, ONE).stem == TWO  # which notes beside it do not hinder


def test_a_reference_that_cannot_be_changed_is_named_and_left(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    me = psutil.Process()
    write_record(place, ONE)
    lineage = {"lineage": {"children": [ONE]}}
    alive = write_record(place, TWO, running(pid=me.pid, started=me.create_time()) | lineage)
    broken = write_record(place, THREE, None, f"related: [{ONE}\n")
    before = [file.path.read_bytes() for file in (alive, broken)]
    said = aletheia(place, "exp", "renumber", ONE)
    assert said.code == 0
    assert f"note: experiments/{TWO}.yaml: is running; its references to {ONE} are left as they are" in said.err
    assert f"{THREE}.yaml:2:1: " in said.err
    assert [file.path.read_bytes() for file in (alive, broken)] == before


def test_a_renumbering_that_is_cut_short_loses_no_record(
    place: Workspace, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_record(place, ONE, {"results": {"loss": 2.5}}, f"experiment_id: {ONE}\n")
    written = RecordFile.write

    def full(self: RecordFile, facts: Facts) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordFile, "write", full)
    before = {path: path.read_bytes() for path in place.experiments.rglob("EXP-*") if path.is_file()}
    with pytest.raises(UserError, match=rf"{ONE}\.yaml: could not be renumbered \(No space left.*stands as it was"):
        renumber(place, ONE)
    assert {path: path.read_bytes() for path in place.experiments.rglob("EXP-*") if path.is_file()} == before
    monkeypatch.setattr(RecordFile, "write", written)
    assert facts_of(file).results == {"loss": 2.5}
    assert os.listdir(place.experiments).count(f"{ONE}.yaml") == 1


def test_a_note_that_is_saved_during_a_renumbering_goes_along(
    place: Workspace, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_record(place, ONE, {"results": {"loss": 2.5}}, f"\ufeffexperiment_id: {ONE}\r\n")
    write = RecordFile.write

    def meanwhile(self: RecordFile, facts: Facts) -> None:
        write(self, facts)
        if file.path.exists() and b"note" not in file.path.read_bytes():
            file.path.write_bytes(file.path.read_bytes().replace(b"\r\n", b"\r\nnote: saved\r\n", 1))

    monkeypatch.setattr(RecordFile, "write", meanwhile)
    new = RecordFile(renumber(place, ONE))
    above = split(new.path.read_bytes()).above
    assert above == f"\ufeffexperiment_id: {TWO}\r\nnote: saved\r\n".encode()
    assert facts_of(new).results == {"loss": 2.5}
    assert sorted(os.listdir(place.experiments)) == [".allocated", TWO, f"{TWO}.yaml"]
    assert not list(place.experiments.rglob("edited-below-*"))


def test_folders_that_cannot_be_moved_are_named_with_where_they_stand(
    place: Workspace, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(place, ONE, {"results": {"loss": 2.5}}, log=[{"step": 1}])
    child = write_record(place, THREE, {"lineage": {"parent": ONE}})
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.is_dir():
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    told = rf"{FOUR}\.yaml: is experiments/{ONE}\.yaml renumbered.*moving experiments/{ONE} and .* to {FOUR} by hand"
    with pytest.raises(UserError, match=told):
        renumber(place, ONE)
    assert facts_of(RecordFile(place.experiments / f"{FOUR}.yaml")).results == {"loss": 2.5}
    assert facts_of(child).lineage.parent == FOUR
    assert (place.experiments / ONE / "log.jsonl").exists()


def test_what_was_typed_is_not_renumbered(place: Workspace, write_record: WriteRecord) -> None:
    typed = {"command": f"aletheia sft --resume {ONE}", "patch": {"path": f"{ONE}/code.patch"}}
    write_record(place, ONE, {"code": typed | {"before_resume": typed}})
    code = facts_of(RecordFile(renumber(place, ONE))).code
    moved = typed | {"patch": {"path": f"{TWO}/code.patch"}}
    assert code == moved | {"before_resume": moved}


def test_repair_leaves_a_run_that_is_being_taken_up_again(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    """Which reads as dead until it has written that it runs."""
    file = write_record(place, ONE, running())
    before = file.path.read_bytes()
    handle = os.open(file.folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    said = aletheia(place, "exp", "repair")
    os.close(handle)
    assert "left as it is: is running" in said.out
    assert file.path.read_bytes() == before
    assert "closed as failed" in aletheia(place, "exp", "repair").out


def test_a_copy_is_refused_and_changes_no_reference(place: Workspace, write_record: WriteRecord) -> None:
    """Renumbered, it would claim the outputs of the other, and every reference to them."""
    write_record(place, ONE, {}, f"experiment_id: {ONE}\n")
    copy = place.experiments / f"{ONE}-theirs.yaml"
    shutil.copy(place.experiments / f"{ONE}.yaml", copy)
    before = {path: path.read_bytes() for path in place.experiments.rglob("*") if path.is_file()}
    for name in (ONE, str(copy)):
        with pytest.raises(UserError, match="is a copy of experiments"):
            renumber(place, name)
    assert {path: path.read_bytes() for path in place.experiments.rglob("*") if path.is_file()} == before


def test_sync_compares_again_what_could_not_be_compared_when_the_run_ended(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    verdict = {
        "frozen_at": "then",
        "criteria": [{"criterion": "a < 1"}],
        "changed_after_start": ["could not be compared: x"],
    }
    file = write_record(place, ONE, {"verdict": verdict}, "success_criteria: [b < 1\n")
    facts = file.read().facts
    assert facts is not None
    file.write(facts)  # waits: the upper half is no YAML
    file.path.write_text(file.path.read_text().replace("[b < 1", "[b < 1]"))
    assert aletheia(place, "exp", "sync").code == 0
    verdict_now = facts_of(file).verdict
    assert verdict_now is not None
    assert verdict_now.changed_after_start == ["taken out: a < 1", "added: b < 1"]
