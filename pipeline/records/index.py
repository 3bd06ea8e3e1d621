"""What lists and searches need of every record, kept in `experiments/.index.sqlite`, so that ten thousand open at once.

    for entry in index.entries(workspace): …

The records' files stay the truth. A row counts only while its file is the very one it was read from: same inode, size
and times. Everything else is read anew, and only read: nothing here writes into a record or beside it. Where the cache
cannot be had (a read-only folder, a full disk, another process that holds it) the records are read without one.
"""

import datetime
import sqlite3
import time
import zlib
from collections.abc import Iterable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.progress import track
from pipeline.records import ids
from pipeline.records.file import Reading, RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

SETTLED = 2.0  # seconds; a file younger than this may change once more within one tick of a coarse clock
BUSY = 1.0  # seconds to wait for another process's write, which takes milliseconds
BULKY = ("overrides", "data", "visualizations", "artifacts", "code", "environment", "external")
BATCH = 500  # rows a write; with more records than this to read, progress is shown


class Entry(BaseModel):
    """One record without what is bulky. What could not be read is told in `errors`; the rest is there."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    id: str
    date: str  # YYYY-MM-DD: the person's, else the id's
    stages: list[str] = []
    profile: str | None = None
    description: str | None = None
    tags: list[str] = []
    facts: Facts | None = None  # None: a plan, or unreadable
    errors: list[str] = []

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
        return "unreadable" if self.errors else "planned"


def entries(workspace: Workspace) -> list[Entry]:
    """All records, newest first."""
    now = time.time()
    paths = ids.newest_first(workspace)
    if not paths:
        return []
    stamps = {path.name: _stamp(path, now) for path in paths}
    store = workspace.experiments / ".index.sqlite"
    rows = _load(store)
    found = {}
    for name, (stamp, text) in rows.items():
        with suppress(ValueError):
            if stamp == stamps.get(name):
                found[name] = Entry.model_validate_json(text)
    changes: dict[str, tuple[str, str]] = {}
    vanished = rows.keys() - stamps.keys()
    unread = [path for path in paths if path.name not in found]
    for path in track(unread, "reads records", "record") if len(unread) > BATCH else unread:
        text, lasting = _read(workspace, path)
        found[path.name] = Entry.model_validate_json(text)  # as it will come from the cache
        stamp = stamps[path.name]
        if stamp and lasting:
            changes[path.name] = stamp, text
        if len(changes) == BATCH:  # an interrupted reading is not begun all over again
            _save(store, changes, ())
            changes = {}
    if changes or vanished:
        _save(store, changes, vanished)
    return [found[path.name] for path in paths]


def _stamp(path: Path, now: float) -> str | None:
    """What tells a file from another of its name; None where nothing does yet."""
    try:
        stat = path.stat()
    except OSError:
        return None
    if now - stat.st_ctime < SETTLED:
        return None
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _read(workspace: Workspace, path: Path) -> tuple[str, bool]:
    """An entry as JSON, and whether it holds for as long as the file is the same."""
    file = RecordFile(path)
    try:
        reading = file.read()
    except UserError as error:
        reading = Reading({}, None, damage=error)
    person, where = reading.person, workspace.shown(path)
    mistakes = [str(mistake) for mistake in (reading.mistake, reading.damage) if mistake]
    edited = [f"{where}: {reading.edited}"] if reading.edited else []
    entry = Entry(
        id=file.id,
        date=_date(person.get("date")) or file.id[4:14],
        stages=_words(person.get("stages")),
        profile=" ".join(_words(person.get("profile"))) or None,
        description=" ".join(_words(person.get("description"))) or None,
        tags=_words(person.get("tags")),
        facts=reading.facts and _without_bulk(reading.facts),
        errors=[mistake.removeprefix(f"{workspace.root}/") for mistake in mistakes] + edited,
    )
    try:
        return entry.model_dump_json(), not (mistakes or reading.pending)
    except ValueError as error:  # bytes, which YAML has and JSON has not
        broken = Entry(id=entry.id, date=entry.date, errors=[f"{where}: {error}"])
        return broken.model_dump_json(), False


def _without_bulk(facts: Facts) -> Facts:
    sft = facts.configuration.get("sft_config")
    control = isinstance(sft, dict) and bool(sft.get("shuffle_answers"))
    small = {"configuration": {"sft_config": {"shuffle_answers": control}}, "history": facts.history[-1:]}
    return facts.model_copy(update=small | {key: type(getattr(facts, key))() for key in BULKY})


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
    code = [Path(__file__), *(Path(__file__).with_name(name) for name in ("file.py", "schema.py")), Path(yamlio.__file__)]
    return f"entries_{zlib.crc32(b''.join(path.read_bytes() for path in code)):08x}"


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


def _load(path: Path) -> dict[str, tuple[str, str]]:
    """Stamp and entry by the record's file name. What is no cache is removed, and made anew by the next write."""
    try:
        with closing(_open(path)) as connection:
            rows = connection.execute(f"SELECT name, stamp, entry FROM {_table()}")
            return {name: (stamp, entry) for name, stamp, entry in rows}
    except sqlite3.OperationalError:
        return {}
    except sqlite3.DatabaseError:
        with suppress(OSError):
            for suffix in ("", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        return {}


def _save(path: Path, changes: dict[str, tuple[str, str]], vanished: Iterable[str]) -> None:
    rows = [(name, stamp, entry) for name, (stamp, entry) in changes.items()]
    with suppress(sqlite3.Error), closing(_open(path)) as connection, connection:
        connection.executemany(f"REPLACE INTO {_table()} VALUES (?, ?, ?)", rows)
        connection.executemany(f"DELETE FROM {_table()} WHERE name = ?", [(name,) for name in vanished])
