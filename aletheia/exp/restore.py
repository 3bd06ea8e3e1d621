"""What a record ran from, put together again: code, pins, rows, inputs, base and configuration.

    with restored(workspace, file) as run:
        run.checks    what could be restored and what could not, each with what to do about it
        run.start()   the stage, with the code of that time

The commit stands in a git worktree in the temporary folder, with the run's patch applied, and is gone at the end however
it ends. The configuration is written as a profile under a name of its own, `<name>-reproduction`, so that no link in
checkpoints/ moves and no later stage takes the new record for its input. The code that runs is the record's: reproduce
only records that you trust.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from aletheia.exp.chain import Chain, Found, lower_half, patches, recorded_rows, rows_config
from aletheia.exp.verify import Check, checked, failures
from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.records import capture
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import CHECKOUT, LOCK_FILE, Workspace

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIX = "-reproduction"
MACHINE = ("python", "cpu", "threads", "gpus", "cuda")  # of the environment: what may change the last digits


@contextmanager
def restored(workspace: Workspace, file: RecordFile, facts: Facts) -> Iterator["Restored"]:
    with tempfile.TemporaryDirectory(prefix="aletheia-reproduce-") as folder:
        run = Restored(workspace, file, facts, Path(folder).resolve())
        try:
            run.checks = [Check(file.id, *found) for found in run._restore()]
            yield run
        finally:
            _git(CHECKOUT, "worktree", "remove", "--force", str(run.checkout))


class Restored:
    def __init__(self, workspace: Workspace, file: RecordFile, facts: Facts, folder: Path) -> None:
        self.workspace, self.file, self.facts = workspace, file, facts
        self.checks: list[Check] = []
        self.checkout = folder / "checkout"
        self.profile = folder / f"{_plain(facts.profile)}{_SUFFIX}.yaml"
        self.changed: dict[str, Any] = {}  # of the configuration, on purpose: dotted key and the value given

    def start(self) -> "subprocess.Popen[str]":
        """The stage as a process of its own; stdout is the new record's path. A Ctrl-C reaches it only through us."""
        values = deepcopy(self.facts.configuration)
        for key, value in self.changed.items():
            *sections, last = key.split(".")
            inner = values
            for section in sections:
                inner = inner[section]
            inner[last] = value
        self.profile.write_text(yamlio.dump(values), "utf-8")
        command = [sys.executable, "-m", "aletheia.cli", *self._stage(), "--profile", str(self.profile)]
        environment = _without_git() | {"ALETHEIA_ROOT": str(self.workspace.root), "PYTHONPATH": str(self.checkout)}
        threads = self.facts.environment.get("threads")
        if isinstance(threads, int):
            environment["OMP_NUM_THREADS"] = str(threads)
        return subprocess.Popen(
            command, cwd=self.checkout, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def _stage(self) -> list[str]:
        facts = self.facts
        if facts.stage == "data":
            return ["data", "snapshot"]
        if facts.stage == "sft":
            return ["sft", *(["--from", facts.lineage.inputs[0].id] if facts.lineage.inputs else [])]
        parts = []
        if facts.stage == "eval":
            parts += ["heldout"] if "conversations" in facts.data or "pairs" in facts.data else []
            parts += ["benchmarks"] if "benchmarks" in facts.results else []
            parts += ["winrate"] if "questions" in facts.data else []
        return [facts.stage, *parts, "--from", facts.lineage.inputs[0].id if facts.lineage.inputs else "base"]

    def _restore(self) -> Iterator[Found]:
        yield lower_half(self.file, self.file.read())
        yield from self._code()
        yield from self._pins()
        yield from self._machine()
        yield from self._configuration()
        chain = Chain(self.workspace, self.file.id)
        yield from self._rows(chain)
        yield from self._inputs(chain)
        yield from self._base(chain)

    def _code(self) -> Iterator[Found]:
        code, commit = self.facts.code, self.facts.code.get("commit")
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            why = code.get("reason") or "the record names none"
            yield "commit", "FAILED", f"{why}; try committing before the next run: this one's code is not known"
            return
        said = _git(CHECKOUT, "worktree", "add", "--detach", str(self.checkout), commit)
        if said is not None:
            yield "commit", "FAILED", f"{commit[:12]} is not to be had from {CHECKOUT} ({said}); try git fetch"
            return
        yield "commit", "ok", commit[:12]
        earlier: Any = code.get("before_resume")
        if isinstance(earlier, dict) and _identity(earlier) != _identity(code):
            yield "resume", "FAILED", "the run was resumed with other code than it began with; try a run in one piece"
        yield from self._patch()
        yield from self._new_files()

    def _patch(self) -> Iterator[Found]:
        code = self.facts.code
        patch = code.get("patch")
        if not isinstance(patch, dict):
            if code.get("dirty") is None:
                yield (
                    "patch",
                    "FAILED",
                    f"{code.get('reason') or 'the record does not say whether the code was changed'}",
                )
            return
        what, finding, why = next(patches(self.workspace, self.file.id, self.facts))
        if finding != "ok":
            yield what, finding, f"{why}; try a copy of it"
        elif patch.get("redacted"):
            yield (
                what,
                "FAILED",
                "secrets were taken out of it: it is not what ran; try committing without them, and a new run",
            )
        else:
            path = self.workspace.experiments / str(patch["path"])
            said = _git(self.checkout, "apply", "--whitespace=nowarn", str(path.resolve()))
            yield what, *(("FAILED", f"does not apply: {said}") if said is not None else ("ok", "applied"))

    def _new_files(self) -> Iterator[Found]:
        names = self.facts.code.get("untracked")
        names = [str(name) for name in names] if isinstance(names, list) else []
        ours = [name for name in names if name.endswith(".py") and name.split("/")[0] in capture.PACKAGES]
        if ours:
            yield (
                "new files",
                "FAILED",
                f"the record does not hold {', '.join(ours)}, which git did not know; try git add",
            )
        others = [name for name in names if name not in ours]
        more = self.facts.code.get("untracked_more")
        if others or more:
            named = ", ".join([*others, *([f"{more} more"] if more else [])])
            yield "new files", "warning", f"are not restored, as git did not know them: {named}"

    def _pins(self) -> Iterator[Found]:
        lock = self.facts.environment.get("lock")
        then = lock if isinstance(lock, dict) else {}
        path = self.checkout / LOCK_FILE.name
        if not isinstance(then.get("sha256"), str):
            yield "pins", "FAILED", "the record names no lock file; what was installed is not known"
            return
        if not path.is_file():
            yield "pins", "not checked", "there is no lock file without the commit"
            return
        text = path.read_text("utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != then["sha256"]:
            yield "pins", "FAILED", f"{path.name} of the commit is not the one of the run, which git does not have"
            return
        differed, differ = then.get("differing"), capture.differing(text)
        differed = differed if isinstance(differed, dict) else {}
        others = [
            f"{name} {differ.get(name, 'as locked')} now, {differed.get(name, 'as locked')} then"
            for name in sorted({*differ, *differed})
            if differ.get(name) != differed.get(name)
        ]
        commit = str(self.facts.code["commit"])[:12]
        remedy = f"git worktree add ../then {commit} && make -C ../then setup, and its .venv/bin/python -m aletheia.cli from here"
        yield (
            "pins",
            *(("FAILED", f"{'; '.join(others)}; try {remedy}") if others else ("ok", f"{path.name} as installed")),
        )

    def _machine(self) -> Iterator[Found]:
        if self.facts.stage != "data":
            import torch  # noqa: F401  to be asked for GPUs and threads
        then, now = self.facts.environment, capture.environment()
        if then.get("gpus") and not now.get("gpus"):
            yield (
                "machine",
                "FAILED",
                f"ran on {_listed(then['gpus'])}, and this machine shows no GPU; try one that has",
            )
            return
        if "threads" in then:
            now["threads"] = then["threads"]  # set so when it starts
        others = [
            f"{key} {_listed(then[key])} then, {_listed(now.get(key))} now"
            for key in MACHINE
            if key in then and then[key] != now.get(key)
        ]
        if others:
            yield "machine", "warning", f"{'; '.join(others)}: figures may differ in their last digits"
        else:
            yield "machine", "ok", f"{then.get('cpu')}{', ' + _listed(then['gpus']) if then.get('gpus') else ''}"

    def _configuration(self) -> Iterator[Found]:
        configuration = self.facts.configuration
        name = configuration.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield "configuration", "FAILED", "the record holds none that can be run"
            return
        self.changed["name"] = f"{name}{_SUFFIX}"
        if configuration.get("device") == "auto" and not self.facts.environment.get("gpus"):
            self.changed["device"] = "cpu"  # where it ran
        base = self.facts.lineage.base or {}
        if configuration.get("revision") != base.get("revision") and isinstance(base.get("revision"), str):
            self.changed["revision"] = base["revision"]
        yield "configuration", "ok", f"as resolved then, with {', '.join(f'{k}: {v}' for k, v in self.changed.items())}"

    def _rows(self, chain: Chain) -> Iterator[Found]:
        """From where they stood, or else from the commit."""
        needed: dict[str, list[str]] = {}
        for part in recorded_rows(self.facts):
            source = part.partition(".")[0]
            needed.setdefault(source if source in ("sft", "dpo") else "eval", []).append(part)
        for key, parts in needed.items():
            try:
                path = getattr(rows_config(self.facts).training_data, key)
            except UserError as error:
                yield f"rows of {key}", "FAILED", str(error)
                continue
            there = self._differ(chain, parts, self.workspace)
            if there is None:
                yield f"rows of {key}", "ok", path
            elif not Path(path).is_absolute() and self._differ(chain, parts, Workspace(self.checkout)) is None:
                self.changed[f"training_data.{key}"] = str(self.checkout / path)
                yield f"rows of {key}", "ok", f"{path} of the commit: {there}"
            else:
                yield f"rows of {key}", "FAILED", f"{there}; try git log -- {path}, or the copy that you keep"

    def _differ(self, chain: Chain, parts: list[str], at: Workspace) -> str | None:
        """How the rows differ from the record's; None when they are those."""
        then = recorded_rows(self.facts)
        rows = chain.rows if at == self.workspace else type(chain.rows)(at)
        for part in parts:
            try:
                now = rows.describe(rows_config(self.facts), part, chain.unfit)
            except UserError as error:
                return str(error)
            if now["sha256"] != then[part]["sha256"]:
                return f"{part} are others now, {now['rows']} rows, then {then[part].get('rows')}"
        return None

    def _inputs(self, chain: Chain) -> Iterator[Found]:
        for taken, (what, finding, why) in zip(self.facts.lineage.inputs, chain.inputs(self.facts), strict=True):
            failed = failures(checked(self.workspace, taken.id)) if finding == "ok" else []
            if failed:
                finding, why = "FAILED", f"{failed[0].what}: {failed[0].why}"
            yield what, *(("ok", why) if finding == "ok" else ("FAILED", f"{why}; try aletheia exp verify {taken.id}"))
        if not self.facts.lineage.inputs and self.facts.stage in ("merge", "eval"):
            yield "input", "FAILED", "the record names none"

    def _base(self, chain: Chain) -> Iterator[Found]:
        for what, finding, why in chain.base(self.facts):
            if finding == "FAILED" and what == "base tiny":
                yield what, "warning", "the commit's own code builds another than today's; compared after the run"
            elif finding == "not checked":
                yield what, "warning", f"{why}; compared after the run"
            else:
                yield what, finding, why


def _identity(code: dict[str, Any]) -> tuple[Any, Any]:
    patch = code.get("patch")
    return code.get("commit"), patch.get("sha256") if isinstance(patch, dict) else None


def _plain(name: str) -> str:
    """As the stem of a file."""
    return name if _NAME.fullmatch(name) else "profile"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _git(checkout: Path, *arguments: str) -> str | None:
    """None when it did what was asked, else what it said."""
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, env=_without_git(), capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"git: {error.strerror}"
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"


def _without_git() -> dict[str, str]:
    """The environment, without what would send git to another repository than the one it stands in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
