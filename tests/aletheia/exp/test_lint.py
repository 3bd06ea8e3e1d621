import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.file import LINE, RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

ONE, TWO, THREE = (f"EXP-2026-01-01-00{n}" for n in (1, 2, 3))
GOOD = f"experiment_id: {ONE}\ndate: 2026-01-01\nprofile: small\nstages: [sft]\nsuccess_criteria:\n  - a < 1\n"
DEAD = [{"status": "running", "at": "then", "host": socket.gethostname(), "pid": 2**22 + 1, "started": 1.0}]
Run = Callable[..., Any]
WriteRecord = Callable[..., RecordFile]


def test_clean_records_give_nothing(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    (place.root / "configs").mkdir(exist_ok=True)
    (place.root / "configs" / "small.yaml").write_text("name: small\nbase_model: tiny\n")
    verdict = {"frozen_at": "then", "criteria": [{"criterion": "a < 1"}]}
    write_record(place, ONE, {"verdict": verdict, "lineage": {"parent": TWO}}, GOOD)
    write_record(place, TWO, {"stage": "pipeline", "lineage": {"children": [ONE]}}, f"# mine\nrelated: [{ONE}]\n")
    write_record(place, THREE, None, f"stages: [dpo]\nprofile: small\nfrom: {ONE}\nrelated: [{THREE}]\n")
    said = aletheia(place, "exp", "lint")
    assert (said.code, said.out, said.err) == (0, "", "3 records, 0 errors, 0 warnings\n")
    said = aletheia(place, "exp", "lint", "--json")
    assert (said.code, said.out) == (0, "[]\n")


def test_there_is_nothing_to_find_where_there_are_no_records(aletheia: Run, tmp_path: Path) -> None:
    assert aletheia(Workspace(tmp_path), "exp", "lint").err == "0 records, 0 errors, 0 warnings\n"


@pytest.mark.parametrize(
    ("person", "finding"),
    [
        ("a: 1\ntags: [x\nb: 2\n", "3:2: error: did not find expected ',' or ']'"),
        ("a: 1\n  b: 2\n", "2:4: error: mapping values are not allowed in this context"),
        ("a: 1\na: 2\n", "2:1: error: the key `a` stands twice"),
        ("- a\n", "1:1: error: a record is a mapping of keys to values"),
        ("a: 1\nstages: [sft, fly]\n", "2:15: error: stages[2]: is `fly`, not one of"),
        (
            "# x\nhypotesis: y\n",
            "2:1: warning: hypotesis: no key of this name is known; it is kept as it is; try `hypothesis`",
        ),
        ("status: complete\n", "1:1: warning: status: is the pipeline's"),
        (f"experiment_id: {TWO}\n", f"1:1: error: experiment_id: is {TWO}, the file is {ONE}; try the file's name"),
        (
            "a: 1\nsuccess_criteria:\n  - a < 1\n  - b is low\n",
            "4:1: error: success_criteria[2]: `b is low` is no criterion",
        ),
        (
            "success_criteria:\n- {criterion: a}\n",
            "2:1: error: success_criteria[1]: `a` is no criterion; try METRIC OP NUMBER",
        ),
        ("success_criteria:\n- {criterion: a < 1, role: main}\n", "2:22: error: success_criteria[1].role: is `main`"),
        (f"a: 1\nrelated:\n- {TWO}\n", f"3:1: warning: names {TWO}, and there is no such record"),
        (f"from: {TWO}\n", f"1:1: warning: names {TWO}, and there is no such record"),
        ("notes: fix #12\n", "1:8: warning: notes: `#12` is a comment to YAML"),
    ],
)
def test_a_mistake_above_the_line_is_found_in_its_place(
    aletheia: Run, place: Workspace, write_record: WriteRecord, person: str, finding: str
) -> None:
    write_record(place, ONE, None, person)
    said = aletheia(place, "exp", "lint")
    lines = said.out.splitlines()
    assert lines[0].startswith(f"experiments/{ONE}.yaml:{finding}")
    assert len(lines) == 1
    assert said.code == (2 if ": error: " in finding else 0)
    kinds = ("1 errors, 0 warnings", "0 errors, 1 warnings")
    assert said.err == f"1 records, {kinds[' warning: ' in finding]}\n"
    (row,) = json.loads(aletheia(place, "exp", "lint", "--json").out)
    assert f"{row['file']}:{row['line']}:{row['column']}: {row['severity']}: {row['what']}" == lines[0]


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"a: 1\nb: caf\xe9\n", "2:7: error: is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "1:1: error: is UTF-16"),
        (b"a: 1\n# x\rb: 2\n", "2:4: error: a carriage return stands alone"),
        (b"a: " + b"[" * 60, "1:1: error: nested too deeply or too many aliases"),
        (b"x: &x [a]\ny: [" + b"*x, " * 12 + b"]\n", "2:1: error: nested too deeply or too many aliases"),
        (b"a: !!python/object/apply:os.system [x]\n", "1:4: error: could not determine a constructor for the tag"),
    ],
)
def test_what_is_no_text_or_no_yaml_is_found_in_its_place(
    aletheia: Run, place: Workspace, content: bytes, finding: str
) -> None:
    (place.experiments / f"{ONE}.yaml").write_bytes(content)
    said = aletheia(place, "exp", "lint")
    assert said.out.startswith(f"experiments/{ONE}.yaml:{finding}")
    assert (said.code, said.out.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("facts", "finding"),
    [
        ({"status": "running", "history": DEAD}, f"warning: its process is gone; try aletheia exp repair {ONE}"),
        ({"lineage": {"parent": TWO}}, f"warning: names {TWO}, and there is no such record"),
        ({"lineage": {"children": [TWO]}}, f"warning: names {TWO}, and there is no such record"),
        (
            {"verdict": {"frozen_at": "then", "criteria": [{"criterion": "a < 2"}, {"criterion": "a < 1"}]}},
            "warning: success_criteria: changed after the start, and not used: taken out: a < 2",
        ),
    ],
)
def test_what_the_lower_half_tells_is_found(
    aletheia: Run, place: Workspace, write_record: WriteRecord, facts: dict[str, Any], finding: str
) -> None:
    facts = {"verdict": {"frozen_at": "then", "criteria": [{"criterion": "a < 1"}]}} | facts
    file = write_record(place, ONE, facts, GOOD)
    said = aletheia(place, "exp", "lint")
    assert said.code == 0
    (line,) = said.out.splitlines()
    where, _, what = line.partition(" ")
    assert what == finding
    wanted = TWO if TWO in what else "success_criteria" if "success" in what else LINE
    place_of_it = file.path.read_text().splitlines()[int(where.split(":")[1]) - 1]
    assert wanted in place_of_it


