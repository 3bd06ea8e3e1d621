import math
import random
import re

import pytest

from pipeline import yamlio
from pipeline.yamlio import YamlError

LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("42", 42),
        ("1234567e8", "1234567e8"),  # a commit
        ("00e12345", "00e12345"),
        ('"2e-4"', "2e-4"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_a_number_is_a_number_and_a_commit_stays_text(written: str, meant: object) -> None:
    value = yamlio.load(f"key: {written}").value["key"]
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize(
    "text",
    ["2e-4", "1e5", "1234567e8", "yes", "null", "~", "12:30", "0x1f", "1_000", ".nan", "2026-11-20", "=", "<<", "# x"],
)
def test_text_is_read_back_as_text(text: str) -> None:
    assert yamlio.load(yamlio.dump({"a": text, "b": [text]})).value == {"a": text, "b": [text]}


def test_whatever_is_written_is_read_back() -> None:
    draw = random.Random(7)
    letters = "ab1e-+.:#'\"\\\n\r\t {}[]&*!|>%@`,?~_=<\x85\u2028\x1b\x00\ufeffé😀"
    for _ in range(400):
        text = "".join(draw.choices(letters, k=draw.randint(0, 9))) * draw.choice([1, 1, 1, 30])
        value = {"text": text, "list": [{text: draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300)}], "none": None}
        assert yamlio.load(yamlio.dump(value)).value == value


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", 3),
        ("s:\n  x: 1\n  'x': 1\n", "x", 3),
        ("- {k: 1, k: 1}\n", "k", 1),
        ("\n1: a\n1: b\n", "1", 3),
    ],
)
def test_a_doubled_key_is_an_error_at_the_second(text: str, key: str, line: int) -> None:
    with pytest.raises(YamlError, match=f"the key `{key}` stands twice") as caught:
        yamlio.load(text)
    assert caught.value.line == line


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: [x]\nb: [" + ", ".join(["*a"] * 11) + "]",
        "[" * 100_000,  # the C parser's recursion overflows the stack unless this is seen first
        "{a: " * 5_000,
        "- " * 100_000,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a" * (yamlio.MAX_BYTES + 1),
    ],
    ids=["laughs", "aliases", "lists", "mappings", "dashes", "list in itself", "mapping in itself", "size"],
)
def test_bombs_are_refused(text: str) -> None:
    with pytest.raises(YamlError):
        yamlio.load(text)


def test_what_a_person_would_write_is_within_the_bounds() -> None:
    deep = "[" * yamlio.MAX_DEPTH + "]" * yamlio.MAX_DEPTH
    aliases = "a: &a [x]\nb: [" + ", ".join(["*a"] * yamlio.MAX_ALIASES) + "]"
    assert yamlio.load(deep).value is not None
    assert yamlio.load(aliases).value["b"] == [["x"]] * yamlio.MAX_ALIASES


@pytest.mark.parametrize(
    ("text", "what", "line", "column"),
    [
        ("a: 1\nb: [1, 2\n", "did not find expected ',' or ']'", 3, 1),
        ("a: 1\n b: 2\n", "mapping values are not allowed in this context", 2, 3),
        ("x: 1\ndate: 2026-02-30\n", "`2026-02-30` is no timestamp", 2, 7),
        ("x: 1\n\ny: !!bool maybe\n", "`maybe` is no bool", 3, 4),
        ("a: 1\n---\nb: 1\n", "but found another document", 2, 1),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor", 1, 4),
        ("a: *nothing\n", "found undefined alias", 1, 4),
    ],
)
def test_an_error_names_line_and_column(text: str, what: str, line: int, column: int) -> None:
    with pytest.raises(YamlError, match=re.escape(what)) as caught:
        yamlio.load(text)
    assert (caught.value.line, caught.value.column) == (line, column)


def test_every_key_knows_its_line() -> None:
    document = yamlio.load("# a comment\na: 1\nb:\n  c: {d: 2}\n  e:\n    - 3\n    - f: 4\n")
    assert document.lines == {
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", "d"): 4,
        ("b", "e"): 5,
        ("b", "e", 0): 6,
        ("b", "e", 1): 7,
        ("b", "e", 1, "f"): 7,
    }


def test_every_key_knows_its_column() -> None:
    columns = yamlio.load("a: 1\nb:\n  é: {d: 2}\n  e: [3, {f: 4}]\n").columns
    assert columns[("b", "é")] == 3
    assert columns[("b", "é", "d")] == 7
    assert columns[("b", "e", 1, "f")] == 11


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("a: fix #12\n", (1, 4), "`#12` is a comment"),
        ("x: 1\na: [b, fix #12\n ]\n", (2, 8), "`#12` is a comment"),
        ("a: #12\n", (1, 3), "`#12` is a comment"),
        ("a: one # two\n", (1, 4), "`# two` is a comment"),
        ("a:\n  - 12:30:00\n", (2, 5), "45000, in base 60"),
        ("a: 0123456\n", (1, 4), "42798, in base 8"),
        ("a: -0_12\n", (1, 4), "-10, in base 8"),
    ],
)
def test_what_is_read_otherwise_than_meant_is_found(text: str, place: tuple[int, int], what: str) -> None:
    (surprise,) = yamlio.surprises(text)
    assert (surprise.line, surprise.column) == place
    assert what in surprise.what


@pytest.mark.parametrize(
    "text",
    [
        "a: one  # a comment, two spaces off\n",
        "a: one\t# so\n",
        "a: # what you expect\n",
        "a: 32 # try 64\n",
        "a: [x, y] # both\n",
        "a: 'fix #12'\n",
        'a: "12:30:00"\n',
        "a: fix#12\n",
        "a: |\n  fix #12\n",
        "a: one\n # below\nb: 0\nc: 10\nd: 0.12\ne: 0x12\nf: 2026-11-20\n",
        "# fix #12\n",
        "",
    ],
)
def test_what_is_meant_so_surprises_nobody(text: str) -> None:
    assert yamlio.surprises(text) == []


def test_an_alias_does_not_surprise_twice() -> None:
    assert len(yamlio.surprises("a: &x 012\nb: *x\n")) == 1


def test_an_empty_document_is_none() -> None:
    assert yamlio.load("# nothing but a comment\n") == yamlio.Document(None, {})


def test_a_number_too_long_to_print_is_refused_at_its_place() -> None:
    with pytest.raises(YamlError, match="is no int") as refused:
        yamlio.load(f"a: 1\nb: 0x{'f' * 5000}\n")
    assert (refused.value.line, refused.value.column) == (2, 4)


def test_aliases_count_as_what_they_stand_for() -> None:
    """Ten aliases of a large list, one inside the other, are a bomb too."""
    ones = ", ".join(["1"] * 1000)
    text = f"a: &a [{ones}]\nb: &b [{', '.join(['*a'] * 4)}]\nc: &c [{', '.join(['*b'] * 4)}]\n"
    yamlio.load(text + "d: 1\n")
    with pytest.raises(YamlError, match="nested too deeply or too many aliases or values"):
        yamlio.load(text.replace(ones, ", ".join(["1"] * 20_000)))
