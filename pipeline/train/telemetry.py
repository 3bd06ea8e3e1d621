"""Where a training's steps are shown as they happen: TensorBoard, MLflow, W&B. And what a step takes of the GPU.

    with Telemetry(job.config.telemetry, record) as telemetry:
        telemetry.write({"step": 51, "loss": 1.2, …})  # each line of log.jsonl

    tensorboard --logdir experiments

`log.jsonl` is the record; these are windows on it. One that fails says so once and fails no training. TensorBoard's
event files lie in the record's folder and are written at once. MLflow and W&B (`pipeline.train.trackers`) get theirs from a
thread, so that a slow server slows no step; what a server missed it is sent once it answers again, or after a resume.
"""

import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from pipeline import config
from pipeline.errors import Interrupted
from pipeline.progress import say
from pipeline.records import items
from pipeline.records.capture import redact
from pipeline.records.energy import Energy
from pipeline.records.lifecycle import Record
from pipeline.stage import flat
from pipeline.train.trackers import Line, Tracker, trackers

LOG = "log.jsonl"
EVERY, AGAIN = 1.0, 60.0  # seconds from one delivery to the next, and to the next try after one that failed
PATIENCE, LAST_TRY = 20.0, 5.0  # seconds that the end of a training waits for what is under way; after a failure


class Telemetry:
    """All that the profile's `telemetry` names. Entered by a resume once the log is cut to the checkpoint."""

    def __init__(self, settings: config.Telemetry, record: Record) -> None:
        self.settings, self.record = settings, record
        self.board: EventFile | None = None
        self.deliveries: list[Delivery] = []

    def __enter__(self) -> Self:
        earlier = [line for line in map(_line, items.read(self.record.folder / LOG)) if line]
        if self.settings.tensorboard:
            with _failing_alone("TensorBoard"):
                self.board = EventFile(self.record.folder / "tensorboard", earlier[-1].step if earlier else 0)
        for tracker in trackers(self.settings, self.record):
            with _failing_alone(tracker.name):
                tracker.load()
                self.deliveries.append(Delivery(tracker, self.record.folder, earlier))
        return self

    def write(self, line: dict[str, Any]) -> None:
        """Shows the numbers of one line; what is no number is left out."""
        told = _line(line)
        if told is None:
            return
        for delivery in self.deliveries:
            delivery.queue.put(told)
        board, self.board = self.board, None  # for good, if this fails: behind a torn record nothing can be read
        if board:
            with _failing_alone("TensorBoard"):
                board.write(told)
                self.board = board

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        status = "cancelled" if stopped else "complete" if error is None else "failed"
        if self.board:
            with suppress(OSError):
                self.board.close()
        for delivery in self.deliveries:
            delivery.queue.put(status)
        until = time.monotonic() + PATIENCE
        for delivery in self.deliveries:
            delivery.end(until)
            if where := delivery.tracker.where():
                self.record.facts.external[delivery.tracker.key] = where


