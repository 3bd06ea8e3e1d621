"""What an adapter makes of one tensor of its base: the arithmetic of a merge, and how far it may be off.

    LoRA    W' = W + s·B·A, s = alpha / r             arXiv 2106.09685
    rsLoRA  the same, s = alpha / sqrt(r)             arXiv 2312.03732
    DoRA    W' = m · V / ‖V‖, V = W + s·B·A           arXiv 2402.09353; m and the norm: a value for each row of V
                                                      (of an embedding, as peft has it: for each column)

Several LoRAs on one weight add up. Beside them: a tensor that was trained whole, and single rows of an embedding.

`float32` sums in float32 and rounds once to the weight's dtype. `peft` gives, bit for bit, what peft 0.21's
`merge_and_unload` gives: it rounds after each adapter, on an embedding also each update before it is added, and takes
DoRA's norm in float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.errors import UserError
from pipeline.merging.blocks import Memory, over_blocks

Arithmetic = Literal["float32", "peft"]
UNIT = 2**-24  # unit roundoff of float32
NOTHING = 1e-300  # where not even a last bit may differ


class Exact(NamedTuple):
    """Of rows, in a wider dtype. All of it may be written over by who asked for it, and with it the rows that were given."""

    was: Any
    values: Any
    allowed: Callable[[], Any]  # how far `merged` may be off; asked last: it may take the memory of `values`


At = Callable[[slice, Any], Exact]  # of rows, and these rows of the weight


class Update(Protocol):
    """Of one tensor."""

    @property
    def kind(self) -> str: ...

    def merged(self, weight: Any, arithmetic: Arithmetic = "float32", out: Any = None) -> Any:
        """`weight` with the adapter in it, of the same dtype, in `out` where it can be. `weight` itself is not altered.

        Of `weight` blocks of rows, dtype and shape are asked for.
        """

    def exact(self, weight: Any, arithmetic: Arithmetic = "float32") -> At:
        """What `merged` should give. Of `weight` the same is asked for; what of one block was given is gone with the next."""


@dataclass(frozen=True)
class Factor:
    """One adapter's B·A, float32: A `(rank, in)`, B `(out, rank)`. Of an embedding: in its width, out its tokens."""

    a: Any
    b: Any
    scale: float


class Product(NamedTuple):
    """A and s·B, the norms of their columns and rows, and the share of these that a sum in float32 may be off."""

    a: Any
    b: Any
    a_norm: Any
    b_norm: Any
    share: float


