"""Processes that begin where the libraries are imported already: eight seconds of a core, once a test process.

They come from one server process, which has imported and done nothing else, so that each is as good as a fresh one.
What an interpreter of its own must show, what is imported and what is not, is not for here.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

from pipeline.workspace import CHECKOUT

get_temp_dir()  # for good: a test may point `tempfile` to a folder of its own, too deep for a socket's path


def context() -> ForkServerContext:
    """For `context().Process(target=…)`."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.forked_imports"])
    return found


def _run(main: Callable[[], Any], words: list[str], environment: dict[str, str], said: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(CHECKOUT)
    sys.argv = words
    main()


def _aletheia() -> None:
    from aletheia.cli import main

    main()


class Forked:
    """A running command, with the ways of `subprocess.Popen`; what it says goes to two files in the folder `said`."""

    def __init__(
        self,
        said: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        main: Callable[[], Any] = _aletheia,
    ) -> None:
        said.mkdir()
        (said / "out").touch()
        (said / "err").touch()
        self.said = said
        words, given = ["aletheia", *arguments], dict(os.environ if environment is None else environment)
        self.process: ForkServerProcess = context().Process(target=_run, args=(main, words, given, said))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("aletheia", timeout or 0)
        return (self.said / "out").read_text(), (self.said / "err").read_text()

    def errors(self) -> Iterator[str]:
        """The lines of stderr as they come, until it ends."""
        with (self.said / "err").open() as lines:
            line = ""
            while True:
                over = self.poll() is not None  # before it is read: then nothing comes any more
                line += lines.readline()
                if line.endswith("\n"):
                    yield line
                    line = ""
                elif over:
                    return
                else:
                    time.sleep(0.02)
