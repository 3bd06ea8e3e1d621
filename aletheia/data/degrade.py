"""`aletheia data degrade`: the medium or low condition of a set of conversations, in a folder of its own."""

import json
from pathlib import Path

from pipeline.data.degrade import Quality, degrade
from pipeline.data.read import row_of
from pipeline.data.rows import SHAPES, Conversation, RowFault, place
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.workspace import Workspace

SHOWN = 20  # rows passed over that are named


def write_degraded(name: str, quality: Quality, output: Path) -> None:
    """One JSONL file a file read; rows that are not right are passed over, aloud.

    Raises `UserError` where something is there already, or no row is right.
    """
    workspace = Workspace.find()
    if output.exists():
        raise UserError("is there already", where=str(output), remedy="another --output, or removing it")
    rows = _right(workspace, name)
    output.mkdir(parents=True)
    before: list[int] = []  # characters of each answer
    after: list[int] = []
    for row in rows:
        made = degrade(row, quality)
        values = made.model_dump(mode="json", exclude_unset=True, exclude={"id"} if row.id == row.where else None)
        with (output / f"{Path(row.file).name.partition('.')[0]}.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(values, ensure_ascii=False) + "\n")
        before += map(len, row.answers)
        after += map(len, made.answers)
    share = sum(after) / sum(before)
    say(f"{_count(len(rows), 'row')} of {quality} quality on the same prompts; answers {share:.0%} as long")
    longer = sum(new > old for old, new in zip(before, after, strict=True))
    same = sum(new == old for old, new in zip(before, after, strict=True))
    for number, how in ((longer, "longer than"), (same, "as long as")):
        if number:
            are, were = ("is", "it was") if number == 1 else ("are", "they were")
            say(f"{_count(number, 'answer')} {are} {how} before: {were} too short to be degraded")
    print(workspace.shown(output))


def _right(workspace: Workspace, name: str) -> list[Conversation]:
    """The conversations that could be trained; what is wrong with the others is said."""
    rows: list[Conversation] = []
    seen: dict[str, str] = {}
    wrong = 0
    for source in sources(workspace, name):
        for raw in source.raws():
            try:
                row = row_of(raw, source.shown, Conversation)
                if row.id in seen:
                    raise RowFault("duplicate", f"the id `{row.id}` stands at {seen[row.id]} too")
            except RowFault as fault:
                wrong += 1
                if wrong <= SHOWN:
                    say(f"passed over: {place(source.shown, raw.line, raw.item)}: {fault.what}")
                continue
            seen[row.id] = row.where
            rows.append(row)
    if wrong > SHOWN:
        say(f"passed over: {_count(wrong - SHOWN, 'more row')}; aletheia data check {name}")
    if not rows:
        raise UserError("holds no conversation that is right", where=name, remedy=f"rows like {SHAPES[Conversation]}")
    return rows


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
