"""Token ids and which of them are trained: what chat, training and measuring hand to each other. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence and, for each, whether it is trained."""

    ids: list[int]
    mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """-100 where nothing is trained, as in transformers."""
        return [token if trained else -100 for token, trained in zip(self.ids, self.mask, strict=True)]
