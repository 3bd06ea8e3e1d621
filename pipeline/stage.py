"""What every stage has in common: what it is asked, what it must offer, and how it is run.

A stage first prepares: it checks all that can be checked without a record, and a user's mistake ends there. Then its
record is opened and it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from pipeline.errors import UserError
from pipeline.profile import Profile, as_assignments, load_profile
from pipeline.progress import say
from pipeline.quiet import quiet
from pipeline.records import criteria, find
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record, liveness, open_record
from pipeline.records.person import STAGES
from pipeline.records.schema import Facts, Input
from pipeline.train import checkpoints
from pipeline.train.ranks import Ranks
from pipeline.workspace import Workspace

FEW_STEPS = 20  # fewer optimiser steps teach little


@dataclass(frozen=True)
class Job:
    """What the person asked for."""

    workspace: Workspace
    profile: Profile
    source: str | None = None  # FROM: the record to build on
    resume: bool = False
    hypothesis: str | None = None
    description: str | None = None
    criteria: tuple[str, ...] = ()  # METRIC OP NUMBER, above the line of the new record
    parts: tuple[str, ...] = ()  # of an evaluation; none named: all
    parent: str | None = None  # the pipeline experiment this is part of
    record: RecordFile | None = None  # the planned record to fill in, or with `resume` the one to go on with
    own_process: bool = False  # which ends with this stage
    ranks: Ranks = field(default_factory=Ranks)  # the processes that train together

    @property
    def config(self) -> Any:
        return self.profile.config


class Stage(Protocol):
    name: ClassVar[str]
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        """Checks and loads what needs no record. Raises `UserError`."""

    def plan(self) -> list[tuple[str, str]]:
        """What `--dry-run` shows: label and value."""

    def run(self, record: Record) -> None:
        """Does the work, and leaves what it found in `record.facts`."""


def run_stage(stage: type[Stage], job: Job) -> Record:
    """Prepares the stage, opens its record, runs it and closes the record. Of several ranks the first one's is kept."""
    quiet()
    with job.ranks.together(), job.ranks.writable(job.workspace) as workspace:
        return _run(stage, job, workspace)


def _run(stage: type[Stage], job: Job, workspace: Workspace) -> Record:
    file = job.record
    if job.resume:
        file = file or find.resumable(job.workspace, job.profile.id, stage.name)[0]
        facts = file.facts()
        job = replace(_as_begun(job, file, facts) if facts else job, record=file)
        if facts:
            settings = "".join(f", {key}={value}" for key, value in facts.overrides.items())
            say(f"resumes {file.id}, {liveness(facts)}{settings}")
    for criterion in job.criteria:
        criteria.parse(criterion, "--criterion")
    prepared = stage.prepare(job)
    job.ranks.gather(None)  # no record is opened before all have looked which there are
    with open_record(
        workspace,
        stage=stage.name,
        profile=job.profile.id,
        person=persons_half(job, [stage.name]),
        overrides=job.profile.overrides,
        configuration=job.config.model_dump(mode="json"),
        cost=job.config.cost,
        inputs=prepared.inputs,
        parent=job.parent,
        file=file if job.ranks.first else None,
        ranks=job.ranks.size,
    ) as record:
        prepared.run(record)
    for name, target in record.links.items():
        find.link_newest(workspace, name, target)
    checkpoints.forget(record.output)  # complete: there is nothing left to resume
    for then in record.when_complete:
        then()
    return record


def persons_half(job: Job, stages: Sequence[str]) -> dict[str, Any]:
    """What a new record says above its line."""
    profile, configs = job.profile, job.workspace.configs
    return {
        "profile": profile.id if profile.path.parent == configs else profile.shown,  # what finds it again
        "stages": list(stages),
        "description": job.description,
        "hypothesis": job.hypothesis,
        "success_criteria": list(job.criteria),
        "overrides": job.profile.overrides,
        "observations": [],
        "conclusion": None,
        "next_steps": [],
    }


@dataclass
class Source:
    """What a stage builds on, and how it says so."""

    file: RecordFile
    facts: Facts
    output: Path
    input: Input = field(repr=False)


def take(job: Job, stages: list[str], folder: str) -> Source:
    """The output of the record named by FROM, else of the newest complete one; says which, and checks its hashes."""
    file, facts = find.source(job.workspace, job.profile.id, stages, job.source)
    output, taken = find.checked_output(job.workspace, file, facts, folder)
    say(f"takes {facts.stage} {file.id} ({'named' if job.source else 'the newest complete'})")
    return Source(file, facts, output, taken)


def _as_begun(job: Job, file: RecordFile, facts: Facts) -> Job:
    """A resume takes up the overrides and the source it began with; anything else is another experiment, and refused.

    A plan says its overrides itself. What only later stages read may differ.
    """
    planned = job.record is not None
    if not job.profile.overrides and not planned:
        overrides = as_assignments(facts.overrides)
        job = replace(job, profile=load_profile(job.workspace, str(job.profile.path), overrides))
    now = flat(job.config.model_dump(mode="json"))
    for key, then in flat(upto(facts.stage, facts.configuration)).items():
        if now.get(key) != then:
            raise UserError(
                f"{key} is {now.get(key)!r}, the run to resume has {then!r}",
                where=job.workspace.shown(file.path),
                remedy=f"`{key}: {then}` in its overrides, or another plan"
                if planned
                else f"--set {key}={then} or a run of its own, without --resume",
            )
    source = facts.lineage.inputs[0].id if facts.lineage.inputs else "base"
    if job.source not in (None, source):
        raise UserError(
            f"the run to resume began from {source}, not {job.source}",
            where=job.workspace.shown(file.path),
            remedy="another plan" if planned else "a run of its own, without --resume",
        )
    return replace(job, source=source)


def upto(stage: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """What this stage's outcome depends on: not the sections of later stages, nor prices, nor where it is shown or served."""
    later = (*(STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()), "cost", "telemetry")
    kept = {key: value for key, value in configuration.items() if key.removesuffix("_config") not in later}
    if isinstance(kept.get("serve_config"), dict):
        kept["serve_config"] = {key: value for key, value in kept["serve_config"].items() if key != "port"}
    return kept


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return dotted


def dry_run(stage: type[Stage], job: Job) -> None:
    """Prepares, and says what would be done. Opens no record."""
    quiet()
    with job.ranks.together():
        rows = stage.prepare(job).plan()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        say(f"{label:<{width}}  {value}")
