"""What the tests share: a small workspace of its own, and one pipeline trained once for the whole run."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline.model import Base, find_base
from pipeline.profile import load_profile
from pipeline.records.file import RecordFile
from pipeline.stage import Job, run_stage
from pipeline.workspace import CHECKOUT, Workspace

SFT_ROWS_A_DOMAIN, PAIRS_A_DOMAIN = 3, 3
SMALL = """\
name: small
base_model: tiny
device: cpu
training_data:
  validation: {fraction: 0.34, strategy: stratified, seed: 1}
sft_config: {learning_rate: 2e-3, batch_size: 2, gradient_accumulation: 1, epochs: 2.0, max_length: 2048, save_steps: 4}
dpo_config: {learning_rate: 2e-4, batch_size: 2, gradient_accumulation: 1, epochs: 1.0, max_length: 2048, save_steps: 4}
eval_config: {max_tokens: 24}
"""


def make_workspace(root: Path) -> Workspace:
    """A root with the profile `small` and a few rows of each kind."""
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "small.yaml").write_text(SMALL)
    for kind, rows in (("sft", SFT_ROWS_A_DOMAIN), ("dpo", PAIRS_A_DOMAIN)):
        (root / "data" / kind).mkdir(parents=True)
        for path in sorted((CHECKOUT / "data" / kind).glob("*.jsonl")):
            lines = sorted(path.read_text("utf-8").splitlines(), key=len)[:rows]  # the shortest: fast
            (root / "data" / kind / path.name).write_text("\n".join(lines) + "\n", "utf-8")
    shutil.copytree(CHECKOUT / "data" / "eval", root / "data" / "eval")
    return Workspace(root)


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
