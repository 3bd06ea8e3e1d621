"""Training's gradients checked: analytical against central differences, in float64, through LoRA and each loss.

    aletheia check gradients

The analytical side is training's own path on a tiny random Llama: rows laid into passes (`pipeline.train.passes`), attention
per document, the LM head in chunks, the step's loss (`pipeline.train.objective`), backward. The other side is worked out
plainly, so that a fault that forward and backward share is seen too: transformers' own forward pass with a sequence a
row, full logits, and the losses once more as their papers write them. Each adapter tensor is moved along random
directions, in which all of its entries take part. Does not check: DoRA (its gradient leaves out that of the norm, by
design), quantised bases, dropout, the scaling of fp16.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from pipeline.config import DpoConfig
from pipeline.encoded import Encoded
from pipeline.train import attention
from pipeline.train.head import token_log_probs
from pipeline.train.objective import PreferenceLoss, SupervisedLoss
from pipeline.train.passes import Row, lay, supervised

TOLERANCE = 1e-5  # relative; without a fault it comes to some 1e-8
DIRECTIONS = 2  # for each tensor: one alone may happen to lie across the gradient
STEP = 1e-5  # along a direction of length 1: the error is of order STEP², and of rounding, 1e-16 / STEP
PASS_TOKENS = 24  # two passes and more
VOCABULARY = 64
KL = 0.3  # nats: KTO's reference point, which no gradient goes through

Answers = list[Tensor]  # log-probs of each sequence's trained tokens
Loss = SupervisedLoss | PreferenceLoss


@dataclass(frozen=True)
class Checked:
    """One loss through one way of laying out rows. `relative_error` is that of the worst adapter tensor."""

    loss: str
    forward: str  # packed | padded
    parameters: int
    relative_error: float

    @property
    def ok(self) -> bool:
        return self.relative_error < TOLERANCE  # NaN is not


@dataclass(frozen=True)
class _Case:
    name: str
    rows: Sequence[Row]
    step_loss: Callable[[], Loss]  # training's, of a step of all rows
    formula: Callable[[Answers], Tensor]  # the same loss, worked out plainly
    sequences: slice  # its rows', among those of all cases


def check_gradients() -> list[Checked]:
    """Every loss, packed and padded; takes seconds on a CPU. The random state is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model()
        rows, pairs = _rows()
        answers = [side for pair in pairs for side in pair]
        with torch.no_grad(), model.disable_adapter():
            reference = [answer.sum().item() for answer in _plainly(model, answers)]
        cases = [_supervised(rows), *_preferences(pairs, reference, slice(len(rows), None))]
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        directions = {
            name: [d / d.norm() for d in torch.randn(DIRECTIONS, *p.shape, dtype=p.dtype)]
            for name, p in tensors.items()
        }
        expected = _differences(model, tensors, directions, [*rows, *answers], cases)
        parameters = sum(p.numel() for p in tensors.values())
        found = []
        for number, case in enumerate(cases):
            for forward in ("packed", "padded"):
                gradients = _analytical(model, tensors, case, forward == "packed")
                errors = [
                    _relative(torch.stack([(gradients[t] * d).sum() for d in directions[t]]), expected[t][number])
                    for t in tensors
                ]
                worst = max(errors, key=lambda error: (math.isnan(error), error))
                found.append(Checked(case.name, forward, parameters, worst))
        return found


def _supervised(rows: list[Encoded]) -> _Case:
    weights = [1.0, 2.0, 0.5]

    def step_loss() -> Loss:
        return SupervisedLoss(list(range(len(rows))), [supervised(row) for row in rows], weights)

    def formula(answers: Answers) -> Tensor:
        each = torch.cat([weight * answer for weight, answer in zip(weights, answers, strict=True)])
        return -each.sum() / sum(weight * len(answer) for weight, answer in zip(weights, answers, strict=True))

    return _Case("sft", rows, step_loss, formula, slice(len(rows)))


def _preferences(pairs: list[tuple[Encoded, Encoded]], reference: list[float], sequences: slice) -> Iterator[_Case]:
    tokens = [(sum(chosen.mask), sum(rejected.mask)) for chosen, rejected in pairs]
    known = list(zip(reference[::2], reference[1::2], strict=True))

    def case(name: str, config: DpoConfig) -> _Case:
        def step_loss() -> Loss:
            return PreferenceLoss(list(range(len(pairs))), config, tokens, [1.0] * len(pairs), known, KL)

        def formula(answers: Answers) -> Tensor:
            chosen, rejected = answers[::2], answers[1::2]
            each = [
                _as_in_its_paper(config, c, r, c.sum() - before[0], r.sum() - before[1])
                for c, r, before in zip(chosen, rejected, known, strict=True)
            ]
            return torch.stack(each).mean() - config.sft_weight * torch.cat(chosen).mean()

        return _Case(name, pairs, step_loss, formula, sequences)

    for loss_type in get_args(DpoConfig.model_fields["loss_type"].annotation):
        yield case(loss_type, DpoConfig(loss_type=loss_type, label_smoothing=0.1 if loss_type == "robust" else 0.0))
    yield case("sigmoid + sft", DpoConfig(sft_weight=0.5))


