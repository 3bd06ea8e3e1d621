"""`aletheia data degrade`: the medium or low condition of a set of conversations, in a folder of its own."""

import json
from pathlib import Path

from pipeline.data.degrade import Quality, degrade
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.workspace import Workspace


def write_degraded(name: str, quality: Quality, output: Path) -> None:
    """One JSONL file a file read. Raises `UserError` where something is there already, or a row is not right."""
    workspace = Workspace.find()
    rows = read_rows(workspace, name, Conversation)
    if output.exists():
        raise UserError("is there already", where=str(output), remedy="another --output, or removing it")
    output.mkdir(parents=True)
    before = after = 0
    for row in rows:
        made = degrade(row, quality)
        values = made.model_dump(mode="json", exclude_unset=True, exclude={"id"} if row.id == row.where else None)
        with (output / f"{Path(row.file).name.partition('.')[0]}.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(values, ensure_ascii=False) + "\n")
        before += sum(map(len, row.answers))
        after += sum(map(len, made.answers))
    say(f"{len(rows)} rows of {quality} quality on the same prompts; answers {after / before:.0%} as long")
    print(workspace.shown(output))
