"""Reproduce: runs a record again from what it ran from, and compares every figure and file.

    aletheia exp reproduce EXP-2026-11-21-003
    aletheia exp reproduce EXP-2026-11-21-003 --dry-run      says what can be restored and what cannot

A complete data, sft, dpo, merge or eval record, or a pipeline's stages one by one, each from the inputs that it had. What
cannot be restored is said with what to do, all of it at once, and then nothing runs. The new run is a record of its own;
nothing of the original is touched. On the same machine and processor threads a training repeats bit for bit; on another
its figures may differ: then each must lie in the other's 95 % interval or, without one, within 1 %. Time and memory are
not compared, and nothing here says that a model is good.
"""

import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aletheia.exp.chain import recorded_rows
from aletheia.exp.reading import brief, figure, flat, plain
from aletheia.exp.restore import Restored, restored
from aletheia.exp.verify import failures, print_checks
from aletheia.output import print_json, print_table
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.records import find, ids
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import StopRequest, liveness
from pipeline.records.metrics import Metric, metrics
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

STAGES = ("data", "sft", "dpo", "merge", "eval")
TOLERANCE = 0.01  # relative, of a figure without an interval
RESIDUE = 1e-4  # absolute: a rounding error differs from another by as much as it is
ENDS_WITHIN = 60.0  # seconds, of a run that was asked to stop
_TIMED = re.compile(r"(^|[._])(seconds|per_second|ms|memory_gb|hours)$|(^|\.)predicted(_and_actual)?\.")

Finding = Literal["equal", "within", "DIFFERENT", "other bytes", "not compared"]


@dataclass(frozen=True)
class Compared:
    what: str
    then: str
    now: str
    finding: Finding


def reproduce(workspace: Workspace, exp: str, dry_run: bool, as_json: bool) -> bool:
    """True when all figures came out again, or when --dry-run finds that all can be restored.

    Raises `UserError` for a record that cannot be run again at all, and `StageFailed` when the run itself fails.
    """
    file = find.named(workspace, exp)
    asked = list(_asked(workspace, file))
    if not asked:
        raise UserError("none of its stages can be run again", where=workspace.shown(file.path))
    told: dict[str, Any] = {"id": file.id, "reproduced": False}
    with StopRequest().listening(), ExitStack() as stack:
        runs = [stack.enter_context(restored(workspace, file, facts)) for file, facts in asked]
        checks = [check for run in runs for check in run.checks]
        missing = failures(checks)
        told |= {"can_be_restored": not missing, "checks": [asdict(check) for check in checks]}
        if not as_json:
            print_checks(checks)
        if missing:
            told["why"] = (
                f"{file.id} cannot be reproduced here: {len(missing)} of {len(checks)} things it ran from cannot be restored"
            )
        elif dry_run:
            told["why"] = f"{file.id} can be reproduced from here; nothing was run"
        else:
            told["runs"] = [_again(workspace, run, as_json) for run in runs]
            told["reproduced"] = all(run["reproduced"] for run in told["runs"])
    if as_json:
        print_json(plain(told))
    elif "why" in told:
        print(f"\n{told['why']}")
    return not missing if dry_run else bool(told["reproduced"])


def compare(then: Facts, now: Facts, changed: Sequence[str] = ()) -> Iterator[Compared]:
    """All that the two records have in common. `changed`: keys of the configuration that were set on purpose."""
    yield _same("code", _code(then), _code(now))
    settings = dict(flat(then.configuration)), dict(flat(now.configuration))
    for key in dict.fromkeys(key for side in settings for key in side):
        if key not in changed and settings[0].get(key) != settings[1].get(key):
            yield _same(f"configuration {key}", settings[0].get(key), settings[1].get(key))
    rows = recorded_rows(then), recorded_rows(now)
    for part in rows[0]:
        yield _same(f"rows {part}", *(side.get(part, {}).get("sha256") for side in rows))
    bases = [(facts.lineage.base or {}).get("sha256") for facts in (then, now)]
    if any(bases):
        yield _same("base", *bases)
    figures = metrics(then.results), metrics(now.results)
    for path in dict.fromkeys([*figures[0], *figures[1]]):
        yield _figure(path, figures[0].get(path), figures[1].get(path))
    files = [{Path(*Path(a.path).parts[2:]): a.sha256 for a in facts.artifacts} for facts in (then, now)]
    for name in sorted({*files[0], *files[1]}):
        one, other = files[0].get(name), files[1].get(name)
        finding: Finding = "equal" if one == other else "other bytes" if one and other else "DIFFERENT"
        yield Compared(f"file {name}", brief(one), brief(other), finding)


def _asked(workspace: Workspace, file: RecordFile) -> Iterator[tuple[RecordFile, Facts]]:
    """The record, or of a pipeline experiment its stages."""
    reading, shown = file.read(), workspace.shown(file.path)
    if reading.damage:
        raise reading.damage
    facts = reading.facts
    if facts is None:
        raise UserError("is a plan: nothing has run", where=shown, remedy=f"make run EXP={file.id}")
    if liveness(facts) != "complete":
        raise UserError(f"is {liveness(facts)}: there is nothing whole to compare with", where=shown)
    if facts.stage in STAGES:
        yield file, facts
    elif facts.stage == "pipeline" and facts.lineage.children:
        for name in facts.lineage.children:
            child = find.named(workspace, name)
            found = child.read().facts
            if found and (found.stage not in STAGES or liveness(found) != "complete"):
                say(f"note: {found.stage} {name} ({liveness(found)}) is not run again: it has no figures to compare")
            else:
                yield from _asked(workspace, child)
    else:
        raise UserError(f"a {facts.stage} record is not run again", where=shown, remedy=f"one of {', '.join(STAGES)}")


