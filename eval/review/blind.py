"""Which prompts are asked, in what order, and whose answer stands left: all drawn by one key, sealed before the first vote.

The key is 32 random bytes. Its SHA-256, the commitment, is written down before anything is shown; whoever has the key
later can draw everything again and see that no side was chosen after a vote. Every reviewer has an order and sides of
their own, so that what one person's place in the day, or eye for the left, does to votes is another's chance.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

KEY_BYTES = 32
REPEATS = 0.1  # of a reviewer's prompts, asked a second time with the sides swapped
APART = 5  # prompts between the two, where there are so many
FEWEST = 3  # prompts from which on some are repeated


@dataclass(frozen=True)
class Item:
    """One comparison as one reviewer sees it. `id` tells nothing without the key."""

    id: str
    prompt: str
    model_left: bool
    repeat: bool = False


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def commitment(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def sample(key: bytes, prompts: Sequence[str], n: int) -> list[str]:
    """`n` of the prompts' ids, each set of so many as likely as any other, in the order in which they were given."""
    chosen = set(sorted(prompts, key=lambda prompt: _draw(key, "sample", prompt))[:n])
    return [prompt for prompt in prompts if prompt in chosen]


def queue(key: bytes, reviewer: str, prompts: Sequence[str]) -> list[Item]:
    """All that a reviewer is shown, in their order: every prompt once, and some again later, with the sides swapped."""
    order = sorted(prompts, key=lambda prompt: _draw(key, "order", reviewer, prompt))
    again: dict[int, list[str]] = {}
    for place, prompt in _repeated(key, reviewer, order):
        again.setdefault(place, []).append(prompt)
    items = []
    for place, prompt in enumerate(order):
        items.append(_item(key, reviewer, prompt))
        items += [_item(key, reviewer, other, repeat=True) for other in again.get(place, [])]
    return items


def _repeated(key: bytes, reviewer: str, order: Sequence[str]) -> list[tuple[int, str]]:
    """Prompts to ask again, each with the place in the order after which it comes."""
    if len(order) < FEWEST:
        return []
    apart = min(APART, len(order) // 2)
    early = list(enumerate(order[: len(order) - apart]))
    early.sort(key=lambda found: _draw(key, "repeat", reviewer, found[1]))
    return [
        (place + apart + _number(key, "place", reviewer, prompt) % (len(order) - apart - place), prompt)
        for place, prompt in early[: max(1, round(REPEATS * len(order)))]
    ]


def _item(key: bytes, reviewer: str, prompt: str, repeat: bool = False) -> Item:
    left = bool(_number(key, "side", reviewer, prompt) % 2)
    name = _draw(key, "item", reviewer, prompt, "again" if repeat else "first")[:8].hex()
    return Item(name, prompt, left != repeat, repeat)


def _number(key: bytes, *words: str) -> int:
    return int.from_bytes(_draw(key, *words), "big")


def _draw(key: bytes, *words: str) -> bytes:
    """32 bytes that only the key can foretell. The words are told apart whatever they hold."""
    return hmac.new(key, json.dumps(words).encode(), "sha256").digest()
