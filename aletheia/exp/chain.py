"""The chain of records from one down to the base: what each took from the next, its rows, its patches.

Everything here only reads. `verify` checks all of it; `reproduce` restores a run from it.
"""

import shutil
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config import Profile
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, MultipleChoice, PreferencePair, Question, Row, describe, row_hash
from pipeline.data.split import sample
from pipeline.errors import UserError
from pipeline.merging.shards import shards, size
from pipeline.progress import say
from pipeline.records import find, items
from pipeline.records.file import Reading, RecordFile
from pipeline.records.ids import ID
from pipeline.records.lifecycle import liveness
from pipeline.records.schema import Facts, Input
from pipeline.training_data import UNFIT, TrainingRows, read
from pipeline.workspace import Workspace

LARGE = 200_000_000  # bytes; hashing more than this takes seconds, and is shown
MAKES_A_MODEL = ("sft", "dpo", "merge")
# stage → the record's block of rows → the rows on disk: held-out rows are judged by eval, too
ROWS = {
    "sft": {"train": "sft.train", "held_out": "sft.held_out"},
    "dpo": {"train": "dpo.train", "held_out": "dpo.held_out"},
    "data": {p: p for p in ("sft.train", "sft.held_out", "dpo.train", "dpo.held_out", "questions", "choices")},
    "eval": {"conversations": "sft.held_out", "pairs": "dpo.held_out", "questions": "questions.sample"},
}
KINDS: dict[str, type[Row]] = {
    "sft": Conversation,
    "dpo": PreferencePair,
    "questions": Question,
    "choices": MultipleChoice,
}

Finding = Literal["ok", "FAILED", "warning", "not checked"]
Found = tuple[str, Finding, str]  # what was checked, what was found, why


class Chain:
    """The records from one down to the base, each read once and not written, and what each took from the next."""

    def __init__(self, workspace: Workspace, start: str) -> None:
        self.workspace, self.start = workspace, start
        self.rows = Rows(workspace)
        self.records: dict[str, Reading | UserError] = {}
        self._bases: dict[tuple[str, str | None], tuple[str | None, str]] = {}
        waiting = [start]
        for experiment_id in waiting:  # grows on the way
            if experiment_id not in self.records:
                self.records[experiment_id] = self._read(experiment_id)
                waiting += self.builds_on(experiment_id)

    @cached_property
    def unfit(self) -> set[str]:
        """Hashes of the rows that any stage of the chain found too long, or that its template did not take."""
        return set().union(*(unfit(self.workspace, i) for i in self.records))

    def inputs(self, facts: Facts) -> Iterator[Found]:
        """What was taken from each parent against what the parent made."""
        for taken in facts.lineage.inputs:
            parent = self.facts(taken.id)
            if parent is None:
                yield f"input {taken.id}", "not checked", "its record cannot be read"
                continue
            wrong = next(self._wrong_input(facts, taken, parent), None)
            yield f"input {taken.id}", "FAILED" if wrong else "ok", wrong or f"what that {parent.stage} made"

    def base(self, facts: Facts) -> Iterator[Found]:
        """The base's weights as they are now against those that were recorded."""
        base = facts.lineage.base
        if base is None:
            if facts.stage in MAKES_A_MODEL:
                yield "base", "not checked", "the record names none"
            return
        name, revision, recorded = base.get("name"), base.get("revision"), base.get("sha256")
        what = f"base {name}"
        if not isinstance(name, str) or not isinstance(revision, str | None):
            yield "base", "not checked", "the record does not name it in words"
        elif not isinstance(recorded, str):
            yield what, "not checked", "the record holds no hash of it"
        else:
            now, why = self._base_now(name, revision)
            if now is None:
                yield what, "not checked", why
            elif now == recorded:
                yield what, "ok", f"sha256 {now[:12]}"
            else:
                yield what, "FAILED", f"its weights in {why} are others now: {now[:12]}, then {recorded[:12]}"

    def facts(self, experiment_id: str) -> Facts | None:
        reading = self.records.get(experiment_id)
        return reading.facts if isinstance(reading, Reading) else None

    def builds_on(self, experiment_id: str) -> list[str]:
        facts = self.facts(experiment_id)
        return [taken.id for taken in facts.lineage.inputs] + facts.lineage.children if facts else []

    def _read(self, experiment_id: str) -> Reading | UserError:
        try:
            if not ID.fullmatch(experiment_id):
                raise UserError(f"{experiment_id!r} is no record's id")
            return find.named(self.workspace, experiment_id).read()
        except UserError as error:
            return error

    def _wrong_input(self, facts: Facts, taken: Input, parent: Facts) -> Iterator[str]:
        made = find.combined(parent.artifacts)
        if parent.status != "complete":
            yield f"is {liveness(parent)}, not complete"
        if parent.stage != taken.stage:
            yield f"is a {parent.stage} now, was a {taken.stage} then"
        if made != taken.sha256:
            yield f"what it made is not what was taken: {made[:12]}, taken {taken.sha256[:12]}"
        bases = [(f.lineage.base or {}).get("sha256") for f in (facts, parent)]
        if all(bases) and bases[0] != bases[1]:
            yield "stands on another base"
        contracts = [f.data.get("contract") for f in (facts, parent)]
        if all(contracts) and contracts[0] != contracts[1]:
            yield "has another chat contract"

    def _base_now(self, name: str, revision: str | None) -> tuple[str | None, str]:
        """The hash, and the folder or why there is none."""
        key = (name, revision)
        if key not in self._bases:
            folder = _base_folder(self.workspace, name, revision)
            self._bases[key] = (
                (None, "is neither a folder nor in the hub's local cache")
                if folder is None
                else _identity(name, folder)
            )
        return self._bases[key]


