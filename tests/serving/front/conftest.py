"""The front over an engine that says what a test wrote, without a socket."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from pipeline.chat import Chat
from pipeline.model import Base
from tests.serving.front.scripted_engine import Scripted, over


@pytest.fixture(scope="session")
def chat(base: Base) -> Chat:
    return base.chat()


@pytest.fixture(scope="module")
def shared(chat: Chat) -> Iterator[TestClient]:
    """For what leaves nothing behind."""
    with over(Scripted(chat)) as client:
        yield client
