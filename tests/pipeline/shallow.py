"""A base of half the layers, and a workspace of few words on it: for what does not depend on a model's depth.

A step over few words is mostly the calls of the model's layers: half as many of them, half the time.
"""

import shutil
from pathlib import Path

from pipeline.model import Base
from pipeline.workspace import Workspace
from tests.conftest import few_words, make_workspace

LAYERS = 2  # of one there would be no norms by layer to tell apart


def shallow_base(base: Base, folder: Path) -> Path:
    """Writes the first layers of the base, and all else that is in its folder."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base.folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    return folder


def on_shallow(workspace: Workspace, shallow: Path) -> Workspace:
    """Puts rows of few words into the workspace, a pair of them to evaluate on, and that base into its profile."""
    few_words(workspace)
    for kind in ("questions", "choices"):  # one row of each is left: all are looked for in every row
        for path in sorted((workspace.root / "data" / "eval" / kind).glob("*.jsonl"))[1:]:
            path.unlink()
    profile = workspace.configs / "small.yaml"
    text = profile.read_text()
    assert "base_model: tiny\n" in text
    profile.write_text(text.replace("base_model: tiny\n", f"base_model: {shallow}\n"))
    return workspace


def make_shallow_talk(root: Path, shallow: Path) -> Workspace:
    return on_shallow(make_workspace(root), shallow)
