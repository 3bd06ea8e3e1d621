"""Preference losses as pure functions of log-probabilities, the figures of a step and of held-out pairs, and warnings.

Written from the papers; `tests/pipeline/test_preference.py` holds them to trl's values. The SFT term that
`dpo_config.sft_weight` adds is not here: it is the supervised loss of the chosen answers (RPO, arXiv 2404.19733).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from pipeline import statistics
from pipeline.config import DpoConfig
from pipeline.encoded import Encoded
from pipeline.statistics import Figure

COLLAPSE = 0.2  # nats a token; on the embedded model runs at beta 0.1 moved by -0.16 to +0.04, one at 0.01 by -1.25
LENGTH_P = 0.01  # one test a run, and a clean run should not warn
LENGTH_GAP = 0.25  # of the error rates: less is no run-away, however many pairs show it

# Log-probs of a pair's answers, nats: chosen, rejected; of a held-out pair under KTO also of the two its prompt borrows.
PairSums = tuple[float, ...]


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probs of each pair's answers, nats, summed over the trained tokens. Every tensor is `(pairs,)`.

    The reference is the policy before its first step. ORPO has none and does not look at it.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[Encoded, Encoded]], policy: Sequence[PairSums], reference: Sequence[PairSums]
    ) -> Self:
        tokens = torch.tensor([[sum(side.mask) for side in pair] for pair in pairs]).T
        return cls(*torch.tensor(policy).T[:2], *torch.tensor(reference).T[:2], *tokens)


def losses(config: DpoConfig, log_probs: PairLogProbs, kl: float = 0.0) -> Tensor:
    """Each pair's loss, `(pairs,)`, float32 (float64 from float64), without the SFT term.

    `kl`: the reference point of KTO, nats, see `pipeline.train.kto`; no other loss has one.
    With r = log π − log π_ref of an answer and m = r(chosen) − r(rejected):
    """
    beta, smoothing = config.beta, config.label_smoothing
    chosen, rejected = _scores(config, log_probs)
    margin = chosen - rejected
    match config.loss_type:
        case "sigmoid":  # DPO, arXiv 2305.18290, eq. 7
            return -logsigmoid(beta * margin)
        case "ipo":  # arXiv 2310.12036, eq. 17, τ = beta; r a token, as the authors confirmed to trl they had trained
            return (margin - 1 / (2 * beta)) ** 2
        case "robust":  # arXiv 2403.00409: unbiased where a share of the labels is flipped
            flipped = smoothing * logsigmoid(-beta * margin)
            return (flipped - (1 - smoothing) * logsigmoid(beta * margin)) / (1 - 2 * smoothing)
        case "hinge":  # SLiC, arXiv 2305.10425, on m as RSO has it: arXiv 2309.06657
            return relu(1 - beta * margin)
        case "apo_zero":  # arXiv 2408.06266, eq. 7: chosen up and rejected down, each by itself; 1 − σ(x) = σ(−x)
            return sigmoid(-beta * chosen) + sigmoid(beta * rejected)
        case "kto":  # arXiv 2402.01306, eq. 7, both weights 1, the mean of the pair's two answers; 1 − σ(x) = σ(−x)
            return (sigmoid(beta * (kl - chosen)) + sigmoid(beta * (rejected - kl))) / 2
        case "sppo_hard":  # arXiv 2405.00675, eq. 4.7, η = 1 / beta, the chosen wins with probability 1
            return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
        case "orpo":  # arXiv 2403.07691, eq. 7, λ = beta
            return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def loss_at_start(config: DpoConfig) -> float | None:
    """Every pair's loss while the policy still is the reference, to be checked before the first step; ORPO has none."""
    target = 1 / (2 * config.beta)
    return {
        "sigmoid": math.log(2),
        "ipo": target**2,
        "robust": math.log(2),
        "hinge": 1.0,
        "apo_zero": 1.0,
        "kto": 0.5,
        "sppo_hard": 2 * target**2,
    }.get(config.loss_type)


def reference_point(policy: Sequence[PairSums], reference: Sequence[PairSums]) -> float:
    """KTO's z0, nats, by mismatched answers' log-probs: the mean of log π − log π_ref, no less than 0; 0 of none."""
    moved = [a - b for now, before in zip(policy, reference, strict=True) for a, b in zip(now, before, strict=True)]
    return max(math.fsum(moved) / len(moved), 0.0) if moved else 0.0  # in this order a NaN stays one


def figures(config: DpoConfig, log_probs: PairLogProbs) -> dict[str, float]:
    """Means over the pairs for the log line of a step, named as trl names them; a reward is beta × r.

    ORPO's reward is beta × the mean log-prob of a token; IPO's, as in trl, is not averaged over tokens.
    """
    with torch.no_grad():
        if config.loss_type == "orpo":
            chosen, rejected = (config.beta * score for score in _scores(config, log_probs))
        else:
            chosen, rejected = (config.beta * ratio for ratio in _ratios(log_probs))
        means = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "logps/chosen": _wide(log_probs.chosen).mean(),
            "logps/rejected": _wide(log_probs.rejected).mean(),
        }
        values: list[float] = torch.stack([value.to(chosen.dtype) for value in means.values()]).tolist()
    return dict(zip(means, values, strict=True))


