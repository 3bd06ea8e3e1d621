"""The shape of answers: each count on an answer written for it."""

import pytest

from eval import shape

ANSWER = """\
# Locks

Use one. Really! Is it `a.b`?

- first, e.g. this
- second

```python
x = 1.  # no sentence. None.
```

The end"""


def test_parts_are_counted_as_commonmark_has_them() -> None:
    found = shape.shape(ANSWER)
    assert (found.with_code, found.with_heading, found.with_list) == (True, True, True)
    assert found.paragraphs == 2
    assert found.sentences == 3 + 1 + 1 + 1  # `e.g.` ends one, what has no end is one
    assert (found.repeated, found.loops) == (0.0, False)


@pytest.mark.parametrize("answer", ["", "   ", "#no heading", "a - b", "1) x" * 0, "see `code` here"])
def test_plain_words_have_no_parts(answer: str) -> None:
    found = shape.shape(answer)
    assert not (found.with_code or found.with_heading or found.with_list or found.loops)


def test_code_in_a_list_and_an_unclosed_fence_are_code() -> None:
    assert shape.shape("1. x\n\n   ```\n   y\n   ```").with_code and shape.shape("```\ncut off").with_code


def test_repetition_is_the_share_of_runs_that_stood_before() -> None:
    words = [f"w{i}" for i in range(20)]
    assert shape.repetition(" ".join(words)) == 0.0
    assert shape.repetition(" ".join(words + words)) == pytest.approx(1 - 20 / 33)  # 33 runs, 20 of them new
    assert shape.repetition("so it goes " * 200) > 0.98 and shape.shape("so it goes " * 200).loops
    assert shape.repetition("one two three four five six seven") == 0.0


def test_changes_are_paired_and_adjusted_for_how_many_there_are() -> None:
    plain, listed = "It is so.", "- one\n- two\n- three"
    found = shape.compare([plain] * 12, [listed] * 11 + [plain], [4] * 12, [9] * 11 + [4])
    with_list = found["structure"]["with_list"]
    assert (with_list["before"]["value"], with_list["after"]["value"]) == (0.0, pytest.approx(11 / 12, abs=1e-6))
    assert with_list["holm_p"] == pytest.approx(4 * 2 * 0.5**11, abs=1e-4)  # McNemar's, of four left; two p are smaller
    assert "holm_p" not in found["structure"]["repeated"], "all alike: no interval, no p"
    assert found["answer_length"]["p50"]["after"]["value"] == 9.0
    assert found["answer_length"]["median_change"] == {"value": 5.0, "ci_low": 5.0, "ci_high": 5.0, "n": 12}
