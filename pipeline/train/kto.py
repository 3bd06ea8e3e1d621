"""The reference point of KTO: how far the policy has moved on answers that belong to another prompt.

Ethayarajh et al. 2024, arXiv 2402.01306: z0 = max(0, mean of log π(y'|x) − log π_ref(y'|x)), an estimate of the KL
divergence. A pair's chosen answer is desirable and its rejected one undesirable. Each prompt x borrows both answers of the
pair before it in the step, so that those borrowed are the step's own; `trl.KTOTrainer` gives the same of a batch that is
the step. z0 is of the whole step, however many passes it takes, in eval mode, at the step's weights; it is a number, and
no gradient goes through it. It costs one more forward pass over the step, which keeps no activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipeline.encoded import Encoded
from pipeline.train.heldout import log_probs
from pipeline.train.passes import prompt_length
from pipeline.train.preference import PairSums, reference_point
from pipeline.train.trainer import Execution

Pair = tuple[Encoded, Encoded]  # prompt + chosen, prompt + rejected


def mismatched(pairs: Sequence[Pair], step: Sequence[int], max_length: int) -> list[Pair]:
    """The prompt of each of the step's pairs with the answers of another, which are cut at `max_length` tokens.

    A pair that is alone in its step borrows from the one before it in `pairs`; one that is alone there too has none.
    """
    others = [*step[-1:], *step[:-1]] if len(step) > 1 else [(one - 1) % len(pairs) for one in step]
    mismatches = [(pairs[own], pairs[other]) for own, other in zip(step, others, strict=True) if own != other]
    return [_borrowing(own, other, max_length) for own, other in mismatches]


def _borrowing(own: Pair, other: Pair, max_length: int) -> Pair:
    prompt, starts = prompt_length(own), prompt_length(other)

    def side(answer: Encoded) -> Encoded:
        ids = own[0].ids[:prompt] + answer.ids[starts:]
        mask = [False] * prompt + answer.mask[starts:]
        return Encoded(ids[:max_length], mask[:max_length])

    return side(other[0]), side(other[1])


@dataclass(frozen=True)
class ReferencePoint:
    """`point(step)` → nats, by the policy as it then is."""

    policy: Any
    pairs: Sequence[Pair]
    max_length: int
    how: Execution
    reference: dict[tuple[int, ...], list[PairSums]]  # of each step's mismatched pairs

    @classmethod
    def of(
        cls,
        policy: Any,
        pairs: Sequence[Pair],
        steps: Sequence[Sequence[int]],
        max_length: int,
        how: Execution,
        reference: Callable[[list[Pair]], list[PairSums]],
    ) -> Self:
        """`reference` gives pairs' log-probs under the reference; it is asked once, for all steps."""
        each = {tuple(step): mismatched(pairs, step, max_length) for step in steps}
        known = iter(reference([pair for borrowed in each.values() for pair in borrowed]))
        return cls(policy, pairs, max_length, how, {s: [next(known) for _ in borrowed] for s, borrowed in each.items()})

    def __call__(self, step: Sequence[int]) -> float:
        borrowing = mismatched(self.pairs, step, self.max_length)
        now = log_probs(self.policy, borrowing, self.how, "KTO's reference point", quiet=True)
        return reference_point(now, self.reference[tuple(step)])
