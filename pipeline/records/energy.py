"""The energy that this process and its GPUs use: the GPUs' by their own counters, the processor's by an estimate.

A GPU's counter counts all that runs on it, whoever started that.
"""

import resource
import sys
from typing import Any

WATTS_PER_BUSY_CORE = 10.0  # an assumption, named in every record that uses it


class Energy:
    """What is used from now on."""

    def __init__(self) -> None:
        self.gpus = gpus()
        self._cpu, self._joules = _cpu_seconds(), _joules(self.gpus)

    def cpu_seconds(self) -> float:
        """Busy time of one core, over all threads and ended child processes."""
        return _cpu_seconds() - self._cpu

    def gpu_joules(self) -> float | None:
        """None where it is not known: no GPU, an old one, one shared out in parts (MIG)."""
        now = _joules(self.gpus)
        return None if now is None or self._joules is None else now - self._joules

    def kwh(self) -> float:
        return (self.cpu_seconds() * WATTS_PER_BUSY_CORE + (self.gpu_joules() or 0.0)) / 3.6e6

    def is_whole(self) -> bool:
        """Not where there are GPUs whose part is not known."""
        return _cuda() is None or self.gpu_joules() is not None

    def how(self) -> str:
        """What the figure rests on."""
        cpu = f"estimated: {WATTS_PER_BUSY_CORE:.0f} W a busy core"
        if _cuda() is None:
            return cpu
        return f"GPU {'measured' if self.is_whole() else 'unknown'}; CPU {cpu}"


def gpus() -> list[Any]:
    """NVML's handles of the GPUs that torch sees, by UUID: NVML's numbers know nothing of CUDA_VISIBLE_DEVICES.

    None on a CPU, and where NVML does not answer for each of them.
    """
    cuda = _cuda()
    if cuda is None:
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        uuids = [cuda.get_device_properties(i).uuid for i in range(cuda.device_count())]
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    except Exception:  # whatever goes wrong (no driver, no permission, MIG) means the same: not measured
        return []


def _cuda() -> Any:
    """`torch.cuda`, where torch is in use and finds a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _joules(handles: list[Any]) -> float | None:
    """Since the driver was loaded."""
    if not handles:
        return None
    import pynvml

    try:
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
    except pynvml.NVMLError:
        return None


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
