"""Rows into those that are trained and those that are held out; and answers shuffled between rows, the control."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from pipeline.config import Validation
from pipeline.data.rows import AnyRow, Conversation, row_hash
from pipeline.errors import UserError


def split(rows: Sequence[AnyRow], validation: Validation) -> tuple[list[AnyRow], list[AnyRow]]:
    """Training rows and held-out rows.

    Which rows are held out depends on their content and the seed, not on their order: adding a row moves at most one other.
    """
    groups: dict[str, list[AnyRow]] = defaultdict(list)
    for row in rows:
        groups[row.domain if validation.strategy == "stratified" else ""].append(row)
    held_out = {
        row.id
        for group in groups.values()
        for row in sorted(group, key=lambda r: hashlib.sha256(f"{validation.seed} {row_hash(r)}".encode()).digest())[
            : round(len(group) * validation.fraction)
        ]
    }
    return [r for r in rows if r.id not in held_out], [r for r in rows if r.id in held_out]


def shuffle_answers(rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """The control: every answer stands under another row's question. The texts themselves stay as they are.

    Raises `UserError` when the rows are too few for that.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    places = [(row, turn) for row in order for turn, m in enumerate(rows[row].messages) if m.role == "assistant"]
    most = max(Counter(row for row, _ in places).values(), default=0)  # moved so far, no answer stays in its own row
    if 2 * most > len(places):
        raise UserError("too few rows to shuffle answers between them", where=rows[0].where)
    shuffled = [row.model_copy(deep=True) for row in rows]
    for (row, turn), (donor, donor_turn) in zip(places, places[most:] + places[:most], strict=True):
        shuffled[row].messages[turn].content = rows[donor].messages[donor_turn].content
    return shuffled
