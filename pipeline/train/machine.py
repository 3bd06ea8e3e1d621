"""The machine that a training would run on: its memory, its matmul rate, and the pace of past records on it."""

import math
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from pipeline.records.energy import WATTS_PER_BUSY_CORE, gpus
from pipeline.records.find import records
from pipeline.records.schema import Facts
from pipeline.train.footprint import Shape
from pipeline.workspace import Workspace

SPARE = 0.05  # of the memory: the allocator's gaps on a GPU, the rest of the system on a CPU
MOST_PAST = 5  # records that a prediction is corrected by: the newest
MEASURED = 0.1  # seconds of matmuls


@dataclass(frozen=True)
class Machine:
    device: str  # cuda | cpu
    name: str  # the GPU's; of a CPU the host's, which its records name too
    memory: int  # bytes that a training may take
    watts: float | None = None  # when busy; None: not known
    threads: int = 1
    here: bool = True  # False: no such GPU is here, and it is only reckoned with

    def rate(self, shape: Shape, precision: str) -> float | None:
        """FLOP/s of a matmul of this model's own size, measured in a fraction of a second."""
        return _matmul_rate(self.device, shape.hidden, shape.ffn, precision) if self.here else None


CARD = Machine(
    "cuda", "a 24 GB card", round(24e9 * (1 - SPARE)), here=False
)  # where the profile wants a GPU and has none


def this_machine(device: str) -> Machine:
    """`device`: as in the profile. `CARD`, where a GPU is wanted and there is none: nothing fails here.

    Of a GPU what other processes leave free counts; of a CPU what the system calls available. The memory that this
    process holds already is its own to use.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        return Machine("cuda", torch.cuda.get_device_name(), round(free * (1 - SPARE)), _watts_of_gpu())
    if device == "cuda":
        return CARD
    import psutil

    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    threads = torch.get_num_threads()
    return Machine("cpu", socket.gethostname(), round(free * (1 - SPARE)), threads * WATTS_PER_BUSY_CORE, threads)


@dataclass(frozen=True)
class Past:
    """What a complete training of the same profile and stage took on this machine; None where its record does not say."""

    id: str
    memory: float | None  # measured peak / what the shape alone had predicted
    rate: float | None  # FLOP/s, of the predicted work
    seconds_a_row: float | None
    watts: float | None


def past(workspace: Workspace, profile: str, stage: str, machine: Machine) -> list[Past]:
    """The newest few, newest first."""

    def wanted(facts: Facts) -> bool:
        return (facts.profile, facts.stage, facts.status) == (profile, stage, "complete")

    found = ((file.id, facts) for file, facts in records(workspace, wanted) if machine.here and _ran_on(facts, machine))
    return [_told(name, facts, machine) for name, facts in islice(found, MOST_PAST)]


def _told(name: str, facts: Facts, machine: Machine) -> Past:
    training, used = facts.results.get("training"), facts.resources
    seconds, by_shape = _number(training, "seconds"), _number(training, "predicted", "memory_gb_by_shape")
    stopped_early = isinstance(training, dict) and "stopped_early" in training  # the work is that of all steps
    peak = _number(used, "gpu_peak_memory_gb" if machine.device == "cuda" else "peak_memory_gb")
    if machine.device == "cpu" and "peak_memory_note" in used:
        peak = None  # it may be an earlier stage's
    config = facts.configuration.get(f"{facts.stage}_config")
    rows = math.prod(_number(config, key) or 0.0 for key in ("batch_size", "gradient_accumulation"))
    kwh, wall = _number(used, "energy", "kwh"), _number(used, "wall_seconds")
    return Past(
        name,
        memory=_ratio(peak, by_shape),
        rate=None if stopped_early else _ratio(_number(training, "predicted", "flops"), seconds),
        seconds_a_row=_ratio(seconds, rows * (_number(training, "steps") or 0.0)),
        watts=_ratio(kwh and kwh * 3.6e6, wall),
    )


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _number(values: Any, *keys: str) -> float | None:
    """None where a record does not hold it: it may be older, or edited."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    right = isinstance(values, int | float) and not isinstance(values, bool)
    return float(values) if right and 0 < values < 1e30 else None


def _ran_on(facts: Facts, machine: Machine) -> bool:
    cards = facts.environment.get("gpus") or []
    if machine.device == "cuda":
        return bool(cards) and cards[0] == machine.name
    on_cpu = not cards or facts.configuration.get("device") == "cpu"
    return on_cpu and facts.environment.get("host") == machine.name


@cache
def _matmul_rate(device: str, hidden: int, ffn: int, precision: str) -> float:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    most, widest = (10**12, 2**16) if device == "cuda" else (4 * 10**9, 4096)  # FLOP: milliseconds; a tenth of a second
    hidden, ffn = min(hidden, widest), min(ffn, widest)
    rows = min(4096, max(64, most // (2 * hidden * ffn)))
    a, b = (torch.ones(size, device=device, dtype=dtype) for size in ((rows, hidden), (hidden, ffn)))

    def run() -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    run()  # the first one also loads the library
    fastest, until = math.inf, time.perf_counter() + MEASURED
    while (started := time.perf_counter()) < until:
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * rows * hidden * ffn / fastest


def _watts_of_gpu() -> float | None:
    """The card's power limit, which training comes near to."""
    with suppress(Exception):  # whatever goes wrong in the driver's library means the same: not known
        import pynvml

        return float(sum(pynvml.nvmlDeviceGetPowerManagementLimit(handle) for handle in gpus()[:1]) / 1000) or None
    return None