class EventFile:
    """A TensorBoard event file, a record a line: `train/loss`, `eval/loss`, `grad_norm_by_layer/layers.0`.

    Written without the library's own writer, whose thread would hide a full disk.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Where event files lie already, the new one takes back what they say of steps after `step`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        earlier = any(folder.iterdir())
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}").open("xb")  # readers go by the order of names
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if earlier:
            self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, line: Line) -> None:
        values = [self._summary.Value(tag=_tag(name), simple_value=value) for name, value in line.numbers.items()]
        self._add(step=line.step, summary=self._summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _add(self, **of: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **of).SerializeToString())
        self._records.flush()


class Delivery:
    """Brings lines to one tracker from a thread of its own. How far it came stands in a file, for a resume."""

    def __init__(self, tracker: Tracker, folder: Path, earlier: Iterable[Line]) -> None:
        self.tracker = tracker
        self.queue: queue.SimpleQueue[Line | str] = queue.SimpleQueue()  # lines, and at the end how it ended
        self._state = folder / f"{tracker.key}.json"
        self._waiting: list[Line] = list(earlier)
        self._sent: tuple[int, bool] | None = None  # the last line's
        self._open = self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"telemetry {tracker.name}", daemon=True)
        self._thread.start()

    def end(self, until: float) -> None:
        """Waits for the rest, and says when it does not come. The queue holds how the training ended."""
        left = max(until - time.monotonic(), 0.0)
        self._thread.join(min(left, LAST_TRY) if self._failed else left)
        given_up, self._failed = self._thread.is_alive() and not self._failed, True  # from here on it says nothing
        if given_up:
            say(f"note: {self.tracker.name}: no answer; the last steps may not be there, and all are in {LOG}")

    def _work(self) -> None:
        ended, pause = None, 0.0
        while ended is None:
            ended = self._take(pause)
            try:
                self._deliver()
                pause = EVERY
            except Exception as error:  # whatever its HTTP library, its database's driver or its own service raises
                if not self._failed:
                    _say_failure(self.tracker.name, error)
                self._failed, pause = True, AGAIN
        if self._open:
            with suppress(Exception):
                self.tracker.close(ended)

    def _take(self, pause: float) -> str | None:
        """Gathers what comes in that time, or until the end: how it ended."""
        until = time.monotonic() + pause
        with suppress(queue.Empty):
            while True:
                taken = self.queue.get(timeout=max(until - time.monotonic(), 0.0))
                if isinstance(taken, str):
                    return taken
                self._waiting.append(taken)
        return None

    def _deliver(self) -> None:
        if not self._open:
            known = self.tracker.open()
            with suppress(OSError, ValueError, TypeError, KeyError):
                step, validates = json.loads(self._state.read_text())["sent"] if known else (None, None)
                self._sent = None if step is None else (int(step), bool(validates))
            self._open = True
        self._waiting = [line for line in self._waiting if self._sent is None or line.place > self._sent]
        if self._waiting:
            self.tracker.send(self._waiting)
            self._sent = self._waiting[-1].place
            part = self._state.with_suffix(".part")
            part.write_text(json.dumps({"sent": self._sent}))
            part.replace(self._state)


class GpuSampler:
    """What a step takes, for its line: begin() before it and read() after it.

        gpu_utilisation   %, share of the time in which the GPU was at work; mean of the driver's samples
        gpu_power_w       mean
        gpu_memory_gb     in use at the end, whoever uses it
        energy_kwh        since the training began, `before` a resume included; on a CPU an estimate

    Of several GPUs the mean utilisation and the sum of the rest. What NVML does not tell is left out; on a CPU all but
    the last.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.before, self.energy = before, Energy()
        self.begin()

    def begin(self) -> None:
        self._began, self._joules = time.time_ns(), self.energy.gpu_joules()

    def read(self) -> dict[str, float]:
        used = {"energy_kwh": float(f"{self.before + self.energy.kwh():.6g}")} if self.energy.is_whole() else {}
        if not self.energy.gpus:
            return used
        import pynvml

        with suppress(pynvml.NVMLError):
            utilisation = fmean(_utilisation(gpu, self._began // 1000) for gpu in self.energy.gpus)
            memory = sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in self.energy.gpus)
            used |= {"gpu_utilisation": round(utilisation, 1), "gpu_memory_gb": round(memory / 1e9, 3)}
        with suppress(pynvml.NVMLError):
            used["gpu_power_w"] = round(self._power(), 1)
        return used

    def _power(self) -> float:
        """By the energy counter, which moves about ten times a second; of a shorter step what NVML says of this moment."""
        import pynvml

        seconds, joules = (time.time_ns() - self._began) / 1e9, self.energy.gpu_joules()
        if seconds < 1 or joules is None or self._joules is None:
            return float(sum(pynvml.nvmlDeviceGetPowerUsage(gpu) for gpu in self.energy.gpus) / 1000)
        return (joules - self._joules) / seconds


def _utilisation(gpu: Any, since: int) -> float:
    """`since`: microseconds. The driver takes a sample every sixth of a second or so, and keeps some seconds of them."""
    import pynvml

    try:
        _, samples = pynvml.nvmlDeviceGetSamples(gpu, pynvml.NVML_GPU_UTILIZATION_SAMPLES, since)
        return fmean(sample.sampleValue.uiVal for sample in samples)
    except (pynvml.NVMLError, ValueError):  # none in a short step, or a driver that keeps none
        return float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)


def _line(line: dict[str, Any]) -> Line | None:
    step = line.get("step")
    if not isinstance(step, int):
        return None
    numbers = {
        name: float(value)
        for name, value in flat({key: value for key, value in line.items() if key != "step"}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Line(time.time(), step, "loss" not in line, numbers)


def _tag(name: str) -> str:
    """TensorBoard groups by what stands before the first slash."""
    group, inside, rest = name.partition(".")
    if inside:
        return f"{group}/{rest}"
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


@contextmanager
def _failing_alone(name: str) -> Iterator[None]:
    """What fails inside is said and ends there; a stop request goes on up."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        _say_failure(name, error)


def _say_failure(name: str, error: Exception) -> None:
    first = (redact(str(error)).strip().splitlines() or [""])[0]
    say(f"note: {name}: {type(error).__name__}: {first}; the training goes on, and its steps are in {LOG}")
