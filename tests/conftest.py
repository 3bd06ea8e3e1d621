"""What the tests share: a small workspace of its own, and one pipeline trained once for the whole run."""

import functools
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline import yamlio
from pipeline.chat import Encoded
from pipeline.model import Base, find_base
from pipeline.profile import load_profile
from pipeline.records.file import RecordFile
from pipeline.stage import Job, run_stage
from pipeline.workspace import CHECKOUT, Workspace
from tests.forked import Forked

# Before torch is imported: two test processes on two cores, where more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

SFT_ROWS_A_DOMAIN, PAIRS_A_DOMAIN, EVALUATION_ROWS_A_DOMAIN = 3, 3, 6
SMALL = """\
name: small
base_model: tiny
device: cpu
training_data:
  validation: {fraction: 0.34, strategy: stratified, seed: 1}
sft_config: {learning_rate: 2e-3, batch_size: 2, gradient_accumulation: 1, epochs: 2.0, max_length: 2048, save_steps: 4}
dpo_config: {learning_rate: 2e-4, batch_size: 2, gradient_accumulation: 1, epochs: 1.0, max_length: 2048, save_steps: 4}
eval_config: {max_tokens: 24}
telemetry: {curves: false, tensorboard: false}  # two seconds a training
"""


LONG = (
    *("test_reproduce", "test_training", "test_run", "test_gpu_bench", "test_serve", "test_lora", "test_receipt"),
    *("test_evaluate", "test_torchrun", "test_app", "test_demo", "test_parity_command", "test_killed", "test_curves"),
)
"""The files that take longest, half a minute to one and a half, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first: the two processes then end at about the same time."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def make_workspace(root: Path) -> Workspace:
    """A root with the profile `small` and a few rows of each kind."""
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "small.yaml").write_text(SMALL)
    for kind, rows in (("sft", SFT_ROWS_A_DOMAIN), ("dpo", PAIRS_A_DOMAIN)):
        (root / "data" / kind).mkdir(parents=True)
        for path in sorted((CHECKOUT / "data" / kind).glob("*.jsonl")):
            lines = sorted(path.read_text("utf-8").splitlines(), key=len)[:rows]  # the shortest: fast
            (root / "data" / kind / path.name).write_text("\n".join(lines) + "\n", "utf-8")
    shutil.copytree(CHECKOUT / "data" / "eval" / "tasks", root / "data" / "eval" / "tasks")
    for kind in ("questions", "choices"):
        (root / "data" / "eval" / kind).mkdir()
        for path in sorted((CHECKOUT / "data" / "eval" / kind).glob("*.jsonl")):
            lines = path.read_text("utf-8").splitlines()[:EVALUATION_ROWS_A_DOMAIN]
            (root / "data" / "eval" / kind / path.name).write_text("\n".join(lines) + "\n", "utf-8")
    return Workspace(root)


@pytest.fixture(scope="module", autouse=True)
def libraries_stay() -> None:
    """Each training begins with a collection (accelerate's), which would walk through all that was imported: 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def machine_described_once() -> None:
    """lm-eval asks a dozen programs, pip among them, what machine this is: for each model it asks anything, 1.4 s."""
    if "torch" in sys.modules:
        from torch.utils import collect_env

        if not hasattr(collect_env.get_pretty_env_info, "cache_info"):
            collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


@pytest.fixture(scope="session", autouse=True)
def model_card_compiled_once() -> None:
    """peft writes a model card with each adapter, and its template is compiled anew for each: 60 ms."""
    import jinja2

    compiled = jinja2.Environment.compile

    @functools.cache
    def once(environment: jinja2.Environment, source: str) -> Any:
        return compiled(environment, source)

    def compile_(self: jinja2.Environment, source: Any, *options: Any, **named: Any) -> Any:
        alike = self.shared and isinstance(source, str) and not options and not named  # of `jinja2.Template(source)`
        return once(self, source) if alike else compiled(self, source, *options, **named)

    jinja2.Environment.compile = compile_  # type: ignore[method-assign]


@pytest.fixture
def parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at a record parses it anew, a few texts dozens of times: most of the time that tests of records take."""
    load = yamlio.load

    @functools.lru_cache(maxsize=200)
    def outcome(text: str) -> bytes:
        try:
            return pickle.dumps((load(text), None))
        except yamlio.YamlError as error:
            return pickle.dumps((None, (error.what, error.line, error.column)))

    def again(text: str) -> yamlio.Document:
        document, mistake = pickle.loads(outcome(text))  # a new one each time: it may be changed
        if mistake is not None:
            raise yamlio.YamlError(*mistake)
        assert isinstance(document, yamlio.Document)
        return document

    monkeypatch.setattr(yamlio, "load", again)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "root")


@pytest.fixture
def job(workspace: Workspace) -> Callable[..., Job]:
    """`job("sft_config.epochs=1.0", source="EXP-…")`: what a stage is asked, in this test's workspace."""

    def make(*assignments: str, profile: str = "small", **options: Any) -> Job:
        return Job(workspace, load_profile(workspace, profile, list(assignments)), **options)

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The embedded base, built once on a new machine and cached."""
    workspace = make_workspace(tmp_path_factory.mktemp("base") / "root")
    return find_base(workspace, load_profile(workspace, "small"))


@dataclass(frozen=True)
class Trained:
    """One finished pipeline: its workspace and the ids of its records. Tests read it and must not write into it."""

    workspace: Workspace
    sft: str
    dpo: str
    merge: str

    def record(self, stage: str) -> RecordFile:
        return RecordFile(self.workspace.experiments / f"{getattr(self, stage)}.yaml")

    def output(self, stage: str) -> Path:
        return self.workspace.checkpoints / getattr(self, stage) / ("model" if stage == "merge" else "adapter")

    def job(self, *assignments: str, **options: Any) -> Job:
        return Job(self.workspace, load_profile(self.workspace, "small", list(assignments)), **options)

    def copy_to(self, root: Path) -> "Trained":
        shutil.copytree(self.workspace.root, root, symlinks=True)
        return replace(self, workspace=Workspace(root))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """sft, dpo and merge, run once for all test processes."""
    from pipeline.dpo import Dpo
    from pipeline.merge import Merge
    from pipeline.sft import Sft

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    root, ids = shared / "trained", shared / "trained.json"
    with FileLock(shared / "trained.lock"):
        if not ids.exists():
            workspace = make_workspace(root)
            found = {}
            for stage in (Sft, Dpo, Merge):
                found[stage.name] = run_stage(stage, Job(workspace, load_profile(workspace, "small"))).id
            ids.write_text(json.dumps(found))
    return Trained(Workspace(root), **json.loads(ids.read_text()))


def few_words(workspace: Workspace) -> None:
    """Puts rows of few words in place of the workspace's, none held out: a step then takes a fraction of a second."""
    profile = workspace.configs / "small.yaml"
    profile.write_text(profile.read_text().replace("fraction: 0.34", "fraction: 0.0"))

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    nouns = ["an index", "a lock", "a queue", "a cache", "a shard", "a pod", "a commit", "a trace"]
    asked = [[turn("user", f"What is {noun}?")] for noun in nouns]
    talks = [
        [*ask, turn("assistant", f"It is {noun}, {'and so on ' * i}no more.")]
        for i, (ask, noun) in enumerate(zip(asked, nouns, strict=True))
    ]
    talks += [talks[0] + talks[1], [turn("system", "Be brief."), *talks[2]]]
    sides = [
        [[turn("assistant", f"{word} {noun}.{' Indeed.' * i}")] for word in ("Use", "Never use")]
        for i, noun in enumerate(nouns[:6])
    ]
    pairs = enumerate(zip(asked, sides, strict=False))
    rows = {
        "sft": [{"id": f"talk-{i}", "messages": talk} for i, talk in enumerate(talks)],
        "dpo": [{"id": f"pair-{i}", "prompt": ask, "chosen": yes, "rejected": no} for i, (ask, (yes, no)) in pairs],
    }
    for kind, values in rows.items():
        shutil.rmtree(workspace.root / "data" / kind)
        (workspace.root / "data" / kind).mkdir()
        lines = [json.dumps(value) + "\n" for value in values]
        (workspace.root / "data" / kind / "few.jsonl").write_text("".join(lines), "utf-8")
    for path in (workspace.root / "data" / "eval").glob("*/*.jsonl"):  # each is looked for in the training rows
        path.write_text(path.read_text("utf-8").splitlines(keepends=True)[0], "utf-8")


@pytest.fixture
def small_talk(workspace: Workspace) -> Workspace:
    """This test's workspace, with rows of few words."""
    few_words(workspace)
    return workspace


@pytest.fixture
def trained_copy(trained: Trained, tmp_path: Path) -> Trained:
    """The finished pipeline as this test's own, to alter and to run more stages in, with rows of few words."""
    copy = trained.copy_to(tmp_path / "copy")
    few_words(copy.workspace)
    return copy


@pytest.fixture
def forked(workspace: Workspace, tmp_path: Path) -> Iterator[Callable[..., Forked]]:
    """`forked("sft", "--profile", "small")`: the command in a process that need not import what it uses."""
    started: list[Forked] = []

    def start(*arguments: str) -> Forked:
        environment = os.environ | {"ALETHEIA_ROOT": str(workspace.root)}
        started.append(Forked(tmp_path / f"said-{len(started)}", *arguments, environment=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _heed_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def command(workspace: Workspace) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`command("sft", "--profile", "small")`: the command as a person starts it, in this test's workspace."""
    started = []

    def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "aletheia.cli", *arguments],
            cwd=CHECKOUT,
            env=os.environ | {"ALETHEIA_ROOT": str(workspace.root)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_ctrl_c,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def answer_losses() -> Callable[[Any, Encoded], list[float]]:
    """−log p of every trained token, nats: one sequence, no padding, no code of the pipeline's."""
    import torch

    def losses(model: Any, encoded: Encoded) -> list[float]:
        with torch.inference_mode():
            logits = model.eval()(input_ids=torch.tensor([encoded.ids])).logits[0].double()
        places = [place for place, trained in enumerate(encoded.mask) if trained]
        scores = torch.log_softmax(logits, -1)
        return [-scores[place - 1, encoded.ids[place]].item() for place in places]

    return losses


@dataclass(frozen=True)
class Said:
    """How one call of the command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def aletheia(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`aletheia(workspace, "exp", "list")`: the `aletheia` command, in this process, on that workspace."""
    from aletheia.cli import main

    def run(workspace: Workspace, *arguments: str) -> Said:
        monkeypatch.setenv("ALETHEIA_ROOT", str(workspace.root))
        monkeypatch.setattr("sys.argv", ["aletheia", *arguments])
        monkeypatch.setattr("pipeline.imports.leave_out_unused", lambda base: None)  # this process does not end with it
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capfd.readouterr()
        return Said(int(ending.value.code or 0), out, err)

    return run


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Trained:
    """The finished pipeline in a workspace of this test's own, which it may write into."""
    return trained.copy_to(tmp_path / "copied")
