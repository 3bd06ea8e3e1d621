"""The index of records: as fast as a cache, and never anything but what the files say."""

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.records import find, index
from pipeline.records.file import LINE, Reading, RecordFile
from pipeline.records.index import Entry, entries
from pipeline.records.schema import Facts, Input, Lineage
from pipeline.workspace import CHECKOUT, Workspace

Keep = Callable[..., RecordFile]
CHANGE = {end: {"value": value, "n": 9} for end, value in (("before", 2.0), ("after", 1.5), ("delta", -0.5))}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, instead of after two seconds."""
    monkeypatch.setattr(index, "SETTLED", 0.0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The numbers of the records whose files were read, in order."""
    numbers: list[str] = []
    whole = RecordFile.read

    def counted(file: RecordFile) -> Reading:
        numbers.append(file.id[15:])
        return whole(file)

    monkeypatch.setattr(RecordFile, "read", counted)
    return numbers


def store(place: Workspace) -> Path:
    return place.experiments / ".index.sqlite"


def rows(place: Workspace) -> dict[str, str]:
    """What the cache holds: entries by file name."""
    with closing(sqlite3.connect(store(place))) as connection:
        [(table,)] = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: entry for name, _, entry in connection.execute(f"SELECT * FROM {table}")}


def statuses(place: Workspace) -> list[str]:
    return [f"{entry.id[15:]} {entry.status}" for entry in entries(place)]


# ── the cache is as good as the files ────────────────────────────────────────────────────────────────────────────────


def test_what_comes_from_the_cache_is_what_came_from_the_files(
    place: Workspace, kept: Keep, settled: None, read: list[str]
) -> None:
    kept(1, results={"eval_loss": CHANGE, "odd": {"nan": float("nan"), 7: [None, True]}}, verdict={"frozen_at": "now"})
    kept(
        2, status="failed", failure={"kind": "x", "message": "ü\n\x1b[2J"}, lineage=Lineage(parent="EXP-2026-11-20-001")
    )
    (place.experiments / "EXP-2026-11-20-1000.yaml").write_text("tags: [a, 7]\ndate: 2025-01-31\nstages: [sft, dpo]\n")
    first = entries(place)
    assert [entry.id[15:] for entry in first] == ["1000", "002", "001"]
    assert read == ["1000", "002", "001"]
    assert [e.model_dump_json() for e in entries(place)] == [e.model_dump_json() for e in first]
    assert read == ["1000", "002", "001"]  # and none since


def test_a_record_of_any_size_is_a_short_entry(place: Workspace, kept: Keep, settled: None) -> None:
    bulk = {"x": "y" * 1000}
    control = {"sft_config": {"shuffle_answers": True, "long": bulk}}
    taken = [Input(id="EXP-2026-11-20-000", stage="data", path="p", sha256="0")]
    kept(1, data=bulk, code=bulk, environment=bulk, external=bulk, configuration=control, lineage=Lineage(inputs=taken))
    [entry] = entries(place)
    assert len(entry.model_dump_json()) < 1000
    assert entry.facts is not None
    assert index.shuffled(entry.facts)
    assert entry.facts.lineage.inputs == taken


def edit_in_place(path: Path) -> None:
    """As some editors save: the same inode, the same size, and then also the same modification time."""
    before = path.stat()
    with path.open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"one"))
        file.write(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """As others save: another file under the same name, of the same size and modification time."""
    before, new = path.stat(), path.with_suffix(".new")
    new.write_bytes(path.read_bytes().replace(b"one", b"two"))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"one", b"two # and more"))


@pytest.mark.parametrize("change", [edit_in_place, replace, lengthen])
def test_a_file_that_changed_is_read_anew(
    place: Workspace, kept: Keep, settled: None, read: list[str], change: Callable[[Path], None]
) -> None:
    kept(1)
    kept(2).path.write_bytes(b"description: one\n")
    shutil.rmtree(place.experiments / "EXP-2026-11-20-002")
    assert [entry.description for entry in entries(place)] == ["one", None]
    change(place.experiments / "EXP-2026-11-20-002.yaml")
    assert [entry.description for entry in entries(place)] == ["two", None]
    assert read == ["002", "001", "002"]


