"""Verdicts kept as they come, so that a run that was stopped goes on, and the same duel is never paid for twice.

One file a judge, `checkpoints/.verdicts/KEY.jsonl`, one line a verdict, under a hash of all that it depends on: the
judge's model and where it is, the prompt, its parameters. Only verdicts are kept, never a failure to give one. A line that
was cut off by a crash is passed over, as is whatever else is none.
"""

import hashlib
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from eval.judges.judge import SCORES, Verdict
from pipeline.workspace import Workspace

FOLDER = ".verdicts"


def key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Kept:
    """The verdicts of one judge, known by `identity`. Several threads may put; other processes may write the same file."""

    def __init__(self, workspace: Workspace, identity: str) -> None:
        self.path = workspace.checkpoints / FOLDER / f"{identity[:16]}.jsonl"
        self._lock = Lock()
        self._known = _read(self.path)

    def get(self, name: str) -> Verdict | None:
        return self._known.get(name)

    def put(self, name: str, verdict: Verdict) -> None:
        """Raises ValueError for one without a score."""
        if verdict.score is None:
            raise ValueError("a failure is not kept")
        line = json.dumps({"key": name, "score": verdict.score, "why": verdict.why}) + "\n"
        with self._lock:
            self._known[name] = verdict
            self.path.parent.mkdir(parents=True, exist_ok=True)
            out = os.open(self.path, os.O_APPEND | os.O_CREAT | os.O_RDWR, 0o644)
            try:
                size = os.fstat(out).st_size
                torn = size and os.pread(out, 1, size - 1) != b"\n"
                os.write(out, (b"\n" if torn else b"") + line.encode())
            finally:
                os.close(out)


def _read(path: Path) -> dict[str, Verdict]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            if row["score"] in SCORES.values():
                known[str(row["key"])] = Verdict(float(row["score"]), str(row["why"]))
        except (ValueError, KeyError, TypeError):
            continue
    return known
