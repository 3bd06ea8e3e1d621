"""What answers look like, whatever they say: how long, of what parts, and whether they go round in circles.

    answer_length   p10, p50 and p90 in tokens, and the median of the paired changes
    structure       shares with a code block, a heading, a list; mean paragraphs and sentences; repeated 8-grams

Parts are CommonMark's, of the first 150,000 characters. A paragraph stands in no list or quotation; a sentence ends in . ! or ?
before white space, outside code and headings, so `e.g. this` counts as two. `repeated` is the share of all runs of 8 words
that stood in the answer before; `loops` the share of answers of which more than half is repeated.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from eval.breakdown import p_value, with_holm
from eval.statistics.quantiles import quantile
from pipeline import statistics
from pipeline.gate.code import MOST_MARKDOWN

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
GRAM = 8  # words
LOOP = 0.5
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]*_`]*(?=\s|$)")


@dataclass(frozen=True)
class Shape:
    """Of one answer."""

    with_code: bool
    with_heading: bool
    with_list: bool
    paragraphs: int
    sentences: int
    repeated: float
    loops: bool


def shape(answer: str) -> Shape:
    tokens = _markdown().parse(answer[:MOST_MARKDOWN])
    kinds = {token.type for token in tokens}
    prose = [
        token.content for before, token in pairwise(tokens) if token.type == "inline" and before.type != "heading_open"
    ]
    repeated = repetition(answer)
    return Shape(
        with_code=bool(kinds & {"fence", "code_block"}),
        with_heading="heading_open" in kinds,
        with_list=bool(kinds & {"bullet_list_open", "ordered_list_open"}),
        paragraphs=sum(token.type == "paragraph_open" and token.level == 0 for token in tokens),
        sentences=sum(max(1, len(_SENTENCE_END.findall(text))) for text in prose),
        repeated=repeated,
        loops=repeated > LOOP,
    )


def repetition(answer: str) -> float:
    """Share of the answer's runs of 8 words that stood in it before; 0 where it has none."""
    words = answer.split()
    runs = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def compare(
    theirs: Sequence[str], ours: Sequence[str], their_tokens: Sequence[int], our_tokens: Sequence[int]
) -> dict[str, Any]:
    """`answer_length` and `structure` for a record, from the other model's answers to ours to the same questions."""
    lengths: dict[str, Any] = {
        name: {"before": quantile(their_tokens, share), "after": quantile(our_tokens, share)}
        for name, share in QUANTILES.items()
    }
    changes = [a - b for b, a in zip(their_tokens, our_tokens, strict=True)]
    lengths |= {"median_change": quantile(changes, 0.5), "unit": "tokens"}
    return {"answer_length": statistics.as_record(lengths), "structure": _structure(theirs, ours)}


def _structure(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    before, after = [shape(answer) for answer in theirs], [shape(answer) for answer in ours]
    figures, p_values = {}, dict[str, float | None]()
    for field in fields(Shape):
        name, shares = field.name, field.type in (bool, "bool")
        was, now = ([float(getattr(answer, name)) for answer in side] for side in (before, after))
        deltas = [a - b for b, a in zip(was, now, strict=True)]
        gained, lost = (sum(sign * d > 0 for d in deltas) for sign in (1, -1))
        figures[name] = statistics.as_record(statistics.paired(was, now, shares))
        p_values[name] = statistics.sign_test(gained, lost) if shares else p_value(deltas)
    return with_holm(figures, p_values)


@functools.cache
def _markdown() -> Any:
    """Blocks alone: what stands inside a paragraph is counted as it is written."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser
