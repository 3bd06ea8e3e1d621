"""What lists and searches need of every record, kept in `experiments/.index.sqlite`, so that ten thousand open at once.

    for entry in index.entries(workspace): …

The records' files stay the truth. A row counts only while its record's file, and the pipeline's copies beside it, are
the very ones it was read from: same inode, size and times. Everything else is read anew, and only read: nothing here
writes into a record or beside it. Where the cache cannot be had (a read-only folder, a full disk, another process that
holds it) the records are read without one.
"""

import datetime
import gc
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.progress import track
from pipeline.records import file, ids, schema
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

SETTLED = 2.0  # seconds; a file younger than this may change once more within one tick of a coarse clock
BUSY = 1.0  # seconds to wait for another process's write, which takes milliseconds
BULKY = ("overrides", "data", "visualizations", "artifacts", "code", "environment", "external")
MANY = 500  # records, about a second's reading: with more, progress is shown

Rows = dict[str, tuple[str, str]]  # by a record's file name: its stamp, and its entry as JSON


class Entry(BaseModel):
    """One record without what is bulky. What could not be read is told in `problems`; the rest is there."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    id: str
    date: str  # YYYY-MM-DD: the person's, else the id's
    stages: list[str] = []
    profile: str | None = None
    description: str | None = None
    tags: list[str] = []
    facts: Facts | None = None  # None: a plan, or unreadable
    problems: list[str] = []

    @property
    def stage(self) -> str:
        if self.facts:
            return self.facts.stage
        return "pipeline" if len(self.stages) > 1 else "".join(self.stages) or "?"

    @property
    def status(self) -> str:
        """As written; whether a running one truly runs, `lifecycle.liveness` tells."""
        if self.facts:
            return self.facts.status
        return "unreadable" if self.problems else "planned"


@contextmanager
def uncollected() -> Iterator[None]:
    """Of the million objects that ten thousand records are, all stay: looking for garbage would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def entries(workspace: Workspace) -> list[Entry]:
    """All records, newest first."""
    now = time.time()
    paths = ids.newest_first(workspace)
    if not paths:
        return []
    stamps = {path.name: stamp for path in paths if (stamp := _stamp(path, now))}
    store = workspace.experiments / ".index.sqlite"
    rows = _load(store)
    found: dict[str, Entry] = {}
    for name, (stamp, text) in rows.items():
        if name in stamps and stamps[name] == stamp and (entry := _parse(text)) and f"{entry.id}.yaml" == name:
            found[name] = entry
    unread = [path for path in paths if path.name not in found]
    changes: Rows = {}
    vanished = rows.keys() - {path.name for path in paths}
    try:
        for path in track(unread, "reads records", "record") if len(unread) > MANY else unread:
            found[path.name], kept = _read(workspace, path)
            if kept and path.name in stamps:
                changes[path.name] = stamps[path.name], kept
    finally:  # what an interrupted reading has read is kept
        if changes or vanished:
            _save(store, changes, vanished)
    return [found[path.name] for path in paths]


def shuffled(facts: Facts) -> bool:
    """Whether it is a control: trained on answers that were shuffled between the questions."""
    sft = facts.configuration.get("sft_config")
    return isinstance(sft, dict) and bool(sft.get("shuffle_answers"))


def _stamp(path: Path, now: float) -> str | None:
    """What changes whenever `RecordFile.read` would find something else; None where that cannot be told yet."""
    folder = path.with_suffix("")
    marks = []
    for part in (path, folder / "below.yaml", folder / "below.next.yaml"):
        try:
            stat = part.stat()
        except OSError:
            marks.append("none")
            continue
        if now - stat.st_ctime < SETTLED:
            return None
        marks.append(f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}")
    return ", ".join(marks)


