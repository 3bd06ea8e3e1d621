"""A text as numbers: which texts have the same words, and which runs of them."""

import subprocess
import sys

import numpy as np
import pytest

from pipeline.gate.words import Words, runs


def same(one: str, other: str) -> bool:
    return Words.of(one).hashes.tolist() == Words.of(other).hashes.tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Use a composite index.", "use A -- composite (index)"),
        ("don't", "don’t"),
        ("caf\u00e9", "cafe\u0301"),  # composed, decomposed
        ("ＡＢＣ ｄｅｆ", "abc def"),  # full width
        ("a\n\n  b\tc", "a b c"),
        ("❤️ b", "b"),
    ],
)
def test_case_punctuation_and_the_form_of_characters_do_not_count(one: str, other: str) -> None:
    assert same(one, other)


@pytest.mark.parametrize(("one", "other"), [("a b", "b a"), ("ab", "a b"), ("a", "a a"), ("max_length", "max length")])
def test_words_and_their_order_count(one: str, other: str) -> None:
    assert not same(one, other)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("?!… — 🙂", 0), ("one", 1), ("a_b c.d", 3), ("v1.5", 2), ("数据库索引", 5), ("用 index 查询", 4),
        ("데이터베이스 인덱스", 2), ("हिन्दी में", 2), ("ภาษาไทย", 7), ("a\ud800b", 2), ("\u0130stanbul", 1),
    ],
)  # fmt: skip
def test_words_are_counted_by_script(text: str, count: int) -> None:
    assert len(Words.of(text)) == count


def test_numbers_and_characters_are_told_apart() -> None:
    words = Words.of("the 3 索引 42ms")
    assert words.numbers.tolist() == [False, True, False, False, True]
    assert words.characters.tolist() == [False, False, True, True, False]


def test_words_are_shown_as_they_stand() -> None:
    words = Words.of("Hello,  World (of `SQL`)!")
    assert words.shown(1, 2) == "World (of `"
    assert words.shown(0, 4) == words.text
    assert Words.of("\u0130zmir (\u0130stanbul)").shown(1, 1).startswith("i\u0307stanbul"), (
        "in lower case, but in its place"
    )


@pytest.mark.parametrize("length", [1, 2, 3, 13, 60])
def test_runs_are_equal_exactly_where_their_words_are(length: int) -> None:
    rng = np.random.default_rng(1)
    words = [f"w{n}" for n in rng.integers(0, 3, 200)] + [f"w{n}" for n in range(70)] * 2
    found = runs(Words.of(" ".join(words)).hashes, length).tolist()
    wanted = [tuple(words[n : n + length]) for n in range(len(words) - length + 1)]
    assert len(found) == len(wanted) and len(set(found)) == len(set(wanted))
    assert len(set(zip(found, wanted, strict=True))) == len(set(wanted))


def test_run_is_the_same_wherever_it_stands_and_however_long_the_text() -> None:
    filler = "x " * 70_000
    (alone,) = runs(Words.of("one two three").hashes, 3)
    assert runs(Words.of(f"{filler} one two three {filler}").hashes, 3)[70_000] == alone


def test_a_text_shorter_than_a_run_has_none() -> None:
    assert len(runs(Words.of("a b").hashes, 3)) == 0 == len(runs(Words.of("").hashes, 1))


def test_hashes_are_the_same_in_every_process() -> None:
    program = "from pipeline.gate.words import Words; print(Words.of('Use a composite index').hashes.tolist())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in "12"
    }
    assert printed == {f"{Words.of('Use a composite index').hashes.tolist()}\n"}
