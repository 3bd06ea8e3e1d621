"""What a stage does not use is not imported; what it does use is."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.workspace import Workspace

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from aletheia.cli import main
try:
    main()
finally:
    print(*(name for name in ("bitsandbytes", "datasets", "pandas") if sys.modules.get(name)), file=sys.stderr)
    print(*(name for name, module in sys.modules.items() if module is None), file=sys.stderr)
"""


def run(workspace: Workspace, stage: str, *words: str) -> tuple[list[str], list[str]]:
    """What the stage's command had imported at its end, and what it had left out."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, stage, "--profile", "small", *words],
        cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"ALETHEIA_ROOT": str(workspace.root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported, left_out = (line.split() for line in done.stderr.splitlines()[-2:])
    return imported, left_out


def test_a_training_imports_what_it_uses_and_no_more(workspace: Workspace) -> None:
    settings = ("sft_config.epochs=0.1", "sft_config.warmup_ratio=0.0")
    imported, left_out = run(workspace, "sft", *(word for setting in settings for word in ("--set", setting)))
    assert imported == [] and {"bitsandbytes", "datasets"} <= set(left_out)


def test_while_rows_are_read_nothing_is_left_out(workspace: Workspace) -> None:
    """Rows of the hub, and the evaluations that must not leak into them, are read with `datasets`."""
    _, left_out = run(workspace, "sft", "--dry-run")
    assert not {"bitsandbytes", "datasets"} & set(left_out)


def test_a_merge_reads_quantised_layers_only_where_training_had_them(trained: Any) -> None:
    assert "bitsandbytes" in run(trained.workspace, "merge", "--dry-run")[1]
