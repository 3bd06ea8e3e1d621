"""Tables for people, JSON for programs."""

import io
import json
from pathlib import Path

import pytest

from aletheia.output import print_json, print_table


def test_columns_stand_below_each_other_and_the_last_may_have_many_lines() -> None:
    out = io.StringIO()
    print_table(("a", "long header", "c"), [("x", 1, ["one", "two"]), ("yyy", 2, [])], out)
    assert out.getvalue() == "a    long header  c\nx    1            one\n                  two\nyyy  2\n"


def test_a_cell_is_one_line_and_moves_no_cursor() -> None:
    out = io.StringIO()
    print_table(("a", "b"), [("x\ny", "one\r\x1b[2J\ttwo")], out)
    assert out.getvalue() == "a    b\nx y  one  [2J two\n"


def test_json_keeps_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"answer": "é 你好\n", "path": Path("data/sft")})
    out = capsys.readouterr().out
    assert json.loads(out) == {"answer": "é 你好\n", "path": "data/sft"}
    assert "你好" in out
