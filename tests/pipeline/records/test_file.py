import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.records.file import LINE, RecordFile, split, write_atomically
from pipeline.records.schema import Facts, Status
from pipeline.workspace import Workspace

MARK = LINE.encode() + b"\n"
ABOVE = {
    "plain": b"# Yours.\ndate: 2026-11-20\n\n\n",
    "odd": "description:   'two  spaces'   # why   \n\n# 🚀 naïve\nobservations: [ 1,2 ,  3]\n\t\n".encode(),
    "crlf": b"date: 2026-11-20\r\ndescription: x\r\n",
    "bom": b"\xef\xbb\xbfdate: 2026-11-20\n",
    "no final newline": b"description: x",
    "no final newline, crlf": b"a: 1\r\ndescription: x",
    "other line breaks": "description: 'one\u2028two\x85three'\n".encode(),
    "a copy of the line in a text": b"notes: |\n  it says\n  " + MARK + b"  and so on\n",
    "not utf-8": b"# \xff\xfe latin\xe9\n",
    "empty": b"",
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
    return [path.read_bytes() for path in sorted(file.folder.glob("edited-below-*"))]


@pytest.mark.parametrize("above", ABOVE.values(), ids=ABOVE)
def test_above_the_line_stays_byte_for_byte(place: Workspace, above: bytes) -> None:
    file = RecordFile(place.experiments / "EXP-2026-11-20-001.yaml")
    file.path.write_bytes(above)
    assert file.facts() is None  # a plan
    statuses: tuple[Status, ...] = ("running", "complete")
    for status in statuses:
        file.write(facts(status))
        assert file.facts() == facts(status)
    ending = b"" if above.endswith(b"\n") or not above else b"\n"  # the line needs one of its own
    content = file.path.read_bytes()
    assert content.startswith(above + ending + MARK)
    assert split(content, "") == split(above + ending + MARK + (file.folder / "below.yaml").read_bytes(), "")


def test_what_an_editor_saves_between_two_writes_stays(file: RecordFile) -> None:
    stale = file.path.read_bytes()  # opened in the editor
    file.write(facts("running"))
    file.path.write_bytes(stale.replace(b"description: x", b"description: y\r\n# \xf0\x9f\x9a\x80"))  # saved there
    file.write(facts("failed"))
    assert file.path.read_bytes().startswith(b"description: y\r\n# \xf0\x9f\x9a\x80\n" + MARK)
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


def test_a_doubled_line_is_refused_at_the_second(file: RecordFile) -> None:
    content = b"description: x\n" + MARK + file.path.read_bytes()
    file.path.write_bytes(content)
    for attempt in (file.facts, file.person, lambda: file.write(facts())):
        with pytest.raises(
            UserError, match=r"001\.yaml:4: the line that divides the record stands twice; try deleting one"
        ):
            attempt()
        assert file.path.read_bytes() == content


@pytest.mark.parametrize("left", [b"description: x\n", b"description: x\nstatus: complete\n"])
def test_a_record_whose_line_was_deleted_is_no_plan(file: RecordFile, left: bytes) -> None:
    file.path.write_bytes(left)
    with pytest.raises(UserError, match="the line that divides the record is gone; try adding # ───"):
        file.facts()
    file.path.write_bytes(left + MARK)
    assert file.facts() == facts()


def test_a_record_is_read_without_its_folder(file: RecordFile) -> None:
    """As in a fresh clone: the folders are not committed."""
    shutil.rmtree(file.folder)
    assert file.facts() == facts()


@pytest.mark.parametrize(
    ("above", "where"), [(b"a: 1\nb: [\n", ":3:1: "), (b"a: 1\na: 2\n", ":2:1: "), (b"- a\n", ":1: ")]
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
    assert file.facts() == facts("failed" if file.path in done else "complete")
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
