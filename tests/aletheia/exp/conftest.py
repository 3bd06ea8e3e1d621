"""Records written by hand, as a stage would have left them: no training needed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """An empty workspace: `experiments/` and `checkpoints/`, no profile and no rows."""
    for name in ("experiments", "checkpoints"):
        (tmp_path / "place" / name).mkdir(parents=True)
    return Workspace(tmp_path / "place")


@pytest.fixture
def write_record() -> Callable[..., RecordFile]:
    """`write_record(place, "EXP-2026-01-01-001", facts={…}, person="hypothesis: …\\n", log=[{…}], **{"x.jsonl": [{…}]})`.

    Makes `experiments/EXP-….yaml` through `RecordFile.write`, and its folder.

    - `facts`: laid over a complete SFT of profile `small`; None: a plan, the person's half alone, without a line.
    - `person`: the upper half, byte for byte, whatever it is.
    - `log`: the lines of `log.jsonl`; any other file beside the record by its name. A line that is text goes in as it is.
    """

    def write(
        workspace: Workspace,
        experiment_id: str,
        facts: dict[str, Any] | None = {},  # noqa: B006  never changed
        person: str = "# mine\n",
        log: list[Any] | None = None,
        **files: list[Any],
    ) -> RecordFile:
        file = RecordFile(workspace.experiments / f"{experiment_id}.yaml")
        file.path.write_bytes(person.encode())
        if facts is not None:
            file.write(Facts(**{"status": "complete", "stage": "sft", "profile": "small"} | facts))
        for name, lines in (({"log.jsonl": log} if log is not None else {}) | files).items():
            file.folder.mkdir(exist_ok=True)
            text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
            (file.folder / name).write_text(text + "\n", "utf-8")
        return file

    return write