def test_criteria_added_after_the_start_are_found(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    write_record(place, ONE, {}, GOOD)
    assert f"{ONE}.yaml:5:1: warning: success_criteria: changed after the start, and not used: added: a < 1" in (
        aletheia(place, "exp", "lint").out
    )


def test_an_edit_below_the_line_is_found_at_the_line(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    file = write_record(place, ONE, {}, "a: 1\n\n")
    file.path.write_bytes(file.path.read_bytes().replace(b"status: complete", b"status: failed"))
    said = aletheia(place, "exp", "lint")
    assert said.out == f"experiments/{ONE}.yaml:3:1: error: was edited below the line; try aletheia exp sync {ONE}\n"
    assert b"status: failed" in file.path.read_bytes()  # lint only looks
    shutil.rmtree(file.folder)
    assert "no copy is at hand to put it back" in aletheia(place, "exp", "lint").out


def test_a_lower_half_whose_seal_was_taken_out_is_found(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    file = write_record(place, ONE, {}, "a: 1\nseal: mine\n")
    shutil.rmtree(file.folder)
    whole, _, _ = file.path.read_bytes().rpartition(b"seal: ")
    file.path.write_bytes(whole.replace(b"status: complete", b"status: failed"))
    said = aletheia(place, "exp", "lint", ONE)
    assert said.code == 2
    assert (
        f"experiments/{ONE}.yaml:3:1: error: carries no seal: the program's half is not as it was written" in said.out
    )


def test_a_damaged_lower_half_is_found_in_its_place(aletheia: Run, place: Workspace) -> None:
    path = place.experiments / f"{ONE}.yaml"
    path.write_text(f"a: 1\n{LINE}\nstatus: complete\nstage: [\n")
    said = aletheia(place, "exp", "lint")
    assert said.out.startswith(f"experiments/{ONE}.yaml:5:1: error: below the line: did not find expected node content")
    path.write_text(f"a: 1\n{LINE}\nstatus: fine\n")
    assert f"{ONE}.yaml:3:1: error: below the line: not a record's lower half" in aletheia(place, "exp", "lint").out


def test_what_waits_beside_a_record_in_mid_edit_is_found_too(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    file = write_record(place, ONE, {}, GOOD)
    file.path.write_bytes(b"tags: [\n" + file.path.read_bytes())
    file.write(Facts(status="failed", stage="sft", profile="small"))
    lines = aletheia(place, "exp", "lint").out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"experiments/{ONE}.yaml:3:5: error: did not find")
    assert lines[1].endswith(f"error: what the pipeline knows waits beside it; try aletheia exp sync {ONE}")


@pytest.mark.parametrize("below", [False, True])
def test_a_merge_conflict_is_found_and_nothing_that_follows_from_it(
    aletheia: Run, place: Workspace, write_record: WriteRecord, below: bool
) -> None:
    file = write_record(place, ONE, {}, GOOD)
    lines = file.path.read_text().split("\n")
    at = lines.index("status: complete") if below else 2
    conflict = ["<<<<<<< HEAD", lines[at], "=======", "status: failed" if below else "profile: other", ">>>>>>> theirs"]
    file.path.write_text("\n".join([*lines[:at], *conflict, *lines[at + 1 :]]))
    said = aletheia(place, "exp", "lint")
    assert said.out == f"experiments/{ONE}.yaml:{at + 1}:1: error: a merge conflict is not resolved\n"


def test_two_files_with_one_id_are_found(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    write_record(place, ONE, {}, f"experiment_id: {ONE}\n")
    theirs = place.experiments / f"{ONE}-theirs.yaml"
    shutil.copy(place.experiments / f"{ONE}.yaml", theirs)
    write_record(place, TWO, {"profile": "another"}, f"\ufeffexperiment_id: '{ONE}'\r\n")
    said = aletheia(place, "exp", "lint")
    assert said.code == 2
    assert said.out.splitlines() == [
        f"experiments/{ONE}-theirs.yaml:1:1: error: `{ONE}-theirs` is no record's name; "
        f"try aletheia exp renumber experiments/{ONE}-theirs.yaml",
        f"experiments/{TWO}.yaml:1:1: error: experiment_id: is {ONE}, the file is {TWO}; try the file's name",
        f"experiments/{ONE}.yaml:1:1: error: is a copy of experiments/{ONE}-theirs.yaml; try deleting one of the two",
        f"experiments/{TWO}.yaml:1:1: error: experiments/{ONE}-theirs.yaml has the id {ONE} too; "
        "try aletheia exp renumber on one of the two",
    ]
    for named in (ONE, f"experiments/{ONE}-theirs.yaml", str(theirs)):
        assert "is a copy of" in aletheia(place, "exp", "lint", named).out
    write_record(place, THREE)
    assert aletheia(place, "exp", "lint", THREE).code == 0  # another's mistake is not its own


def test_only_the_named_are_looked_at(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    write_record(place, ONE, None, "a: [\n")
    write_record(place, TWO)
    assert aletheia(place, "exp", "lint", TWO).code == 0
    assert aletheia(place, "exp", "lint", ONE, TWO).code == 2
    said = aletheia(place, "exp", "lint", "EXP-2026-01-01-0011")
    assert (said.code, said.out) == (2, "")
    assert f"there is no record `EXP-2026-01-01-0011`; try {ONE}" in said.err


def test_what_is_no_file_is_named_and_hinders_nothing(
    aletheia: Run, place: Workspace, write_record: WriteRecord
) -> None:
    (place.experiments / f"{ONE}.yaml").mkdir()
    (place.experiments / f"{TWO}.yaml").symlink_to("nowhere")
    write_record(place, THREE, None, "a: [\n")
    lines = aletheia(place, "exp", "lint").out.splitlines()
    assert [line.partition(" error: ")[0] for line in lines] == [
        f"experiments/{ONE}.yaml:1:1:",
        f"experiments/{TWO}.yaml:1:1:",
        f"experiments/{THREE}.yaml:2:1:",
    ]


def test_lint_changes_nothing(aletheia: Run, place: Workspace, write_record: WriteRecord) -> None:
    file = write_record(place, ONE, {}, GOOD)
    file.path.write_bytes(file.path.read_bytes().replace(LINE.encode() + b"\n", b""))
    before = {path: path.read_bytes() for path in place.root.rglob("*") if path.is_file()}
    assert "the line was gone; try aletheia exp sync" in aletheia(place, "exp", "lint").out
    assert {path: path.read_bytes() for path in place.root.rglob("*") if path.is_file()} == before
