"""A record runs again with the code, pins, rows and configuration of then; what cannot be restored is refused, all at once.

The quickest stage, `data`, stands for the others where it can; one real SFT shows that a training repeats bit for bit.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aletheia.cli import main
from aletheia.exp import restore
from aletheia.exp.reproduce import Compared, closing, compare, reproduce
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base
from pipeline.profile import load_profile
from pipeline.records import capture, find
from pipeline.records.file import RecordFile
from pipeline.records.schema import Artifact, Facts, Input
from pipeline.snapshot import Snapshot
from pipeline.stage import Job, run_stage
from pipeline.workspace import CHECKOUT, Workspace
from tests.forked import Forked

PACKAGES = ("aletheia", "eval", "pipeline", "serving")
NO_GIT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
PROFILE = """\
name: small
base_model: tiny
device: cpu
training_data: {validation: {fraction: 0.34, strategy: random, seed: 1}}
sft_config: {learning_rate: 2e-3, batch_size: 2, gradient_accumulation: 1, epochs: 1.0, max_length: 2048}
telemetry: {curves: false, tensorboard: false}  # two seconds a training
"""


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(root: Path) -> None:
    """A profile and a few rows of each kind, of few words."""
    words = ("a lock", "a shard", "a queue", "a pod", "an index", "a commit")
    talks = [[turn("user", f"What is {word}?"), turn("assistant", f"It is {word}.")] for word in words]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"id": f"talk-{i}", "messages": talk} for i, talk in enumerate(talks)],
        "dpo": [
            {"id": f"pair-{i}", "prompt": [ask], "chosen": [answer], "rejected": [turn("assistant", "No.")]}
            for i, (ask, answer) in enumerate(talks)
        ],
        "eval/questions": [{"id": "q", "prompt": "Why do pods restart?", "key_points": ["containers"]}],
        "eval/choices": [{"id": "c", "question": "Which?", "choices": ["this", "that"], "answer": 0}],
    }
    for kind, values in rows.items():
        (root / "data" / kind).mkdir(parents=True)
        (root / "data" / kind / "few.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (root / "configs").mkdir()
    (root / "configs" / "small.yaml").write_text(PROFILE)


def git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, env=NO_GIT, check=True, capture_output=True, text=True).stdout


def command_at(checkout: Path) -> None:
    """The command, with that checkout for its own and a temporary folder beside it."""
    for module in (capture, restore):
        module.CHECKOUT = checkout  # type: ignore[attr-defined]
    tempfile.tempdir = str(checkout.with_name("temporary"))
    os.chdir(checkout)
    main()


def start_at(checkout: Path, workspace: Workspace, *arguments: str) -> Forked:
    """Only what it starts in turn is an interpreter of its own, and that is what must run the code of then."""
    said = Path(tempfile.mkdtemp(dir=checkout.parent)) / "said"
    environment = NO_GIT | {"ALETHEIA_ROOT": str(workspace.root)}
    return Forked(said, *arguments, environment=environment, main=partial(command_at, checkout))


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This code as it stands, in a repository of its own, with the rows."""
    root = tmp_path_factory.mktemp("committed") / "checkout"
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.lock", ".gitignore"):
        shutil.copy(CHECKOUT / name, root / name)
    write_rows(root)
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "then"]):
        git(root, *arguments)
    return root


def snapshot(workspace: Workspace) -> str:
    """The id of a new record of the stage `data`; without a base no tokens are counted, which takes longest."""
    return run_stage(Snapshot, Job(workspace, load_profile(workspace, "small", ["base_model=./none"]))).id


@dataclass(frozen=True)
class Place:
    """A workspace, the checkout that its runs take for theirs, and what a test does there."""

    workspace: Workspace
    checkout: Path
    capsys: pytest.CaptureFixture[str]

    def snapshot(self) -> str:
        return snapshot(self.workspace)

    def facts(self, record: str) -> Facts:
        facts = RecordFile(self.workspace.experiments / f"{record}.yaml").facts()
        assert facts is not None
        return facts

    def rewrite(self, record: str, change: Callable[[Facts], Any]) -> None:
        facts = self.facts(record)
        change(facts)
        RecordFile(self.workspace.experiments / f"{record}.yaml").write(facts)

    def missing(self, record: str) -> dict[str, str]:
        """What a dry run says cannot be restored. Nothing may come of it."""
        before = sorted(self.workspace.root.rglob("*"))
        self.capsys.readouterr()
        possible = reproduce(self.workspace, record, dry_run=True, as_json=True)
        said = json.loads(self.capsys.readouterr().out)
        assert said["can_be_restored"] is possible
        assert sorted(self.workspace.root.rglob("*")) == before
        return {check["what"]: check["why"] for check in said["checks"] if check["finding"] == "FAILED"}

    def again(self, record: str) -> tuple[bool, str]:
        """Runs it again: the outcome, and what stands on stdout."""
        self.capsys.readouterr()
        return reproduce(self.workspace, record, dry_run=False, as_json=False), self.capsys.readouterr().out


