"""The processes of one training, each on a GPU of its own or on some cores of a CPU.

    torchrun --standalone --nproc-per-node 2 -m aletheia sft --profile tiny

Every rank knows all the rows of every step. It takes its share of them; gradients are added up, never averaged, because
a share's loss is already divided by what the whole step supervises. So the optimiser steps alike on every rank, and the
weights stay the same. One process is a `Ranks()` whose every method is as if there were no others.

What goes wrong on one rank ends all: it tells so where the others next gather something. The first rank alone writes
and speaks.
"""

import heapq
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import AletheiaError, StageFailed, UserError
from pipeline.progress import say
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
PATIENCE = timedelta(days=7)  # the others wait while the first one measures; torchrun ends them when one is gone


class Ranks:
    """This process's place among those of a training: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._others = size > 1  # that are still there
        self._failed = False  # one of them, and all know

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank. Raises what another rank ended with."""
        return self._meet(value) if self._others else [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes; the others wait for it."""
        if not self._others:
            return make()
        return self.gather(make() if self.first else None)[0]  # type: ignore[return-value]

    def share(self, rows: Sequence[T], size: Callable[[T], int]) -> list[int]:
        """The places of this rank's rows: the largest first, each to the rank that has the least. The same everywhere."""
        if not self._others:
            return list(range(len(rows)))
        sizes = [size(row) for row in rows]
        shares: list[list[int]] = [[] for _ in range(self.size)]
        filled = [(0, rank) for rank in range(self.size)]  # a heap: the least first
        for place in sorted(range(len(rows)), key=lambda place: -sizes[place]):
            taken, rank = filled[0]
            shares[rank].append(place)
            heapq.heapreplace(filled, (taken + sizes[place], rank))
        return sorted(shares[self.rank])

    def add_up(self, loss: "torch.Tensor", parameters: Iterable["torch.nn.Parameter"]) -> "torch.Tensor":
        """The sum of all ranks' losses; each trained parameter's gradient becomes that of all, none where no rank has one."""
        if not self._others:
            return loss
        import torch
        import torch.distributed as dist

        trained = [p for p in parameters if p.requires_grad]
        have = torch.tensor([p.grad is not None for p in trained], device=loss.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        parts = [loss.detach()[None], have, *gradients]
        flat = torch.cat([part.flatten() for part in parts])  # one message
        dist.all_reduce(flat)
        total, have, *gradients = flat.split([part.numel() for part in parts])
        for parameter, known, gradient in zip(trained, have.tolist(), gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if known else None
        return total[0].to(loss.dtype)

    def copy_first(self, parameters: Iterable["torch.nn.Parameter"]) -> None:
        """The trained parameters start as the first rank's."""
        if not self._others:
            return
        import torch.distributed as dist

        for parameter in parameters:
            if parameter.requires_grad:
                dist.broadcast(parameter.data, 0)

    @contextmanager
    def own_noise(self, device: "torch.device") -> Iterator[None]:
        """Dropout and NEFTune of its own for each rank, from one draw: outside of it all generators stay alike."""
        if not self._others:
            yield
            return
        import torch

        drawn = int(torch.randint(2**62, ()))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(drawn + self.rank)
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around all that ranks do. What one raises inside, the others raise too; the first one tells it."""
        try:
            yield
            self.gather(None)
        except Exception as error:
            if not self._others:
                raise
            if not self._failed:
                self._meet(error=error)
            if self.first:
                raise
            raise SystemExit(0) from error

    def part(self) -> None:
        """What is left is for the first rank alone: the others end here."""
        if not self._others:
            return
        self.gather(None)
        self._others = False
        if not self.first:
            raise SystemExit(0)

    @contextmanager
    def writable(self, workspace: Workspace) -> Iterator[Workspace]:
        """The workspace for the first rank; for another an empty one that goes away."""
        if self.first:
            yield workspace
            return
        with tempfile.TemporaryDirectory(prefix="aletheia-rank-") as folder:
            yield Workspace(Path(folder))

    def _meet(self, value: Any = None, error: Exception | None = None) -> list[Any]:
        """Raises what the lowest of the ranks that failed says, unless this one brings an error itself."""
        import torch.distributed as dist

        if error is not None and not isinstance(error, AletheiaError):
            error = StageFailed(f"rank {self.rank}: {type(error).__name__}: {error}")
        met: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(met, (value, error))
        except RuntimeError as broken:
            self._failed = True
            raise StageFailed("another rank is gone", remedy="RESUME=1, with as many ranks") from broken
        failed = [told for _, told in met if told is not None]
        self._failed = bool(failed)
        if failed and error is None:
            raise failed[0]
        return [told for told, _ in met]


def join(device: str) -> Ranks:
    """The rank that torchrun made this process, which then sees one GPU; else alone. `device`: as in the profile.

    torchrun's variables are taken out of the environment: transformers would wrap the model and share out the batches.
    Raises `UserError` for ranks on several machines, and for more ranks than GPUs.
    """
    if not started_by_torchrun():
        return Ranks()
    import torch
    import torch.distributed as dist

    rank, size, here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if here < size:
        refuse(f"{size} ranks on several machines", "torchrun --standalone, on one")
    if gpus and here > gpus:
        refuse(f"{here} ranks and {gpus} GPUs", f"--nproc-per-node {gpus}")
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    elif size > 1:
        say(f"{size} ranks: each takes its share of every step's rows")
    return Ranks(rank, size)


def refuse(what: str, remedy: str) -> None:
    """Raises `UserError` on the first rank; the others leave without a word."""
    if int(os.environ.get("RANK", "0")):
        raise SystemExit(0)
    raise UserError(what, remedy=remedy)


def started_by_torchrun() -> bool:
    """`WORLD_SIZE` alone may be a cluster's."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def several() -> bool:
    """Whether torchrun started more processes than this one."""
    return started_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1
