"""`aletheia data show`: rows as the sequences that are trained, token by token, and what all rows of a path come to.

Each token is trained, masked or past `max_length`; ids and mask are training's own (`pipeline.chat`), never a second
reading. The rules on tokens are applied (`pipeline.gate.tokens`); what else may reject a row (duplicates, leaks, secrets)
is for `aletheia data check`. With --html the same goes to a page (`aletheia/data/page.py`).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from aletheia.data.examples import (
    MARK,
    PAST_SHOWN,
    Example,
    Piece,
    Reader,
    Side,
    State,
    code_point,
    heading,
    is_hidden,
    lengths,
    pieces,
    runs,
)
from aletheia.output import print_table
from pipeline.chat import Chat
from pipeline.data.rows import NAMES
from pipeline.errors import UserError
from pipeline.progress import printable
from pipeline.records.file import write_atomically
from pipeline.stage import Job

IN_TERMINAL, ON_PAGE = 1, 200  # rows, unless another number is asked for
END = "■"
PLAIN: dict[State, tuple[str, str]] = {"trained": ("⟦", "⟧"), "masked": ("", ""), "past": ("⟪", "⟫")}
ANSI: dict[State, str] = {"trained": "32", "masked": "2", "past": "9;31"}  # green, dim, struck out in red
ANSI_END = "7"  # reversed


def show(
    path: str,
    job: Job,
    wanted: str | None = None,
    rows: int | None = None,
    html: Path | None = None,
    totals_only: bool = False,
    as_json: bool = False,
) -> None:
    """Prints rows, and what all of them come to; with `html` prints only where that file is.

    Raises `UserError` where nothing is to be shown, or the file cannot be written.
    """
    if html:
        if as_json:
            raise UserError("is one output, --html another", where="--json", remedy="one of them")
        _check_replaceable(html)
    reader = Reader(job, path)
    limit = 0 if totals_only else rows or (ON_PAGE if html else IN_TERMINAL)
    kept: list[Example] = []
    for example in reader.examples(wanted):
        if reader.rows > limit:
            continue
        if html or as_json:
            kept.append(example)
        else:
            _print(reader, example)
    if html:
        from aletheia.data.page import page

        _write(html, page(reader, kept))
        print(job.workspace.shown(html.resolve()))
    elif as_json:
        print(json.dumps(_json(reader, kept)))  # ASCII: no character of a row reaches a terminal
    elif totals_only or wanted is None:
        _print_totals(reader, min(limit, reader.rows), totals_only)


def _print(reader: Reader, example: Example) -> None:
    coloured = _is_coloured()
    if reader.rows == 1:
        print(f"# {printable(heading(reader))}; {_legend(coloured)}")
    for side in example.sides:
        print(f"# {printable(example.row.where)}  {printable(example.row.id)}  {side.name}: {side.text()}")
        for reason in example.rejected:
            print(f"# training rejects this row: {printable(reason)}")
        found = runs(pieces(reader.chat, side, side.max_length + PAST_SHOWN))
        print("".join(_painted(run) if coloured else _marked(run) for run in found))
        if side.unshown:
            print(f"# {side.unshown:,} more tokens past max_length")


def _marked(run: list[Piece]) -> str:
    """For a log: a text's own brackets are shown by their code points."""
    opened, closed = PLAIN[run[0].state]
    text = _visible("".join(piece.text for piece in run), f"⟦⟧⟪⟫{END}")
    return f"{opened}{text}{closed}{END if run[-1].ends else ''}"


def _painted(run: list[Piece]) -> str:
    ending = f"\x1b[{ANSI_END}m{_visible(run.pop().text)}\x1b[0m{END}" if run[-1].ends else ""
    code = ANSI[run[0].state] if run else ""
    lines = _visible("".join(piece.text for piece in run)).split(
        "\n"
    )  # each by itself: `less -R` forgets at a line's end
    return "\n".join(line and f"\x1b[{code}m{line}\x1b[0m" for line in lines) + ending


def _legend(coloured: bool) -> str:
    if not coloured:
        return f"in double brackets: trained; in double angle brackets: past max_length; {END} end of turn"
    return " ".join(f"\x1b[{code}m{state}\x1b[0m" for state, code in ANSI.items()) + f" max_length {END} end of turn"


def _visible(text: str, marks: str = "") -> str:
    return "".join(f"⟨{code_point(c)}⟩" if is_hidden(c) or c in marks else c for c in text)


def _print_totals(reader: Reader, shown: int, alone: bool) -> None:
    if alone:
        print(f"# {printable(heading(reader))}")
    for kind, totals in reader.totals.items():
        if totals.sequences:
            print(f"\n# {NAMES[kind]}: {totals.text()}")
            columns = ("sequences", "min", "median", "p95", "max")
            table = [(domain, *(f"{found[c]:,}" for c in columns)) for domain, found in lengths(totals)]
            print_table(("tokens by domain", *columns), table, sys.stdout)
            if len(totals.lengths) > len(table):
                print(f"and {len(totals.lengths) - len(table):,} smaller domains")
    for line in reader.summary(reader.rows if alone else shown):
        print(f"# {printable(line)}")
    if not alone and shown < reader.rows:
        print("# others: --row ID, --rows N or --html FILE")


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _json(reader: Reader, shown: list[Example]) -> dict[str, Any]:
    return {
        "path": reader.path,
        "base": reader.base.name,
        "revision": reader.base.revision,
        "contract": reader.chat.contract.sha256,
        "end_of_turn": {"token": reader.chat.end_of_turn, "id": reader.chat.end_of_turn_id},
        "rows": [
            {
                "id": example.row.id,
                "where": example.row.where,
                "domain": example.row.domain,
                "rejected": example.rejected,
                "sequences": [_json_side(reader.chat, side) for side in example.sides],
            }
            for example in shown
        ],
        "rows_left_out": reader.rows - len(shown),
        "rows_rejected": dict(reader.rejected),
        "rows_broken": reader.broken_rows,
        "broken": [{"where": where, "reason": what} for where, what in reader.broken],
        "rows_of_evaluation": reader.evaluation,
        "totals": {NAMES[kind]: totals.as_json() for kind, totals in reader.totals.items() if totals.sequences},
    }


def _json_side(chat: Chat, side: Side) -> dict[str, Any]:
    """`tokens`: where a character takes several tokens, it stands at the last of them and nothing at the others."""
    texts = [text for piece in pieces(chat, side) for text in [*[""] * (len(piece.ids) - 1), piece.text]]
    return {
        "name": side.name,
        "max_length": side.max_length,
        "past_max_length": side.past,
        "ids": side.encoded.ids,
        "tokens": texts,
        "mask": side.encoded.mask,
    }


# ── Reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


def _check_replaceable(path: Path) -> None:
    """Raises `UserError` rather than replace what this command did not write."""
    if not path.exists():
        return
    if not path.is_file():
        raise UserError("is no file", where=str(path), remedy="--html with a file's name")
    with path.open("rb") as file:
        if MARK.encode() not in file.read(1024):
            raise UserError("was not written by this command, and stays", where=str(path), remedy="another --html")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