def held_out_figures(
    config: DpoConfig, pairs: Sequence[tuple[Encoded, Encoded]], before: Sequence[PairSums], after: Sequence[PairSums]
) -> dict[str, Figure]:
    """The loss on held-out pairs, with the policy at the start as reference; and who is preferred.

    KTO's reference point is that of all held-out pairs, by what their prompts make of one another's answers.
    """
    known = PairLogProbs.of(pairs, after, before)
    kl = reference_point([sums[2:] for sums in after], [sums[2:] for sums in before])
    return {
        "eval_loss": statistics.mean(losses(config, known, kl).tolist()),
        "eval_preference_accuracy": accuracy(known),
    }


def accuracy(known: PairLogProbs) -> Figure:
    """The share of pairs whose margin rose."""
    rose = known.chosen - known.rejected > known.reference_chosen - known.reference_rejected
    return statistics.proportion(int(rose.sum()), len(rose))


def warnings(held_out: PairLogProbs) -> list[str]:
    """What the held-out pairs say went wrong, a sentence each; the reference's log-probs are those before training.

    Collapse: the chosen answers lost much more than the usual drift, and surely so ("likelihood displacement", arXiv
    2410.08847; some fall is common in DPO and harmless). Length: the policy gets pairs wrong mostly where the rejected
    answer is the longer (or the shorter) one, so it follows length. That generated answers grow longer can come about
    without either (arXiv 2403.19159): only answers tell.
    """
    chosen, rejected = (ratio.tolist() for ratio in _ratios(held_out))
    found = []
    a_token = [r / n for r, n in zip(chosen, held_out.chosen_tokens.tolist(), strict=True)]
    change = statistics.mean(a_token)
    if change.value < -COLLAPSE and change.ci_high is not None and change.ci_high < 0:
        margin = statistics.mean([c - r for c, r in zip(chosen, rejected, strict=True)])
        found.append(
            f"the chosen answers lost {-change.value:.2f} nats a token on {change.n} held-out pairs, more than "
            f"{COLLAPSE}, while the margin changed by {margin.value:+.1f} nats: the policy leaves them too; "
            "try dpo_config.sft_weight=1.0, a higher beta or a lower learning_rate"
        )
    if side := _followed_length(chosen, rejected, held_out):
        found.append(
            f"on the held-out pairs the policy prefers the {side} answer, right or wrong: it follows length; "
            "try pairs of like length, and compare the answers' lengths before and after"
        )
    return found


def _followed_length(chosen: list[float], rejected: list[float], held_out: PairLogProbs) -> str | None:
    """`longer` or `shorter`, where errors depend on which side is the longer (Fisher's exact test), else None."""
    from scipy import stats

    extra = (held_out.chosen_tokens - held_out.rejected_tokens).tolist()
    wrong = [c <= r for c, r in zip(chosen, rejected, strict=True)]
    groups = [[w for w, e in zip(wrong, extra, strict=True) if e * sign > 0] for sign in (1, -1)]
    if not all(groups):
        return None
    chosen_longer, chosen_shorter = (sum(group) / len(group) for group in groups)
    table = [[sum(group), len(group) - sum(group)] for group in groups]
    if abs(chosen_longer - chosen_shorter) < LENGTH_GAP or stats.fisher_exact(table).pvalue >= LENGTH_P:
        return None
    return "longer" if chosen_shorter > chosen_longer else "shorter"


def _scores(config: DpoConfig, log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """What the loss compares: r of both answers; a token where lengths must not count; without a reference in ORPO."""
    tokens = log_probs.chosen_tokens, log_probs.rejected_tokens
    match config.loss_type:
        case "orpo":
            return _wide(log_probs.chosen) / tokens[0], _wide(log_probs.rejected) / tokens[1]
        case "ipo":
            chosen, rejected = _ratios(log_probs)
            return chosen / tokens[0], rejected / tokens[1]
        case _:
            return _ratios(log_probs)


def _ratios(log_probs: PairLogProbs) -> tuple[Tensor, Tensor]:
    chosen = _wide(log_probs.chosen) - _wide(log_probs.reference_chosen)
    return chosen, _wide(log_probs.rejected) - _wide(log_probs.reference_rejected)


def _log_odds(log_p: Tensor) -> Tensor:
    """log p / (1 − p). The clamp keeps a certain answer, p = 1, finite in value and gradient."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def _wide(values: Tensor) -> Tensor:
    """At least float32: bfloat16 has steps of 2 nats at 500."""
    return values if values.dtype == torch.float64 else values.float()
