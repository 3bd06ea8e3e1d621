"""Benchmarks over a server: the same tokens, so the same scores and the same words as in process."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmarks import harness, preflight
from pipeline.chat import Chat
from pipeline.config import ServeConfig
from pipeline.errors import StageFailed, UserError
from pipeline.tasks import find_tasks
from serving.endpoint import Endpoint
from serving.front.app import Usage, build_app
from serving.transformers_backend.engine import TransformersEngine
from tests.serving.in_process import serving

if TYPE_CHECKING:
    from tests.conftest import Trained


@pytest.fixture(scope="module")
def endpoint(model: Any, chat: Chat) -> Iterator[Endpoint]:
    with serving(build_app(TransformersEngine(model, chat, 2048, 4), "small", ServeConfig(), Usage())) as address:
        yield Endpoint(address)


@pytest.fixture(scope="module")
def ready(trained: "Trained") -> list[preflight.Ready]:
    tasks = find_tasks(trained.workspace.path("data/eval"), ["aletheia_choices", "aletheia_questions"])
    found = preflight.check(tasks, run_code=False).ready
    found[1].leaves["aletheia_questions"].set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
    return found


def test_scores_and_texts_are_those_of_the_model_in_process(
    model: Any, chat: Chat, endpoint: Endpoint, ready: list[preflight.Ready]
) -> None:
    chosen = harness.choose(ready, 4, 42)
    here = harness.run(harness.in_process(model, chat, 1), chat, ready, chosen, "here")
    there = harness.run(harness.served(endpoint, chat), chat, ready, chosen, "there")
    assert there["aletheia_choices"] == here["aletheia_choices"]
    assert there["aletheia_questions"] == here["aletheia_questions"]
    assert all(here["aletheia_questions"].written.values())


def test_a_doubled_bos_is_not_sent_to_a_server_either(
    chat: Chat, endpoint: Endpoint, ready: list[preflight.Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = harness.served(endpoint, chat)
    monkeypatch.setattr(chat.tokenizer, "chat_template", "{{ bos_token }}" + chat.tokenizer.chat_template)
    with pytest.raises(StageFailed, match="begins with 2 BOS tokens"):
        harness.run(lm, chat, ready, harness.choose(ready, 1, 42), "there")


def test_a_server_without_token_ids_is_refused_before_anything_runs(chat: Chat) -> None:
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "chat-only"}]}

    with serving(app) as address, pytest.raises(UserError, match="takes no token ids at /v1/completions"):
        harness.served(Endpoint(address), chat)
