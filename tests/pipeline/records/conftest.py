"""Records without stages: opened as a stage opens them, or written as a stage leaves them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Cost
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record, open_record
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    for name in ("experiments", "checkpoints"):
        (tmp_path / name).mkdir()
    return Workspace(tmp_path)


@pytest.fixture
def opened(place: Workspace) -> Callable[..., AbstractContextManager[Record]]:
    """`with opened(description="…") as record:`; what is named goes into the person's half."""

    def make(file: RecordFile | None = None, **person: Any) -> Any:
        return open_record(
            place,
            stage="sft",
            profile="small",
            person={"profile": "small", "stages": ["sft"]} | person,
            overrides={},
            configuration={},
            cost=Cost(),
            file=file,
        )

    return make


@pytest.fixture
def kept(place: Workspace) -> Callable[..., RecordFile]:
    """`kept(3, stage="dpo", status="failed")`: a record with the number 3, already closed."""

    def make(number: int, **facts: Any) -> RecordFile:
        file = RecordFile(place.experiments / f"EXP-2026-11-20-{number:03d}.yaml")
        file.path.write_bytes(b"# mine\n")
        file.write(Facts(**{"status": "complete", "stage": "sft", "profile": "small"} | facts))
        return file

    return make