def _again(workspace: Workspace, run: Restored, as_json: bool) -> dict[str, Any]:
    """Runs it, and prints what came out next to what is recorded."""
    say(f"\nruns {run.facts.stage} {run.file.id} again")
    new = _run(workspace, run)
    facts = new.read().facts
    if facts is None:
        raise StageFailed(f"{workspace.shown(new.path)} cannot be read")
    compared = list(compare(run.facts, facts, tuple(run.changed)))
    told = {
        "id": run.file.id,
        "again": new.id,
        "reproduced": _outcome(compared) != "no",
        "exactly": _outcome(compared) == "exactly",
    }
    told |= {"compared": [asdict(c) for c in compared], "why": closing(run.file.id, new.id, compared)}
    if not as_json:
        print()
        print_table(("", run.file.id, new.id, ""), [(c.what, c.then, c.now, c.finding) for c in compared], sys.stdout)
        print(f"\n{told['why']}")
    return told


def _run(workspace: Workspace, run: Restored) -> RecordFile:
    """The new record. Raises `StageFailed` when the run does not come to its end, `Interrupted` when it was stopped."""
    before = set(ids.newest_first(workspace))
    process = run.start()
    try:
        process.communicate()
    finally:
        _end(process)
        made = (RecordFile(path) for path in ids.newest_first(workspace) if path not in before)
        new = [file for file in made if _is_from(run, file.read().facts)]
        for file in new:
            _describe(file, run.file.id)
    if process.returncode or not new:
        known = f"; {workspace.shown(new[0].path)} says more" if new else ""
        raise StageFailed(f"the run again ended with exit code {process.returncode}{known}")
    return new[0]


def _end(process: "subprocess.Popen[str]") -> None:
    """Nothing is left running behind us. A run that was asked to stop closes its record first."""
    if process.poll() is not None:
        return
    try:
        process.terminate()
        process.wait(ENDS_WITHIN)
    finally:
        process.kill()
        process.wait()


def _is_from(run: Restored, facts: Facts | None) -> bool:
    """Others may open records at the same time. One that was stopped at once does not yet say where it ran."""
    return (
        facts is not None and facts.profile == run.profile.stem and facts.code.get("cwd") in (None, str(run.checkout))
    )


def _describe(file: RecordFile, original: str) -> None:
    """What the stage's own command cannot say above the line of the new record."""
    said = f"description: Reproduction of {original}\nrelated: [{original}]\ntags: [reproduction]"
    try:
        file.rewrite_above(lambda text: re.sub(r"^description:[ ]*$", said, text, count=1, flags=re.MULTILINE))
    except UserError as error:
        say(f"note: {error}; it is the reproduction of {original}")


def _same(what: str, then: Any, now: Any) -> Compared:
    return Compared(what, brief(then), brief(now), "equal" if then == now else "DIFFERENT")


def _code(facts: Facts) -> str:
    patch = facts.code.get("patch")
    patched = f" + {str(patch.get('sha256'))[:12]}" if isinstance(patch, dict) else ""
    return f"{str(facts.code.get('commit'))[:12]}{patched}"


def _figure(path: str, then: Metric | None, now: Metric | None) -> Compared:
    before, after = (figure(metric) if metric else "–" for metric in (then, now))
    finding: Finding
    if _TIMED.search(path):
        finding = "not compared"
    elif then is None or now is None:
        finding = "DIFFERENT"
    elif then == now:
        finding = "equal"
    else:
        finding = "within" if _within(then, now) else "DIFFERENT"
        if before == after:  # the difference is in later digits
            before, after = repr(then.value), repr(now.value)
    return Compared(path, before, after, finding)


def _within(one: Metric, other: Metric) -> bool:
    """Each in the other's interval. Without intervals: whole numbers, which count something, may not differ at all."""
    ends = (one.ci_low, one.ci_high, other.ci_low, other.ci_high)
    if None not in ends:
        low, high, other_low, other_high = ends
        return low <= other.value <= high and other_low <= one.value <= other_high  # type: ignore[operator]
    if one.value.is_integer() and other.value.is_integer():
        return False
    return math.isclose(one.value, other.value, rel_tol=TOLERANCE, abs_tol=RESIDUE)


def _outcome(compared: Sequence[Compared]) -> Literal["exactly", "within", "no"]:
    findings = {c.finding for c in compared}
    if "DIFFERENT" in findings:
        return "no"
    return "exactly" if findings <= {"equal", "not compared"} else "within"


def closing(original: str, again: str, compared: Sequence[Compared]) -> str:
    different = [c for c in compared if c.finding == "DIFFERENT"]
    if different:
        first = f"{different[0].what} {different[0].then}, now {different[0].now}"
        return f"{original} was NOT reproduced by {again}: {len(different)} of {len(compared)} are different, first {first}"
    files = [c for c in compared if c.what.startswith("file ")]
    rest = [c for c in compared if c not in files and c.finding != "not compared"]
    equal, same = ([c for c in group if c.finding == "equal"] for group in (rest, files))
    how = "" if len(equal) < len(rest) else " exactly" if len(same) == len(files) else " in every figure"
    sentence = f"{original} was reproduced{how} by {again}: {len(equal)} of {len(rest)} equal"
    if len(equal) < len(rest):
        sentence += f", {len(rest) - len(equal)} not exactly but within their interval or {TOLERANCE:.0%}"
    others = ", ".join(c.what.removeprefix("file ") for c in files if c not in same)
    bits = f"; {len(same)} of {len(files)} files are the same bit for bit" if files else ""
    return f"{sentence}{bits}{f', not {others}' if others else ''}"