def _as_in_its_paper(config: DpoConfig, chosen: Tensor, rejected: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """One pair's loss, written out anew and without care for overflow; see `pipeline.train.preference` for the papers.

    `chosen`, `rejected`: log-probs of tokens. `r`, `s`: log π / π_ref of the chosen and of the rejected answer.
    """
    beta, smoothing = config.beta, config.label_smoothing

    def sigma(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    def odds(answer: Tensor) -> Tensor:
        p = torch.exp(answer.mean())
        return p / (1 - p)

    right = sigma(beta * (r - s))  # the probability that the chosen one is preferred
    match config.loss_type:
        case "sigmoid":
            return -right.log()
        case "ipo":
            return (r / len(chosen) - s / len(rejected) - 1 / (2 * beta)) ** 2
        case "robust":
            return ((1 - smoothing) * -right.log() - smoothing * -(1 - right).log()) / (1 - 2 * smoothing)
        case "hinge":
            return torch.clamp(1 - beta * (r - s), min=0)
        case "apo_zero":
            return (1 - sigma(beta * r)) + sigma(beta * s)
        case "kto":
            return ((1 - sigma(beta * (r - KL))) + (1 - sigma(beta * (KL - s)))) / 2
        case "sppo_hard":
            return (r - 0.5 / beta) ** 2 + (s + 0.5 / beta) ** 2
        case "orpo":
            return -beta * sigma((odds(chosen) / odds(rejected)).log()).log()


def _analytical(model: Any, tensors: dict[str, Tensor], case: _Case, packed: bool) -> dict[str, Tensor]:
    """Gradients as a training step adds them up."""
    attention.install(model.get_base_model())
    model.zero_grad()
    loss = case.step_loss()
    for batch in lay(case.rows, PASS_TOKENS, packed):
        loss.part(token_log_probs(model, batch), batch).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in tensors.items()}


def _differences(
    model: Any,
    tensors: dict[str, Tensor],
    directions: dict[str, list[Tensor]],
    sequences: Sequence[Encoded],
    cases: Sequence[_Case],
) -> dict[str, Tensor]:
    """Central differences of every case's loss along each tensor's directions, (cases, directions)."""

    def losses() -> Tensor:
        answers = _plainly(model, sequences)
        return torch.stack([case.formula(answers[case.sequences]) for case in cases])

    found = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            start, slopes = tensor.clone(), []
            for direction in directions[name]:
                tensor.copy_(start + STEP * direction)
                above = losses()
                tensor.copy_(start - STEP * direction)
                slopes.append((above - losses()) / (2 * STEP))
            tensor.copy_(start)
            found[name] = torch.stack(slopes, dim=1)
    return found


def _plainly(model: Any, sequences: Sequence[Encoded]) -> Answers:
    """Log-probs of each sequence's trained tokens, by transformers' own forward pass with its `sdpa` attention.

    (Its eager attention takes the softmax in float32.) A sequence a row: what is causal does not see the padding.
    """
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([sequence.ids + [0] * (longest - len(sequence.ids)) for sequence in sequences])
    scores = torch.log_softmax(base(input_ids=ids, use_cache=False).logits, -1)
    found = []
    for row, sequence in enumerate(sequences):
        places = [place for place, trained in enumerate(sequence.mask) if trained]
        found.append(scores[row, [place - 1 for place in places], [sequence.ids[place] for place in places]])
    return found


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / torch.maximum(one.norm(), other.norm()))


def _model() -> Any:
    """A Llama with grouped-query attention and an adapter on every linear layer, nothing of it 0.

    Its norm is torch's own: transformers' computes in float32 whatever it is given, and leaves an error of 1e-5.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(shape).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = torch.nn.RMSNorm(shape.hidden_size, module.variance_epsilon, dtype=torch.float64)
            model.set_submodule(name, norm)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter, autocast_adapter_dtype=False).eval()


def _rows() -> tuple[list[Encoded], list[tuple[Encoded, Encoded]]]:
    """Random tokens: conversations of one and two turns, and pairs of unlike lengths."""

    def sequence(*turns: tuple[int, int]) -> Encoded:
        mask = [trained for asked, answered in turns for trained in [False] * asked + [True] * answered]
        return Encoded(torch.randint(VOCABULARY, (len(mask),)).tolist(), mask)

    def pair(prompt: int, chosen: int, rejected: int) -> tuple[Encoded, Encoded]:
        one = sequence((prompt, chosen))
        other = sequence((prompt, rejected))
        return one, Encoded(one.ids[:prompt] + other.ids[prompt:], other.mask)

    return [sequence((4, 5)), sequence((3, 2), (4, 6)), sequence((2, 1))], [pair(5, 4, 6), pair(3, 7, 1), pair(2, 2, 3)]
