"""The table of planted faults names tests that exist, and every guard."""

import re
from typing import get_args

from pipeline.guards import Kind
from pipeline.workspace import CHECKOUT

TABLE = [line for line in (CHECKOUT / "docs" / "guards.md").read_text("utf-8").splitlines() if line.startswith("| ")][
    1:
]


def test_every_fault_names_a_test_that_exists() -> None:
    files = {path.stem: path.read_text("utf-8") for path in (CHECKOUT / "tests").rglob("test_*.py")}
    named = [re.fullmatch(r"\| [^|]+ \| [^|]+ \| [^|]+ \| `(\w+)::(\w+)` \|", line) for line in TABLE]
    assert TABLE and all(named)
    missing = [m[0] for m in named if m and f"\ndef {m[2]}(" not in files.get(m[1], "")]
    assert missing == []


def test_every_guard_stands_in_the_table() -> None:
    assert set(re.findall(r"guard `(\w+)`", "\n".join(TABLE))) == set(get_args(Kind))
