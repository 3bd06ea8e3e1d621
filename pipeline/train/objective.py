"""What a step minimises, pass by pass: the mean over its supervised tokens, or over its preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.config import DpoConfig
from pipeline.train import preference
from pipeline.train.head import sequence_sums
from pipeline.train.passes import Pass
from pipeline.train.preference import PairLogProbs, PairSums


def domain_weights(weights: dict[str, float], domains: Sequence[str | None]) -> list[float]:
    """A row's weight in the loss, by its domain; 1 where none is named."""
    return [weights.get(domain or "", 1.0) for domain in domains]


@dataclass
class SupervisedLoss:
    """−log p of the step's supervised tokens, their mean; a row of weight 2 counts as if its tokens stood there twice."""

    rows: list[int]
    supervised: Sequence[int]  # tokens of every row of the training
    weights: Sequence[float]

    def part(self, log_probs: torch.Tensor, batch: Pass) -> torch.Tensor:
        weights = torch.tensor([self.weights[self.rows[i]] for i in batch.rows], device=log_probs.device)
        whole = sum(self.weights[row] * self.supervised[row] for row in self.rows)
        return -(log_probs * weights[batch.sequence]).sum() / whole

    def figures(self) -> dict[str, float]:
        return {}


@dataclass
class PreferenceLoss:
    """The mean over the step's pairs, and with `sft_weight` the chosen answers' supervised loss (RPO, arXiv 2404.19733)."""

    rows: list[int]
    config: DpoConfig
    tokens: Sequence[tuple[int, int]]  # supervised tokens of chosen and rejected, of every pair of the training
    weights: Sequence[float]
    reference: Sequence[PairSums]
    kl: float = 0.0  # KTO's reference point of the whole step, nats (`pipeline.train.kto`)
    _seen: list[PairLogProbs] = field(default_factory=list)

    def part(self, log_probs: torch.Tensor, batch: Pass) -> torch.Tensor:
        pairs = [self.rows[i] for i in batch.rows]
        sums = sequence_sums(log_probs, batch)

        def tensor(values: Sequence[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=sums.dtype, device=sums.device)

        weights = tensor([self.weights[pair] for pair in pairs])
        known = PairLogProbs(
            chosen=sums[::2],
            rejected=sums[1::2],
            reference_chosen=tensor([self.reference[pair][0] for pair in pairs]),
            reference_rejected=tensor([self.reference[pair][1] for pair in pairs]),
            chosen_tokens=tensor([self.tokens[pair][0] for pair in pairs]),
            rejected_tokens=tensor([self.tokens[pair][1] for pair in pairs]),
        )
        self._seen.append(PairLogProbs(*(value.detach() for value in vars(known).values())))
        losses = preference.losses(self.config, known, self.kl)
        loss = (losses * weights).sum() / sum(self.weights[row] for row in self.rows)
        if self.config.sft_weight:
            chosen = sum(self.weights[row] * self.tokens[row][0] for row in self.rows)
            loss = loss - self.config.sft_weight * (known.chosen * weights).sum() / chosen
        return loss

    def figures(self) -> dict[str, float]:
        """Rewards, margins and accuracy over the step's pairs; of KTO the reference point too."""
        whole = (torch.cat(parts) for parts in zip(*(vars(seen).values() for seen in self._seen), strict=True))
        found = preference.figures(self.config, PairLogProbs(*whole))
        return found | {"kl": self.kl} if self.config.loss_type == "kto" else found
