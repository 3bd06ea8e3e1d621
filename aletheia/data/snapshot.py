"""`aletheia data snapshot PATH…`: rows through the gate and kept under their hash, without a profile or a record."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Check
from pipeline.data import store
from pipeline.data.read import kind_of
from pipeline.data.rows import NAMES, describe
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.gate.admit import admit
from pipeline.progress import say
from pipeline.workspace import Workspace


def keep(names: Sequence[str]) -> None:
    """Prints where each set lies. Raises `UserError` where a path holds rows of several kinds, or none that pass."""
    workspace = Workspace.find()
    for name in names:
        kinds = {kind for source in sources(workspace, name) if (kind := kind_of(source))}
        if len(kinds) != 1:
            found = ", ".join(NAMES[kind] for kind in kinds) or "no rows"
            raise UserError(f"holds {found}: a snapshot is of one kind", where=name, remedy="its parts one by one")
        admitted = admit(workspace, name, kinds.pop(), Check())
        facts, path = describe(admitted.rows), store.keep(workspace, admitted.rows)
        for reject in admitted.rejects:
            say(f"rejected: {reject.where}: {reject.text}")
        say(f"{name}: {facts['rows']} of {admitted.read} rows kept; domains {json.dumps(facts['domains'])}")
        print(workspace.shown(Path(path)))
