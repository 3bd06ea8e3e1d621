"""`aletheia exp add`: takes in logs kept elsewhere, one record an experiment.

    aletheia exp add notebook.md plans.yaml

All of a log goes above the line, which is the person's; below it stands what the program can tell of it: how it ended,
the figures that it could read, and where it came from. A plan has no line. Everything is read and checked before anything
is written; an experiment that a record holds already is not taken in again.
"""

import hashlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aletheia.exp import foreign_figures, foreign_markdown, foreign_yaml
from aletheia.exp.foreign import Log, Placed, place
from aletheia.output import print_json, print_table
from pipeline import yamlio
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.records import criteria, ids, person
from pipeline.records.file import LINE, RecordFile
from pipeline.records.lifecycle import upper_half
from pipeline.records.schema import Facts, Failure, StatusChange, Verdict
from pipeline.workspace import Workspace

MARKDOWN, YAML = (".md", ".markdown"), (".yaml", ".yml", ".json")
WIDTH = 80
NO_EVIDENCE = {  # by these alone a file is no experiment: pages and configurations have them too
    "title", "date", "description", "notes", "set_up", "seeds", "tags", "experimenter", "profile", "splits", "related",
    "template_version", "code_version",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where an experiment stood. `sha256` is of its own part of the file: it is known again in a log that has grown."""

    file: str
    line: int
    sha256: str
    file_sha256: str
    foreign_id: str | None
    notes: list[str] = field(default_factory=list)  # what was changed on the way, and what has no place of its own


@dataclass(frozen=True)
class Taken:
    """An experiment ready to be written."""

    shown: str
    placed: Placed
    origin: Origin
    half: dict[str, Any]
    facts: Facts | None  # None: a plan

    @property
    def status(self) -> str:
        return self.facts.status if self.facts else "planned"


def add(workspace: Workspace, files: Sequence[Path], as_json: bool) -> None:
    """Raises `UserError`, with nothing written, where one of the files cannot be taken in."""
    there = _taken_in_before(workspace)
    new: list[Taken] = []
    for file in files:
        found = list(_of_file(file))
        known = {taken.origin.sha256: taken.shown for taken in new} | there
        again = [taken for taken in found if taken.origin.sha256 in known]
        if len(again) == len(found):
            earlier = ", ".join(dict.fromkeys(known[taken.origin.sha256] for taken in again))
            raise UserError(f"was taken in already, as {earlier}", where=str(file))
        for taken in again:
            say(f"note: {taken.shown} is there already, as {known[taken.origin.sha256]}")
        new += [taken for taken in found if taken not in again]
    paths = _write(workspace, new)
    if as_json:
        print_json([_as_data(workspace, path, taken) for path, taken in zip(paths, new, strict=True)])
        return
    _summarise([path.stem for path in paths], new)
    for path in paths:
        print(workspace.shown(path))


def _of_file(file: Path) -> Iterator[Taken]:
    content = _read(file)
    text = content.decode("utf-8-sig")
    markdown = file.suffix.lower() in MARKDOWN
    placed = [
        (log, place(log)) for log in (foreign_markdown.logs(text) if markdown else foreign_yaml.logs(text, str(file)))
    ]
    if not any(one.person.keys() - NO_EVIDENCE for _, one in placed):
        raise UserError(
            "nothing in it reads as an experiment",
            where=str(file),
            remedy="headings or keys such as hypothesis, configuration, metrics, observations, conclusion, next steps",
        )
    digest = hashlib.sha256(content).hexdigest()
    for log, one in placed:
        yield _taken(file, digest, log, one)


def _read(file: Path) -> bytes:
    """Raises `UserError` for what is no text of a kind that is known here."""
    where = str(file)
    if file.suffix.lower() not in MARKDOWN + YAML:
        raise UserError("is neither YAML nor Markdown", where=where, remedy=f"a name in {', '.join(YAML + MARKDOWN)}")
    if not file.is_file():  # reading a pipe would wait for ever
        raise UserError("there is no such file", where=where)
    try:
        with file.open("rb") as stream:
            content = stream.read(yamlio.MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=where) from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError("is no UTF-8 text", where=f"{where}:{line}") from None
    if len(content) > yamlio.MAX_BYTES:
        raise UserError(f"is larger than {yamlio.MAX_BYTES // 2**20} MiB", where=where)
    if any(line == LINE for line in text.splitlines()):
        raise UserError("is a record already", where=where, remedy="copying it and its folder into experiments/")
    return content


def _taken(file: Path, digest: str, log: Log, placed: Placed) -> Taken:
    shown = f"{file}:{log.line}"
    foreign_id = placed.person.get("foreign_id")
    kept = ", ".join(f"`{name}`" for name in placed.unplaced)
    notes = [*placed.remarks, *([f"kept under notes: {kept}"] if kept else [])]
    own = hashlib.sha256(f"{foreign_id}\n{log.text.strip()}".encode()).hexdigest()
    origin = Origin(file.name, log.line, own, digest, None if foreign_id is None else str(foreign_id), notes)
    half: dict[str, Any] = {"date": None} | placed.person
    facts = None
    if placed.status == "planned":
        half = {"date": None, "profile": None, "stages": None} | placed.person | {"taken_in": asdict(origin)}
    else:
        facts = _facts(file.name, placed, origin)
    taken = Taken(shown, placed, origin, half, facts)
    _check(taken)
    return taken


def _facts(file: str, placed: Placed, origin: Origin) -> Facts:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = f"; its status there: {placed.status_text}" if placed.status_text else ""
    results = foreign_figures.results(placed.person)
    wanted = criteria.read(placed.person.get("success_criteria"))
    failed = (
        Failure(kind="imported", message=f"its log says: {placed.status_text}") if placed.status == "failed" else None
    )
    return Facts(
        status=placed.status,
        stage="imported",
        profile=placed.person.get("profile") or "external",
        history=[StatusChange(status=placed.status, at=now, note=f"taken in from {file}{told}")],
        results=results,
        verdict=criteria.judge(Verdict(frozen_at=now, criteria=wanted), results) if wanted else None,
        failure=failed,
        external={"taken_in": asdict(origin)},
    )


def _check(taken: Taken) -> None:
    """That both halves can be read again: a log may be as deep or as large as a record may just not be."""
    try:
        person.parse(upper_half("EXP-2000-01-01-001", "2000-01-01", taken.half).decode(), taken.shown)
        if taken.facts:
            yamlio.load(yamlio.dump(taken.facts.model_dump(mode="json", exclude_none=True)))
    except (UserError, yamlio.YamlError) as error:
        raise UserError(f"cannot be kept as a record: {error.what}", where=taken.shown) from None


def _write(workspace: Workspace, new: Sequence[Taken]) -> list[Path]:
    """All, or none: a full disk leaves no half of a log behind."""
    written: list[RecordFile] = []
    try:
        for taken in new:
            path = ids.allocate(workspace, lambda name, date, half=taken.half: upper_half(name, date, half))
            written.append(RecordFile(path))
            if taken.facts:
                written[-1].write(taken.facts)
    except OSError as error:
        for file in written:
            _remove(file)
        raise StageFailed(f"nothing was taken in: {error.strerror or error}") from None
    return [file.path for file in written]


def _remove(file: RecordFile) -> None:
    """A record that was made a moment ago, and that nobody has seen."""
    with suppress(OSError):
        file.path.unlink()
        for path in file.folder.iterdir() if file.folder.is_dir() else []:
            path.unlink()
        file.folder.rmdir()


def _taken_in_before(workspace: Workspace) -> dict[str, str]:
    """SHA-256 of every experiment that was taken in → the record that holds it."""
    known = {}
    for path in reversed(ids.newest_first(workspace)):
        with suppress(OSError, UserError):
            if path.is_file() and b"taken_in:" in path.read_bytes():
                record = RecordFile(path).read()
                origin = record.facts.external.get("taken_in") if record.facts else record.person.get("taken_in")
                if isinstance(origin, dict) and isinstance(origin.get("sha256"), str):
                    known[origin["sha256"]] = path.stem
    return known


def _as_data(workspace: Workspace, path: Path, taken: Taken) -> dict[str, Any]:
    return {
        "id": path.stem,
        "path": workspace.shown(path),
        "status": taken.status,
        "placed": list(taken.placed.person),
        "unplaced": list(taken.placed.unplaced),
        "changed": taken.placed.remarks,
        **{key: value for key, value in asdict(taken.origin).items() if key != "notes"},
    }


def _summarise(names: Sequence[str], new: Sequence[Taken]) -> None:
    rows = []
    for name, taken in zip(names, new, strict=True):
        lines = textwrap.wrap(", ".join(key for key in taken.placed.person if key != "notes"), WIDTH)
        lines += [f"note: {note}" for note in taken.origin.notes]
        rows.append((name, taken.shown, taken.origin.foreign_id or "", taken.status, lines))
    print_table(("record", "from", "foreign id", "status", "placed"), rows, sys.stderr)
