"""`aletheia data check` and `aletheia data show`."""

import sys
from typing import Any

from aletheia.output import print_json, print_table
from pipeline.data.formats import converted
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, Row, RowFault, describe
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.stage import Job
from pipeline.workspace import Workspace


def check(paths: list[str], as_json: bool) -> None:
    workspace = Workspace.find()
    found = []
    for name in paths:
        kinds = {source.path: _kind(source) for source in sources(workspace, name)}
        if len(set(kinds.values())) == 1:  # as training reads them: no id may stand twice in all the files
            read_rows(workspace, name, next(iter(kinds.values())))
        for path, kind in kinds.items():
            rows = read_rows(workspace, str(path), kind)
            found.append({"path": workspace.shown(path), "kind": type(rows[0]).__name__} | describe(rows))
    if as_json:
        print_json(found)
        return
    table = [(f["path"], f["kind"], f["rows"], ", ".join(f"{d} {n}" for d, n in f["domains"].items())) for f in found]
    print_table(("file", "rows are", "rows", "domains"), table, sys.stdout)


def show(path: str, job: Job, wanted: str | None) -> None:
    """Prints the sequence as the model meets it; what is trained stands between ⟦ and ⟧."""
    from pipeline.heldout import encode_pair
    from pipeline.model import find_base

    kind = _kind(sources(job.workspace, path)[0])
    rows = read_rows(job.workspace, path, kind)
    row = next((r for r in rows if wanted in (None, r.id)), None)
    if row is None:
        raise UserError(f"there is no row `{wanted}`", where=path, remedy=f"--row {rows[0].id}")
    chat = find_base(job.workspace, job.profile).chat()
    if isinstance(row, Conversation):
        sequences = {"conversation": chat.conversation(row.messages)}
    elif isinstance(row, PreferencePair):
        chosen, rejected = encode_pair(chat, row)
        sequences = {"chosen": chosen, "rejected": rejected}
    else:
        raise UserError("these rows are not trained on: they are for evaluation", where=row.where)
    for name, encoded in sequences.items():
        trained = sum(encoded.mask)
        print(f"# {row.where}  {row.id}  {name}: {len(encoded.ids)} tokens, {trained} trained")
        print(_marked(chat, encoded))


def _marked(chat: Any, encoded: Any) -> str:
    """The decoded tokens, run by run."""
    runs: list[tuple[bool, list[int]]] = []
    for token, trained in zip(encoded.ids, encoded.mask, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    texts = ((trained, chat.tokenizer.decode(ids)) for trained, ids in runs)
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


def _kind(source: Source) -> type[Row]:
    """Of the first row that can be told."""
    fault = RowFault("unknown-shape", "holds no rows")
    for raw in source.raws():
        try:
            if raw.values is not None:
                return converted(raw.values)[0]
        except RowFault as found:
            fault = found
    raise UserError(fault.what, where=source.shown, remedy=fault.remedy)
