"""`aletheia exp repair`, `sync` and `renumber`: what went wrong with a record's file, put right and said.

repair    closes runs whose process is gone
sync      completes what waited for the person's half to be YAML again, and undoes edits below the line
renumber  gives a record the next free id of its day, where two checkouts made the same one
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from aletheia.output import print_json, print_table
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import criteria, find, ids
from pipeline.records.file import RecordFile, split
from pipeline.records.lifecycle import close_dead, liveness
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

_OWN_LINE = re.compile(r"(?m)^(experiment_id:[ \t]*['\"]?)EXP-[\d-]+\b")


def repair(workspace: Workspace, exps: Sequence[str], as_json: bool) -> None:
    """Closes every dead run among `exps` (default: all) as failed, with the last step its log knows."""
    done = []
    for file in _files(workspace, exps):
        try:
            facts = file.facts()
        except UserError as error:
            done.append({"id": file.id, "done": f"cannot be read: {error}"})
            continue
        state = liveness(facts) if facts else "planned"
        if facts and state == "dead":
            try:
                facts = close_dead(file, workspace)
            except UserError as error:  # it was taken up again in this moment
                done.append({"id": file.id, "done": f"left as it is: {error.what}"})
                continue
            step = facts.failure.step if facts.failure else None
            resume = f"; aletheia exp run {facts.lineage.parent or file.id} goes on" if facts.stage != "serve" else ""
            done.append({"id": file.id, "done": f"closed as failed{f' after step {step}' if step else ''}{resume}"})
        elif state.startswith("running on") or exps:
            done.append({"id": file.id, "done": f"left as it is: {state}"})
    _print(done, as_json, "no run is dead")


def sync(workspace: Workspace, exps: Sequence[str], as_json: bool) -> bool:
    """Completes and undoes what `RecordFile.read` shows; False when a person's half still keeps one from it."""
    done, whole = [], True
    for file in _files(workspace, exps):
        try:
            read = file.read()
        except UserError as error:
            done.append({"id": file.id, "done": str(error)})
            whole = False
            continue
        if read.mistake:
            mistake = str(read.mistake).removeprefix(f"{workspace.root}/")
            done.append({"id": file.id, "done": f"{'waits' if read.pending else 'is wrong'}: {mistake}"})
            whole = False
        elif read.pending or read.edited:
            complete = file.complete() and not file.read().edited
            with suppress(UserError):  # which lint tells
                _compare_again(file)
            what = read.edited or "completed with what had waited beside it"
            done.append({"id": file.id, "done": what + (": undone" if read.edited and complete else "")})
            whole = whole and complete
        elif read.damage:
            damage = str(read.damage).removeprefix(f"{workspace.root}/")
            done.append({"id": file.id, "done": f"no copy is at hand to put it right: {damage}"})
            whole = False
    _print(done, as_json, "every record is in step with what the pipeline knows")
    return whole


def _compare_again(file: RecordFile) -> None:
    """What was no YAML when the run ended can be compared with the frozen criteria now."""
    facts = file.facts()
    if facts and facts.verdict and liveness(facts) in ("complete", "failed", "cancelled"):
        now = criteria.changes(facts.verdict.criteria, criteria.read(file.person().get("success_criteria")))
        if now != facts.verdict.changed_after_start:
            facts.verdict.changed_after_start = now
            file.write(facts)


