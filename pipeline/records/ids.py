"""Names for records: EXP-YYYY-MM-DD-###, allocated by linking a complete file, so that two starters never share one."""

import os
import re
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pipeline.workspace import Workspace

ALLOCATED = ".allocated"  # beside the records, not committed
ID = re.compile(r"^EXP-\d{4}-\d{2}-\d{2}-(\d{3,})$")


class Render(Protocol):
    def __call__(self, experiment_id: str, date: str) -> bytes: ...


def allocate(workspace: Workspace, render: Render, date: str | None = None) -> Path:
    """Creates `experiments/EXP-….yaml` holding `render(id, date)` and returns its path. Numbers pass 999.

    `date`: another day's than today's (UTC), for what is taken in or renumbered.
    """
    workspace.experiments.mkdir(parents=True, exist_ok=True)
    date = date or datetime.now(UTC).strftime("%Y-%m-%d")
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
            try:
                _remember(workspace, experiment_id)
            except OSError:  # a full disk: nobody would know of the file
                target.unlink()
                raise
            return target
        except FileExistsError:
            number += 1
        finally:
            os.unlink(complete)


def _remember(workspace: Workspace, experiment_id: str) -> None:
    """Ids outlive their records here: one that was deleted is not given out again."""
    with (workspace.experiments / ALLOCATED).open("a") as out:
        out.write(f"{experiment_id}\n")


def _highest(workspace: Workspace, date: str) -> int:
    """Also counts folders that outlived their record, and records that were deleted: an id is never used twice."""
    names = [path.name for folder in (workspace.experiments, workspace.checkpoints) for path in folder.glob("EXP-*")]
    with suppress(OSError):
        names += (workspace.experiments / ALLOCATED).read_text("utf-8", "replace").splitlines()
    matches = (ID.match(name.removesuffix(".yaml")) for name in names if name.startswith(f"EXP-{date}-"))
    return max((int(match[1]) for match in matches if match), default=0)


def newest_first(workspace: Workspace) -> list[Path]:
    """All records, by date and number."""

    def order(path: Path) -> tuple[str, int]:
        match = ID.match(path.stem)
        return (path.stem[:14], int(match[1]) if match else 0)

    return sorted((p for p in workspace.experiments.glob("EXP-*.yaml") if ID.match(p.stem)), key=order, reverse=True)
