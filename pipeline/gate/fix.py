"""`--fix`: what is safe to mend in JSONL files, mended in place. Everything else is left to the person.

Safe is what takes no word from any row: white space around an answer, byte order marks, and rows
whose text stands in the set already. The file as it was is kept beside it, hidden; lines that need nothing stay byte for
byte. Compressed files, CSV, Parquet, JSON arrays and hub data sets are not written.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Check
from pipeline.data.formats import converted
from pipeline.data.rows import Conversation, PreferencePair, RowFault, validated
from pipeline.data.source import Source
from pipeline.gate.gate import text_digest
from pipeline.gate.rules import selected
from pipeline.progress import say
from pipeline.workspace import Workspace

_MARK = "\ufeff"  # a byte order mark, where it marks nothing
_ANSWERS = ("completion", "output", "response", "answer", "chosen", "rejected", "reference")


def fix(workspace: Workspace, found: Sequence[Source], check: Check) -> None:
    """Mends what can be mended, and says what. A file that needs nothing is not written."""
    rules = selected(check)
    seen: set[bytes] = set()
    for source in found:
        if source.path is None or source.path.suffix not in (".jsonl", ".ndjson"):
            say(f"note: {source.shown} is not mended: only plain JSONL files are")
            continue
        counts: Counter[str] = Counter()
        with tempfile.NamedTemporaryFile(dir=source.path.parent, prefix=".writing-", delete=False) as out:
            new = Path(out.name)
            try:
                with source.path.open("rb") as lines:
                    out.writelines(_mended(source.shown, lines, set(rules), seen, counts))
                out.flush()
                os.fsync(out.fileno())
                os.fchmod(out.fileno(), source.path.stat().st_mode)
                kept = _replaced(source.path, new) if counts.total() else None
            finally:
                new.unlink(missing_ok=True)
        if kept:
            done = ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()) if n)
            say(f"fixed {source.shown}: {done}; the file as it was: {workspace.shown(kept)}")


def _mended(
    shown: str, lines: Iterable[bytes], rules: set[str], seen: set[bytes], counts: Counter[str]
) -> Iterator[bytes]:
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
            counts["byte order mark taken out"] += 1
        values = _object(line)
        if values is None:
            yield line
            continue
        changed = False
        if "edge-whitespace" in rules:
            values, changed = _stripped(values, "")
            counts["rows with white space stripped from an answer"] += changed
        if "odd-characters" in rules and (_MARK.encode() in line or b"\\ufeff" in line.lower()):
            values, changed = _without_marks(values), True
            counts["rows with a byte order mark inside taken out"] += 1
        if "duplicate" in rules and _is_repeated(values, shown, number, seen):
            counts["duplicate rows taken out"] += 1
            continue
        yield json.dumps(values, ensure_ascii=False).encode() + b"\n" if changed else line


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _stripped(value: Any, key: str, role: str = "") -> tuple[Any, bool]:
    """The value with each answer's edges stripped, and whether that changed anything."""
    if isinstance(value, dict):
        role = str(value.get("role", value.get("from", "")))
        parts = {k: _stripped(v, k, role) for k, v in value.items()}
        return {k: v for k, (v, _) in parts.items()}, any(changed for _, changed in parts.values())
    if isinstance(value, list):
        items = [_stripped(v, key, role) for v in value]
        return [v for v, _ in items], any(changed for _, changed in items)
    is_answer = key in _ANSWERS or (key in ("content", "value") and role in ("assistant", "gpt", "chatgpt", "model"))
    if isinstance(value, str) and is_answer and value.strip():
        return value.strip(), value != value.strip()
    return value, False


def _without_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_marks(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_marks(v) for v in value]
    return value.replace(_MARK, "") if isinstance(value, str) else value


def _is_repeated(values: dict[str, Any], shown: str, number: int, seen: set[bytes]) -> bool:
    try:
        kind, own = converted(values)
        row = validated(own, kind, shown, number)
    except RowFault:
        return False
    if not isinstance(row, Conversation | PreferencePair):
        return False
    digest = text_digest(row)
    repeated = digest in seen
    seen.add(digest)
    return repeated


def _replaced(path: Path, new: Path) -> Path:
    """Where the old file is kept now that the new one is in its place."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    kept = path.with_name(f".{path.name}.{sha256[:8]}.orig")
    if not kept.exists():
        os.link(path, kept)
    os.replace(new, path)
    return kept