def renumber(workspace: Workspace, exp: str) -> Path:
    """Gives the record the next free id of its day, with its folders, links and the references to it.

    Where another file has the same id, a reference is changed only when it can be told to mean this one (by the hash of
    what was taken, or by naming each other); the others are named. Raises `UserError`.
    """
    file = located(workspace, exp)
    facts, old = _at_rest(workspace, file), _own_id(file)
    if old is None:
        what = "has no id to be renumbered from"
        raise UserError(what, where=workspace.shown(file.path), remedy="`experiment_id: EXP-…` above the line")
    twins = [other for other in _all(workspace) if other.path != file.path and _own_id(other) == old]
    for twin in twins:
        if is_copy(file, twin):  # both would claim the same outputs, and every reference to them
            what = f"is a copy of {workspace.shown(twin.path)}"
            raise UserError(what, where=workspace.shown(file.path), remedy="deleting one of the two")
    new = RecordFile(ids.allocate(workspace, lambda *_, **__: split(file.path.read_bytes()).above, date=old[4:14]))
    try:
        facts = _take_over(workspace, file, new, old)
    except BaseException as error:
        if file.path.exists():
            new.path.unlink(missing_ok=True)
            shutil.rmtree(new.folder, ignore_errors=True)
        if isinstance(error, OSError):
            what = f"could not be renumbered ({error.strerror}) and stands as it was"
            raise UserError(what, where=workspace.shown(file.path)) from error
        raise
    for other in _all(workspace):
        if other.path != new.path:
            _refer(workspace, other, old, new.id, facts, twins)
    try:
        _move_folders(workspace, file.id, new.id)
    except OSError as error:
        what = f"is {workspace.shown(file.path)} renumbered, whose folders could not all be moved ({error})"
        remedy = f"moving experiments/{file.id} and checkpoints/{file.id} to {new.id} by hand"
        raise UserError(what, where=workspace.shown(new.path), remedy=remedy) from error
    say(f"{workspace.shown(file.path)} is now {new.id}")
    return new.path


def is_copy(file: RecordFile, other: RecordFile) -> bool:
    """Whether the two tell of the same run, whatever stands above their lines."""
    with suppress(UserError):
        facts = file.read().facts
        return facts is not None and facts == other.read().facts
    return False


def _at_rest(workspace: Workspace, file: RecordFile) -> Facts | None:
    file.person()  # what cannot be read cannot be changed
    facts = file.facts()
    if facts and liveness(facts).startswith("running"):
        raise UserError("is running", where=workspace.shown(file.path), remedy="renumbering it when it has ended")
    return facts


def _take_over(workspace: Workspace, file: RecordFile, new: RecordFile, old: str) -> Facts | None:
    """Makes `new` all that `file` is, and removes `file`; once more when it was saved meanwhile. Returns its facts."""
    while True:
        content = file.path.read_bytes()
        facts = _at_rest(workspace, file)
        new.rewrite_above(lambda _: _OWN_LINE.sub(rf"\g<1>{new.id}", file.above()))
        if facts:
            renamed = _renamed(facts, old, new.id)
            last = renamed.history[-1] if renamed.history else None
            if last:
                last.note = "; ".join(filter(None, [last.note, f"renumbered from {old}"]))
            new.write(renamed)
        if _removed(file.path, content):
            return facts


def _removed(path: Path, content: bytes) -> bool:
    """False, and the file as it is, when it no longer holds `content`: an editor has saved."""
    aside = path.with_name(f".{path.name}.renumbered")
    path.rename(aside)  # from here on, who saves makes a file of its own
    same = False
    try:
        same = aside.read_bytes() == content
    finally:
        if not same:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
    return same


def _refer(
    workspace: Workspace, other: RecordFile, old: str, new: str, facts: Facts | None, twins: Sequence[RecordFile]
) -> None:
    """Changes the references to the renumbered record in another one, as far as they can be told apart."""
    text = other.path.read_bytes().decode("utf-8", "replace")
    if not re.search(rf"\b{old}\b(?!\d)", text) or any(other.path == twin.path for twin in twins):
        return
    shown = workspace.shown(other.path)
    try:
        theirs = other.facts()
        if theirs and liveness(theirs).startswith("running"):  # its process would write the old id again
            raise UserError("is running", where=shown)
        if theirs:
            before = theirs.model_dump()
            if not twins:
                theirs = _renamed(theirs, old, new)
            elif facts and not _repoint(theirs, other.id, old, new, facts, twins):
                say(f"note: {shown}: names {old} below the line; which of the two is meant cannot be told")
            if theirs.model_dump() != before:
                other.write(theirs)
                say(f"{shown}: refers to {new} now")
        above = other.above()
        if re.search(rf"\b{old}\b(?!\d)", above):
            if twins:
                say(f"note: {shown}: names {old} above the line; which of the two is meant, only you can tell")
            else:
                other.rewrite_above(_replacer(old, new))
                say(f"{shown}: names {new} now")
    except (UserError, OSError) as error:
        say(f"note: {error}; its references to {old} are left as they are")


