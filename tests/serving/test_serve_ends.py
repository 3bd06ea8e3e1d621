"""How a server ends whose engine ended first; and the address that it tells where it listens on all interfaces."""

import os
import signal
import socket
from threading import Timer
from typing import TYPE_CHECKING

import pytest

from pipeline.errors import StageFailed
from pipeline.records.find import records
from pipeline.stage import run_stage
from serving.serve import Serve
from tests.serving.front.scripted_engine import Scripted

if TYPE_CHECKING:
    from tests.conftest import Trained


def test_an_engine_that_ends_fails_the_record_with_its_cause(
    copied: "Trained", monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(Scripted):
        def start(self) -> None:
            super().start()
            Timer(0.2, self.stop).start()

    monkeypatch.setattr(Serve, "_engine", lambda serve: Dies(serve.chat, ended="llama-server was killed by SIGKILL"))
    else_it_goes_on = Timer(20, os.kill, (os.getpid(), signal.SIGTERM))
    else_it_goes_on.start()
    with pytest.raises(StageFailed, match=r"^llama-server was killed by SIGKILL$"):
        run_stage(Serve, copied.job("serve_config.port=0"))
    else_it_goes_on.cancel()
    _, facts = next(records(copied.workspace))
    assert (facts.stage, facts.status) == ("serve", "failed") and facts.failure
    assert "SIGKILL" in facts.failure.message and facts.results["requests"] == 0


@pytest.mark.parametrize(("host", "own"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_the_address_told_is_one_that_this_machine_can_open(trained: "Trained", host: str, own: str) -> None:
    serve = Serve.prepare(trained.job("serve_config.port=0", f"serve_config.host='{host}'"))
    serve.listener.close()
    assert serve.address == f"http://{own}:{serve.port}/v1"
    everywhere = f" and on all interfaces of {socket.gethostname()}" if host != own else ""
    assert dict(serve.plan())["address"] == serve.address + everywhere
