"""`aletheia data feedback`: what people thought of answers, as preference pairs for DPO.

A pair is an answer rated up over one rated down to the same prompt, or a correction over the answer it corrects. What
gives no pair is counted by its reason. A pair's id is a hash of its texts, so the same pair is not written twice.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.data.read import read_rows
from pipeline.data.rows import PreferencePair, RowFault, text_digest, validated
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.workspace import Workspace
from serving.page.feedback import NAME, Feedback, Invalid, read

SHOWN = 20  # conflicts and lines passed over that are named


@dataclass(frozen=True)
class Rating:
    """One line of a feedback file, and where it stands."""

    told: Feedback
    record: str  # "" of a file that lies beside no record
    where: str

    @property
    def asked(self) -> str:
        return json.dumps(self.told.messages)

    @property
    def answer(self) -> str:
        return self.told.answer.strip()


def write_pairs(names: Sequence[str], target: Path, add: bool) -> None:
    """Prints the file's path. `names`: records, folders of theirs or files; none: all records of the workspace.

    Raises `UserError` where there is nothing to read, no rating gives a pair, or `target` is there and `add` is not said.
    """
    workspace = Workspace.find()
    there = _there(workspace, target, add)
    notes = Notes()
    ratings = [rating for path in _files(workspace, names) for rating in _ratings(workspace, path, notes)]
    pairs = {text_digest(pair): pair for pair in _pairs(_latest(ratings, notes), notes)}
    notes.tell()
    what = _count(len(ratings), "rating")
    if not pairs:
        remedy = "a better answer on the page, or rating several answers to one prompt"
        raise UserError(f"{what}, and none gives a pair", where="data feedback", remedy=remedy)
    new = [pair for digest, pair in pairs.items() if digest not in there]
    _append(target, new)
    known = len(pairs) - len(new)
    say(f"{what}: {_count(len(new), 'pair')} written{f', {known:,} stood there already' if known else ''}")
    shown = workspace.shown(target.resolve())
    say(f"check them before they are trained: aletheia data check {shown}")
    print(shown)


def _there(workspace: Workspace, target: Path, add: bool) -> set[bytes]:
    """Digests of the pairs that `target` holds. Raises `UserError` where it may not be added to, or is none of pairs."""
    if target.suffix != ".jsonl":
        raise UserError("is not called .jsonl", where=str(target), remedy="--to data/dpo/feedback.jsonl")
    if not target.exists():
        return set()
    if not add:
        raise UserError("is there already", where=str(target), remedy="--add, or another --to")
    if not target.stat().st_size:
        return set()
    return {text_digest(row) for row in read_rows(workspace, str(target.resolve()), PreferencePair)}


class Notes:
    """What gives no pair: reasons counted, the first places named."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lines: list[str] = []

    def add(self, reason: str, place: str = "", number: int = 1) -> None:
        self.counts[reason] += number
        if place:
            self.lines.append(place)

    def tell(self) -> None:
        for line in self.lines[:SHOWN]:
            say(line)
        if len(self.lines) > SHOWN:
            say(f"and {len(self.lines) - SHOWN:,} more like these")
        for reason, number in self.counts.items():
            if number:
                say(f"no pair from {_count(number, 'rating')}: {reason}")


def _files(workspace: Workspace, names: Sequence[str]) -> list[Path]:
    if not names:
        found = sorted(workspace.experiments.glob(f"EXP-*/{NAME}"))
        if not found:
            raise UserError("no record holds feedback yet", where=workspace.shown(workspace.experiments))
        return found
    files: dict[Path, None] = {}
    for name in names:
        path = workspace.path(name)
        path = next((p for p in (workspace.experiments / name / NAME, path / NAME, path) if p.is_file()), path)
        if not path.is_file():
            raise UserError("holds no feedback", where=name, remedy=f"EXP-… of a server, or a {NAME}")
        files[path.resolve()] = None
    return list(files)


def _ratings(workspace: Workspace, path: Path, notes: Notes) -> Iterator[Rating]:
    record = path.parent.name if path.parent.name.startswith("EXP-") else ""
    for line, told in read(path):
        where = f"{workspace.shown(path)}:{line}"
        if isinstance(told, Invalid):
            notes.add("the line could not be read", f"passed over: {where}: {told}")
        else:
            yield Rating(told, record, where)


