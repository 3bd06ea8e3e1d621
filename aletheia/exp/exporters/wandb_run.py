"""A record as a W&B offline run; a pipeline's record with its stages, as one group. Nothing leaves the machine.

    aletheia exp export EXP-2026-11-21-003 --to wandb

Project is the profile, group the pipeline experiment, job type the stage. Config: the resolved configuration, the data,
and under `record` what the run was. Summary: every figure with the ends of its interval; history: the log, under
`log/`, by step. Files: the record itself, its log, its pictures. `wandb sync PATH` uploads it when its person wants
that; W&B then shows the export's time for every step, because the log has no clock.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aletheia.exp.exporters.record import Finished, attachments, curves, figures, finished, texts, with_children
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.workspace import Workspace

MAX_TAG = 64  # characters; W&B refuses longer ones


def export_wandb(workspace: Workspace, exp: str, output: Path | None, force: bool) -> str:
    """The folders of the offline runs, one a line. Raises `UserError`."""
    family = with_children(finished(workspace, exp))
    earlier = {record.id: folder for record in family if (folder := _earlier(record))}
    if earlier and not force:
        where = next(iter(earlier.values()))
        raise UserError(f"{', '.join(earlier)} is exported already", where=workspace.shown(where), remedy="--force")
    folder = output.expanduser().resolve() if output else family[0].file.folder
    _writable(workspace, folder)
    runs: dict[str, Path] = {}
    try:
        with _alone(folder):
            for record in family:
                runs[record.id] = _write(record, folder)
        for run in runs.values():
            (run / "logs" / "debug-core.log").unlink(missing_ok=True)  # a link into the cache, which is gone
    except BaseException:  # half an export would be taken for the whole
        for run in runs.values():
            shutil.rmtree(run, ignore_errors=True)
        raise
    for record in family:
        run = runs[record.id]
        if record.id in earlier:
            shutil.rmtree(earlier[record.id], ignore_errors=True)
            say(
                f"the earlier run {workspace.shown(earlier[record.id])} is removed; what was synced of it is still at W&B"
            )
        record.note_external(
            "wandb", {"path": workspace.shown(run), "project": record.facts.profile, "run_id": _id(run)}
        )
    say(f"to upload: wandb sync {shlex.join(map(str, runs.values()))}")
    return "\n".join(workspace.shown(run) for run in runs.values())


def _earlier(record: Finished) -> Path | None:
    """The offline run that the record says it was exported to, where it is still there."""
    noted = record.facts.external.get("wandb")
    path = noted.get("path") if isinstance(noted, dict) else None
    if not isinstance(path, str):
        return None
    folder = record.workspace.path(path)
    is_a_run = folder.name.startswith("offline-run-") and any(folder.glob("run-*.wandb"))  # it may be removed
    return folder if is_a_run else None


def _writable(workspace: Workspace, folder: Path) -> None:
    """W&B would quietly take a temporary folder instead."""
    try:
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", where=workspace.shown(folder)) from None
    if not os.access(folder / "wandb", os.W_OK):
        raise UserError("cannot be written to", where=workspace.shown(folder))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No setting of the shell's reaches the run, no file of W&B's lands at home, and none of its hooks outlives it."""
    before, hooks = dict(os.environ), (sys.exit, sys.excepthook)
    for name in before:
        if name.startswith("WANDB_"):
            del os.environ[name]
    os.environ |= {
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "wandb" / "config"),
        "WANDB_DATA_DIR": str(folder / "wandb" / "cache"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise UserError(f"W&B: {str(error).splitlines()[0]}") from error
    finally:
        wandb.teardown()  # ends its service process
        sys.exit, sys.excepthook = hooks
        shutil.rmtree(folder / "wandb" / "cache", ignore_errors=True)  # the service's own log
        os.environ.clear()
        os.environ.update(before)


def _write(record: Finished, folder: Path) -> Path:
    """The new run's folder."""
    import wandb

    facts, person = record.facts, record.person
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        symlink=False,  # a run that is copied elsewhere stays whole
        # this machine, at this moment, is not where and when the record ran
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    run = wandb.init(
        mode="offline",
        dir=folder,
        project=facts.profile,
        name=record.id,
        group=facts.lineage.parent or record.id,
        job_type=facts.stage,
        notes="\n".join([*texts(person.get("description")), *texts(person.get("hypothesis"))]) or None,
        tags=list(_tags(record)),
        config=facts.configuration | {"data": facts.data, "overrides": facts.overrides, "record": _about(record)},
        settings=settings,
    )
    place = Path(run.dir).parent
    try:
        for step, values in curves(record).items():
            run.log({f"log/{name}": value for name, value in values.items()}, step=step)
        found = figures(facts.results) | {f"resources.{k}": v for k, v in figures(facts.resources).items()}
        run.summary.update(found)
        for path, subfolder in attachments(record):
            target = Path(run.dir) / subfolder / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            run.save(str(target), base_path=run.dir, policy="now")
    except BaseException:
        run.finish(exit_code=1)
        shutil.rmtree(place, ignore_errors=True)
        raise
    run.finish(exit_code=0 if record.status == "complete" else 1)
    return place


def _tags(record: Finished) -> Iterator[str]:
    for tag in dict.fromkeys([record.facts.stage, record.status, *texts(record.person.get("tags"))]):
        if len(tag) <= MAX_TAG:
            yield tag
        else:
            say(f"note: {record.id}: the tag `{tag[:20]}…` is longer than W&B's {MAX_TAG} characters; left out")


def _about(record: Finished) -> dict[str, Any]:
    """What the run was, in the config, where W&B can filter by it."""
    facts = record.facts
    return {
        "id": record.id,
        "status": record.status,
        "started": record.started.isoformat() if record.started else None,
        "ended": record.ended.isoformat() if record.ended else None,
        "stage": facts.stage,
        "commit": facts.code.get("commit"),
        "dirty": facts.code.get("dirty"),
        "command": facts.code.get("command"),
        "hypothesis": record.person.get("hypothesis"),
        "verdict": facts.verdict.model_dump(mode="json", exclude_none=True) if facts.verdict else None,
        "failure": facts.failure.message if facts.failure else None,
        "lineage": facts.lineage.model_dump(mode="json", exclude_none=True),
    }


def _id(run: Path) -> str:
    return run.name.rpartition("-")[2]