def _repoint(theirs: Facts, their_id: str, old: str, new: str, facts: Facts, twins: Sequence[RecordFile]) -> bool:
    """Where two records bear the id: by the hash of what was taken, or because the two name each other.

    False where a reference fits both or neither, and is left.
    """
    others = [known for twin in twins if (known := twin.facts()) is not None]
    told: list[bool] = []

    def ours(fits: bool, fits_another: bool) -> bool:
        told.append(fits != fits_another)
        return fits and not fits_another

    lineage, digests = theirs.lineage, [find.combined(t.artifacts) for t in others]
    for taken in lineage.inputs:
        if taken.id == old and ours(taken.sha256 == find.combined(facts.artifacts), taken.sha256 in digests):
            taken.id, taken.path = new, taken.path.replace(old, new)
    if lineage.parent == old and ours(
        their_id in facts.lineage.children, any(their_id in t.lineage.children for t in others)
    ):
        lineage.parent = new
    if old in lineage.children and ours(
        facts.lineage.parent == their_id, any(t.lineage.parent == their_id for t in others)
    ):
        lineage.children = [new if child == old else child for child in lineage.children]
    return all(told)


def _move_folders(workspace: Workspace, old: str, new: str) -> None:
    """`experiments/EXP-…/`, `checkpoints/EXP-…/`, and the links that point into the latter."""
    for folder in (workspace.experiments, workspace.checkpoints):
        if (folder / old).is_dir():
            for file in (folder / new).glob("*"):  # what was written there already
                file.replace(folder / old / file.name)
            (folder / old).rename(folder / new)
    if not workspace.checkpoints.is_dir():
        return
    for link in workspace.checkpoints.iterdir():
        if link.is_symlink() and Path(os.readlink(link)).parts[:1] == (old,):
            find.link_newest(
                workspace, link.name, workspace.checkpoints / new / Path(*Path(os.readlink(link)).parts[1:])
            )


def _renamed(facts: Facts, old: str, new: str) -> Facts:
    """With the new id for the old one wherever it stands, but for the history and the command, which tell what was."""
    renamed = Facts.model_validate(_deep(facts.model_dump(mode="json"), _replacer(old, new)))
    _keep_commands(facts.code, renamed.code)
    return renamed.model_copy(update={"history": facts.history})


def _keep_commands(code: Any, renamed: Any) -> None:
    """What was typed stays, also what was typed before a resume; the path of the patch goes with its folder."""
    if isinstance(code, dict):
        renamed |= {key: code[key] for key in ("command", "cwd") if key in code}
        _keep_commands(code.get("before_resume"), renamed.get("before_resume"))


def _replacer(old: str, new: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"\b{re.escape(old)}\b(?!\d)", new, text)


def _deep(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _deep(child, change) for key, child in value.items()}
    if isinstance(value, list):
        return [_deep(child, change) for child in value]
    return change(value) if isinstance(value, str) else value


def _own_id(file: RecordFile) -> str | None:
    """What the record was called when it was written: its file's name, unless that was changed since."""
    said, facts = None, None
    with suppress(UserError):
        said, facts = file.person().get("experiment_id"), file.facts()
    named = bool(ids.ID.match(file.id))
    if isinstance(said, str) and ids.ID.match(said) and not (named and (facts is None or file.id in str(facts))):
        return said
    match = re.match(r"EXP-\d{4}-\d{2}-\d{2}-\d{3,}", file.id)
    return match[0] if match else None


def located(workspace: Workspace, exp: str) -> RecordFile:
    """The record with this id, or the file at this path among the records, whatever its name. Raises `UserError`."""
    for path in (Path(exp), workspace.root / exp, workspace.experiments / exp):
        if path.suffix == ".yaml" and path.is_file() and path.resolve().parent == workspace.experiments.resolve():
            return RecordFile(workspace.experiments / path.name)
    return find.named(workspace, exp)


def _all(workspace: Workspace) -> list[RecordFile]:
    """Every file that may be a record, also one whose name is no id."""
    return [RecordFile(path) for path in sorted(workspace.experiments.glob("EXP-*.yaml")) if path.is_file()]


def _files(workspace: Workspace, exps: Sequence[str]) -> list[RecordFile]:
    if exps:
        return [find.named(workspace, exp) for exp in exps]
    return [RecordFile(path) for path in ids.newest_first(workspace)]


def _print(done: list[dict[str, str]], as_json: bool, nothing: str) -> None:
    if as_json:
        print_json(done)
    elif done:
        print_table(("record", "what was done"), [(row["id"], row["done"]) for row in done], sys.stdout)
    else:
        say(nothing)