def _read(workspace: Workspace, path: Path) -> tuple[Entry, str | None]:
    """The entry, and as JSON where it can be kept."""
    try:
        reading = RecordFile(path).read()
    except UserError as error:  # no file, or none at this moment
        return Entry(id=path.stem, date=path.stem[4:14], problems=[_short(workspace, error)]), None
    person, facts = reading.person, reading.facts
    mistakes = [_short(workspace, mistake) for mistake in (reading.mistake, reading.damage) if mistake]
    edited = [f"{workspace.shown(path)}: {reading.edited}"] if reading.edited else []
    entry = Entry(
        id=path.stem,
        date=_date(person.get("date")) or path.stem[4:14],
        stages=_words(person.get("stages")),
        profile=facts.profile if facts else " ".join(_words(person.get("profile"))) or None,
        description=" ".join(_words(person.get("description"))) or None,
        tags=_words(person.get("tags")),
        facts=_without_bulk(facts) if facts else None,
        problems=mistakes + edited,
    )
    try:
        text = entry.model_dump_json()
    except ValueError:  # bytes, which YAML has and JSON has not
        return entry, None
    return Entry.model_validate_json(text), text  # the same as when it comes from the cache


def _short(workspace: Workspace, error: UserError) -> str:
    return str(error).removeprefix(f"{workspace.root}/")


def _without_bulk(facts: Facts) -> Facts:
    kept = {"configuration": {"sft_config": {"shuffle_answers": shuffled(facts)}}, "history": facts.history[-1:]}
    return facts.model_copy(update=kept | {block: type(getattr(facts, block))() for block in BULKY})


def _date(value: Any) -> str | None:
    try:
        return datetime.date.fromisoformat(str(value)[:10]).isoformat()
    except ValueError:  # "TBD", None
        return None


def _words(value: Any) -> list[str]:
    """A person's text, or list of texts; nothing of any other shape."""
    values = value if isinstance(value, list) else [value]
    return [str(word) for word in values if isinstance(word, str | int | float)]


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _table() -> str:
    """Its name changes with the code that reads records: rows which other code has written are never met."""
    sources = (__file__, file.__file__, schema.__file__, yamlio.__file__)
    return f"entries_{zlib.crc32(b''.join(Path(source).read_bytes() for source in sources)):08x}"


def _parse(text: str) -> Entry | None:
    try:
        return Entry.model_validate_json(text)
    except ValueError:
        return None


def _open(path: Path) -> sqlite3.Connection:
    """Raises `sqlite3.Error`; a plain `DatabaseError` for what is no cache of this code's."""
    wanted = f"CREATE TABLE {_table()}(name TEXT PRIMARY KEY, stamp TEXT, entry TEXT)"
    connection = sqlite3.connect(path, timeout=BUSY)
    try:
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        tables = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if not tables:
            connection.execute(wanted.replace("TABLE", "TABLE IF NOT EXISTS"))
        elif tables != [(wanted,)]:  # also no view and no trigger, which would run when read
            raise sqlite3.DatabaseError("not this code's cache")
    except BaseException:
        connection.close()
        raise
    return connection


def _load(path: Path) -> Rows:
    """What is no cache is removed, and made anew by the next write."""
    try:
        with closing(_open(path)) as connection:
            rows = connection.execute(f"SELECT name, stamp, entry FROM {_table()}")
            return {name: (stamp, entry) for name, stamp, entry in rows}
    except sqlite3.OperationalError:
        return {}
    except sqlite3.DatabaseError:
        with suppress(OSError):
            path.unlink()  # SQLite itself removes the journal that it may leave
        return {}


def _save(path: Path, changes: Rows, vanished: Iterable[str]) -> None:
    rows = [(name, stamp, entry) for name, (stamp, entry) in changes.items()]
    with suppress(sqlite3.Error), closing(_open(path)) as connection, connection:
        connection.executemany(f"REPLACE INTO {_table()} VALUES (?, ?, ?)", rows)
        connection.executemany(f"DELETE FROM {_table()} WHERE name = ?", [(name,) for name in vanished])
