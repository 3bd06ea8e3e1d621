"""One record as a page to paste into a wiki: verdict first, figures with their intervals, and all that its person wrote.

    aletheia exp export EXP-2026-11-21-003 --to markdown

Writes `experiments/EXP-…/report.md`. A plan, and a record that is running or cannot be read whole, is written as far as
it goes, and says so at its top. Only the configuration is not there whole; the page links to the record, which has it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aletheia.exp.exporters.page import label, place, plain, render, write_page
from aletheia.exp.exporters.record import besides, moment, pictures, texts
from aletheia.exp.exporters.tables import changes, one_line, settings, values
from aletheia.exp.reading import flat
from aletheia.summary import figures as key_figures
from pipeline.errors import UserError
from pipeline.progress import duration, say
from pipeline.records import find
from pipeline.records.file import Reading, RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Facts, Verdict
from pipeline.workspace import Workspace

TITLE = 100  # characters of a description that fits into the heading
STARTS_FROM = {"sft": "the base", "eval": "the base", "dpo": "the SFT policy, its reference"}
# elsewhere on the page
PLACED = {"experiment_id", "date", "description", "hypothesis", "profile", "stages", "overrides"}
FIRST = ("observations", "conclusion", "analysis", "issues", "learnings", "next_steps", "journal")


def export_markdown(workspace: Workspace, exp: str, output: Path | None, force: bool) -> str:
    """The path of the page. Raises `UserError`."""
    file = find.named(workspace, exp)
    reading = file.read()
    target = place(output, file.folder / "report.md", f"{file.id}.md")
    return write_page(workspace, target, page(workspace, file, reading, target.parent), force, reading.facts)


def page(workspace: Workspace, file: RecordFile, reading: Reading, folder: Path) -> str:
    """`folder`: where the page will lie, from which its links start."""
    facts, person = reading.facts, reading.person
    results = facts.results if facts else {}
    described = texts(person.get("description"))
    title = described[0] if len(described) == 1 and len(described[0]) <= TITLE and "\n" not in described[0] else ""
    return render(
        "report.md.jinja",
        id=file.id,
        facts=facts,
        is_plan=facts is None and reading.damage is None,
        title=title,
        description=[] if title else described,
        problems=list(_problems(reading)),
        summary=list(_summary(file, reading)),
        verdict=_verdict(reading),
        hypothesis=texts(person.get("hypothesis")),
        failure=facts.failure if facts else None,
        setup=list(_setup(facts, person)),
        record_link=_link(file.path, folder),
        changes_are=_changes_are(facts) if facts else "",
        changes=list(changes(results)),
        figures=list(values(results)),
        besides=besides(results),
        parts=list(_parts(workspace, facts, folder)),
        curves=[(_link(p, folder), purpose) for p, purpose in pictures(file, workspace, facts)] if facts else [],
        lineage=list(_lineage(workspace, facts, folder)) if facts else [],
        artifacts=facts.artifacts if facts else [],
        reproduce=list(_reproduce(file, facts)) if facts else [],
        made_with=list(_made_with(facts)) if facts else [],
        written=list(_written(facts, person)),
    )


def _problems(reading: Reading) -> Iterator[str]:
    for problem in (reading.mistake, reading.damage):
        if problem:
            yield f"Not whole: {problem}"
    if reading.edited:
        yield f"The record {reading.edited}."
    if reading.facts and liveness(reading.facts).startswith("running"):
        yield "Partial: the run has not ended."


def _summary(file: RecordFile, reading: Reading) -> Iterator[str]:
    facts, person = reading.facts, reading.person
    yield (liveness(facts) if facts else "unreadable" if reading.damage else "planned")
    yield (f"stage {facts.stage}" if facts else f"stages {', '.join(texts(person.get('stages'))) or 'not named'}")
    yield f"profile {facts.profile if facts else person.get('profile')}"
    yield str(person.get("date") or file.id[4:14])
    seconds = facts.resources.get("wall_seconds") if facts else None
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e12:
        yield duration(seconds)


def _verdict(reading: Reading) -> dict[str, Any]:
    verdict = reading.facts.verdict if reading.facts else None
    if verdict is None:
        criteria = reading.person.get("success_criteria")
        when = "after the run had begun" if reading.facts else "and nothing has run"
        sentence = f"None: criteria were set, {when}." if criteria else "None: no success criteria were set."
        return {"sentence": sentence, "rows": [], "changed": []}
    return {"sentence": _sentence(verdict), "rows": list(_criteria(verdict)), "changed": verdict.changed_after_start}


def _sentence(verdict: Verdict) -> str:
    found = verdict.finding or "not judged: the run is not complete"
    return f"{found[:1].upper()}{found[1:]}, by criteria frozen at {verdict.frozen_at}."


def _criteria(verdict: Verdict) -> Iterator[list[Any]]:
    for one in verdict.judged:
        needed = f"; n needed: {one.n_needed}" if one.n_needed else ""
        yield [one.criterion, one.role, one.finding, one.observed, f"{one.why}{needed}"]
    for open_ in [] if verdict.judged else verdict.criteria:
        yield [open_.criterion, open_.role, "", "", f"needs n ≥ {open_.min_n}" if open_.min_n else ""]


def _setup(facts: Facts | None, person: dict[str, Any]) -> Iterator[tuple[str, str]]:
    asked = {"stages": person.get("stages")}
    if facts is None:
        asked |= {key: person.get(key) for key in ("profile", "overrides")}
    for key, value in flat(asked):
        if value not in (None, "", [], {}):
            yield key, one_line(value)
    if facts:
        yield from settings(facts)


def _changes_are(facts: Facts) -> str:
    start = STARTS_FROM.get(facts.stage, "what it is compared with")
    against = facts.results.get("against")
    return f"Before: {start}{f' ({against})' if isinstance(against, str) else ''}; after: this record. Paired on the same rows."


def _parts(workspace: Workspace, facts: Facts | None, folder: Path) -> Iterator[dict[str, Any]]:
    for child in facts.lineage.children if facts else []:
        try:
            file = find.named(workspace, child)
            below = file.read().facts
        except UserError as error:
            say(f"note: {error}")
            yield {"id": plain(child), "link": "", "stage": "?", "status": "not there", "figures": []}
            continue
        yield {
            "id": file.id,
            "link": _link(file.path, folder),
            "stage": below.stage if below else "?",
            "status": liveness(below) if below else "not run, or unreadable",
            "figures": key_figures(below) if below else [],
        }


def _lineage(workspace: Workspace, facts: Facts, folder: Path) -> Iterator[str]:
    """Markdown already: links, and hashes in full."""

    def record(name: str) -> str:
        path = workspace.experiments / f"{name}.yaml"
        return f"[{name}]({_link(path, folder)})" if path.is_file() else f"{plain(name)} (not here)"

    lineage = facts.lineage
    if lineage.base:
        base = {key: plain(value) for key, value in lineage.base.items()}
        yield f"base {base.get('name')}, weights {base.get('sha256') or 'not hashed'}"
    for taken in lineage.inputs:
        yield f"built on {record(taken.id)} ({plain(taken.stage)}): {plain(taken.path)}, {plain(taken.sha256)}"
    if lineage.parent:
        yield f"part of {record(lineage.parent)}"
    for child in lineage.children:
        yield f"its stage {record(child)}"
    for name, where in facts.external.items():
        yield f"{plain(name)}: {', '.join(plain(f'{key} {value}') for key, value in flat(where)) or plain(where)}"
    if not any((lineage.base, lineage.inputs, lineage.parent, lineage.children, facts.external)):
        yield "none recorded"


def _reproduce(file: RecordFile, facts: Facts) -> Iterator[str]:
    commit, patch = facts.code.get("commit"), facts.code.get("patch")
    if commit:
        yield f"git checkout {one_line(commit)}"
    else:
        yield f"# the commit is not known: {one_line(facts.code.get('reason')) or 'it was not recorded'}"
    if isinstance(patch, dict):
        redacted = "   # secrets were taken out of it: it may not apply" if patch.get("redacted") else ""
        yield f"git apply experiments/{one_line(patch.get('path'))}{redacted}"
    elif facts.code.get("dirty"):
        yield "# there were files that git did not know; they are not kept"
    yield f"aletheia exp reproduce {file.id}"
    if facts.code.get("command"):
        yield f"# it was run as: {one_line(facts.code['command'])}"


def _made_with(facts: Facts) -> Iterator[tuple[str, Any]]:
    history = facts.history
    if history and moment(history[0].at):
        yield "ran", f"{history[0].at} to {history[-1].at}" if len(history) > 1 else f"from {history[0].at}"
    for name, value in [*flat(facts.environment), *flat(facts.resources)]:
        yield name, one_line(value)


def _written(facts: Facts | None, person: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What its person wrote, under headings: all keys, known or not, that do not stand on the page already."""
    known = [key for key in FIRST if key in person]
    for key in [*known, *(key for key in person if key not in FIRST)]:
        if not _is_placed(key, facts, person[key]) and person[key] not in (None, "", [], {}):
            yield label(key), person[key]


def _is_placed(key: str, facts: Facts | None, written: Any) -> bool:
    if key == "success_criteria":
        return facts is not None and facts.verdict is not None
    if facts and key in ("profile", "overrides"):  # taken up by the run, or changed since
        return bool(written == getattr(facts, key))
    return key in PLACED


def _link(path: Path, folder: Path) -> str:
    return quote(os.path.relpath(path, folder))
