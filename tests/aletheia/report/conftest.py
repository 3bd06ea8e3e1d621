"""Records written by hand for the report: seven lines say what a stage would have left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aletheia.report.project import Project, read_project
from pipeline import yamlio
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

Put = Callable[..., RecordFile]


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    (tmp_path / "place" / "experiments").mkdir(parents=True)
    return Workspace(tmp_path / "place")


@pytest.fixture
def put(place: Workspace) -> Put:
    """`put("EXP-2026-01-01-001", {"results": {…}}, person={…}, log=[{…}])`; facts None: a plan, without a line."""

    def write(
        experiment_id: str,
        facts: dict[str, Any] | None = {},  # noqa: B006  never changed
        person: dict[str, Any] | None = None,
        log: list[Any] | None = None,
    ) -> RecordFile:
        file = RecordFile(place.experiments / f"{experiment_id}.yaml")
        file.path.write_text(yamlio.dump({"experiment_id": experiment_id} | (person or {})), "utf-8")
        if facts is not None:
            at = {"status": "complete", "at": f"{experiment_id[4:14]}T10:00:00Z"}
            file.write(Facts(**{"status": "complete", "stage": "sft", "profile": "small", "history": [at]} | facts))
        if log is not None:
            file.folder.mkdir(exist_ok=True)
            lines = [line if isinstance(line, str) else json.dumps(line) for line in log]
            (file.folder / "log.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        return file

    return write


@pytest.fixture
def project(place: Workspace) -> Callable[[], Project]:
    """What the report reads of the records written so far."""
    return lambda: read_project(place)


def change(before: float, after: float, half: float = 0.1, n: int = 25) -> dict[str, Any]:
    """A change as a stage records it."""

    def figure(value: float) -> dict[str, Any]:
        return {"value": value, "ci_low": round(value - half, 6), "ci_high": round(value + half, 6), "n": n}

    return {"before": figure(before), "after": figure(after), "delta": figure(round(after - before, 6))}