def _latest(ratings: Sequence[Rating], notes: Notes) -> list[Rating]:
    """Of one completion the last word counts: who rates again has thought again. One that tells only the completion's id
    gets its prompt from another that tells both; where several are told under one id, nobody knows which was meant."""
    prompts: dict[str, dict[str, Rating]] = defaultdict(dict)
    for rating in ratings:
        if rating.told.messages:
            prompts[rating.told.completion_id][rating.asked] = rating
    latest: dict[tuple[str, ...], Rating] = {}
    for rating in ratings:
        told = rating.told
        if not told.messages:
            known = list(prompts[told.completion_id].values())
            if len(known) > 1:
                place = f"passed over: {rating.where}: `{told.completion_id}` is the completion of several prompts"
                notes.add("its completion_id stands beside several prompts", place)
            elif not known:
                notes.add("nothing tells its prompt")
            if len(known) != 1:
                continue
            rating = replace(rating, told=replace(told, messages=known[0].told.messages))
        one = (
            (rating.record, told.completion_id, rating.asked, rating.answer) if told.completion_id else (rating.where,)
        )
        if latest.pop(one, None):
            notes.add("it was rated again, and the last word counts")
        latest[one] = rating
    return list(latest.values())


def _pairs(ratings: Sequence[Rating], notes: Notes) -> Iterator[PreferencePair]:
    prompts: dict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        prompts[rating.asked].append(rating)
    for rated in prompts.values():
        corrected = [rating for rating in rated if rating.told.better.strip()]
        for rating in corrected:
            yield from _pair(rating.told.better, rating.told.answer, [rating], notes)
        answers: dict[str, list[Rating]] = defaultdict(list)
        for rating in rated:
            answers[rating.answer].append(rating)
        sides: dict[str, list[list[Rating]]] = {"up": [], "down": []}
        for same in answers.values():
            if len({rating.told.rating for rating in same}) > 1:
                places = " and ".join(rating.where for rating in same[:4])
                lost = [rating for rating in same if rating not in corrected]
                notes.add("one answer was rated up and down", f"rated up and down: {places}", len(lost))
            else:
                sides[same[0].told.rating].append(same)
        up, down = sides["up"], sides["down"]
        if up and down:  # each in at least one pair; all with all would weigh a prompt by its square
            for best, worst in islice(zip(cycle(up), cycle(down), strict=False), max(len(up), len(down))):
                yield from _pair(best[0].told.answer, worst[0].told.answer, [*best, *worst], notes)
        else:
            other = "up" if down else "down"
            lost = [rating for same in (*up, *down) for rating in same if rating not in corrected]
            notes.add(f"no other answer to its prompt was rated {other}", number=len(lost))


def _pair(chosen: str, rejected: str, of: Sequence[Rating], notes: Notes) -> Iterator[PreferencePair]:
    """One, or none where it would be no right row."""
    last = of[-1]
    values: dict[str, Any] = {
        "domain": "feedback",
        "prompt": list(last.told.messages),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "comments": [rating.told.text for rating in of if rating.told.text],
        "records": sorted({rating.record for rating in of if rating.record}),
        "models": sorted({rating.told.model for rating in of if rating.told.model}),
        "contracts": sorted({rating.told.contract for rating in of if rating.told.contract}),
        "feedback": [rating.told.id or rating.where for rating in of],
    }
    try:
        row = validated({name: value for name, value in values.items() if value}, PreferencePair, last.where, 0)
    except RowFault as fault:
        notes.add("it makes no right row", f"passed over: {last.where}: {fault.what}", len(of))
        return
    row.id = f"feedback-{text_digest(row).hex()[:16]}"
    yield row


def _append(target: Path, pairs: Sequence[PreferencePair]) -> None:
    """All of them or, where the disk is full, what was there before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(pair.model_dump(mode="json", exclude_unset=True), ensure_ascii=False) + "\n" for pair in pairs]
    with target.open("ab+") as out:
        size = out.seek(0, os.SEEK_END)
        if size:
            out.seek(size - 1)
            lines[:0] = [] if out.read(1) == b"\n" else ["\n"]
        try:
            out.write("".join(lines).encode())
            out.flush()
            os.fsync(out.fileno())
        except OSError:
            out.truncate(size)
            raise


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
