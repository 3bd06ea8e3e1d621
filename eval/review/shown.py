"""Markdown as a tree that a page can build without ever parsing markup: what an answer says stays text.

A node is text or `{"tag", "of": [nodes]}`; `start` is an ordered list's first number. HTML is not parsed, a link shows its
address and cannot be followed, a picture is its words, and what the eye would not see (bidirectional controls, zero-width
characters) stands as its code point. The page knows these tags and no others.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

LONGEST = 100_000  # characters that are read as Markdown; what is longer is shown as it is
HEADING, MARK = "h3", "mark"
TAGS = frozenset(
    [
        "p", HEADING, "ul", "ol", "li", "blockquote", "hr", "pre", "code", "em", "strong", "s", "span", MARK,
        "table", "thead", "tbody", "tr", "th", "td",
    ]
)  # fmt: skip
JOINERS = "\u200c\u200d"  # between letters of some scripts, and within emoji
_SUSPECT = re.compile(r"[^\S \n\t]|[^\w\s!-~]")  # a first look, so that only few are looked up

Node = str | dict[str, Any]


def tree(text: str) -> list[Node]:
    if len(text) > LONGEST:
        return [_node("pre", *_words(text))]
    try:
        tokens = _parser().parse(text)
    except RecursionError:
        return [_node("pre", *_words(text))]
    top: list[Node] = []
    stack, addresses = [top], []
    for token in _flat(tokens):
        if token.hidden:  # the paragraph of a list without blank lines
            continue
        if token.nesting == 1:
            node = _node(_tag(token))
            if token.tag == "ol" and isinstance(token.attrs.get("start"), int):
                node["start"] = token.attrs["start"]
            addresses += [str(token.attrs.get("href", ""))] if token.type == "link_open" else []
            stack[-1].append(node)
            stack.append(node["of"])
        elif token.nesting == -1:
            said = stack.pop()
            if token.type == "link_close" and (address := addresses.pop()) and said != [address]:
                stack[-1] += [" (", *_words(address), ")"]
        else:
            stack[-1] += _leaf(token)
    return top


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _flat(tokens: list[Any]) -> Iterator[Any]:
    for token in tokens:
        if token.type == "inline":
            yield from token.children
        else:
            yield token


def _tag(token: Any) -> str:
    if token.type == "heading_open":
        return HEADING
    return str(token.tag) if token.tag in TAGS else "span"


def _leaf(token: Any) -> list[Node]:
    if token.type in ("softbreak", "hardbreak"):
        return ["\n"]
    if token.type in ("fence", "code_block"):
        return [_node("pre", *_words(token.content.removesuffix("\n")))]
    if token.type == "code_inline":
        return [_node("code", *_words(token.content))]
    if token.type == "hr":
        return [_node("hr")]
    if token.type == "image":
        return [_node("span", "[picture: ", *_words(token.content), "] (", *_words(str(token.attrs["src"])), ")")]
    return _words(token.content)


def _node(tag: str, *of: Node) -> dict[str, Any]:
    return {"tag": tag, "of": list(of)}


def _words(text: str) -> list[Node]:
    """The text, what cannot be seen in it as marked code points. No lone surrogate is left."""
    words: list[Node] = []
    end = 0
    for found in _SUSPECT.finditer(text):
        if _is_hidden(found[0]):
            words += [text[end : found.start()], _node(MARK, f"U+{ord(found[0]):04X}")]
            end = found.end()
    return [word for word in [*words, text[end:]] if word]


def _is_hidden(letter: str) -> bool:
    """Control and format characters, line and paragraph separators, surrogates. Other spaces are spaces."""
    return letter not in JOINERS and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