@pytest.fixture(scope="module")
def cloned(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs take for their checkout, with a folder for temporary ones beside it."""
    checkout = tmp_path_factory.mktemp("cloned") / "checkout"
    checkout.with_name("temporary").mkdir()
    git(committed, "clone", "-q", str(committed), str(checkout))
    return checkout


@contextmanager
def running_from(checkout: Path) -> Iterator[None]:
    """What runs here takes that checkout for its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            patch.delenv(name)
        for module in (capture, restore):
            patch.setattr(module, "CHECKOUT", checkout)
        yield


@pytest.fixture(scope="module")
def recorded(cloned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with one record that can be run again, and its id."""
    root = tmp_path_factory.mktemp("recorded") / "root"
    write_rows(root)
    with running_from(cloned):
        return root, snapshot(Workspace(root))


@pytest.fixture
def then(
    committed: Path, cloned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Place]:
    """A workspace of this test's own; afterwards no worktree is left, nor a folder of one, and the clone is as before."""
    root, temporary = tmp_path / "root", cloned.with_name("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    write_rows(root)
    with running_from(cloned):
        yield Place(Workspace(root), cloned, capsys)
    assert git(cloned, "worktree", "list").count("\n") == 1
    assert not list(temporary.glob("aletheia-*"))  # torch may leave a cache of its own
    git(cloned, "reset", "-q", "--hard", git(committed, "rev-parse", "HEAD").strip())
    assert git(cloned, "status", "--porcelain") == ""


@pytest.fixture
def record(then: Place, recorded: tuple[Path, str]) -> str:
    """A record that can be run again: each test takes one thing away."""
    root, made = recorded
    shutil.copytree(root, then.workspace.root, dirs_exist_ok=True)
    return made


def test_nothing_is_missing_where_all_is_as_it_was(then: Place, record: str) -> None:
    assert then.missing(record) == {}


@pytest.mark.parametrize("commit", ["f" * 40, None, "--upload-pack=touch x", "HEAD", 7])
def test_a_commit_that_is_not_there_is_missing(then: Place, record: str, commit: Any) -> None:
    then.rewrite(record, lambda facts: facts.code.update(commit=commit))
    assert list(then.missing(record)) == ["commit"]


@pytest.mark.parametrize("fault", ["is gone", "was changed", "secrets", "does not apply"])
def test_a_patch_that_is_not_what_ran_is_missing(then: Place, fault: str) -> None:
    secret = "pass" + "word = 'hunter22'"
    (then.checkout / "pipeline" / "errors.py").write_text(f"{secret if fault == 'secrets' else 'x = 1'}\n")
    record = then.snapshot()
    patch = then.workspace.experiments / record / "code.patch"
    if fault == "is gone":
        patch.unlink()
    elif fault == "was changed":
        patch.write_bytes(patch.read_bytes() + b"\n")
    elif fault == "does not apply":
        git(then.checkout, "commit", "-q", "-a", "-m", "now")
        now = git(then.checkout, "rev-parse", "HEAD").strip()
        then.rewrite(record, lambda facts: facts.code.update(commit=now))
    missing = then.missing(record)
    assert list(missing) == [f"experiments/{record}/code.patch"]
    assert fault in missing[f"experiments/{record}/code.patch"]


def test_code_of_which_git_could_not_tell_the_changes_is_missing(then: Place, record: str) -> None:
    then.rewrite(record, lambda facts: facts.code.update(dirty=None))
    assert list(then.missing(record)) == ["patch"]


def test_new_code_that_an_older_record_only_names_is_missing_and_other_new_files_are_not(
    then: Place, record: str
) -> None:
    then.rewrite(record, lambda facts: facts.code.update(untracked=["notes/a.py", "note.txt"]))
    assert then.missing(record) == {}
    then.rewrite(record, lambda facts: facts.code.update(untracked=["pipeline/new.py", "note.txt"]))
    missing = then.missing(record)
    assert list(missing) == ["new files"]
    assert "pipeline/new.py" in missing["new files"]
    assert "note.txt" not in missing["new files"]


def test_a_run_resumed_with_other_code_is_refused(then: Place, record: str) -> None:
    commit = then.facts(record).code["commit"]
    then.rewrite(record, lambda facts: facts.code.update(before_resume={"commit": commit}))
    assert then.missing(record) == {}
    then.rewrite(record, lambda facts: facts.code.update(before_resume={"commit": "1" * 40}))
    assert list(then.missing(record)) == ["resume"]


@pytest.mark.parametrize("lock", [None, {}, {"sha256": "0" * 64, "differing": {}}])
def test_a_lock_file_that_git_does_not_have_is_missing(then: Place, record: str, lock: Any) -> None:
    then.rewrite(record, lambda facts: facts.environment.update(lock=lock))
    assert list(then.missing(record)) == ["pins"]


def test_packages_installed_otherwise_than_then_are_named(then: Place, record: str) -> None:
    differed = {"torch": "1.0 installed, 2.0 locked"}
    then.rewrite(record, lambda facts: facts.environment["lock"].update(differing=differed))
    assert "torch as locked now, 1.0 installed, 2.0 locked then" in then.missing(record)["pins"]


def test_rows_that_are_neither_on_the_disk_nor_in_the_commit_are_missing(then: Place) -> None:
    rows = then.workspace.root / "data" / "sft" / "few.jsonl"
    more = {"id": "more", "messages": [turn("user", "Who?"), turn("assistant", "They.")]}
    rows.write_text(rows.read_text() + json.dumps(more) + "\n")
    record = then.snapshot()
    rows.unlink()
    missing = then.missing(record)
    assert list(missing) == ["rows of sft"]
    assert "data/sft" in missing["rows of sft"]


def test_a_gpu_that_this_machine_does_not_have_is_missing(
    then: Place, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    then.rewrite(record, lambda facts: facts.environment.update(gpus=["H200"]))
    assert "H200" in then.missing(record)["machine"]


def test_a_record_edited_below_the_line_is_refused(then: Place, record: str) -> None:
    path = then.workspace.experiments / f"{record}.yaml"
    path.write_bytes(path.read_bytes().replace(b"rows: 4", b"rows: 5"))
    assert list(then.missing(record)) == ["record"]


@pytest.mark.parametrize("name", ["../../x", "", None, "x" * 300])
def test_a_configuration_that_cannot_be_run_is_refused(then: Place, record: str, name: Any) -> None:
    then.rewrite(record, lambda facts: facts.configuration.update(name=name))
    assert list(then.missing(record)) == ["configuration"]


def test_a_parents_output_and_a_base_that_were_changed_are_missing(then: Place, record: str) -> None:
    workspace, parent = then.workspace, then.snapshot()
    folder, base = workspace.checkpoints / parent / "adapter", workspace.root / "base"
    for path in (folder / "a.bin", base / "config.json", base / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    identity = Base("base", None, base, "cpu", None, "none", False).identity()

    def as_sft(facts: Facts) -> None:
        facts.stage, facts.data, facts.results = "sft", {}, {}
        facts.artifacts, facts.lineage.base = find.artifacts(workspace, folder), identity

    then.rewrite(parent, as_sft)
    file = RecordFile(workspace.experiments / f"{parent}.yaml")
    taken = find.checked_output(workspace, file, then.facts(parent), "adapter")[1]

    def as_merge(facts: Facts) -> None:
        facts.stage, facts.data, facts.results = "merge", {}, {}
        facts.lineage.inputs, facts.lineage.base = [taken], identity

    then.rewrite(record, as_merge)
    assert then.missing(record) == {}
    (base / "config.json").write_text("{ }")
    (folder / "a.bin").write_text("now")
    missing = then.missing(record)
    assert list(missing) == [f"input {parent}", "base base"]
    assert "a.bin: was changed" in missing[f"input {parent}"]


def test_all_that_is_missing_is_said_at_once_with_what_to_do_and_nothing_runs(then: Place, record: str) -> None:
    then.rewrite(record, lambda facts: facts.code.update(commit="f" * 40))
    then.rewrite(record, lambda facts: facts.environment.update(lock=None))
    shutil.rmtree(then.workspace.root / "data" / "dpo")
    reproduced, out = then.again(record)
    assert not reproduced
    assert [line.split("FAILED")[1].split()[0] for line in out.splitlines() if "FAILED" in line] == [
        "commit",
        "pins",
        "rows",
    ]
    assert "try git fetch" in out
    assert "try git log -- data/dpo" in out
    assert out.splitlines()[-1].startswith(f"{record} cannot be reproduced here: 3 of ")
    assert len(list(then.workspace.experiments.glob("EXP-*.yaml"))) == 1


@pytest.mark.parametrize(("stage", "status"), [("serve", "complete"), ("sft", "failed"), ("pipeline", "complete")])
def test_a_record_without_figures_to_come_back_to_is_refused(then: Place, record: str, stage: str, status: Any) -> None:
    def change(facts: Facts) -> None:
        facts.stage, facts.status = stage, status

    then.rewrite(record, change)
    with pytest.raises(UserError, match=record):
        reproduce(then.workspace, record, dry_run=True, as_json=False)


def test_the_command_ends_with_1_where_something_is_missing(
    then: Place, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    then.rewrite(record, lambda facts: facts.environment.update(lock=None))
    then.capsys.readouterr()
    monkeypatch.setenv("ALETHEIA_ROOT", str(then.workspace.root))
    monkeypatch.setattr("sys.argv", ["aletheia", "exp", "reproduce", record, "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 1
    assert json.loads(then.capsys.readouterr().out)["why"].startswith(f"{record} cannot be reproduced here")


def test_rows_that_changed_on_the_disk_come_from_the_commit(then: Place, record: str) -> None:
    rows = then.workspace.root / "data" / "sft" / "few.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(True)[1:]))
    reproduced, out = then.again(record)
    assert reproduced
    assert "data/sft of the commit: sft.train are others now, 3 rows, then 4" in out
    assert then.facts(f"{record[:-1]}2").data == then.facts(record).data


def test_a_pipeline_runs_again_stage_by_stage_and_a_server_does_not(then: Place) -> None:
    pipeline, stage, server = (then.snapshot() for _ in range(3))
    then.rewrite(server, lambda facts: setattr(facts, "stage", "serve"))

    def change(facts: Facts) -> None:
        facts.stage, facts.lineage.children = "pipeline", [stage, server]

    then.rewrite(pipeline, change)
    then.capsys.readouterr()
    assert reproduce(then.workspace, pipeline, dry_run=False, as_json=True)
    captured = then.capsys.readouterr()
    assert [(run["id"], run["exactly"]) for run in json.loads(captured.out)["runs"]] == [(stage, True)]
    assert f"serve {server} (complete) is not run again" in captured.err


def test_a_figure_that_does_not_come_out_again_is_named(then: Place, record: str) -> None:
    then.rewrite(record, lambda facts: facts.results.update(rows=77))
    reproduced, out = then.again(record)
    assert not reproduced
    assert out.splitlines()[-1].startswith(f"{record} was NOT reproduced by {record[:-1]}2: 1 of ")
    assert out.splitlines()[-1].endswith("first rows 77, now 14")


def test_a_run_again_that_fails_says_so(then: Place, record: str) -> None:
    then.rewrite(record, lambda facts: facts.configuration.update(no_such_key=1))
    with pytest.raises(StageFailed, match="ended with exit code 2"):
        then.again(record)


def test_an_interrupt_ends_the_run_and_leaves_no_worktree_behind(then: Place) -> None:
    with (then.checkout / "pipeline" / "snapshot.py").open("a") as out:
        out.write("\nimport time\n\nSnapshot.run = lambda *_: time.sleep(60)\n")
    record = then.snapshot()
    process = start_at(then.checkout, then.workspace, "exp", "reproduce", record)
    path = then.workspace.experiments / f"{record[:-1]}2.yaml"
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted by SIGINT"
    assert then.facts(path.stem).status == "cancelled"
    assert RecordFile(path).person()["description"] == f"Reproduction of {record}"


@dataclass(frozen=True)
class Training:
    """A real SFT in a tree that was dirty in every way, and whose code has moved on since."""

    workspace: Workspace
    checkout: Path
    record: str

    def records(self) -> set[Path]:
        return set(self.workspace.experiments.glob("EXP-*.yaml"))


@pytest.fixture(scope="module")
def trained_once(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("training")
    checkout, root = folder / "checkout", folder / "root"
    (folder / "temporary").mkdir()
    write_rows(root)
    git(committed, "clone", "-q", str(committed), str(checkout))
    with (checkout / "pipeline" / "sft.py").open("a") as out:
        out.write("\nimport pipeline.planted  # noqa\n")
    (checkout / "pipeline" / "planted.py").write_text("import sys\n\nprint('the code of then', file=sys.stderr)\n")
    (checkout / "note.txt").write_text("for myself\n")
    process = start_at(checkout, Workspace(root), "sft", "--profile", "small")
    out_text, err = process.communicate()
    assert process.returncode == 0, err
    for name in ("pipeline/planted.py", "note.txt"):
        (checkout / name).unlink()
    git(checkout, "checkout", "-q", "--", ".")
    (checkout / "pipeline" / "train" / "training.py").write_text("raise RuntimeError('not the code of then')\n")
    git(checkout, "commit", "-q", "-a", "-m", "now")
    return Training(Workspace(root), checkout, Path(out_text.strip()).stem)


@pytest.fixture
def training(trained_once: Training) -> Iterator[Training]:
    """Afterwards the record, what lies beside it, its output and its link are as they were."""
    workspace = trained_once.workspace
    ours = [workspace.experiments / f"{trained_once.record}.yaml"]
    for folder in (workspace.experiments, workspace.checkpoints):
        ours += [path for path in (folder / trained_once.record).rglob("*") if path.is_file()]
    before, link = {path: path.read_bytes() for path in ours}, workspace.checkpoints / "small-sft"
    target = os.readlink(link)
    yield trained_once
    assert {path: path.read_bytes() for path in before} == before
    assert os.readlink(link) == target
    assert git(trained_once.checkout, "worktree", "list").count("\n") == 1


def test_a_training_comes_out_bit_for_bit_from_the_code_of_then(training: Training) -> None:
    known = training.records()
    process = start_at(training.checkout, training.workspace, "exp", "reproduce", training.record)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "the code of then" in err.splitlines()
    (path,) = training.records() - known
    new = RecordFile(path)
    assert f"{training.record} was reproduced exactly by {new.id}" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith("7 of 7 files are the same bit for bit")
    assert "are not restored, as git did not know them: note.txt" in out
    old, again = (RecordFile(training.workspace.experiments / f"{i}.yaml").facts() for i in (training.record, new.id))
    assert old is not None and again is not None
    assert again.code["commit"] == old.code["commit"] != git(training.checkout, "rev-parse", "HEAD").strip()
    assert again.code["patch"]["sha256"] == old.code["patch"]["sha256"]
    assert again.results["eval_loss"] == old.results["eval_loss"]
    assert again.results["training"]["train_loss"] == old.results["training"]["train_loss"]
    person = new.person()
    assert person["description"] == f"Reproduction of {training.record}"
    assert (person["related"], person["tags"]) == ([training.record], ["reproduction"])
    taken, _ = find.source(training.workspace, "small", ["sft"], None)
    assert taken.id == training.record  # a later stage takes the original, not its reproduction


def facts(results: dict[str, Any], **more: Any) -> Facts:
    return Facts(**{"status": "complete", "stage": "sft", "profile": "small", "results": results} | more)


def figure(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "ci_low": value - half, "ci_high": value + half, "n": 9}


def findings(then: Facts, now: Facts, *changed: str) -> dict[str, str]:
    return {c.what: c.finding for c in compare(then, now, changed)}


@pytest.mark.parametrize(
    ("then", "now", "finding"),
    [
        (5.4, 5.4, "equal"),
        (5.400001, 5.400002, "within"),
        (5.4, 5.45, "within"),
        (5.4, 5.5, "DIFFERENT"),
        (54, 55, "DIFFERENT"),
        (1e-7, 3e-6, "within"),
        (figure(5.0, 0.1), figure(5.09, 0.1), "within"),
        (figure(5.0, 0.1), figure(5.2, 0.1), "DIFFERENT"),
        (figure(5.0, 1.0), figure(5.2, 0.1), "DIFFERENT"),
        (5.4, None, "DIFFERENT"),
        (None, 5.4, "DIFFERENT"),
    ],
)
def test_a_figure_is_equal_or_within_its_interval_or_different(then: Any, now: Any, finding: str) -> None:
    sides = [facts({} if value is None else {"loss": value}) for value in (then, now)]
    assert findings(*sides)["loss"] == finding


def test_a_difference_in_later_digits_is_shown_with_them() -> None:
    found = [c for c in compare(facts({"loss": 5.400001}), facts({"loss": 5.400002})) if c.what == "loss"]
    assert found == [Compared("loss", "5.400001", "5.400002", "within")]


@pytest.mark.parametrize("name", ["seconds", "tokens_per_second", "peak_memory_gb", "first_token_ms"])
def test_time_and_memory_are_not_compared(name: str) -> None:
    assert (
        findings(facts({"training": {name: 3.0}}), facts({"training": {name: 9.0}}))[f"training.{name}"]
        == "not compared"
    )


def test_what_the_runs_stood_on_is_compared_too() -> None:
    def side(letter: str) -> Facts:
        base = {"name": "tiny", "sha256": letter}
        rows = {"train": {"rows": 1, "sha256": letter}}
        return facts(
            {},
            lineage={"base": base},
            data=rows,
            configuration={"seed": letter, "name": letter},
            code={"commit": letter},
        )

    assert findings(side("a"), side("b"), "name") == {
        "code": "DIFFERENT",
        "configuration seed": "DIFFERENT",
        "rows sft.train": "DIFFERENT",
        "base": "DIFFERENT",
    }
    assert set(findings(side("a"), side("a")).values()) == {"equal"}


def test_files_are_compared_bit_for_bit_by_their_place_in_the_output() -> None:
    def side(number: int, **files: str) -> Facts:
        named = [Artifact(path=f"checkpoints/EXP-{number}/adapter/{n}", sha256=s, bytes=1) for n, s in files.items()]
        return facts({}, artifacts=named)

    found = findings(side(1, a="1", b="1", c="1"), side(2, a="1", b="2"))
    del found["code"]
    assert found == {"file adapter/a": "equal", "file adapter/b": "other bytes", "file adapter/c": "DIFFERENT"}


@pytest.mark.parametrize(
    ("loss", "digest", "sentence"),
    [
        (5.4, "1", "exactly by B: 2 of 2 equal; 1 of 1 files are the same bit for bit"),
        (5.4, "2", "in every figure by B: 2 of 2 equal; 0 of 1 files are the same bit for bit, not adapter/a"),
        (5.41, "2", "by B: 1 of 2 equal, 1 not exactly but within their interval or 1%; 0 of 1 files are"),
        (6.0, "1", "by B: 1 of 4 are different, first loss 5.4, now 6"),
    ],
)  # fmt: skip
def test_the_closing_sentence_says_exactly_only_of_what_is_the_same_to_the_last_bit(
    loss: float, digest: str, sentence: str
) -> None:
    def side(loss: float, digest: str) -> Facts:
        artifact = Artifact(path="checkpoints/EXP/adapter/a", sha256=digest, bytes=1)
        return facts({"loss": loss, "seconds": loss}, artifacts=[artifact])

    said = closing("A", "B", list(compare(side(5.4, "1"), side(loss, digest))))
    assert said.startswith(f"A was {'NOT ' if loss == 6.0 else ''}reproduced {sentence}")


@pytest.mark.parametrize(
    ("stage", "data", "results", "inputs", "expected"),
    [
        ("data", {}, {}, [], ["data", "snapshot"]),
        ("sft", {}, {}, [], ["sft"]),
        ("dpo", {}, {}, [], ["dpo", "--from", "base"]),
        ("dpo", {}, {}, ["EXP-2026-01-01-001"], ["dpo", "--from", "EXP-2026-01-01-001"]),
        ("merge", {}, {}, ["EXP-2026-01-01-001"], ["merge", "--from", "EXP-2026-01-01-001"]),
        ("eval", {"pairs": {}}, {}, ["EXP-2026-01-01-001"], ["eval", "heldout", "--from", "EXP-2026-01-01-001"]),
        (
            "eval",
            {"questions": {}},
            {"benchmarks": {}},
            ["EXP-2026-01-01-001"],
            ["eval", "benchmarks", "winrate", "--from", "EXP-2026-01-01-001"],
        ),
    ],
)
def test_the_command_names_the_inputs_and_parts_that_the_record_had(
    place: Workspace, stage: str, data: Any, results: Any, inputs: list[str], expected: list[str]
) -> None:
    taken = [Input(id=i, stage="sft", path="", sha256="") for i in inputs]
    record = facts(results, stage=stage, data=data, lineage={"inputs": [t.model_dump() for t in taken]})
    run = restore.Restored(place, RecordFile(place.experiments / "EXP-2026-01-01-009.yaml"), record, place.root)
    assert run._stage() == expected
