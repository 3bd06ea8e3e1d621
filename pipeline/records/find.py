"""Which record to build on: the one named by FROM, else the newest complete one of the same profile."""

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.records import ids, index
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Artifact, Facts, Input
from pipeline.workspace import Workspace

BLOCK = 1 << 24  # bytes hashed at once: after each, a thread waits until those that run Python let it go on


def records(
    workspace: Workspace, keep: Callable[[Facts], bool] = lambda facts: True
) -> Iterator[tuple[RecordFile, Facts]]:
    """Every record that has run and that `keep` accepts, newest first.

    `keep` is first asked of what the index knows, without the bulk: status, stage, profile, lineage, results. One that
    cannot be read is passed over here, and shown by `exp list`.
    """
    for entry in index.entries(workspace):
        if entry.facts is None or not keep(entry.facts):
            continue
        file = RecordFile(workspace.experiments / f"{entry.id}.yaml")
        try:
            facts = file.facts()
        except UserError:
            continue
        if facts is not None and keep(facts):
            yield file, facts


def named(workspace: Workspace, name: str) -> RecordFile:
    """The record with this id, or at this path. Raises `UserError`, naming the nearest id there is."""
    experiment_id = Path(name).name.removesuffix(".yaml")
    file = RecordFile(workspace.experiments / f"{experiment_id}.yaml")
    if ids.ID.match(experiment_id) and file.path.is_file():
        return file
    near = difflib.get_close_matches(experiment_id, [path.stem for path in ids.newest_first(workspace)], 1)
    raise UserError(
        f"there is no record `{name}`",
        where=workspace.shown(workspace.experiments),
        remedy=near[0] if near else "aletheia exp list",
    )


def source(workspace: Workspace, profile: str, stages: list[str], wanted: str | None) -> tuple[RecordFile, Facts]:
    """The record to take input from: `wanted`, or the newest complete one of the first of `stages` that has any.

    A control (its answers were shuffled), or what was built on one, is never taken unless named.
    """
    if wanted:
        file = named(workspace, wanted)
        facts = file.facts()
        if facts is None or facts.stage not in stages:
            raise UserError(f"is no {' or '.join(stages)} record", where=workspace.shown(file.path))
        if facts.status != "complete":
            raise UserError(f"is {liveness(facts)}, not complete", where=workspace.shown(file.path))
        return file, facts
    for stage in stages:
        for file, facts in records(workspace, partial(_usable, profile=profile, stages=[stage])):
            if not _is_control(workspace, file, facts):
                return file, facts
    what = " or ".join(stages)
    raise UserError(
        f"no complete {what} record of profile `{profile}` yet", remedy=f"make {stages[0]} PROFILE={profile}"
    )


def latest_first(workspace: Workspace, profile: str, stages: list[str]) -> list[str]:
    """`stages`, the one with the newest complete record first: an SFT made after a DPO is what its maker now means."""
    for file, facts in records(workspace, partial(_usable, profile=profile, stages=stages)):
        if not _is_control(workspace, file, facts):
            return [facts.stage, *(stage for stage in stages if stage != facts.stage)]
    return stages


def resumable(workspace: Workspace, profile: str, stage: str) -> tuple[RecordFile, Facts]:
    """The newest record of this stage and profile, if it did not finish and its process is gone."""
    for file, facts in records(workspace, lambda known: known.profile == profile and known.stage == stage):
        state = liveness(facts)
        if state in ("cancelled", "failed", "dead"):
            return file, facts
        remedy = f"make {stage} PROFILE={profile}, without RESUME" if state == "complete" else "waiting for it to end"
        raise UserError(f"nothing to resume: it is {state}", where=workspace.shown(file.path), remedy=remedy)
    raise UserError(
        f"nothing to resume: no {stage} record of profile `{profile}`", remedy=f"make {stage} PROFILE={profile}"
    )


def children(workspace: Workspace, parent: str) -> list[tuple[RecordFile, Facts]]:
    """The records of a pipeline experiment's stages, oldest first."""
    return list(records(workspace, lambda facts: facts.lineage.parent == parent))[::-1]


def lineage(workspace: Workspace, file: RecordFile, facts: Facts) -> Iterator[tuple[RecordFile, Facts]]:
    """The record and all that it builds on, each once, the nearest first. Raises `UserError` where one is gone."""
    seen, waiting = {file.id}, [(file, facts)]
    while waiting:
        file, facts = waiting.pop(0)
        yield file, facts
        for taken in facts.lineage.inputs:
            if taken.id not in seen:
                seen.add(taken.id)
                parent = named(workspace, taken.id)
                known = parent.facts()
                waiting += [(parent, known)] if known else []


def ancestor(workspace: Workspace, file: RecordFile, facts: Facts, stage: str) -> tuple[RecordFile, Facts] | None:
    """The record of `stage` that this one builds on, itself included; None when there is none in its lineage."""
    return next((found for found in lineage(workspace, file, facts) if found[1].stage == stage), None)


def checked_output(workspace: Workspace, file: RecordFile, facts: Facts, folder: str) -> tuple[Path, Input]:
    """The output folder of a record, after its files were found to be those the record names."""
    output = workspace.checkpoints / file.id / folder
    name = workspace.shown(file.path)
    if not output.is_dir():
        raise UserError(f"its output {workspace.shown(output)} is gone", where=name, remedy=f"make {facts.stage} again")
    if not facts.artifacts:
        raise UserError("names no artifacts", where=name)
    for artifact in facts.artifacts:
        path = workspace.path(artifact.path)
        if not path.is_file():
            raise UserError(f"its artifact {artifact.path} is gone", where=name, remedy=f"make {facts.stage} again")
        if sha256(path) != artifact.sha256:
            raise UserError(
                f"its artifact {artifact.path} was changed since", where=name, remedy=f"make {facts.stage} again"
            )
    return output, Input(id=file.id, stage=facts.stage, path=workspace.shown(output), sha256=combined(facts.artifacts))


def combined(artifacts: Sequence[Artifact]) -> str:
    """One hash over an output's files."""
    return hashlib.sha256("".join(artifact.sha256 for artifact in artifacts).encode()).hexdigest()


def artifacts(workspace: Workspace, folder: Path) -> list[Artifact]:
    """Every file below `folder`, hashed."""
    return [
        Artifact(path=workspace.shown(path), sha256=sha256(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def link_newest(workspace: Workspace, name: str, target: Path) -> Path:
    """Points `checkpoints/<name>` at `target`, atomically. A real folder of that name is not touched."""
    link = workspace.checkpoints / name
    if link.exists() and not link.is_symlink():
        raise UserError("is not a link; move it away", where=workspace.shown(link))
    temporary = link.with_name(f".{name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
    return link


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(BLOCK, os.fstat(file.fileno()).st_size + 1)))
        while read := file.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def _usable(facts: Facts, profile: str, stages: list[str]) -> bool:
    return facts.profile == profile and facts.status == "complete" and facts.stage in stages


def _is_control(workspace: Workspace, file: RecordFile, facts: Facts) -> bool:
    """Whether it was trained on shuffled answers, or builds on a record that was."""
    with suppress(UserError):  # a record that is gone tells nothing
        return any(index.shuffled(known) for _, known in lineage(workspace, file, facts))
    return False
