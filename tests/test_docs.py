"""What the documents say of rules and formats is what the code does."""

import re
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.data.formats import FORMATS
from pipeline.data.rows import NAMES
from pipeline.gate.rules import RULES
from pipeline.workspace import CHECKOUT, Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

README = (CHECKOUT / "README.md").read_text("utf-8")
DATA = (CHECKOUT / "docs" / "data.md").read_text("utf-8")


def test_every_rule_and_format_stands_in_the_page_on_data_as_it_is() -> None:
    rules = [f"| {r.code} | `{r.name}` | {r.severity}{', `--fix`' if r.fixable else ''} | {r.finds} |" for r in RULES]
    formats = [f"| {f.name} | `{f.shape}` | {NAMES[f.becomes]} |" for f in FORMATS]
    assert [line for line in DATA.splitlines() if re.match(r"\| D\d", line)] == rules
    assert [line for line in formats if line not in DATA.splitlines()] == []
    assert f"a gate of {len(RULES)} rules" in " ".join(README.split())


def test_the_gate_says_of_the_bad_file_what_the_readme_shows(aletheia: "Callable[..., Said]") -> None:
    shown = re.search(r"^\$ \.venv/bin/aletheia (data check .*)\n((?:.*\n)*?)```", README, re.MULTILINE)
    assert shown
    said = aletheia(Workspace(CHECKOUT), *shlex.split(shown[1]))
    assert said.code == 1 and said.out.splitlines() == shown[2].splitlines()
