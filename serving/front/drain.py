"""uvicorn, which at the first SIGTERM goes on listening until what runs has ended, and ends when its engine does.

uvicorn's own closes its socket at once, so that a balancer meets a refused connection where it should read 503.
"""

from types import FrameType

import uvicorn

from pipeline.progress import duration, say
from serving.engine import Engine
from serving.front.limits import Gate


class DrainingServer(uvicorn.Server):
    """The first signal closes the gate, the second ends what runs with an error; both then end the server.

    An engine that is no longer alive ends it too, and `failure` then says how. `timeout_graceful_shutdown` of the
    configuration is only for clients that do not read: what runs ends before.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate, engine: Engine) -> None:
        super().__init__(config)
        self._gate, self._engine, self._signals = gate, engine, 0
        self.failure: str | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)  # remembers the signal, and passes it on when the server has ended
        self._signals += 1
        if self._signals == 1:
            self.should_exit = False

    async def on_tick(self, counter: int) -> bool:
        gate = self._gate
        if self._signals and not gate.draining:
            gate.drain()
            if gate.open:
                most = duration(gate.config.drain_timeout)
                say(f"{gate.open} requests are answered first, {most} at most; once more to stop at once")
        if self._signals > 1:
            gate.drain(0)
        if not self._engine.alive:  # what runs fails by itself; now, before its log goes, it can be told why
            self.failure = self._engine.ended
        return await super().on_tick(counter) or gate.drained or self.failure is not None
