"""`aletheia exp plan` and `exp promote`: records of what is still to be done.

A plan is a record without the line: all of it is the person's, to edit as they like until `exp run` fills it in.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aletheia.exp.run import STAGES
from pipeline.errors import UserError
from pipeline.profile import load_profile
from pipeline.progress import say
from pipeline.records import criteria, find, ids
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import upper_half
from pipeline.records.person import parse
from pipeline.stage import Job, persons_half
from pipeline.workspace import Workspace


def plan(
    workspace: Workspace,
    stages: Sequence[str],
    profile: str,
    assignments: Sequence[str],
    source: str | None,
    hypothesis: str | None,
    criterion: Sequence[str],
    description: str | None,
    tags: Sequence[str],
) -> Path:
    """Writes a planned record after all that can be checked was. Raises `UserError`."""
    check_stages(stages, "exp plan")
    for text in criterion:
        criteria.parse(text, "--criterion")
    if source:
        find.named(workspace, source)
    job = Job(
        workspace,
        load_profile(workspace, profile, list(assignments)),
        hypothesis=hypothesis,
        description=description,
        criteria=tuple(criterion),
    )
    half = persons_half(job, stages)
    half |= {"from": source} if source else {}
    half |= {"tags": list(tags)} if tags else {}
    path = ids.allocate(workspace, lambda experiment_id, date: upper_half(experiment_id, date, half))
    say(f"planned {', '.join(stages)} of {job.profile.id}; edit it as you like, then  make run EXP={path.stem}")
    return path


@dataclass(frozen=True)
class Plan:
    """What a person's half asks the pipeline to do."""

    stages: list[str]
    profile: str
    overrides: dict[str, Any]
    source: str | None


def read_plan(workspace: Workspace, file: RecordFile) -> Plan:
    """Raises `UserError` with the place of the mistake."""
    shown = workspace.shown(file.path)
    person = parse(file.above(), shown)
    check_stages(person.stages or [], f"{shown}: stages")
    criteria.read(file.person().get("success_criteria"), shown)
    if not person.profile:
        raise UserError("names no profile", where=f"{shown}: profile", remedy="profile: tiny")
    return Plan(person.stages or [], person.profile, person.overrides or {}, person.from_)


def check_stages(stages: Sequence[str], where: str) -> None:
    for number, stage in enumerate(stages):
        if stage not in STAGES:
            raise UserError(f"there is no stage `{stage}`", where=where, remedy=", ".join(STAGES))
        if stage in stages[:number]:
            raise UserError(f"the stage `{stage}` stands twice", where=where)
    if list(stages) != sorted(stages, key=STAGES.index):
        raise UserError(
            f"{', '.join(stages)} is not the order they run in",
            where=where,
            remedy=", ".join(sorted(stages, key=STAGES.index)),
        )
    if not stages:
        raise UserError("no stage is named", where=where, remedy="stages: [sft]")


def promote(workspace: Workspace, exp: str, number: int) -> Path:
    """Turns next step `number` (from 1) of a record into a plan and ticks it there, in its one place. Raises `UserError`."""
    file = find.named(workspace, exp)
    shown = workspace.shown(file.path)
    person = file.person()
    steps = person.get("next_steps") or []
    if not isinstance(steps, list) or number > len(steps):
        many = len(steps) if isinstance(steps, list) else 0
        raise UserError(f"has {many} next steps, not {number}", where=shown)
    step = steps[number - 1]
    text = step.get("step") if isinstance(step, dict) else step
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"next step {number} is no text", where=shown)
    if isinstance(step, dict) and step.get("promoted_to"):
        raise UserError(f"next step {number} was promoted to {step['promoted_to']}", where=shown)
    half: dict[str, Any] = {key: person.get(key) for key in ("profile", "stages") if person.get(key)} | {
        "description": text.strip(),
        "hypothesis": None,
        "success_criteria": [],
        "overrides": person.get("overrides") or {},
        "related": [file.id],
        "observations": [],
        "conclusion": None,
        "next_steps": [],
    }
    path = ids.allocate(workspace, lambda experiment_id, date: upper_half(experiment_id, date, half))
    try:
        file.rewrite_above(lambda above: _tick(above, number - 1, path.stem))
    except BaseException:
        path.unlink()  # a plan whose step is not ticked would be made twice
        raise
    say(f"{shown}: next step {number} is now {path.stem}; edit it, then  make run EXP={path.stem}")
    return path


def _tick(above: str, index: int, promoted_to: str) -> str:
    """The text with one item of `next_steps` done and promoted; nothing else in it changes, comments included."""
    node = yaml.compose(above, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    steps = next(value for key, value in node.value if key.value == "next_steps")
    item = steps.value[index]
    begin = item.start_mark.index
    if isinstance(item, yaml.ScalarNode):
        text = above[begin : item.end_mark.index].rstrip()  # a folded text's end stands behind blank lines
        ticked = json.dumps({"step": item.value.strip(), "done": True, "promoted_to": promoted_to}, ensure_ascii=False)
        return above[:begin] + ticked + above[begin + len(text) :]
    between = ", " if item.flow_style else f"\n{' ' * item.start_mark.column}"
    done = next((value for key, value in item.value if key.value == "done"), None)
    first = f"promoted_to: {promoted_to}{between}" + ("" if done else f"done: true{between}")
    begin += 1 if item.flow_style else 0
    edits = [(begin, begin, first)]
    if done is not None:
        edits.append((done.start_mark.index, done.end_mark.index, "true"))
    for start, end, new in sorted(edits, reverse=True):
        above = above[:start] + new + above[end:]
    return above