def test_a_file_that_was_just_written_is_not_trusted_to_the_cache(
    place: Workspace, kept: Keep, read: list[str]
) -> None:
    """Written twice within one tick of the clock it would look the same."""
    kept(1)
    entries(place)
    entries(place)
    assert read == ["001", "001"]


def test_a_clock_that_went_backwards_makes_no_file_old(
    place: Workspace, kept: Keep, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(1)
    monkeypatch.setattr(index.time, "time", lambda: 0.0)
    entries(place)
    entries(place)
    assert read == ["001", "001"]


def test_a_deleted_record_is_gone_from_the_list_and_from_the_cache(place: Workspace, kept: Keep, settled: None) -> None:
    kept(1)
    gone = kept(2)
    entries(place)
    assert set(rows(place)) == {"EXP-2026-11-20-001.yaml", "EXP-2026-11-20-002.yaml"}
    gone.path.unlink()
    assert statuses(place) == ["001 complete"]
    assert set(rows(place)) == {"EXP-2026-11-20-001.yaml"}


def test_a_run_is_followed_from_write_to_write(place: Workspace, kept: Keep, settled: None) -> None:
    for status in ("running", "failed", "running", "complete"):
        kept(1, status=status)
        assert statuses(place) == [f"001 {status}"]


# ── broken and odd records ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_in_mid_edit_has_its_facts_and_says_where_the_mistake_is(
    place: Workspace, kept: Keep, settled: None
) -> None:
    file = kept(1)
    file.path.write_bytes(b"# mine\ntags: [}\n" + file.path.read_bytes())
    [entry] = entries(place)
    assert entry.status == "complete"
    assert entry.problems[0].startswith("experiments/EXP-2026-11-20-001.yaml:2:8: ")
    file.path.write_bytes(file.path.read_bytes().replace(b"tags: [}", b"tags: [night]"))
    [entry] = entries(place)
    assert (entry.problems, entry.tags) == ([], ["night"])


@pytest.mark.parametrize("above", [b"tags: [\n", b""], ids=["mid-edit", "emptied"])
def test_facts_that_wait_beside_the_file_are_never_stale(
    place: Workspace, kept: Keep, settled: None, above: bytes
) -> None:
    file = kept(1, status="running")
    file.path.write_bytes(above + file.path.read_bytes().removeprefix(b"# mine\n"))
    assert statuses(place) == ["001 running"]
    before = file.path.stat()
    for status in ("failed", "complete"):
        file.write(Facts(status=status, stage="sft", profile="small"))
        assert file.path.stat() == before  # nothing was written into the file
        assert statuses(place) == [f"001 {status}"]


def test_an_unreadable_record_says_why(place: Workspace, kept: Keep, settled: None) -> None:
    kept(1)
    (place.experiments / "EXP-2026-11-20-002.yaml").write_text(f"{LINE}\nstatus: [}}")
    (place.experiments / "EXP-2026-11-20-003.yaml").symlink_to("nowhere")
    (place.experiments / "EXP-2026-11-20-004.yaml").mkdir()
    for _ in ("read", "from the cache"):
        assert statuses(place) == ["004 unreadable", "003 unreadable", "002 unreadable", "001 complete"]
        problems = [" ".join(entry.problems) for entry in entries(place)]
        assert problems[0] == "experiments/EXP-2026-11-20-004.yaml: is no file"
        assert problems[1].startswith("experiments/EXP-2026-11-20-003.yaml: cannot be read: ")
        assert problems[2].startswith("experiments/EXP-2026-11-20-002.yaml:2:10: ")


def test_a_file_that_the_system_would_not_open_is_tried_again(
    place: Workspace, kept: Keep, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: os.open("/", os.O_WRONLY))  # raises an OSError
        assert statuses(place) == ["001 unreadable"]
    assert statuses(place) == ["001 complete"]


def test_the_pipelines_copy_counts_as_the_record_does(place: Workspace, kept: Keep, settled: None) -> None:
    """An edited lower half is told by the copy beside it; with another copy, or none, it means something else."""
    file = kept(1, status="failed")
    file.path.write_bytes(file.path.read_bytes().replace(b"status: failed", b"status: complete"))
    assert statuses(place) == ["001 failed"]
    shutil.rmtree(file.folder)
    assert statuses(place) == ["001 complete"]
    [entry] = entries(place)
    assert "no copy is at hand" in entry.problems[0]


