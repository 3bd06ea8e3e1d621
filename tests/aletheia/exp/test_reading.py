"""Values as short text and as JSON: few digits, nothing cut off in silence, nothing that JSON or a terminal cannot hold."""

import json

import pytest

from aletheia.exp.reading import brief, number, plain, short, table, wrapped


@pytest.mark.parametrize(
    ("value", "text"),
    [(156160.0, "156160"), (54.0, "54"), (5.433964, "5.434"), (24332.4, "24332"), (1e-5, "1e-05"), (1e300, "1e+300")],
)
def test_numbers_have_four_digits_and_whole_ones_are_whole(value: float, text: str) -> None:
    assert number(value) == text


def test_values_are_brief_and_a_cut_is_seen() -> None:
    assert [brief(v) for v in (True, None, "a" * 64, {"a": 1}, [1, "b"], [[1]], float("nan"))] == [
        "true", "–", "a" * 12, "1 keys", "1, b", "1 entries", "nan",
    ]  # fmt: skip
    assert short("word " * 40).endswith("…")
    assert len(short("word " * 40)) == 90
    assert "".join(wrapped("word " * 40)) == "word " * 40


def test_a_table_leaves_out_empty_columns() -> None:
    assert table(("a", "b", "c"), [("1", "", "3"), ("22", "", "4")]) == ["a   c", "1   3", "22  4"]
    assert table(("", ""), [("x", "y")]) == ["x  y"]
    assert table(("a", "b"), []) == []


def test_json_holds_whatever_a_record_may() -> None:
    odd = {1: float("nan"), "a": [float("inf"), {"\ud800": "\ud800x"}], None: (1, 2)}
    assert plain(odd) == {"1": None, "a": [None, {"?": "?x"}], "None": [1, 2]}
    json.dumps(plain(odd), ensure_ascii=False, allow_nan=False).encode()