@dataclass(frozen=True)
class LowRank:
    """LoRA of one weight `(out, in)`, of one adapter or several; DoRA, of one alone, has a magnitude beside."""

    factors: tuple[Factor, ...]
    magnitude: Any = None  # float32, `(out,)`; of an embedding `(in,)`
    embedding: bool = False

    @property
    def kind(self) -> str:
        return "embedding" if self.embedding else "linear"

    def merged(self, weight: Any, arithmetic: Arithmetic = "float32", out: Any = None) -> Any:
        import torch

        if arithmetic == "peft":
            return self._as_peft(weight[:])
        merged = torch.empty(weight.shape, dtype=weight.dtype) if out is None else out
        by_column = None
        if self.magnitude is not None and self.embedding:
            squares = over_blocks(weight, lambda rows: self._total(weight, rows, Memory()).double().square_().sum(0))
            by_column = (self.magnitude / sum(squares) ** 0.5).float()

        memory = Memory()

        def merge(rows: slice) -> None:
            total = self._total(weight, rows, memory)
            if by_column is not None:
                total.mul_(by_column)
            elif self.magnitude is not None:
                norm = torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)
                total.mul_((self.magnitude[rows] / norm).float()[:, None])
            merged[rows] = total

        over_blocks(weight, merge)
        return merged

    def _total(self, weight: Any, rows: slice, memory: Memory) -> Any:
        import torch

        block = weight[rows]
        total = memory.take(torch.float32, block.shape).copy_(block)
        for factor in self.factors:
            total.addmm_(factor.b[rows], factor.a, alpha=factor.scale)
        return total

    def _as_peft(self, weight: Any) -> Any:
        """Products over whole matrices, in peft's order and memory layout, on which their last bits depend."""
        import torch

        for factor in self.factors:
            delta = (factor.a.T @ factor.b.T).T if self.embedding else factor.b @ factor.a
            delta = delta.mul_(factor.scale).to(torch.promote_types(delta.dtype, weight.dtype))
            if self.magnitude is None:
                delta = delta.to(weight.dtype) if self.embedding else delta
                total = delta.add_(weight)
            else:
                across = weight.T + delta.T if self.embedding else None  # not total.T: it lies otherwise in memory
                total = delta.add_(weight)
                scale = self.magnitude / torch.linalg.norm(total if across is None else across, dim=1)
                total.mul_(scale[:, None] if across is None else scale)
            weight = total.to(weight.dtype)
        return weight

    def exact(self, weight: Any, arithmetic: Arithmetic = "float32") -> At:
        """The bound of a sum of rank + 1 products in float32 (Higham 2002, section 3.1), with |B|·|A| ≤ ‖B‖‖A‖.

        In float64; a LoRA of 16-bit weights in float32, whose own error, as large, is added.
        """
        if self.magnitude is None:
            return self._rounded_as_peft(weight) if arithmetic == "peft" else self._rounded_once(weight)
        # of a norm: squares summed one after the other in float32; in float64 nothing that counts
        squares = len(weight) if self.embedding else weight.numel() // max(1, len(weight))
        of_norm = ((squares / 2 if arithmetic == "peft" else 0) + 4) * UNIT
        wide, products = self._products(weight)

        def sums(rows: slice, block: Any) -> tuple[Any, Any, Any]:
            was = block.to(wide)
            total = _summed(products, rows, was)
            return was, total, _error_of_sum(products, rows, total.abs())

        by_column = _norms(weight, sums) if self.embedding else None

        def at(rows: slice, block: Any) -> Exact:
            was, total, error = sums(rows, block)
            magnitude = (self.magnitude if self.embedding else self.magnitude[rows, None]).double()
            norm, off = by_column or (total.norm(dim=1, keepdim=True), error.norm(dim=1, keepdim=True))
            factor = magnitude / norm
            error.addcmul_(total.abs(), off / norm + of_norm).mul_(factor.abs())
            total.mul_(factor)
            return Exact(was, total, lambda: error.add_(rounding(total, weight)))

        return at

    def _rounded_once(self, weight: Any) -> At:
        """Each block in the memory of the one before."""
        wide, products = self._products(weight)
        share, least = half_unit(weight, wide)
        before, total = Memory(), Memory()

        def at(rows: slice, block: Any) -> Exact:
            was = before.take(wide, block.shape).copy_(block)
            values = _summed(products, rows, was, total.take(wide, block.shape))
            return Exact(was, values, lambda: _error_of_sum(products, rows, values.abs_(), share).add_(least))

        return at

    def _rounded_as_peft(self, weight: Any) -> At:
        """Where each adapter is rounded before the next is added; of an embedding also its update."""
        import torch

        wide, products = self._products(weight)

        def at(rows: slice, block: Any) -> Exact:
            was = block.to(wide)
            total, error = was.clone(), None
            for one in products:
                if error is not None:  # what the adapter before was rounded to
                    error.add_(rounding(total.abs().add_(error), weight))
                of_sum = _error_of_sum([one], rows, total.abs())
                error = of_sum if error is None else error.add_(of_sum)
                if self.embedding:
                    error.add_(rounding(torch.mm(one.b[rows], one.a), weight))
                total.addmm_(one.b[rows], one.a)
            return Exact(was, total, lambda: error.add_(rounding(total, weight)))  # type: ignore[union-attr]

        return at

    def _products(self, weight: Any) -> tuple[Any, list[Product]]:
        """The dtype to compute in, and each adapter's product in it."""
        import torch

        narrow = weight.dtype.itemsize < 4 and self.magnitude is None
        wide, sums = (torch.float32, 2) if narrow else (torch.float64, 1)
        products = []
        for factor in self.factors:
            a, b = factor.a.to(wide), factor.b.to(wide) * factor.scale
            products.append(Product(a, b, a.norm(dim=0), b.norm(dim=1), sums * (len(a) + 4) * UNIT))
        return wide, products


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained whole: a module to save, a bias."""

    tensor: Any
    kind = "replaced"

    def merged(self, weight: Any, arithmetic: Arithmetic = "float32", out: Any = None) -> Any:
        return self.tensor.to(weight.dtype, copy=True)

    def exact(self, weight: Any, arithmetic: Arithmetic = "float32") -> At:
        def at(rows: slice, block: Any) -> Exact:
            new = self.tensor.reshape(weight.shape)[rows].double()  # a number alone comes as a row of one
            return Exact(block.double(), new, lambda: rounding(new, weight))

        return at


@dataclass(frozen=True)
class Rows:
    """Single tokens' rows of an embedding or an output layer."""

    tokens: Any  # int64
    values: Any  # (tokens, width)
    kind = "tokens"

    def merged(self, weight: Any, arithmetic: Arithmetic = "float32", out: Any = None) -> Any:
        return weight[:].index_copy(0, self.tokens, self.values.to(weight.dtype))

    def exact(self, weight: Any, arithmetic: Arithmetic = "float32") -> At:
        """Every other row may be off by nothing."""
        import torch

        def at(rows: slice, block: Any) -> Exact:
            was = block.double()
            new = was.clone()
            error = torch.full_like(new, NOTHING)
            inside = (self.tokens >= rows.start) & (self.tokens < rows.start + len(new))
            tokens = self.tokens[inside] - rows.start
            new[tokens] = self.values[inside].double()
            error[tokens] = rounding(new[tokens], weight)
            return Exact(was, new, lambda: error)

        return at