def test_an_edit_below_the_line_is_told_and_the_pipelines_word_shown(
    place: Workspace, kept: Keep, settled: None
) -> None:
    file = kept(1, status="failed")
    file.path.write_bytes(file.path.read_bytes().replace(b"status: failed", b"status: complete"))
    for _ in ("read", "from the cache"):
        [entry] = entries(place)
        assert entry.status == "failed"
        assert entry.problems == ["experiments/EXP-2026-11-20-001.yaml: was edited below the line"]


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ("tags: night", {"tags": ["night"]}),
        ("tags: {a: 1}", {"tags": []}),
        ("tags: [a, [b], {c: d}, null, 7]", {"tags": ["a", "7"]}),
        ("date: 2025-02-03", {"date": "2025-02-03"}),
        ("date: 2025-02-03 04:05:06", {"date": "2025-02-03"}),
        ("date: TBD", {"date": "2026-11-20"}),
        ("date: [2025]", {"date": "2026-11-20"}),
        ("stages: sft", {"stages": ["sft"], "stage": "sft"}),
        ("stages: [sft, dpo]", {"stages": ["sft", "dpo"], "stage": "pipeline"}),
        ("stages: {sft: 1}", {"stages": [], "stage": "?"}),
        ("profile: [a, b]", {"profile": "a b"}),
        ("description: {a: b}", {"description": None}),
        ("description: 2024", {"description": "2024"}),
        ("", {"status": "planned", "profile": None, "problems": []}),
    ],
)
def test_a_plan_is_read_as_far_as_it_has_the_shape(
    place: Workspace, settled: None, above: str, expected: dict[str, object]
) -> None:
    (place.experiments / "EXP-2026-11-20-001.yaml").write_text(above + "\n# a plan\n")
    for _ in ("read", "from the cache"):
        [entry] = entries(place)
        assert {key: getattr(entry, key) for key in expected} == expected


@pytest.mark.parametrize(
    "value", ["!!binary /w==", "{!!binary /w==: 1}", "!!set {1, 2}", "{[1]: 2}", "{1: {null: 2026-01-01}}"]
)
def test_what_json_has_no_word_for_keeps_nobody_from_being_listed(
    place: Workspace, kept: Keep, settled: None, value: str
) -> None:
    kept(1)
    facts = f"status: complete\nstage: sft\nprofile: small\nresults: {{odd: {value}}}\n"
    (place.experiments / "EXP-2026-11-20-002.yaml").write_text(f"# mine\n{LINE}\n{facts}")
    for _ in ("read", "from the cache"):
        assert [entry.id[15:] for entry in entries(place)] == ["002", "001"]


def test_reading_writes_nothing_but_the_cache(place: Workspace, kept: Keep, settled: None) -> None:
    kept(1)
    for number, old, new in (
        (2, b"status: complete", b"status: failed"),
        (3, b"# mine", b"tags: ["),
        (4, b"# mine", b"\xff"),
    ):
        file = kept(number)
        file.path.write_bytes(file.path.read_bytes().replace(old, new))
    kept(5).path.write_bytes(b"")
    kept(6).path.write_bytes(kept(6).path.read_bytes().replace(LINE.encode(), b"# the line was here"))

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in place.root.rglob("*") if path.is_file()}

    before = content()
    assert len(entries(place)) == 6
    assert {path: text for path, text in content().items() if path != str(store(place))} == before


