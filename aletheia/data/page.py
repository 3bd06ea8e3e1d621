"""`aletheia data show --html`: rows token by token, and totals, as one self-contained page.

Rows are what others wrote: everything of them is escaped, characters that a browser would obey or hide are shown by their
code points, and a content security policy lets only the page's own two scripts run, named by their hashes, and nothing
be loaded. Looks like the report (`aletheia/report`), whose style sheet it begins with.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from aletheia.data import examples
from aletheia.report.page import HERE as REPORT
from aletheia.report.page import policy
from pipeline.data.rows import NAMES
from pipeline.gate.tokens import Totals

HERE = Path(__file__).parent
BINS = 30
SCALE = 1.25  # of max_length, where the scale of a histogram ends at the latest: one long row would hide all others
WIDTH, HEIGHT = 240, 28  # of a histogram, in its own units


def page(reader: examples.Reader, shown: Sequence[examples.Example]) -> str:
    """The whole page; `reader` has read all rows."""
    scripts = [(REPORT / "theme.js").read_text("utf-8"), (HERE / "page.js").read_text("utf-8")]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "hidden": lambda text: _characters(str(text)),
        "comma": "{:,}".format,
        "count": lambda number, what: f"{number:,} {what}{'s' * (number != 1)}",
        "percent": lambda share: f"{share:.1%}",
        "tokens": lambda side: tokens(reader, side),
    }
    return environment.get_template("page.html.j2").render(
        mark=Markup(examples.MARK),
        policy=policy(scripts),
        css=Markup((REPORT / "page.css").read_text("utf-8") + (HERE / "page.css").read_text("utf-8")),
        scripts=list(map(Markup, scripts)),
        reader=reader,
        heading=examples.heading(reader),
        examples=shown,
        domains=sorted({example.row.domain for example in shown}),
        summary=reader.summary(len(shown)),
        totals=[(NAMES[kind], Spread.of(totals)) for kind, totals in reader.totals.items() if totals.sequences],
        box=(WIDTH, HEIGHT),
    )


@dataclass(frozen=True)
class Spread:
    """What rows of one kind come to, and how long they are by domain, drawn on one scale from 0."""

    figures: dict[str, Any]
    domains: list[tuple[str, dict[str, int], list[Any]]]
    left_out: int  # domains
    end: int  # tokens, of the scale: the longest, or a little past max_length where one is longer than that
    more: bool  # whether a last bar holds what is longer than the scale
    limit: float | None  # where max_length is drawn; nothing when all rows are shorter

    @classmethod
    def of(cls, totals: Totals) -> "Spread":
        figures = totals.as_json()
        longest = max(max(found) for found in totals.lengths.values())
        end = min(longest, round(SCALE * totals.max_length))
        more = end < longest
        domains = [(name, figure, bars(totals.lengths[name], end, more)) for name, figure in examples.lengths(totals)]
        width = WIDTH * _bins(more) / BINS
        limit = totals.max_length / end * width if totals.max_length < longest else None
        return cls(figures, domains, len(totals.lengths) - len(domains), end, more, limit)


def bars(lengths: Sequence[int], end: int, more: bool = False) -> list[tuple[float, float, float]]:
    """Left, width and height of each bar that is not empty, in the units of the picture.

    With `more` the last one stands a little apart, for what is longer than `end`.
    """
    counts, bins = [0] * BINS, _bins(more)
    for length in lengths:
        counts[BINS - 1 if length > end else min(length * bins // end, bins - 1)] += 1
    width = WIDTH / BINS
    return [
        (round(place * width, 2), round(width - 1, 2), round(max(1.5, count / max(counts) * HEIGHT), 2))
        for place, count in enumerate(counts)
        if count
    ]


def _bins(more: bool) -> int:
    """Of the scale: all, or all but the last bar and a gap before it."""
    return BINS - 2 if more else BINS


def tokens(reader: examples.Reader, side: examples.Side) -> Markup:
    """Every token as an element that tells its position and id, in an element for each run of one state."""
    found = examples.pieces(reader.chat, side, side.max_length + examples.PAST_SHOWN)
    return Markup("").join(
        Markup('<span class="{}">{}</span>').format(run[0].state, Markup("").join(map(_token, run)))
        for run in examples.runs(found)
    )


def _token(piece: examples.Piece) -> Markup:
    last = piece.start + len(piece.ids) - 1
    place = f"{piece.start}" if last == piece.start else f"{piece.start}–{last}"
    title = f"{place} · id {' '.join(map(str, piece.ids))}"
    if piece.ends:
        return Markup('<i class="end" title="{} · end of turn">{}</i>').format(title, _characters(piece.text))
    return Markup('<i title="{}">{}</i>').format(title, _characters(piece.text, breaks=True))


def _characters(text: str, breaks: bool = False) -> Markup:
    """Escaped. Hidden characters stand as their code points; with `breaks` an empty <s> marks each line's end."""
    if text.isprintable():
        return escape(text)
    parts = []
    for hidden, group in groupby(text, examples.is_hidden):
        if hidden:
            parts += [Markup('<b title="{}">{}</b>').format(_name(c), examples.code_point(c)) for c in group]
        else:
            plain = escape("".join(group))
            parts.append(plain.replace("\n", Markup("<s></s>\n")) if breaks else plain)
    return Markup("").join(parts)


def _name(character: str) -> str:
    return unicodedata.name(character, "control character").capitalize()
