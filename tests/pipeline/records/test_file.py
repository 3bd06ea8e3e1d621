import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.records.file import LINE, RecordFile, write_atomically
from pipeline.records.schema import Facts, Status
from pipeline.workspace import Workspace

MARK = LINE.encode() + b"\n"
ABOVE = {
    "plain": b"# Yours.\ndate: 2026-11-20\n\n\n",
    "odd": "description:   'two  spaces'   # why   \n\n# 🚀 naïve\nobservations: [ 1,2 ,  3]\n \n".encode(),
    "crlf": b"date: 2026-11-20\r\ndescription: x\r\n",
    "bom": b"\xef\xbb\xbfdate: 2026-11-20\n",
    "no final newline": b"description: x",
    "no final newline, crlf": b"a: 1\r\ndescription: x",
    "other line breaks": "description: 'one\u2028two\x85three'\n".encode(),
    "a copy of the line in a text": b"notes: |\n  it says\n  " + MARK + b"  and so on\n",
    "tabs and emoji": "tags: [ 'a\tb' ,\t'🚀' ]   \n   # so\n".encode(),
    "odd indentation": b"journal:\n     - learned:  x\n       date:    2026-11-20\n",
}


def facts(status: Status = "complete") -> Facts:
    return Facts(status=status, stage="sft", profile="small")


@pytest.fixture
def file(place: Workspace) -> RecordFile:
    """A record that ran: `description: x` above the line."""
    file = RecordFile(place.experiments / "EXP-2026-11-20-001.yaml")
    file.path.write_bytes(b"description: x\n")
    file.write(facts())
    return file


def asides(file: RecordFile) -> list[bytes]:
    return [path.read_bytes() for path in sorted(file.folder.glob("edited-below-*.yaml"))]


@pytest.mark.parametrize("above", ABOVE.values(), ids=ABOVE)
def test_above_the_line_stays_byte_for_byte(place: Workspace, above: bytes) -> None:
    file = RecordFile(place.experiments / "EXP-2026-11-20-001.yaml")
    file.path.write_bytes(above)
    assert file.facts() is None  # a plan
    statuses: tuple[Status, ...] = ("running", "complete")
    for status in statuses:
        file.write(facts(status))
        assert file.facts() == facts(status)
    end = b"\r\n" if b"\r\n" in above else b"\n"
    ending = b"" if above.endswith(b"\n") else end  # the line needs one of its own
    below = (MARK + (file.folder / "below.yaml").read_bytes()).replace(b"\n", end)
    assert file.path.read_bytes() == above + ending + below


