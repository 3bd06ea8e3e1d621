"""What a command asks of a stage, and the run of it."""

from dataclasses import replace
from typing import Any

from pipeline.profile import load_profile
from pipeline.stage import Job, dry_run, run_stage
from pipeline.train.ranks import join
from pipeline.workspace import Workspace


def make_job(profile: str, assignments: list[str] | None, **options: Any) -> Job:
    workspace = Workspace.find()
    return Job(workspace, load_profile(workspace, profile, assignments), **options)


def run_or_plan(stage: Any, job: Job, plan_only: bool) -> None:
    """Runs the stage and prints its record's path; or only says what it would do."""
    job = replace(job, ranks=join(job.config.device))
    if plan_only:
        dry_run(stage, job)
    else:
        print_record(run_stage(stage, job))


def print_record(record: Any) -> None:
    """The record's path alone, on stdout."""
    print(record.workspace.shown(record.file.path))