@dataclass(frozen=True)
class Change:
    """Of one tensor: `load` reads the adapter's part of it. Only what adds up can be of several adapters."""

    load: Callable[[], Update]
    adds_up: bool = False


class Updates(Mapping[str, Update]):
    """By the name of the base's tensor; each is read when it is asked for, so that one at a time is in memory."""

    def __init__(self, changes: dict[str, Change]) -> None:
        self.changes = changes

    def __getitem__(self, name: str) -> Update:
        return self.changes[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.changes

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


@dataclass(frozen=True)
class Adapter:
    """The updates of a whole model, by the name of the base's tensor each belongs to."""

    kind: str  # LoRA | rsLoRA | DoRA | rsLoRA and DoRA; of several, joined by +
    updates: Mapping[str, Update]


def together(adapters: Sequence[Adapter], where: Sequence[str]) -> Adapter:
    """Several adapters as one that adds them up. Raises `UserError`, at its place in `where`, for one that does not."""
    if len(adapters) == 1:
        return adapters[0]
    changes: dict[str, Change] = {}
    for adapter, name in zip(adapters, where, strict=True):
        if "DoRA" in adapter.kind:
            raise UserError("is a DoRA, which adds up with no other adapter", where=name, remedy="merging it alone")
        assert isinstance(adapter.updates, Updates)
        for tensor, change in adapter.updates.changes.items():
            if not change.adds_up:
                raise UserError(
                    f"replaces {tensor}, which adds up with no other", where=name, remedy="merging it alone"
                )
            changes[tensor] = _sum(changes[tensor], change) if tensor in changes else change
    return Adapter(" + ".join(adapter.kind for adapter in adapters), Updates(changes))


def _sum(one: Change, other: Change) -> Change:
    def load() -> Update:
        first, second = one.load(), other.load()
        assert isinstance(first, LowRank) and isinstance(second, LowRank)
        return LowRank(first.factors + second.factors, embedding=first.embedding)

    return Change(load, adds_up=True)


def _summed(products: Sequence[Product], rows: slice, was: Any, out: Any = None) -> Any:
    """Of rows, W + Σ s·B·A."""
    import torch

    first, *others = products
    total = torch.mm(first.b[rows], first.a, out=out).add_(was)
    for one in others:
        total.addmm_(one.b[rows], one.a)
    return total


def _error_of_sum(products: Sequence[Product], rows: slice, total: Any, rounded: float = 0.0) -> Any:
    """How far this sum may be from one in float32, in the memory of its absolute values; and what share it is rounded by.

    A partial sum is no larger than the whole and the products that follow: so what each rounds is bounded by these.
    """
    shares = sum(one.share for one in products)
    part = shares + rounded
    for one in products:
        total.addr_(one.b_norm[rows], one.a_norm, beta=part, alpha=shares + one.share)
        part = 1.0
    return total


def _norms(weight: Any, sums: Callable[[slice, Any], tuple[Any, Any, Any]]) -> tuple[Any, Any]:
    """‖V‖ of each column in float64, and how far that of the sum in float32 may be from it."""
    found = over_blocks(weight, lambda rows: [one.square().sum(0) for one in sums(rows, weight[rows])[1:]])
    norm, off = (sum(squares) ** 0.5 for squares in zip(*found, strict=True))
    return norm, off


def rounding(values: Any, weight: Any) -> Any:
    """Half a unit in the last place of the weight's dtype."""
    share, least = half_unit(weight, values.dtype)
    return values.abs().mul_(share).add_(least)


def half_unit(weight: Any, wide: Any) -> tuple[float, float]:
    """Of the weight's dtype: a share of the value, and what is added to it below the smallest normal number.

    What is added is a normal number of `wide`: with any smaller one, some cores take a hundred times as long.
    """
    import torch

    limits = torch.finfo(weight.dtype)
    return limits.eps / 2, max(limits.tiny * limits.eps / 2, torch.finfo(wide).tiny)
