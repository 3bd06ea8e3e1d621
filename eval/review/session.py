"""A review under way: what a reviewer sees next, what becomes of their vote, and when it may be opened."""

import hashlib
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from eval.names import MODEL
from eval.review import blind, store, tally
from eval.review.shown import tree
from eval.review.store import Line, Plan, Stale, Store, Told
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import items

NAME, COMMENT = 60, 4000  # characters at most
PAUSE = 600.0  # seconds; who takes longer was away
RECENT = 20  # votes whose pace tells how long the rest will take
VOTES_EACH = 1


@dataclass(frozen=True)
class Rows:
    """The answers of one pair of contestants, by the prompt's id, and the file's hash."""

    prompts: dict[str, str]
    answers: dict[str, tuple[str, str]]  # the model's, the other's
    sha256: str


def read_rows(path: Path, against: str, shown: str) -> Rows:
    """Raises `UserError` where nobody of that name answered, or a prompt stands there twice."""
    found = items.read(path)
    prompts: dict[str, str] = {}
    answers: dict[str, tuple[str, str]] = {}
    for row in found:
        name, prompt, ours, theirs = (row.get(key) for key in ("id", "prompt", MODEL, against))
        if not (isinstance(name, str) and isinstance(prompt, str)):
            continue
        if not (isinstance(ours, str) and isinstance(theirs, str)):
            continue
        if name in prompts:
            raise UserError(f"the prompt {name} stands there twice", where=shown)
        prompts[name], answers[name] = prompt, (ours, theirs)
    others = sorted({key for row in found for key, value in row.items() if isinstance(value, str)} - {"id", "prompt"})
    if not prompts or against not in others or against == MODEL:
        known = ", ".join(name for name in others if name != MODEL) or "aletheia eval winrate"
        raise UserError(f"holds no answers of `{against}` beside the model's", where=shown, remedy=known)
    if len(prompts) < len(found):
        say(f"note: {len(found) - len(prompts)} rows of {shown} lack an answer and are left out")
    return Rows(prompts, answers, hashlib.sha256(path.read_bytes()).hexdigest())


class Review:
    """One pair of contestants before any number of people. Every method reads the file anew: others write into it too."""

    def __init__(self, folder: Path, rows: Rows, against: str, n: int | None = None, each: int | None = None) -> None:
        """Goes on with the review in `folder`, or begins one of `n` prompts (default: all). Raises `UserError`."""
        self.rows, self.store = rows, Store(folder)
        self._queues: dict[str, list[blind.Item]] = {}

        def make(commitment: str) -> Plan:
            if n is not None and n > len(rows.prompts):
                raise UserError(f"there are {len(rows.prompts)} prompts, not {n}", where="--n")
            planned = len(rows.prompts) if n is None else n
            return Plan(now(), commitment, against, planned, each or VOTES_EACH, rows.sha256)

        self.plan, self.key = self.store.begin(make)
        if self.plan.answers_sha256 != rows.sha256:
            raise UserError("the answers are not those that this review began with", where=str(folder))
        for asked, fixed, option in ((n, self.plan.planned, "--n"), (each, self.plan.votes_each, "--votes-each")):
            if asked is not None and asked != fixed:
                raise UserError(f"is {fixed} since this review began", where=option, remedy=f"without {option}")
        self.prompts = blind.sample(self.key, list(rows.prompts), self.plan.planned)

    def tally(self, told: Told | None = None) -> tally.Tally:
        told = told or self.store.read()
        return tally.count(self.queue, told.lines, self.plan)

    def queue(self, reviewer: str) -> list[blind.Item]:
        if reviewer not in self._queues:
            self._queues[reviewer] = blind.queue(self.key, reviewer, self.prompts)
        return self._queues[reviewer]

    def state(self, reviewer: str) -> dict[str, Any]:
        """For the page: where this reviewer stands and what is next, both answers at once, and no name of either."""
        told = self.store.read()
        mine = told.of(reviewer)
        queue = self.queue(reviewer)
        item = _next(queue, mine)
        done = len(store.standing(mine))
        return {
            "seq": len(mine),
            "done": done,
            "total": len(queue),
            "seconds_left": _seconds_left(mine, len(queue) - done),
            "complete": self.tally(told).complete,  # not may_open: by undoing one could ask which side would
            "item": self._shown(item) if item else None,
            "undone": _undone(mine),
        }

    def vote(self, line: Line) -> None:
        """Keeps a vote for the item that is next. Raises `Stale` and OSError."""
        queue = self.queue(line.reviewer)

        def fits(mine: list[Line]) -> bool:
            item = _next(queue, mine)
            return item is not None and item.id == line.item

        self.store.append(line, fits)

    def undo(self, reviewer: str, seq: int) -> None:
        """Takes the last vote that stands back. Raises `Stale`, also where there is none."""
        mine = self.store.read().of(reviewer)
        sent = mine[seq] if seq < len(mine) else None
        last = list(store.standing(mine))[-1:] if sent is None else [sent.item]
        if not last:
            raise Stale
        undo = Line(now(), reviewer, seq, last[0], store.UNDO)
        self.store.append(undo, lambda mine: list(store.standing(mine))[-1:] == last)

    def _shown(self, item: blind.Item) -> dict[str, Any]:
        ours, theirs = self.rows.answers[item.prompt]
        left, right = (ours, theirs) if item.model_left else (theirs, ours)
        return {"id": item.id, "prompt": tree(self.rows.prompts[item.prompt]), "left": tree(left), "right": tree(right)}


def line(reviewer: str, seq: int, item: str, choice: str, ratings: dict[str, dict[str, int]], comment: str) -> Line:
    return Line(now(), reviewer, seq, item, choice, ratings, comment)


def name_of(text: str) -> str:
    """A reviewer's name as it is kept: `Anna ` and `anna` are one. Raises ValueError for none, or one too long."""
    name = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not name or len(name) > NAME or not name.isprintable():
        raise ValueError(f"a name has 1 to {NAME} visible characters")
    return name


def _next(queue: Sequence[blind.Item], mine: list[Line]) -> blind.Item | None:
    voted = store.standing(mine)
    return next((item for item in queue if item.id not in voted), None)


def _undone(mine: list[Line]) -> dict[str, Any] | None:
    """What the reviewer had told of the item that they are shown again because they took it back."""
    if not mine or mine[-1].choice != store.UNDO:
        return None
    was = next(line for line in reversed(mine[:-1]) if line.item == mine[-1].item)
    return {"choice": was.choice, "ratings": was.ratings, "comment": was.comment}


def _seconds_left(mine: list[Line], left: int) -> float | None:
    """At the median pace of the last votes; None where there are too few to tell."""
    times = [datetime.fromisoformat(line.at).timestamp() for line in mine[-RECENT:]]
    taken = [later - earlier for earlier, later in pairwise(times) if later - earlier < PAUSE]
    return round(statistics.median(taken) * left) if len(taken) > 1 else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