# ── a cache that is not what it should be ────────────────────────────────────────────────────────────────────────────


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def as_view(path: Path, view: str) -> None:
    table = index._table()
    execute(path, f"DROP TABLE {table}", f"CREATE VIEW {table}(name, stamp, entry) AS {view}")


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, i, i FROM n"
LIE = Entry(id="EXP-2026-11-20-001", date="2026-11-20", problems=["a lie"]).model_dump_json()
FAULTS: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a database\n" * 500),
    "cut short": lambda path: os.truncate(path, 5000),
    "its pages overwritten": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 8192),
    "a journal of something else": lambda path: path.with_name(f"{path.name}-journal").write_bytes(b"\xd9\xd5" * 999),
    "older code's": lambda path: execute(
        path, f"DROP TABLE {index._table()}", "CREATE TABLE entries_0000(name TEXT PRIMARY KEY, stamp TEXT, entry TEXT)"
    ),
    "another table beside": lambda path: execute(path, "CREATE TABLE more(x)"),
    "an endless view": lambda path: as_view(path, ENDLESS),
    "a trigger": lambda path: execute(
        path, f"CREATE TRIGGER t AFTER DELETE ON {index._table()} BEGIN DELETE FROM {index._table()}; END"
    ),
    "no JSON": lambda path: execute(path, f"UPDATE {index._table()} SET entry = '{{'"),
    "JSON of another shape": lambda path: execute(path, f"UPDATE {index._table()} SET entry = '[1]'"),
    "deep JSON": lambda path: execute(path, f"UPDATE {index._table()} SET entry = '{'[' * 100_000}'"),
    "unknown status": lambda path: execute(
        path, f"UPDATE {index._table()} SET entry = replace(entry, 'complete', 'splendid')"
    ),
    "null": lambda path: execute(path, f"UPDATE {index._table()} SET entry = NULL, stamp = NULL"),
    "numbers": lambda path: execute(path, f"UPDATE {index._table()} SET entry = 7, stamp = 7"),
    "bytes": lambda path: execute(path, f"UPDATE {index._table()} SET entry = X'FF', stamp = CAST(X'FF' AS TEXT)"),
    "another record's entry": lambda path: execute(
        path, f"UPDATE {index._table()} SET entry = replace(entry, '2026-11-20-001', '../../etc/passwd')"
    ),
    "a stranger's row": lambda path: execute(path, f"INSERT INTO {index._table()} VALUES ('../x', '', '{LIE}')"),
    "a name that is no text": lambda path: execute(
        path, f"INSERT INTO {index._table()} VALUES (CAST(X'FF' AS TEXT), '', '{LIE}')"
    ),
    "stale": lambda path: execute(path, f"UPDATE {index._table()} SET entry = '{LIE}', stamp = '1 2 3 4'"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("/nowhere/at/all")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "unreadable": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_with_a_fault_changes_nothing(place: Workspace, kept: Keep, settled: None, fault: str) -> None:
    kept(1)
    kept(2, status="failed")
    expected = entries(place)
    assert len(rows(place)) == 2
    FAULTS[fault](store(place))
    assert entries(place) == expected
    assert entries(place) == expected


REBUILT = FAULTS.keys() - {"a folder", "a link to nowhere", "a link to itself", "unreadable"}


@pytest.mark.parametrize("fault", sorted(REBUILT))
def test_a_cache_with_a_fault_is_made_anew(
    place: Workspace, kept: Keep, settled: None, read: list[str], fault: str
) -> None:
    kept(1)
    kept(2)
    entries(place)
    FAULTS[fault](store(place))
    entries(place)
    entries(place)
    del read[:]
    entries(place)
    assert read == []


def test_another_database_that_a_link_leads_to_is_left_alone(place: Workspace, kept: Keep, settled: None) -> None:
    kept(1)
    precious = place.root / "precious.sqlite"
    execute(precious, "CREATE TABLE mine(x)", "INSERT INTO mine VALUES (1)")
    before = precious.read_bytes()
    store(place).symlink_to(precious)
    for _ in range(3):
        assert statuses(place) == ["001 complete"]
    assert precious.read_bytes() == before


@contextmanager
def as_nobody(place: Workspace) -> Iterator[None]:
    """Whoever runs the tests, `experiments/` is a folder they may read and not write."""
    root = os.geteuid() == 0
    modes = {path: path.stat().st_mode for path in (place.root, *place.root.parents) if root}
    closed = {path: mode for path, mode in modes.items() if mode & 0o055 != 0o055}  # pytest's own folders
    for path, mode in closed.items():
        path.chmod(mode | 0o055)  # the user changes, the group does not
    place.experiments.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        place.experiments.chmod(0o755)
        for path, mode in closed.items():
            path.chmod(mode)


@pytest.mark.parametrize("cached", [True, False])
def test_a_folder_that_cannot_be_written_is_read(place: Workspace, kept: Keep, settled: None, cached: bool) -> None:
    kept(1)
    kept(2)
    if cached:
        entries(place)
        kept(2, status="failed")
    with as_nobody(place):
        with pytest.raises(PermissionError):
            (place.experiments / "x").touch()
        assert statuses(place) == ["002 failed" if cached else "002 complete", "001 complete"]
    assert store(place).exists() == cached


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 6 KB: SQLite meets a write that fails, as on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_the_cache_and_nothing_else(
    place: Workspace, kept: Keep, settled: None, full_disk: None
) -> None:
    for number in range(1, 31):
        kept(number)
    for _ in range(2):
        assert len(statuses(place)) == 30


def test_a_cache_that_another_process_holds_is_done_without(
    place: Workspace, kept: Keep, settled: None, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BUSY", 0.05)
    kept(1)
    entries(place)
    kept(2)
    with closing(sqlite3.connect(store(place))) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        assert statuses(place) == ["002 complete", "001 complete"]
        assert read == ["001", "002", "001"]
    assert statuses(place) == ["002 complete", "001 complete"]
    assert read == ["001", "002", "001", "002"]  # what was cached before is still there


def test_processes_at_once_get_the_same_list_and_leave_a_whole_cache(
    place: Workspace, kept: Keep, settled: None, read: list[str]
) -> None:
    for number in range(1, 101):
        kept(number, status="failed" if number % 3 else "complete")
    script = (
        "import sys, pathlib; from pipeline.records import index; from pipeline.workspace import Workspace\n"
        "index.SETTLED = 0.0\n"
        "for _ in range(5): found = index.entries(Workspace(pathlib.Path(sys.argv[1])))\n"
        "print([(e.id, e.status) for e in found])"
    )
    command = [sys.executable, "-c", script, str(place.root)]
    started = [subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert said == [f"{[(entry.id, entry.status) for entry in entries(place)]}\n"] * 4
    assert read == []
    assert len(rows(place)) == 100


def test_what_an_interrupted_reading_has_read_is_kept(
    place: Workspace, kept: Keep, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 6):
        kept(number)
    whole = RecordFile.read

    def interrupted(file: RecordFile) -> Reading:
        if file.id.endswith("003"):
            raise KeyboardInterrupt
        return whole(file)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            entries(place)
    assert set(rows(place)) == {"EXP-2026-11-20-005.yaml", "EXP-2026-11-20-004.yaml"}
    assert len(entries(place)) == 5


def test_a_long_reading_shows_how_far_it_is(
    place: Workspace, kept: Keep, settled: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index, "MANY", 2)
    for number in range(1, 4):
        kept(number)
    entries(place)
    assert "reads records  3/3 records" in capfd.readouterr().err
    entries(place)
    assert capfd.readouterr().err == ""


def test_where_there_are_no_records_nothing_is_made(tmp_path: Path) -> None:
    assert entries(Workspace(tmp_path)) == []
    (tmp_path / "experiments").mkdir()
    assert entries(Workspace(tmp_path)) == []
    assert list((tmp_path / "experiments").iterdir()) == []


# ── searches that build on it ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The numbers of the records whose facts were read in full."""
    numbers: list[str] = []
    facts = RecordFile.facts

    def counted(file: RecordFile) -> Facts | None:
        numbers.append(file.id[15:])
        return facts(file)

    monkeypatch.setattr(RecordFile, "facts", counted)
    return numbers


def test_a_search_reads_only_the_record_it_finds(place: Workspace, kept: Keep, settled: None, whole: list[str]) -> None:
    for number in range(1, 8):
        kept(number, stage=("sft", "dpo", "merge")[number % 3], profile="small" if number < 6 else "other")
    kept(8, status="failed")
    assert find.source(place, "small", ["dpo"], None)[0].id[15:] == "004"
    assert find.latest_first(place, "small", ["sft", "dpo"]) == ["dpo", "sft"]
    assert find.resumable(place, "small", "sft")[0].id[15:] == "008"
    assert whole == ["004", "004", "008"]


def test_a_search_believes_the_file_and_not_the_index(place: Workspace, kept: Keep, settled: None) -> None:
    kept(1)
    kept(2, status="failed")
    entries(place)
    execute(store(place), f"UPDATE {index._table()} SET entry = replace(entry, 'failed', 'complete')")
    assert statuses(place) == ["002 complete", "001 complete"]  # so far the lie goes
    assert find.source(place, "small", ["sft"], None)[0].id[15:] == "001"
    with pytest.raises(UserError, match="no complete dpo"):
        find.source(place, "small", ["dpo"], None)
