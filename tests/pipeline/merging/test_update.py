"""Every kind of update is the sum in float64 within the bound that it states, in both arithmetics."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

import pipeline.merging.blocks
from pipeline.merging.blocks import blocks, over_blocks
from pipeline.merging.update import (
    Adapter,
    Change,
    Factor,
    LowRank,
    Replacement,
    Rows,
    Update,
    Updates,
    half_unit,
    together,
)

OUT, IN = 700, 500
TOKENS = torch.tensor([699, 3, 300])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.merging.blocks, "BLOCK", OUT * IN // 3)


def drawn(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape) * std


def factor(rank: int, scale: float) -> Factor:
    return Factor(drawn(rank, IN, std=0.1), drawn(OUT, rank, std=0.1), scale)


def embedding(rank: int, scale: float) -> Factor:
    """As peft holds it: A (rank, tokens), B (width, rank)."""
    return Factor(drawn(IN, rank, std=0.1).T, drawn(rank, OUT, std=0.1).T, scale)


@cache
def made() -> tuple[dict[str, Update], torch.Tensor]:
    torch.manual_seed(0)
    one, other, first, second = factor(4, 2.0), factor(7, 0.3), embedding(4, 2.0), embedding(7, 0.3)
    updates: dict[str, Update] = {
        "LoRA": LowRank((one,)),
        "two LoRAs": LowRank((one, other)),
        "DoRA": LowRank((one,), magnitude=drawn(OUT).abs() + 1),
        "embedding": LowRank((first,), embedding=True),
        "two on an embedding": LowRank((first, second), embedding=True),
        "DoRA on an embedding": LowRank((first,), magnitude=drawn(IN).abs() + 1, embedding=True),
        "replaced": Replacement(drawn(OUT, IN)),
        "tokens": Rows(TOKENS, drawn(3, IN)),
    }
    return updates, drawn(OUT, IN)


KINDS = list(made()[0])
BOTH = pytest.mark.parametrize("arithmetic", ["float32", "peft"])


def plainly(update: Any, weight: torch.Tensor) -> torch.Tensor:
    """In float64, from the formula."""
    exact = weight.double()
    if isinstance(update, Replacement):
        return update.tensor.double()
    if isinstance(update, Rows):
        for token, values in zip(update.tokens.tolist(), update.values, strict=True):
            exact[token] = values.double()
        return exact
    for one in update.factors:
        exact = exact + one.scale * one.b.double() @ one.a.double()
    if update.magnitude is None:
        return exact
    if update.embedding:
        return exact * (update.magnitude.double() / exact.norm(dim=0))
    return exact * (update.magnitude.double() / exact.norm(dim=1))[:, None]


def shares(update: Update, weight: torch.Tensor, merged: torch.Tensor, arithmetic: Any) -> torch.Tensor:
    """How much of its bound each element is off."""
    at = update.exact(weight, arithmetic)

    def share(rows: slice) -> torch.Tensor:
        exact = at(rows, weight[rows])
        off = merged[rows].double() - exact.values
        return off.abs() / exact.allowed()

    return torch.cat([share(rows) for rows in blocks(weight)])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_the_exact_sum_within_the_bound(kind: str, dtype: torch.dtype, arithmetic: Any) -> None:
    update, weight = made()[0][kind], made()[1].to(dtype)
    kept = weight.clone()
    merged = update.merged(weight, arithmetic)
    at = update.exact(weight, arithmetic)
    assert torch.equal(weight, kept) and merged.dtype == dtype and merged.shape == weight.shape
    exact = torch.cat(over_blocks(weight, lambda rows: at(rows, weight[rows]).values.clone()))
    assert exact.dtype.itemsize > dtype.itemsize  # LoRA of 16 bits in float32, all else in float64
    close = {"rtol": 1e-11, "atol": 1e-12} if exact.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(exact.double(), plainly(update, weight), **close)
    share = shares(update, weight, merged, arithmetic)
    assert share.max() <= 1
    if dtype != torch.float32:  # where the bound of float32 itself hardly counts: it is no wider than it must be
        assert share.max() > (0.3 if arithmetic == "peft" else 0.9)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_an_element_in_a_hundred_that_is_a_unit_off_is_outside_the_bound(kind: str, arithmetic: Any) -> None:
    update, weight = made()[0][kind], made()[1].bfloat16()
    merged = update.merged(weight, arithmetic)
    wrong = merged.clone()
    wrong.view(torch.int16)[::10, ::10] += 2  # units in the last place
    outside = shares(update, weight, wrong, arithmetic) > 1
    assert outside[::10, ::10].float().mean() > 0.5
    assert not (outside & (wrong == merged)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_cores_there_are_changes_no_bit_and_is_left_as_it_was(kind: str) -> None:
    update, weight = made()[0][kind], made()[1].bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            found.append(update.merged(weight))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_sum_that_is_rounded_after_each_adapter_is_outside_the_bound_of_one_rounding() -> None:
    """Which is peft's way: its bound is wider, and said to be its own."""
    update, weight = made()[0]["two LoRAs"], made()[1].bfloat16()
    merged = update.merged(weight, "peft")
    assert shares(update, weight, merged, "peft").max() <= 1 < shares(update, weight, merged, "float32").max()


