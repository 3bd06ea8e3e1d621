"""The merged model of the finished pipeline, and engines around it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.chat import Chat
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.transformers_backend.asking import CONTEXT

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def folder(trained: "Trained") -> Path:
    return trained.output("merge")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def start(tuned_chat: Chat) -> Iterator[Callable[..., TransformersEngine]]:
    """`start(model, …)`: an engine of this test's own, stopped when the test ends."""
    started: list[TransformersEngine] = []

    def run(model: Any, context: int = CONTEXT, **options: Any) -> TransformersEngine:
        engine = TransformersEngine(model, tuned_chat, context, **{"max_concurrent": 16} | options)
        engine.start()
        started.append(engine)
        return engine

    yield run
    for engine in started:
        engine.stop()


@pytest.fixture(scope="module")
def engine(model: Any, tuned_chat: Chat) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, tuned_chat, CONTEXT, max_concurrent=16)
    engine.start()
    yield engine
    engine.stop()
