"""Markdown becomes a tree of known tags and text: nothing an answer holds is markup, an address to fetch, or unseen."""

import json
import re
from collections.abc import Iterator

import pytest

from eval.review.shown import LONGEST, TAGS, Node, tree
from pipeline.workspace import CHECKOUT
from tests.eval.review.reviewing import HOSTILE


def tags(nodes: list[Node]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, dict):
            assert node.keys() <= {"tag", "of", "start"}
            yield node["tag"]
            yield from tags(node["of"])


def text(nodes: list[Node]) -> str:
    return "".join(node if isinstance(node, str) else text(node["of"]) for node in nodes)


def test_markdown_is_laid_out() -> None:
    bold, slanted, struck, code = (
        {"tag": tag, "of": [of]} for tag, of in zip(("strong", "em", "s", "code"), "bcde", strict=True)
    )
    assert tree("# Top\n\na **b** *c* ~~d~~ `e`\nf") == [
        {"tag": "h3", "of": ["Top"]},
        {"tag": "p", "of": ["a ", bold, " ", slanted, " ", struck, " ", code, "\n", "f"]},
    ]
    assert tree("3. x\n4. y\n   - z") == [
        {
            "tag": "ol",
            "start": 3,
            "of": [
                {"tag": "li", "of": ["x"]},
                {"tag": "li", "of": ["y", {"tag": "ul", "of": [{"tag": "li", "of": ["z"]}]}]},
            ],
        }
    ]
    assert tree("```python\nx = 1\n\n```\n> q\n\n---") == [
        {"tag": "pre", "of": ["x = 1\n"]},
        {"tag": "blockquote", "of": [{"tag": "p", "of": ["q"]}]},
        {"tag": "hr", "of": []},
    ]
    assert list(tags(tree("|a|b|\n|-|-|\n|1|2|"))) == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert tree("") == []


def test_links_and_pictures_are_words_with_their_address() -> None:
    said = text(tree("[a **b**](http://x/y) ![c](http://x/z.png) <http://x/w> [d](javascript:e) [](http://x/v)"))
    assert said == "a b (http://x/y) [picture: c] (http://x/z.png) http://x/w [d](javascript:e)  (http://x/v)"


def test_html_stays_text() -> None:
    nodes = tree(HOSTILE)
    assert set(tags(nodes)) <= TAGS
    said = text(nodes)
    for part in ("</script><script>", "<img src=x onerror=", "<iframe srcdoc=", "<style>*{", "<u>u</u>", "</td>"):
        assert part in said


@pytest.mark.parametrize(
    ("letter", "shown"),
    [
        ("\u202e", "U+202E"), ("\u2066", "U+2066"), ("\u200b", "U+200B"), ("\ufeff", "U+FEFF"), ("\x1b", "U+001B"),
        ("\u2028", "U+2028"), ("\u2029", "U+2029"), ("\u00ad", "U+00AD"), ("\ue000", "U+E000"), ("\ud800", "U+D800"),
        ("\U000e0041", "U+E0041"), ("\x85", "U+0085"),
    ],
    ids=lambda value: value if value[:2] == "U+" else "",
)  # fmt: skip
def test_what_the_eye_would_miss_is_marked_everywhere(letter: str, shown: str) -> None:
    for place in ("a{}b", "`a{}b`", "```\na{}b\n```", "# a{}b", "[a{}b](u)", "![a{}b](u)", "|a{}b|c|\n|-|-|"):
        nodes = tree(place.format(letter))
        assert letter not in text(nodes) and f"a{shown}b" in text(nodes) and "mark" in tags(nodes)
        json.dumps(nodes, ensure_ascii=False).encode()


def test_words_of_all_languages_stay_as_they_are() -> None:
    for said in ("naïve 你好 שלום سلام 👩\u200d💻 می\u200cخواهم", "a\u00a0b – “c” №\t1", "e\u0301 ½ × ≥"):
        assert text(tree(said)) == said and set(tags(tree(said))) == {"p"}


def test_an_answer_that_is_built_to_be_slow_or_deep_or_long_is_still_shown() -> None:
    for said in (
        "> " * 5000 + "x",
        "[" * 20_000,
        "*a " * 20_000,
        "`" * 5000 + "x",
        "- " * 3000 + "x",
        "a" * (LONGEST + 1),
    ):
        nodes = tree(said)
        json.dumps(nodes)
        assert set(tags(nodes)) <= TAGS
    assert tree("*a*" * LONGEST)[0]["tag"] == "pre"  # type: ignore[index]


def test_the_page_knows_the_same_tags() -> None:
    script = (CHECKOUT / "eval" / "review" / "page.js").read_text()
    known = re.search(r'TAGS = new Set\("([^"]*)"', script)
    assert known and set(known[1].split()) == TAGS
