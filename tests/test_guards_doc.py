"""The table of planted faults names tests that exist, and every guard."""

import re
from typing import get_args

from pipeline.train.guards import Kind
from pipeline.workspace import CHECKOUT

TABLE = [line for line in (CHECKOUT / "docs" / "guards.md").read_text("utf-8").splitlines() if line.startswith("| ")][
    1:
]


def test_every_fault_names_a_test_that_exists() -> None:
    files = {path.stem: path.read_text("utf-8") for path in (CHECKOUT / "tests").rglob("test_*.py")}
    cells = [line.split("|")[4] for line in TABLE if line.count("|") == 5]
    named = [re.findall(r"`(\w+)::(\w+)`", cell) for cell in cells]
    assert TABLE and len(cells) == len(TABLE) and all(named)
    missing = [
        f"{file}::{test}" for tests in named for file, test in tests if f"\ndef {test}(" not in files.get(file, "")
    ]
    assert missing == []


def test_every_guard_stands_in_the_table() -> None:
    assert set(re.findall(r"guard `(\w+)`", "\n".join(TABLE))) == set(get_args(Kind))
