"""What a stage does not use is not imported; what it does use is. One interpreter for three commands, one after another."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline.imports import left_out
from pipeline.workspace import Workspace

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from aletheia.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["aletheia", *words, "--profile", "small"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
    imported = [name for name in ("bitsandbytes", "datasets", "pandas") if sys.modules.get(name)]
    left_out = [name for name, module in sys.modules.items() if module is None]
    print(json.dumps([imported, left_out]), file=sys.stderr)
    for name in left_out:
        del sys.modules[name]  # the next one leaves out its own
"""
BRIEF = ("--set", "sft_config.epochs=0.1", "--set", "sft_config.warmup_ratio=0.0")
Modules = dict[str, tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def modules(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Modules:
    """What each command had imported at its end, and what it had left out."""
    own: Workspace = trained.copy_to(tmp_path_factory.mktemp("imports") / "root").workspace
    commands = {
        "sft, dry": ("sft", "--dry-run"),
        "merge, dry": ("merge", "--dry-run"),
        "sft": ("sft", *BRIEF),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps([*commands.values()])]
    environment = os.environ | {"ALETHEIA_ROOT": str(own.root)}
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    return dict(zip(commands, found, strict=True))


def test_a_training_imports_what_it_uses_and_no_more(modules: Modules) -> None:
    imported, left_out = modules["sft"]
    assert imported == [] and {"bitsandbytes", "datasets"} <= set(left_out)


def test_while_rows_are_read_nothing_is_left_out(modules: Modules) -> None:
    """Rows of the hub, and the evaluations that must not leak into them, are read with `datasets`."""
    _, left_out = modules["sft, dry"]
    assert not {"bitsandbytes", "datasets"} & set(left_out)


def test_a_merge_reads_quantised_layers_only_where_training_had_them(modules: Modules) -> None:
    assert "bitsandbytes" in modules["merge, dry"][1]


def test_a_library_left_out_for_a_while_can_be_imported_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there already stays; a failure within the block changes nothing."""
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with suppress(ZeroDivisionError), left_out("colorsys", "json"):
        with pytest.raises(ModuleNotFoundError, match="colorsys"):
            import_module("colorsys")
        assert import_module("json") is json
        raise ZeroDivisionError
    assert import_module("colorsys").rgb_to_hsv(0, 0, 0) == (0, 0, 0)
