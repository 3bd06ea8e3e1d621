"""What a training does not use is not imported; what it does use is."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.workspace import Workspace

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from aletheia.cli import main
try:
    main()
finally:
    print(*(name for name in ("bitsandbytes", "datasets", "pandas") if sys.modules.get(name)), file=sys.stderr)
"""


def test_a_training_imports_what_it_uses_and_no_more(workspace: Workspace) -> None:
    settings = ("sft_config.epochs=0.1", "sft_config.warmup_ratio=0.0")
    words = ["sft", "--profile", "small", *(word for setting in settings for word in ("--set", setting))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"ALETHEIA_ROOT": str(workspace.root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].split() == []
