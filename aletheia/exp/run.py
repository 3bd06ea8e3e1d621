"""`aletheia exp run EXP`: runs a planned record and fills it in.

A plan with one stage becomes that stage's record. With several it is a pipeline experiment: each stage gets a record of
its own below it, and the criteria may name their figures (`eval.eval_loss.delta < 0`). Run again after a failure or an
interruption it goes on: what is complete, and still what the plan says, is kept.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from aletheia.exp.chain import Chain, Rows, recorded_rows
from aletheia.exp.plan import TAKES, planned_profile, read_plan
from pipeline.errors import UserError
from pipeline.profile import as_assignments, load_profile
from pipeline.progress import say
from pipeline.records import find
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import ENDED_EARLY, Record, check_may_run, liveness, open_record
from pipeline.records.schema import Facts
from pipeline.stage import Job, flat, persons_half, run_stage, upto
from pipeline.workspace import Workspace


def run(workspace: Workspace, exp: str) -> Record:
    """Raises `UserError` for a record that is complete or running, or whose plan has a mistake."""
    file = find.named(workspace, exp)
    facts, shown = file.facts(), workspace.shown(file.path)
    check_may_run(workspace, file, facts)
    plan = read_plan(workspace, file, begun=facts is not None)
    if facts is not None and facts.stage != (plan.stages[0] if len(plan.stages) == 1 else "pipeline"):
        what = f"was begun as {facts.stage}, and its stages are now {', '.join(plan.stages)}"
        raise UserError(what, where=shown, remedy=f"aletheia exp plan {' '.join(plan.stages)}")
    profile = planned_profile(workspace, plan, shown)
    job = Job(workspace, profile, source=plan.source, record=file, resume=facts is not None)
    if len(plan.stages) == 1:
        return run_stage(stage_class(plan.stages[0]), job)
    with open_pipeline(job, plan.stages) as record:
        if facts is not None:
            _take_changes(job, record)
        pipeline = Pipeline(job, record)
        for stage in plan.stages:
            pipeline.run(stage)
    return record


def open_pipeline(job: Job, stages: Sequence[str], description: str | None = None) -> Any:
    """The record that holds the stages' records together."""
    return open_record(
        job.workspace,
        stage="pipeline",
        profile=job.profile.id,
        person=persons_half(replace(job, description=description or job.description), stages),
        overrides=job.profile.overrides,
        configuration=job.config.model_dump(mode="json"),
        cost=job.config.cost,
        file=job.record,
    )


def stage_class(name: str) -> Any:
    """Imported here, so that what only reads records does not load what trains."""
    if name == "data":
        from pipeline.snapshot import Snapshot

        return Snapshot
    if name == "sft":
        from pipeline.sft import Sft

        return Sft
    if name == "dpo":
        from pipeline.dpo import Dpo

        return Dpo
    if name == "merge":
        from pipeline.merge import Merge

        return Merge
    if name == "export":
        from pipeline.export import Export

        return Export
    if name == "serve":
        from serving.serve import Serve

        return Serve
    from eval.evaluate import Evaluate

    return Evaluate


