"""The result in the terminal: the same as on the page, in lines."""

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from eval.page import words
from eval.page.claims import Claim
from eval.page.result import Result, cost_lines, read
from eval.page.spent import Spent
from eval.page.tables import Table
from pipeline.progress import printable
from pipeline.records.schema import Facts


def print_result(facts: Facts, spent: Spent | None = None, out: TextIO | None = None, whole: bool = True) -> None:
    """`whole`: with the tables behind the claims. `spent` (`eval.page.spent.spent`) adds what it cost."""
    for line in told(read(facts, spent), whole):
        print(printable(line).rstrip(), file=out or sys.stdout)


def told(result: Result, whole: bool = True) -> Iterator[str]:
    yield f"{result.model} against {result.against}: {result.headline}"
    if result.claims:
        yield result.by_chance
    if result.status != "complete":
        yield f"The evaluation is {result.status}: what it has so far."
    for title, found in (("Better", result.better), ("Worse", result.worse), ("Neither, but changed", result.changed)):
        if found:
            yield from ("", title)
            yield from _aligned([_told(claim) for claim in found])
    if result.unknown:
        yield from ("", "Not known (rows that would decide: with 80 % power, were the difference to stay)")
        for claim, line in zip(result.unknown, _aligned([_told(claim) for claim in result.unknown]), strict=True):
            yield line
            yield f"    {claim.open}"
    if whole:
        for table in result.tables:
            yield from _table(table)
    if lines := cost_lines(result):
        yield from ("", "Cost", *(f"  {line}" for line in lines))


def _told(claim: Claim) -> list[str]:
    word = f", {claim.verdict}" if claim.verdict in ("higher", "lower") else ""
    return [claim.name, words.change(claim), f"change {words.delta(claim)}{word}", f"n = {claim.change.delta.n:,}"]


def _table(table: Table) -> Iterator[str]:
    yield from ("", table.title)
    yield from _aligned([list(table.header), *table.rows] if table.rows else [])
    yield from (f"  {note}" for note in table.notes)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
