"""How the rows of an optimiser step are laid into forward passes; what the step learns does not depend on it.

A packed pass holds documents end to end in one row, each attending to itself alone (`pipeline.train.attention`). A document is
a sequence, or a preference pair as prompt + chosen + rejected: the prompt stands once, and the rejected answer does not
see the chosen one. A padded pass is a rectangle with a sequence a row, for a model that cannot be packed.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from pipeline.encoded import Encoded

Row = Encoded | tuple[Encoded, Encoded]
Document = tuple[int, int, int]  # tokens of a whole sequence or of a pair's prompt, of chosen, of rejected
Trained = tuple[int, int, int]  # of a trained token: where it is predicted, its id, its sequence


@dataclass(frozen=True)
class Pass:
    """One forward pass. `trained` tokens are those with loss, row after row, chosen before rejected."""

    input_ids: torch.Tensor  # (1, tokens), padded: (sequences, longest)
    position_ids: torch.Tensor  # the same shape
    predicted_at: torch.Tensor  # (trained,) where in the flattened pass a trained token is predicted
    targets: torch.Tensor  # (trained,) its id
    sequence: torch.Tensor  # (trained,) its sequence; of pair i: 2i is chosen, 2i + 1 rejected
    sequences: int  # that it holds, those without a trained token too
    rows: tuple[int, ...]  # the rows it holds, by their place in the step
    documents: tuple[Document, ...] | None  # None: padded
    attention_mask: torch.Tensor | None  # padded: (sequences, longest)

    def to(self, device: torch.device) -> "Pass":
        moved = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Without padding; a prompt that stands once counts once."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


def lay(rows: Sequence[Row], pass_tokens: int, packed: bool, pad_id: int = 0) -> list[Pass]:
    """Passes of at most `pass_tokens` tokens, padding included; a row that alone is longer gets its own."""
    groups = _balanced([size(row) for row in rows], pass_tokens) if packed else _alike(rows, pass_tokens)
    return [_packed(rows, group) if packed else _padded(rows, group, pad_id) for group in groups]


def size(row: Row) -> int:
    """Tokens of a row when packed."""
    if isinstance(row, Encoded):
        return len(row.ids)
    chosen, rejected = row
    return len(chosen.ids) + len(rejected.ids) - prompt_length(row)


def supervised(row: Row) -> int:
    """Tokens of a row that have loss."""
    return sum(sum(side.mask) for side in _sides(row))


def prompt_length(pair: tuple[Encoded, Encoded]) -> int:
    """Tokens up to the answers, which both sides share. Raises `ValueError` when they do not."""
    chosen, rejected = pair
    length = chosen.mask.index(True)
    if rejected.mask.index(True) != length or chosen.ids[:length] != rejected.ids[:length]:
        raise ValueError("chosen and rejected have different prompts")
    return length


def out_of_memory(error: BaseException) -> bool:
    """Whether a pass ended for want of memory, on a GPU or a CPU: smaller ones may do."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _balanced(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """As few groups as fit, of like size: the longest row first, each into the emptiest group."""
    count = max(1, math.ceil(sum(min(size, capacity) for size in sizes) / capacity))
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while True:
        groups: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
        filled = [(0, group) for group in range(len(groups))]  # a heap: the emptiest first
        for row in largest_first:
            tokens, emptiest = filled[0]
            groups[emptiest].append(row)
            heapq.heapreplace(filled, (tokens + sizes[row], emptiest))
        alone = all(len(groups[group]) == 1 for tokens, group in filled if tokens > capacity)
        if alone or count >= len(sizes):
            return [sorted(group) for group in groups]
        count += 1


def _alike(rows: Sequence[Row], capacity: int) -> list[list[int]]:
    """Rows of like length together: little padding."""
    groups: list[list[int]] = []
    for row in sorted(range(len(rows)), key=lambda i: -_longest(rows[i])):
        widest = _longest(rows[groups[-1][0]]) if groups else 0
        if groups and widest * sum(len(_sides(rows[i])) for i in (*groups[-1], row)) <= capacity:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _packed(rows: Sequence[Row], group: Sequence[int]) -> Pass:
    ids: list[int] = []
    positions: list[int] = []
    documents: list[Document] = []
    trained: list[Trained] = []
    for n, row in enumerate(rows[i] for i in group):
        start, sides = len(ids), _sides(row)
        first = sides[0]
        ids += first.ids
        positions += range(len(first.ids))
        trained += [(start + i - 1, token, n * len(sides)) for i, token in _trained(first)]
        if isinstance(row, Encoded):
            documents.append((len(first.ids), 0, 0))
            continue
        prompt, rejected = prompt_length(row), sides[1]
        fork = len(ids)  # the rejected answer begins here, and is predicted from the prompt's end on
        ids += rejected.ids[prompt:]
        positions += range(prompt, len(rejected.ids))
        for i, token in _trained(rejected):
            trained.append((start + prompt - 1 if i == prompt else fork + i - prompt - 1, token, 2 * n + 1))
        documents.append((prompt, len(first.ids) - prompt, len(rejected.ids) - prompt))
    at, targets, sequence = _columns(trained)
    return Pass(
        torch.tensor([ids]),
        torch.tensor([positions]),
        at,
        targets,
        sequence,
        sum(len(_sides(rows[i])) for i in group),
        tuple(group),
        tuple(documents),
        None,
    )


def _padded(rows: Sequence[Row], group: Sequence[int], pad_id: int) -> Pass:
    sides = [side for i in group for side in _sides(rows[i])]
    longest = max(len(side.ids) for side in sides)
    ids = torch.full((len(sides), longest), pad_id)
    attention = torch.zeros((len(sides), longest), dtype=torch.long)
    trained: list[Trained] = []
    for n, side in enumerate(sides):
        ids[n, : len(side.ids)] = torch.tensor(side.ids)
        attention[n, : len(side.ids)] = 1
        trained += [(n * longest + i - 1, token, n) for i, token in _trained(side)]
    at, targets, sequence = _columns(trained)
    return Pass(
        ids,
        torch.arange(longest).expand(len(sides), -1),
        at,
        targets,
        sequence,
        len(sides),
        tuple(group),
        None,
        attention,
    )


def _trained(side: Encoded) -> list[tuple[int, int]]:
    """Place and id of each trained token."""
    return [(place, side.ids[place]) for place, trained in enumerate(side.mask) if trained]


def _columns(trained: list[Trained]) -> torch.Tensor:
    """(3, trained). Of none too: a guard says so later."""
    return torch.tensor(trained, dtype=torch.long).view(-1, 3).T.contiguous()


def _sides(row: Row) -> tuple[Encoded, ...]:
    return (row,) if isinstance(row, Encoded) else row


def _longest(row: Row) -> int:
    return max(len(side.ids) for side in _sides(row))