class Pipeline:
    """Stages of one experiment: each takes what an earlier one of the same experiment made."""

    def __init__(self, job: Job, record: Record) -> None:
        self.record = record
        self.job = replace(job, record=None, resume=False, parent=record.id)
        self.made: dict[str, str] = {}  # stage → record id
        self.used: list[str] = []  # the records that this attempt stands on; superseded ones still name their parent

    def run(self, stage: str, overrides: Sequence[str] = (), control: bool = False) -> RecordFile:
        """One stage; a `control` is no other stage's input. Returns its record, kept or new."""
        say("")
        job = self._job(stage, overrides)
        file = self._kept(stage, job)
        try:
            file = file or self._run(stage, job)
        finally:
            with suppress(UserError):
                latest = [file] if file else [f for f, _ in self._earlier(stage, job)[:1]]  # the one that failed
                self.used += [f.id for f in latest]
                self.record.facts.lineage.children = list(self.used)
                self.record.save()
        facts = file.facts()
        if facts and not control:
            self.made[stage] = file.id
            self.record.of_stages[stage] = facts.results
        return file

    def _run(self, stage: str, job: Job) -> RecordFile:
        if stage == "serve":
            from aletheia.trial import serve_and_ask

            self.record.facts.results["served"] = serve_and_ask(job)
            return next(
                f for f, facts in reversed(find.children(job.workspace, self.record.id)) if facts.stage == "serve"
            )
        for file, facts in self._earlier(stage, job):
            if liveness(facts) in ENDED_EARLY:
                say(f"{stage}: goes on with {file.id}, which was {liveness(facts)}")
                return run_stage(stage_class(stage), replace(job, record=file, resume=True)).file
        return run_stage(stage_class(stage), job).file

    def _kept(self, stage: str, job: Job) -> RecordFile | None:
        for file, facts in self._earlier(stage, job):
            if facts.status != "complete":
                continue
            changed = _changed_rows(job, file, facts)
            if changed:
                say(f"{stage}: {file.id} is complete, but the rows of {changed} have changed since; run anew")
            elif not self._whole(facts) and not self._taken(file):
                say(f"{stage}: {file.id} is complete, but its output is gone or was changed; run anew")
            else:
                say(f"{stage}: {file.id} is complete and kept")
                return file
        return None

    def _whole(self, facts: Facts) -> bool:
        paths = [(self.job.workspace.path(artifact.path), artifact.sha256) for artifact in facts.artifacts]
        return all(path.is_file() and find.sha256(path) == digest for path, digest in paths)

    def _taken(self, file: RecordFile) -> bool:
        """Whether a later stage that still counts has taken its output, which then need not be there any more."""
        now = _configuration(self.job)
        return any(
            later.status == "complete"
            and file.id in [taken.id for taken in later.lineage.inputs]
            and upto(later.stage, later.configuration) == upto(later.stage, now)
            for _, later in find.children(self.job.workspace, self.record.id)
        )

    def _earlier(self, stage: str, job: Job) -> list[tuple[RecordFile, Facts]]:
        """This experiment's records of the stage, newest first, that did what the plan says now."""
        wanted = upto(stage, _configuration(job))
        return [
            (file, facts)
            for file, facts in reversed(find.children(job.workspace, self.record.id))
            if facts.stage == stage
            and upto(stage, facts.configuration) == wanted
            and (job.source is None or job.source in [taken.id for taken in facts.lineage.inputs])
        ]

    def _job(self, stage: str, overrides: Sequence[str]) -> Job:
        made = [self.made[earlier] for earlier in TAKES.get(stage, []) if earlier in self.made]
        job = replace(self.job, source=made[0] if made else self.job.source if stage in TAKES else None)
        if overrides:
            all_of_them = [*as_assignments(job.profile.overrides), *overrides]
            job = replace(job, profile=load_profile(job.workspace, str(job.profile.path), all_of_them))
        return job


def _take_changes(job: Job, record: Record) -> None:
    """A plan may be mended between two attempts; its history says what was."""
    then, now = flat(record.facts.configuration), flat(_configuration(job))
    changed = [
        f"{key} {then.get(key)!r} → {now.get(key)!r}" for key in {**then, **now} if then.get(key) != now.get(key)
    ]
    if record.facts.profile != job.profile.id:
        changed.insert(0, f"profile {record.facts.profile} → {job.profile.id}")
    record.facts.configuration, record.facts.overrides = _configuration(job), job.profile.overrides
    record.facts.profile = job.profile.id
    if changed:
        record.facts.history[-1].note = f"resumed; the plan had been changed: {', '.join(changed)}"
        say(record.facts.history[-1].note)


def _changed_rows(job: Job, file: RecordFile, facts: Facts) -> str | None:
    """The first part of its rows that is not what it was; None where all are."""
    rows, chain = Rows(job.workspace), Chain(job.workspace, file.id)
    for part, recorded in recorded_rows(facts).items():
        if rows.describe(job.config, part, chain.unfit)["sha256"] != recorded["sha256"]:
            return part
    return None


def _configuration(job: Job) -> dict[str, Any]:
    configuration: dict[str, Any] = job.config.model_dump(mode="json")
    return configuration