MID_EDIT = {
    "an open bracket": (b"description: x\ntags: [a,\n", ":3:1: "),
    "a doubled key": (b"description: x\ndescription: y\n", ":2:1: "),
    "a tab for indentation": (b"journal:\n\t- learned: x\n", ":2:1: "),
    "not UTF-8": (b"a: 1\nb: latin\xe9\n", ":2:9: is not UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), ":1:1: is UTF-16; try saving it as UTF-8"),
    "a lone carriage return": (b"a: 1\n# note\rb: 2\n", ":2:7: a carriage return stands alone"),
    "a list": (b"- a\n", ":1:1: a record is a mapping"),
    "an alias bomb": (b"a: &a [x]\nb: [" + b"*a, " * 20 + b"]\n", ":2"),
    "too deep": (b"a: " + b"[" * 100 + b"\n", ":1"),
    "nothing": (b"", ": is empty above the line"),
}


@pytest.mark.parametrize(("above", "where"), MID_EDIT.values(), ids=MID_EDIT)
def test_invalid_yaml_in_mid_edit_is_not_written_into_and_completed_later(
    file: RecordFile, above: bytes, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lower = file.path.read_bytes().partition(MARK)[2]
    mid_edit = above + MARK + lower
    file.path.write_bytes(mid_edit)
    file.write(facts("failed"))
    file.write(facts("cancelled"))
    assert file.path.read_bytes() == mid_edit
    assert f"note: {file.path}{where}" in capsys.readouterr().err
    assert file.facts() == facts("cancelled")  # what the program knows is not lost
    assert file.read().pending
    assert not file.complete()
    file.path.write_bytes(b"description: mended\n" + MARK + lower)
    assert file.complete()
    assert file.path.read_bytes().startswith(
        b"description: mended\n" + MARK + b"schema_version: 1\nstatus: cancelled\n"
    )
    assert not file.read().pending
    assert asides(file) == []


def test_a_save_in_the_last_moment_before_the_write_is_not_lost(
    file: RecordFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, saved = file.path.read_bytes(), []
    fsync = os.fsync

    def save_meanwhile(handle: int) -> None:  # the editor renames its version into place while ours goes to the disk
        fsync(handle)
        if not saved and MARK in Path(f"/proc/self/fd/{handle}").read_bytes():
            saved.append(whole.replace(b"description: x", b"description: saved just now"))
            file.path.with_suffix(".editor").write_bytes(saved[0])
            os.rename(file.path.with_suffix(".editor"), file.path)

    monkeypatch.setattr(os, "fsync", save_meanwhile)
    file.write(facts("failed"))
    assert saved
    assert file.person() == {"description": "saved just now"}
    assert file.facts() == facts("failed")


def test_line_ends_changed_by_an_editor_are_no_edit(file: RecordFile, capsys: pytest.CaptureFixture[str]) -> None:
    file.path.write_bytes(file.path.read_bytes().replace(b"\n", b"\r\n"))
    assert file.facts() == facts()
    file.write(facts("failed"))
    assert b"\n" not in file.path.read_bytes().replace(b"\r\n", b"")  # one kind of line ends
    assert (asides(file), capsys.readouterr().err) == ([], "")


def test_what_an_editor_saves_between_two_writes_stays(file: RecordFile) -> None:
    stale = file.path.read_bytes()  # opened in the editor
    file.write(facts("running"))
    file.path.write_bytes(stale.replace(b"description: x", b"description: y\r\n# \xf0\x9f\x9a\x80"))  # saved there
    file.write(facts("failed"))
    assert file.path.read_bytes().startswith(b"description: y\r\n# \xf0\x9f\x9a\x80\n" + MARK[:-1])
    assert asides(file) == []  # the lower half that it saved with it was an earlier one of ours
    assert file.facts() == facts("failed")
    assert file.person() == {"description": "y"}


def test_edits_below_the_line_are_kept_aside_and_undone(file: RecordFile, capsys: pytest.CaptureFixture[str]) -> None:
    whole = file.path.read_bytes()
    for lie in (b"status: failed", b"status: planned"):
        file.path.write_bytes(whole.replace(b"status: complete", lie))
        assert file.facts() == facts("complete")
        assert file.path.read_bytes() == whole
        assert "was edited below the line; the edit is kept in" in capsys.readouterr().err
    assert sorted(asides(file)) == [
        whole.partition(MARK)[2].replace(b"status: complete", lie) for lie in (b"status: failed", b"status: planned")
    ]


def test_an_edit_is_kept_aside_also_when_it_is_no_yaml(file: RecordFile) -> None:
    with file.path.open("ab") as out:
        out.write(b"results: {\n")
    file.write(facts("failed"))
    assert file.facts() == facts("failed")
    assert [edit.endswith(b"results: {\n") for edit in asides(file)] == [True]


def test_a_doubled_line_is_taken_out_and_what_stands_between_stays_the_persons(file: RecordFile) -> None:
    whole = file.path.read_bytes()
    file.path.write_bytes(b"description: x\n" + MARK + b"notes: between\n" + whole.partition(b"\n")[2])
    assert file.facts() == facts()
    assert file.path.read_bytes() == whole.replace(b"description: x\n", b"description: x\nnotes: between\n")


def test_a_doubled_lower_half_is_kept_aside_and_undone(file: RecordFile) -> None:
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + MARK + whole.partition(MARK)[2])
    assert file.facts() == facts()
    assert file.path.read_bytes() == whole
    assert len(asides(file)) == 1


def test_a_doubled_line_over_an_edited_half_loses_nothing(file: RecordFile) -> None:
    whole = file.path.read_bytes()
    file.path.write_bytes(b"description: x\n" + MARK + b"notes: mine\n" + MARK + b"status: edited\n")
    assert file.facts() == facts()
    assert file.path.read_bytes() == whole
    assert b"notes: mine\n" in asides(file)[0]


def test_a_deleted_line_is_put_back(file: RecordFile) -> None:
    whole = file.path.read_bytes()
    file.path.write_bytes(whole.replace(MARK, b""))
    assert file.facts() == facts()
    assert file.path.read_bytes() == whole


@pytest.mark.parametrize("left", [b"description: x\n", b"description: x\nstatus: complete\n"])
def test_a_record_whose_lower_half_was_deleted_gets_it_back(file: RecordFile, left: bytes) -> None:
    file.path.write_bytes(left)
    assert file.facts() == facts()
    assert file.path.read_bytes() == left + MARK + (file.folder / "below.yaml").read_bytes()


def test_an_edit_below_the_line_shows_also_without_the_folder(file: RecordFile) -> None:
    """As in another checkout, where there is no copy to put back: the seal tells."""
    shutil.rmtree(file.folder)
    assert file.read().edited is None
    file.path.write_bytes(file.path.read_bytes().replace(b"status: complete", b"status: failed"))
    assert file.read().edited == "was edited below the line, and no copy is at hand to put it back"


def test_another_records_lower_half_is_an_edit(file: RecordFile, place: Workspace) -> None:
    other = RecordFile(place.experiments / "EXP-2026-11-20-002.yaml")
    other.path.write_bytes(b"description: y\n")
    other.write(facts("failed"))
    lower = other.path.read_bytes().partition(MARK)[2]
    file.path.write_bytes(b"description: x\n" + MARK + lower)
    assert file.facts() == facts("complete")
    assert asides(file) == [lower]


@pytest.mark.parametrize("waiting", [False, True])
def test_a_copy_that_its_seal_does_not_fit_is_not_put_into_the_file(file: RecordFile, waiting: bool) -> None:
    whole = file.path.read_bytes()
    copy = file.folder / ("below.next.yaml" if waiting else "below.yaml")
    for broken in (b"", b"status: [\n", (file.folder / "below.yaml").read_bytes().replace(b"complete", b"failed")):
        copy.write_bytes(broken)
        assert file.facts() == facts("complete")
        assert file.complete()
        assert file.path.read_bytes() == whole
    file.write(facts("failed"))
    assert file.facts() == facts("failed")


def test_a_copy_that_cannot_be_read_is_none(file: RecordFile) -> None:
    (file.folder / "below.yaml").unlink()
    (file.folder / "below.yaml").mkdir()
    assert file.facts() == facts("complete")
    assert file.read().edited is None


def test_a_record_under_another_name_was_not_edited(file: RecordFile, place: Workspace) -> None:
    """As when two checkouts made the same id, and one of the files was renamed."""
    file.rewrite_above(lambda text: f"experiment_id: {file.id}\n{text}")
    other = RecordFile(place.experiments / f"{file.id}-theirs.yaml")
    file.path.rename(other.path)
    assert other.read().edited is None
    assert other.facts() == facts("complete")
    other.path.write_bytes(other.path.read_bytes().replace(b"status: complete", b"status: failed"))
    assert other.read().edited == "was edited below the line, and no copy is at hand to put it back"


def test_what_stands_between_two_lines_survives_a_change_above(file: RecordFile) -> None:
    whole = file.path.read_bytes()
    lower = whole.partition(MARK)[2]
    edited = lower.replace(b"status: complete", b"status: failed")
    file.path.write_bytes(b"description: x\n" + MARK + edited + MARK + lower)
    file.rewrite_above(lambda text: text.replace("x", "y"))
    assert file.path.read_bytes() == whole.replace(b"description: x", b"description: y")
    assert [edited in edit for edit in asides(file)] == [True]


def test_a_change_above_that_would_leave_no_yaml_is_not_made(file: RecordFile) -> None:
    whole = file.path.read_bytes()
    with pytest.raises(UserError, match=":2:1: "):
        file.rewrite_above(lambda text: "tags: [\n")
    assert file.path.read_bytes() == whole


def test_reading_writes_nothing(file: RecordFile) -> None:
    file.path.write_bytes(file.path.read_bytes().replace(b"status: complete", b"status: failed"))
    before = {path: path.read_bytes() for path in file.path.parent.rglob("*") if path.is_file()}
    read = file.read()
    assert (read.facts, read.edited) == (facts(), "was edited below the line")
    assert {path: path.read_bytes() for path in file.path.parent.rglob("*") if path.is_file()} == before


def test_the_edit_is_kept_with_a_diff(file: RecordFile) -> None:
    file.path.write_bytes(file.path.read_bytes().replace(b"status: complete", b"status: failed"))
    file.facts()
    (diff,) = file.folder.glob("edited-below-*.diff")
    assert "\n-status: complete\n+status: failed\n" in diff.read_text()


def test_a_record_is_read_without_its_folder(file: RecordFile) -> None:
    """As in a fresh clone: the folders are not committed."""
    shutil.rmtree(file.folder)
    assert file.facts() == facts()


@pytest.mark.parametrize(
    ("above", "where"), [(b"a: 1\nb: [\n", ":3:1: "), (b"a: 1\na: 2\n", ":2:1: "), (b"- a\n", ":1:1: ")]
)
def test_a_mistake_above_names_file_line_and_column(file: RecordFile, above: bytes, where: str) -> None:
    file.path.write_bytes(above)
    with pytest.raises(UserError, match=f"^{file.path}{where}"):
        file.person()


@pytest.mark.parametrize(
    ("below", "where"), [(b"a: 1\na: 2\n", ":5:1: the key"), (b"status: fine\n", ":4: not a record's lower half")]
)
def test_a_mistake_below_names_the_line_of_the_whole_file(place: Workspace, below: bytes, where: str) -> None:
    file = RecordFile(place.experiments / "EXP-2026-11-20-001.yaml")
    file.path.write_bytes(b"a: 1\nb: 2\n" + MARK + below)
    with pytest.raises(UserError, match=f"^{file.path}{where}"):
        file.facts()


def test_a_record_that_is_not_there_is_an_error_of_one_line(place: Workspace) -> None:
    file = RecordFile(place.experiments / "EXP-2026-11-20-009.yaml")
    with pytest.raises(UserError, match=r"009\.yaml: cannot be read: No such file"):
        file.facts()


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_write_cut_short_is_not_taken_for_an_edit(
    file: RecordFile, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    """A crash after any of a write's renames: the record is the old or the new one, and nobody is said to have edited."""
    replace = os.replace
    done: list[Path] = []

    def crash(source: Path, target: Path) -> None:
        if len(done) == survives:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        file.write(facts("failed"))
    monkeypatch.undo()
    assert file.facts() == facts("failed" if done else "complete")  # the next version, once it lies there whole
    assert asides(file) == []
    file.write(facts("cancelled"))
    assert file.facts() == facts("cancelled")


def test_readers_beside_a_writer_see_whole_records_and_no_edits(file: RecordFile) -> None:
    """As the demo waits for its server: one process writes while others read."""
    writer = os.fork()
    if writer == 0:
        try:
            for number in range(60):
                file.write(facts().model_copy(update={"results": {"number": number}}))
        finally:
            os._exit(0)
    seen = []
    while os.waitpid(writer, os.WNOHANG)[0] == 0:
        read = file.facts()
        assert read is not None
        seen.append(read.results.get("number", -1))
    assert seen
    assert seen == sorted(seen)
    assert asides(file) == []
    last = file.facts()
    assert last is not None
    assert last.results == {"number": 59}


@contextmanager
def full_disk() -> Iterator[None]:
    """Any file is too large: the kernel refuses to write, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_keeps_the_old_file(file: RecordFile) -> None:
    old, beside = file.path.read_bytes(), sorted(file.path.parent.rglob("*"))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_atomically(file.path, b"new" * 1000)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        file.write(facts("failed"))
    assert file.path.read_bytes() == old
    assert sorted(file.path.parent.rglob("*")) == beside
    assert file.facts() == facts("complete")


def test_a_device_that_is_full_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full in place of the temporary file: the real ENOSPC, on flush."""
    target = tmp_path / "record.yaml"
    target.write_bytes(b"old")
    temporary = tmp_path / "temporary"
    temporary.write_bytes(b"")
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(temporary)))
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
