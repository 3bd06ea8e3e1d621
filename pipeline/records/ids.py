"""Names for records: EXP-YYYY-MM-DD-###, allocated by linking a complete file, so that two starters never share one."""

import os
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pipeline.workspace import Workspace

ID = re.compile(r"^EXP-\d{4}-\d{2}-\d{2}-(\d{3,})$")


class Render(Protocol):
    def __call__(self, experiment_id: str, date: str) -> bytes: ...


def allocate(workspace: Workspace, render: Render) -> Path:
    """Creates `experiments/EXP-….yaml` holding `render(id, date)` and returns its path. Numbers pass 999."""
    workspace.experiments.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    number = _highest(workspace, date) + 1
    while True:
        experiment_id = f"EXP-{date}-{number:03d}"
        target = workspace.experiments / f"{experiment_id}.yaml"
        handle, complete = tempfile.mkstemp(dir=workspace.experiments, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(render(experiment_id, date))
            os.chmod(complete, 0o644)
            os.link(complete, target)
            return target
        except FileExistsError:
            number += 1
        finally:
            os.unlink(complete)


def _highest(workspace: Workspace, date: str) -> int:
    """Also counts folders that outlived their record: an id is never used twice."""
    numbers = [0]
    for folder in (workspace.experiments, workspace.checkpoints):
        for path in folder.glob(f"EXP-{date}-*"):
            match = ID.match(path.name.removesuffix(".yaml"))
            if match:
                numbers.append(int(match[1]))
    return max(numbers)


def newest_first(workspace: Workspace) -> list[Path]:
    """All records, by date and number."""

    def order(path: Path) -> tuple[str, int]:
        match = ID.match(path.stem)
        return (path.stem[:14], int(match[1]) if match else 0)

    return sorted((p for p in workspace.experiments.glob("EXP-*.yaml") if ID.match(p.stem)), key=order, reverse=True)
