"""The chunked head against plain `log_softmax`: values, gradients, and what it keeps in memory."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from little import little_model, sequence
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.train import attention, head
from pipeline.train.head import bare, sequence_sums, token_log_probs
from pipeline.train.passes import Pass, lay

CHUNK, HIDDEN, VOCABULARY = 4, 6, 97


class Model(torch.nn.Module):
    """Hidden states that a decoder would give, and a head."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.float64, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(tokens)
        self.hidden = torch.nn.Parameter(torch.randn(1, tokens, HIDDEN, dtype=dtype))
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)

    def get_decoder(self) -> Callable[..., Any]:
        return lambda **_: SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def pass_of(trained: int) -> Pass:
    """Every other token is predicted from a place further back, so that no order is taken for granted."""
    places = torch.arange(trained) * 2
    targets = torch.randint(VOCABULARY, (trained,), generator=torch.Generator().manual_seed(trained))
    ids = torch.zeros(1, 2 * trained, dtype=torch.long)
    of = torch.zeros(trained, dtype=torch.long)
    return Pass(ids, ids, places.flip(0), targets, of, 1, (0,), ((2 * trained, 0, 0),), None)


def plain(model: Model, batch: Pass, dtype: torch.dtype) -> Tensor:
    bias = None if model.head.bias is None else model.head.bias.to(dtype)
    logits = torch.nn.functional.linear(model.hidden[0].to(dtype), model.head.weight.to(dtype), bias)
    return torch.log_softmax(logits, -1)[batch.predicted_at, batch.targets]


def with_gradient(values: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of an uneven sum, in which no token stands for another."""
    weights = torch.linspace(0.5, 2, len(values), dtype=values.dtype)
    return values.detach(), torch.autograd.grad((values * weights).sum(), by)[0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", CHUNK)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_log_probs_and_gradients_are_those_of_the_full_logits(trained: int, bias: bool) -> None:
    model, batch = Model(2 * trained, bias=bias), pass_of(trained)
    values, gradient = with_gradient(token_log_probs(model, batch), model.hidden)
    expected, right = with_gradient(plain(model, batch, torch.float64), model.hidden)
    assert (values - expected).abs().max() < 1e-10 and (gradient - right).abs().max() < 1e-10
    assert right.abs().max() > 0.1 and (gradient[0, 1::2] == 0).all()  # where nothing is predicted


def test_a_bias_that_is_forgotten_would_be_seen() -> None:
    model, batch = Model(10, bias=True), pass_of(5)
    values = token_log_probs(model, batch)
    model.head.bias = None
    assert (values - plain(model, batch, torch.float64)).abs().max() > 1e-3


def test_bf16_is_off_by_its_rounding_alone() -> None:
    """Against float64 from the same bfloat16 numbers; logits of bfloat16 are the larger part of it, here as anywhere."""
    model, batch = Model(24, torch.bfloat16), pass_of(12)
    values, gradient = with_gradient(token_log_probs(model, batch), model.hidden)
    expected, right = with_gradient(plain(model, batch, torch.float64), model.hidden)
    assert values.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert (values - expected).abs().max() < 0.02
    assert (gradient - right).norm() < 0.01 * right.norm()


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model, batch = Model(10), pass_of(5)
    model.head.requires_grad_(True)
    _, found = with_gradient(token_log_probs(model, batch), model.head.weight)
    _, right = with_gradient(plain(model, batch, torch.float64), model.head.weight)
    assert (found - right).abs().max() < 1e-10 and right.abs().max() > 0.1


def test_an_adapter_on_the_head_counts_and_is_trained() -> None:
    model = little_model(adapter={"target_modules": ["lm_head"]})
    attention.install(bare(model))
    rows = [sequence(random.Random(0), (3, 5))]
    (batch,) = lay(rows, 100, packed=True)
    found = token_log_probs(model, batch)
    logits = bare(model)(input_ids=torch.tensor([rows[0].ids])).logits[0]
    expected = torch.log_softmax(logits, -1)[range(2, 7), rows[0].ids[3:]]
    assert (found - expected).abs().max() < 1e-10
    with model.disable_adapter():
        assert (token_log_probs(model, batch) - found).abs().max() > 1e-3
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


class Largest(TorchDispatchMode):
    """The most logits that any one tensor held."""

    logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        for made in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(made, Tensor) and made.shape[-1:] == (VOCABULARY,) and made.shape[0] != HIDDEN:  # the weight
                self.logits = max(self.logits, made.numel() // VOCABULARY)
        return found


@pytest.mark.parametrize("trained_head", [False, True])
def test_logits_are_never_held_for_more_than_a_chunk_and_none_are_kept_for_backward(trained_head: bool) -> None:
    """A head that is trained keeps them all: what is looked for would be found."""
    trained = 5 * CHUNK
    model, batch = Model(2 * trained), pass_of(trained)
    model.head.requires_grad_(trained_head)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Largest() as largest:
        values = token_log_probs(model, batch)
    values.sum().backward()
    logits_kept = [shape for shape in kept if shape[-1:] == (VOCABULARY,)]
    assert kept and largest.logits == (trained if trained_head else CHUNK)
    assert bool(logits_kept) == trained_head


def test_nothing_is_worked_out_for_backward_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Model(10), pass_of(5)
    expected = token_log_probs(model, batch)
    monkeypatch.setattr(Tensor, "scatter_add_", None)  # the first step to the direction
    with torch.inference_mode():
        assert torch.equal(token_log_probs(model, batch), expected)
    with pytest.raises(TypeError):
        token_log_probs(model, batch)


def test_sums_are_by_sequence_and_of_none_are_zero() -> None:
    batch = Pass(*[torch.zeros(1)] * 4, torch.tensor([0, 0, 2]), 4, (0, 1), ((3, 1, 1), (3, 1, 1)), None)
    assert sequence_sums(torch.tensor([-1.0, -2.0, -4.0]), batch).tolist() == [-3, 0, -4, 0]


def test_wrappers_are_taken_off() -> None:
    model = little_model()
    inner = model.get_base_model()
    assert inner is not model
    for given in (model, inner, SimpleNamespace(module=model)):
        assert bare(given) is inner
