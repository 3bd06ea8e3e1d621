"""`aletheia exp plan` and `exp promote`: records of what is still to be done.

A plan is a record without the line: all of it is the person's, to edit as they like until `exp run` fills it in.
"""

import datetime as dt
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.profile import Profile, as_assignments, load_profile
from pipeline.progress import say
from pipeline.records import criteria, find, ids
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import upper_half
from pipeline.records.person import STAGES, parse, problems
from pipeline.records.schema import Criterion
from pipeline.stage import Job, flat, persons_half
from pipeline.workspace import Workspace

_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
_BLOCK_COMMENT = re.compile(r"[|>][-+0-9]*[ \t]+(#[^\r\n]*)")  # behind the sign of a literal or folded text


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
    check_figures([Criterion(criterion=text) for text in criterion], stages, "--criterion")
    source = check_source(workspace, stages, source, "--from") if source else None
    overrides = flat(load_profile(workspace, profile, list(assignments)).overrides)
    job = Job(
        workspace,
        load_profile(workspace, profile, as_assignments(overrides)),
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


TAKES = {
    "dpo": ["sft"],
    "merge": ["dpo", "sft"],
    "export": ["merge"],
    "serve": ["merge", "dpo", "sft"],
    "eval": ["merge", "dpo", "sft"],
}


@dataclass(frozen=True)
class Plan:
    """What a person's half asks the pipeline to do."""

    stages: list[str]
    profile: str
    overrides: dict[str, Any]
    source: str | None


def read_plan(workspace: Workspace, file: RecordFile, begun: bool, quietly: bool = False) -> Plan:
    """What was `begun` has its criteria frozen and its input taken. Raises `UserError` with the place of the mistake."""
    shown, text = workspace.shown(file.path), file.above()
    person, document = parse(text, shown), yamlio.load(text)

    def place(key: str) -> str:
        return f"{shown}:{document.lines[(key,)]}: {key}" if (key,) in document.lines else f"{shown}: {key}"

    stages = person.stages or []
    check_stages(stages, place("stages"))
    if not person.profile:
        raise UserError("names no profile", where=place("profile"), remedy="`profile: tiny`")
    if not begun:
        refuse_near_misses(text, shown, quietly)
        wanted = criteria.read(document.value.get("success_criteria"), shown, document.lines)
        check_figures(wanted, stages, place("success_criteria"))
        if person.from_:
            check_source(workspace, stages, person.from_, place("from"))
    overrides = flat(person.overrides or {})  # nested sections are no less clear
    for key, value in overrides.items():
        if isinstance(value, bytes | dt.date):
            raise UserError(f"{key} is a {type(value).__name__}", where=place("overrides"), remedy="quotes around it")
    return Plan(list(stages), person.profile, overrides, person.from_)


def planned_profile(workspace: Workspace, plan: Plan, shown: str) -> Profile:
    """Raises `UserError` for a profile or an override that is not there."""
    try:
        return load_profile(workspace, plan.profile, as_assignments(plan.overrides))
    except UserError as error:
        what = str(error).replace("--set: ", "overrides: ").replace("--profile ", "profile: ")
        raise UserError(what, where=shown) from None


def refuse_near_misses(text: str, shown: str, quietly: bool) -> None:
    """`overides:` would run another experiment than the one meant; what is doubtful beside that is only told."""
    for problem in problems(text):
        what = f"{problem.key}: {problem.what}"
        where = f"{shown}:{problem.line}:{problem.column}"
        if problem.severity == "warning" and problem.remedy.strip("`") in (
            "overrides",
            "success_criteria",
            "stages",
            "from",
        ):
            raise UserError(what, where=where, remedy=problem.remedy)
        if problem.severity == "warning" and not quietly:
            say(f"note: {where}: {what}; try {problem.remedy}")


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


def check_figures(wanted: Sequence[Criterion], stages: Sequence[str], where: str) -> None:
    """A figure of one stage among several begins with its name, and of the only one without; else it is never found."""
    for criterion in wanted:
        path = criteria.parse(criterion.criterion, where).path
        stage, _, rest = path.partition(".")
        if len(stages) > 1 and stage not in stages:
            if stage in STAGES:
                raise UserError(
                    f"`{criterion.criterion}` is of {stage}, which is not planned",
                    where=where,
                    remedy=f"{stage} among the stages",
                )
            remedy = f"`{'eval' if 'eval' in stages else stages[-1]}.{criterion.criterion.strip()}`"
            raise UserError(f"`{criterion.criterion}` names none of the stages", where=where, remedy=remedy)
        if len(stages) == 1 and stage in STAGES and rest:
            what = f"`{criterion.criterion}` names a stage, and the only one needs no name"
            raise UserError(what, where=where, remedy=f"`{criterion.criterion.strip().removeprefix(stage + '.')}`")


def check_source(workspace: Workspace, stages: Sequence[str], source: str, where: str) -> str:
    """The id of a record that is there and that some stage here would take. Raises `UserError`."""
    taking = next((stage for stage in stages if stage in TAKES), None)
    if taking is None or set(TAKES[taking]) & set(stages):
        raise UserError(f"no stage of {', '.join(stages)} would take {source}", where=where, remedy="leaving it out")
    if source == "base" and taking == "dpo":
        return source
    file = find.named(workspace, source)
    facts = file.facts()
    if facts and facts.stage not in TAKES[taking]:
        what = f"{file.id} is a {facts.stage} record; {taking} takes {' or '.join(TAKES[taking])}"
        raise UserError(what, where=where)
    return file.id


def promote(workspace: Workspace, exp: str, number: int) -> Path:
    """Turns next step `number` (from 1) of a record into a plan and ticks it there, in its one place. Raises `UserError`."""
    file = find.named(workspace, exp)
    shown = workspace.shown(file.path)
    person = file.person()
    step = _step(person, number, shown)
    half: dict[str, Any] = {key: person.get(key) for key in ("profile", "stages") if person.get(key)} | {
        "description": step,
        "hypothesis": None,
        "success_criteria": [],
        "overrides": person.get("overrides") or {},
        "related": [file.id],
        "observations": [],
        "conclusion": None,
        "next_steps": [],
    }
    path = ids.allocate(workspace, lambda experiment_id, date: upper_half(experiment_id, date, half))

    def tick(above: str) -> str:
        if _step(yamlio.load(above).value, number, shown) != step:
            raise UserError(f"next step {number} was just changed", where=shown, remedy="again")
        ticked = _ticked(above, number - 1, path.stem)
        if not _only_ticked(above, ticked, number - 1, path.stem):
            raise UserError(
                f"next step {number} cannot be ticked as it is written", where=shown, remedy=f"`- step: {step}`"
            )
        return ticked

    try:
        file.rewrite_above(tick)
    except BaseException:
        path.unlink()  # a plan whose step is not ticked would be made twice
        raise
    say(f"{shown}: next step {number} is now {path.stem}; edit it, then  make run EXP={path.stem}")
    return path


def _step(person: Any, number: int, shown: str) -> str:
    """The text of next step `number`, where it may be promoted."""
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
    return text.strip()


def _ticked(above: str, index: int, promoted_to: str) -> str:
    """The text with one item of `next_steps` done and promoted; nothing else in it changes, comments included."""
    node: Any = yaml.compose(above, Loader=yaml.CSafeLoader)
    item = next((steps.value[index] for key, steps in node.value if key.value == "next_steps"), node)
    begin = item.start_mark.index
    if isinstance(item, yaml.ScalarNode):
        text = above[begin : item.end_mark.index].rstrip()  # a folded text's end stands behind blank lines
        step = json.dumps(item.value.strip(), ensure_ascii=False)
        step = _UNPRINTABLE.sub(lambda m: f"\\u{ord(m[0]):04x}", step)  # to YAML, what it does not print is no text
        comment = _BLOCK_COMMENT.match(text)
        ticked = f"{{step: {step}, done: true, promoted_to: {promoted_to}}}{'  ' + comment[1] if comment else ''}"
        return above[:begin] + ticked + above[begin + len(text) :]
    begin, end = item.value[0][0].start_mark.index, "\r\n" if "\r\n" in above else "\n"
    between = ", " if item.flow_style else end + " " * item.value[0][0].start_mark.column
    there = {key.value: value for key, value in item.value if isinstance(key, yaml.ScalarNode)}
    edits = []
    for key, new in (("promoted_to", promoted_to), ("done", "true")):
        start, stop = (there[key].start_mark.index, there[key].end_mark.index) if key in there else (begin, begin)
        empty = key in there and start == stop  # `done:` and no more
        edits.append((start, stop, f" {new}" if empty else new if key in there else f"{key}: {new}{between}"))
    for start, stop, new in sorted(edits, reverse=True):
        above = above[:start] + new + above[stop:]
    return above


def _only_ticked(above: str, ticked: str, index: int, promoted_to: str) -> bool:
    """Whether the two say the same but for the tick: a step may be an alias of what stands elsewhere."""
    then = yamlio.load(above).value
    try:
        now = yamlio.load(ticked).value
        step, after = (document["next_steps"].pop(index) for document in (then, now))
    except (yamlio.YamlError, LookupError):
        return False
    wanted = (step if isinstance(step, dict) else {"step": step.strip()}) | {"done": True, "promoted_to": promoted_to}
    return bool(after == wanted) and repr(now) == repr(then)