class Rows:
    """Rows on disk, described as records describe them; each file is read once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._read: dict[str, TrainingRows[Any] | list[Any]] = {}

    def describe(self, config: Profile, part: str, unfit: set[str]) -> dict[str, Any]:
        """`part`: sft.train, …, questions. `unfit`: hashes of rows that are not counted. Raises `UserError` where they
        cannot be read."""
        source, _, end = part.partition(".")
        paths = config.training_data
        key = f"{source} {config.eval_config.tasks} {paths.model_dump_json()}"
        if key not in self._read:
            self._read[key] = (
                read(self.workspace, config, KINDS[source], quiet=True)
                if source in ("sft", "dpo")
                else read_rows(self.workspace, f"{paths.eval}/{source}", KINDS[source])
            )
        rows = self._read[key]
        if isinstance(rows, TrainingRows):
            found = getattr(rows, end)
        else:
            found = sample(rows, config.eval_config.questions) if end == "sample" else rows
        return describe([row for row in found if row_hash(row) not in unfit])


def unfit(workspace: Workspace, experiment_id: str) -> set[str]:
    """Hashes of the rows that this record's stage found too long, or that its template did not take."""
    parts = items.rows(workspace.experiments / experiment_id)
    return {sha256 for part, found in parts.items() if part.endswith(UNFIT) for sha256 in found.values()}


def recorded_rows(facts: Facts) -> dict[str, dict[str, Any]]:
    """What a record says of the rows it used, by their part: sft.train, …, questions."""
    found = {}
    for path, part in ROWS.get(facts.stage, {}).items():
        block: Any = facts.data
        for key in path.split("."):
            block = block.get(key) if isinstance(block, dict) else None
        if isinstance(block, dict) and isinstance(block.get("sha256"), str):
            found[part] = block
    return found