def test_no_other_row_than_a_trained_token_s_may_change_by_anything() -> None:
    update, weight = made()[0]["tokens"], made()[1]
    merged = update.merged(weight)
    assert (merged != weight).any(dim=1).nonzero().flatten().tolist() == sorted(TOKENS.tolist())
    merged[5, 5] = torch.nextafter(merged[5, 5], torch.tensor(9.0))
    assert (shares(update, weight, merged, "float32") > 1).nonzero().tolist() == [[5, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_computed_with_numbers_below_the_smallest_normal_one(dtype: torch.dtype) -> None:
    """Each takes some cores a hundred times as long, and the rounding of bf16's smallest number is one in float32."""
    for wide in (torch.float32, torch.float64):
        share, least = half_unit(torch.empty(0, dtype=dtype), wide)
        assert share == torch.finfo(dtype).eps / 2 and least >= torch.finfo(wide).tiny


def test_biases_and_single_numbers_are_replaced_too() -> None:
    for shape in ((9,), ()):
        update, weight = Replacement(torch.full(shape, 0.1)), torch.zeros(shape).bfloat16()
        merged = update.merged(weight)
        assert merged.shape == shape and merged.dtype == torch.bfloat16
        exact = update.exact(weight := torch.atleast_1d(weight))(slice(0, 9), weight)
        assert torch.equal(exact.was, weight.double())
        assert (torch.atleast_1d(merged).double() - exact.values).abs().max() <= exact.allowed().max() < 1e-3


def adapter(kind: str = "LoRA", **updates: Update) -> Adapter:
    changes = {name: Change(partial(updates.__getitem__, name), isinstance(updates[name], LowRank)) for name in updates}
    return Adapter(kind, Updates(changes))


def test_several_adapters_add_up_each_at_its_own_scale() -> None:
    one, other, weight = LowRank((factor(4, 2.0),)), LowRank((factor(7, 0.3),)), made()[1]
    both = together([adapter(a=one, b=one), adapter("rsLoRA", b=other, c=other)], ["x", "y"])
    assert both.kind == "LoRA + rsLoRA" and sorted(both.updates) == ["a", "b", "c"]
    exact = plainly(one, weight) + plainly(other, weight) - weight.double()
    torch.testing.assert_close(both.updates["b"].merged(weight).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.updates["a"].merged(weight), one.merged(weight), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda: adapter("DoRA", a=made()[0]["DoRA"]), "^y: is a DoRA, which adds up with no other adapter"),
        (lambda: adapter(c=made()[0]["replaced"]), "^y: replaces c, which adds up with no other; try merging it alone"),
        (lambda: adapter(a=made()[0]["tokens"]), "^y: replaces a, which adds up with no other"),
    ],
)
def test_adapters_that_do_not_add_up_are_refused(second: Callable[[], Adapter], said: str) -> None:
    from pipeline.errors import UserError

    with pytest.raises(UserError, match=said):
        together([adapter(a=made()[0]["LoRA"]), second()], ["x", "y"])
