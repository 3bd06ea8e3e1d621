"""Verify: is this model really what its records say? Every hash in the chain, against the files.

    aletheia exp verify EXP-2026-11-21-006

Walks from the record over what it built on (of a pipeline: over its stages) to the base, and checks of each: that the
program's half is as it was written, that each artifact is the file it was and nothing else lies among them, that what
was taken from a parent is what the parent made, the base's weights, the chat contract, the code's patch. Rows that have
changed since are a warning: the model is still the one that was trained. It only reads, and judges no links such as
checkpoints/<name>-merged. Whoever rewrites files, records and seals alike is caught by the records' history in git,
not here.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from aletheia.exp.chain import (
    LARGE,
    MAKES_A_MODEL,
    Chain,
    Finding,
    Found,
    differs,
    lower_half,
    not_plain,
    patches,
    recorded_rows,
    rows_config,
    within,
)
from aletheia.output import print_json, print_table
from pipeline.chat import CONTRACT_FILE, Contract
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.records import find
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Check:
    record: str
    what: str
    finding: Finding
    why: str = ""


def verify(workspace: Workspace, exp: str, as_json: bool) -> bool:
    """Prints every check; False when one failed or nothing could be judged.

    Raises `UserError` for a plan, which has nothing to check.
    """
    file = find.named(workspace, exp)
    reading = file.read()
    if reading.facts is None and reading.damage is None:
        raise UserError(
            "is a plan: nothing has run", where=workspace.shown(file.path), remedy=f"make run EXP={file.id}"
        )
    checks = checked(workspace, file.id)
    counts = Counter(check.finding for check in checks)
    true = bool(counts["ok"]) and not counts["FAILED"]
    if as_json:
        print_json({"id": file.id, "true": true, "counts": counts, "checks": [asdict(check) for check in checks]})
    else:
        print_checks(checks)
        state = _unfinished(file)
        print(
            f"\n{_closing(file.id, checks)}{f'; it is {state}: nothing finished is vouched for' if true and state else ''}"
        )
    return true


def _unfinished(file: RecordFile) -> str | None:
    """The state of a record that has no finished output to verify."""
    facts = file.read().facts
    state = liveness(facts) if facts else "complete"
    return None if state == "complete" else state


def failures(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.finding == "FAILED"]


def print_checks(checks: Sequence[Check]) -> None:
    """A line each on stdout, below the record that it is about."""
    rows, above = [], ""
    for check in checks:
        rows.append((check.record if check.record != above else "", check.finding, check.what, check.why))
        above = check.record
    print_table(("record", "found", "check", ""), rows, sys.stdout)


def _closing(experiment_id: str, checks: Sequence[Check]) -> str:
    failed, counts = failures(checks), Counter(check.finding for check in checks)
    judged = counts["ok"] + counts["FAILED"]
    warnings = f"{counts['warning']} warning{'s' if counts['warning'] > 1 else ''}" if counts["warning"] else ""
    unchecked = f"{counts['not checked']} not checked" if counts["not checked"] else ""
    rest = ", ".join(filter(None, (warnings, unchecked)))
    if failed:
        first = f"{failed[0].record} {failed[0].what}: {failed[0].why}"
        sentence = f"is NOT what its records say: {len(failed)} of {judged} checks failed, the first: {first}"
    elif judged:
        sentence = f"is what its records say: {judged} of {judged} checks"
    else:
        sentence = "cannot be judged: no check could be made"
    return f"{experiment_id} {sentence}{f'; {rest}' if rest else ''}"


def checked(workspace: Workspace, experiment_id: str) -> list[Check]:
    """Every check of a record and of all that it builds on."""
    return _Checks(Chain(workspace, experiment_id)).all()


class _Checks:
    """What can be checked of a chain of records."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.workspace = chain, chain.workspace
        self._hashing = _Hashing(sum(path.stat().st_size for path in self._plain_artifacts()))

    def all(self) -> list[Check]:
        try:
            TopologicalSorter({i: self.chain.builds_on(i) for i in self.chain.records}).prepare()
        except CycleError as error:
            circle = [Check(self.chain.start, "lineage", "FAILED", f"goes in a circle: {' → '.join(error.args[1])}")]
        else:
            circle = []
        with self._hashing:
            return circle + [Check(i, *found) for i in self.chain.records for found in self._found(i)]

    def _found(self, experiment_id: str) -> Iterator[Found]:
        reading = self.chain.records[experiment_id]
        if isinstance(reading, UserError):
            yield "record", "FAILED", str(reading)
            return
        yield lower_half(RecordFile(self.workspace.experiments / f"{experiment_id}.yaml"), reading)
        if reading.facts is None:
            return
        yield from self._output(experiment_id, reading.facts)
        yield from self._contract(experiment_id, reading.facts)
        yield from self.chain.inputs(reading.facts)
        yield from self.chain.base(reading.facts)
        yield from self._rows_on_disk(reading.facts)
        yield from patches(self.workspace, experiment_id, reading.facts)

    def _plain_artifacts(self) -> Iterator[Path]:
        for experiment_id in self.chain.records:
            facts, home = self.chain.facts(experiment_id), self.workspace.checkpoints / experiment_id
            for artifact in facts.artifacts if facts else ():
                path = self.workspace.root / artifact.path
                if not not_plain(path, home):
                    yield path

    def _output(self, experiment_id: str, facts: Facts) -> Iterator[Found]:
        state = liveness(facts)
        if state != "complete":
            yield "output", "not checked", f"the record is {state}: nothing is finished"
            return
        if not facts.artifacts and facts.stage in MAKES_A_MODEL:
            yield "output", "FAILED", "a complete record, and it names no artifacts"
        home = self.workspace.checkpoints / experiment_id
        folders: dict[Path, set[Path]] = {}
        for artifact in facts.artifacts:
            path = self.workspace.root / artifact.path
            wrong = not_plain(path, home) or differs(path, artifact.sha256, self._hashing.sha256)
            yield artifact.path, "FAILED" if wrong else "ok", wrong or f"sha256 {artifact.sha256[:12]}"
            if within(path, home):
                folders.setdefault(home / path.relative_to(home).parts[0], set()).add(path)
        for folder, named in folders.items():
            strangers = sorted(p for p in folder.rglob("*") if p not in named and (p.is_symlink() or not p.is_dir()))
            for stranger in strangers:
                yield (
                    self.workspace.shown(stranger),
                    "FAILED",
                    "lies among the artifacts, and the record does not name it",
                )
            if not strangers:
                yield self.workspace.shown(folder), "ok", "holds nothing else"

    def _contract(self, experiment_id: str, facts: Facts) -> Iterator[Found]:
        home = self.workspace.checkpoints / experiment_id
        if facts.stage not in MAKES_A_MODEL or facts.status != "complete" or not facts.artifacts:
            return
        recorded = facts.data.get("contract")
        path = next((self.workspace.root / a.path for a in facts.artifacts if Path(a.path).name == CONTRACT_FILE), None)
        if not isinstance(recorded, str):
            yield "chat contract", "not checked", "the record names none"
        elif path is None or not_plain(path, home):
            yield "chat contract", "FAILED", f"there is no {CONTRACT_FILE} beside the weights"
        else:
            try:
                now = str(Contract.load(path.parent).sha256)
            except UserError as error:
                yield "chat contract", "FAILED", error.what
            else:
                same = now == recorded
                why = f"sha256 {now[:12]}" if same else f"is {now[:12]}, trained with {recorded[:12]}"
                yield "chat contract", "ok" if same else "FAILED", why

    def _rows_on_disk(self, facts: Facts) -> Iterator[Found]:
        for part, then in recorded_rows(facts).items():
            try:
                now = self.chain.rows.describe(rows_config(facts), part, self.chain.unfit)
            except UserError as error:
                yield f"rows {part}", "warning", f"those of then are not there: {error}"
                continue
            if now["sha256"] == then["sha256"]:
                yield f"rows {part}", "ok", f"{now['rows']} rows, sha256 {now['sha256'][:12]}"
            else:
                yield f"rows {part}", "warning", f"are others now: {now['rows']} rows, then {then.get('rows')}"


class _Hashing:
    """SHA-256 of files, with progress where there is much to read."""

    def __init__(self, total: int) -> None:
        self.done = 0
        self.progress = Progress("hashing", total // 10**6, "megabyte") if total >= LARGE else None

    def __enter__(self) -> "_Hashing":
        if self.progress:
            self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.__exit__(*error)

    def sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(find.BLOCK):
                digest.update(block)
                self.done += len(block)
                if self.progress:
                    self.progress.advance(self.done // 10**6, path.name)
        return digest.hexdigest()