def rows_config(facts: Facts) -> Profile:
    """What of its profile decides which rows it used. Raises `UserError` when it does not say so in today's words."""
    evaluation = facts.configuration.get("eval_config")
    tasks = evaluation.get("tasks", []) if isinstance(evaluation, dict) else []
    questions = evaluation.get("questions") if isinstance(evaluation, dict) else None
    values = {
        "name": "rows",
        "base_model": "none",
        "training_data": facts.configuration.get("training_data"),
        "eval_config": {"tasks": tasks, "questions": questions},
    }
    try:
        return Profile.model_validate(values)
    except ValidationError:
        raise UserError("its configuration names no training_data that this version reads") from None


def patches(workspace: Workspace, experiment_id: str, facts: Facts) -> Iterator[Found]:
    """The code's patch, and those of the parts of the run before it was resumed."""
    code: Any = facts.code
    home = workspace.experiments / experiment_id
    while isinstance(code, dict):
        patch = code.get("patch")
        if isinstance(patch, dict):
            path, recorded = workspace.experiments / str(patch.get("path")), str(patch.get("sha256"))
            wrong = not_plain(path, home) or differs(path, recorded, find.sha256)
            yield workspace.shown(path), "FAILED" if wrong else "ok", wrong or f"sha256 {recorded[:12]}"
        code = code.get("before_resume")


def not_plain(path: Path, home: Path) -> str | None:
    """Why a file that a record names is not to be read: it is outside `home`, behind a link, gone, or no plain file."""
    if not within(path, home):
        return f"is not in {home.parent.name}/{home.name}, and not read"
    try:
        inside = path
        while inside != home:
            if inside.is_symlink():
                return "is a symbolic link, and not followed" if inside == path else "lies behind a symbolic link"
            inside = inside.parent
        return None if stat.S_ISREG(path.lstat().st_mode) else "is no plain file"
    except (FileNotFoundError, NotADirectoryError):
        return "is gone"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"


def differs(path: Path, recorded: str, sha256: Callable[[Path], str]) -> str | None:
    """How a file is not the one that was recorded."""
    try:
        now = sha256(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if now == recorded else f"was changed since: sha256 {now[:12]} now, {recorded[:12]} then"


def within(path: Path, home: Path) -> bool:
    """Judged by its name alone; `not_plain` looks for links."""
    return path != home and path.is_relative_to(home) and ".." not in path.parts


def lower_half(file: RecordFile, reading: Reading) -> Found:
    """Whether the program's half is as it was written."""
    if reading.damage or reading.facts is None:
        return "record", "FAILED", str(reading.damage or "is a plan: nothing has run")
    if reading.edited:
        return "record", "FAILED", reading.edited
    if reading.pending:
        return "record", "warning", "the program's half waits beside the file; aletheia exp sync completes it"
    if _elsewhere(file).edited:
        return "record", "FAILED", "was edited below the line, and the copy beside it with it: the seal is broken"
    if not reading.sealed:
        return "record", "FAILED", "carries no seal: the program's half is not as it was written"
    return "record", "ok", "as the program wrote it"


def _elsewhere(file: RecordFile) -> Reading:
    """As another checkout reads it: by its seal alone, with no copy to vouch for it."""
    with TemporaryDirectory() as folder:
        return RecordFile(Path(shutil.copy(file.path, folder))).read()


def _base_folder(workspace: Workspace, name: str, revision: str | None) -> Path | None:
    """Where the base is on this machine; nothing is fetched."""
    if name == "tiny":
        from pipeline.tiny import tiny_base

        return tiny_base()
    local = workspace.path(name)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # not there, or no name that a hub could know
        return None


def _identity(name: str, folder: Path) -> tuple[str | None, str]:
    from pipeline.model import Base

    try:
        if not shards(folder):
            return None, f"{folder} holds no weights"
        if (bytes_of := size(folder)) >= LARGE:
            say(f"hashing the base {name}  {bytes_of / 1e9:.1f} GB")
        base = Base(name, None, folder, device="cpu", dtype=None, quantization="none", trust_remote_code=False)
        return base.identity()["sha256"], str(folder)
    except OSError as error:
        return None, f"{error.filename} cannot be read: {error.strerror}"
    except UserError as error:
        return None, str(error)
