"""The server that judges by a rule: `start(…)`."""

from tests.eval.judges.judging_server import start

__all__ = ["start"]
