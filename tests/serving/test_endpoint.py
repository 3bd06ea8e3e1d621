"""A running server from the outside: what goes wrong is one line, and a server of our own does not stay."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from pipeline.data.rows import Message
from pipeline.errors import StageFailed, UserError
from serving.endpoint import Endpoint, Lacks, answer_all, own_server
from serving.engine import Sampling
from tests.serving.in_process import serving

if TYPE_CHECKING:
    from pipeline.chat import Chat
    from tests.conftest import Trained

STATUS = {"full": 429, "missing": 404, "odd": 400, "broken": 500, "unknown": 501}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Has two models and wants the key `secret`; the rest of its paths fail by their name."""
    app = FastAPI()

    @app.middleware("http")
    async def key(request, call_next):  # type: ignore[no-untyped-def]
        if request.headers.get("authorization") != "Bearer secret":
            return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
        return await call_next(request)

    @app.get("/v1/models")
    def models() -> dict[str, list[dict[str, str]]]:
        return {"data": [{"id": "base"}, {"id": "tuned"}]}

    @app.post("/v1/chat/completions")
    def chat(body: dict) -> dict:  # type: ignore[type-arg]
        text = f"{body['messages'][0]['content']} {body['seed']}"
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    @app.post("/{path}")
    def other(path: str) -> JSONResponse:
        return JSONResponse({"error": {"message": f"{path}!"}}, STATUS[path])

    with serving(app) as address:
        yield address


@pytest.fixture
def endpoint(address: str, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    monkeypatch.setenv("ALETHEIA_API_KEY", "secret")
    return Endpoint(address, ("tuned", "EXP-1"))


def test_the_key_comes_from_the_environment_and_the_model_is_the_one_meant(endpoint: Endpoint, address: str) -> None:
    assert endpoint.model == "tuned"
    with pytest.raises(UserError, match="serves base, tuned; none of them is another or EXP-2; try the --profile"):
        Endpoint(address, ("another", "EXP-2"))
    assert endpoint.root == address.removesuffix("/v1")
    assert Endpoint(address.removeprefix("http://").removesuffix("/v1")).root == endpoint.root


@pytest.mark.parametrize("key", ["", "wrong"])
def test_a_wrong_key_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("ALETHEIA_API_KEY", key)
    with pytest.raises(UserError, match=r"wants another API key; try ALETHEIA_API_KEY="):
        Endpoint(address)


@pytest.mark.parametrize("path", ["missing", "odd", "unknown"])
def test_what_a_server_does_not_do_is_told_from_what_failed(endpoint: Endpoint, path: str) -> None:
    with pytest.raises(Lacks, match=f"{STATUS[path]} {path}!"):
        endpoint.post(f"/{path}")


@pytest.mark.parametrize("path", ["broken", "full"])
def test_a_server_that_fails_or_is_full_is_no_answer(endpoint: Endpoint, path: str) -> None:
    with pytest.raises(StageFailed, match=f"{path} answered {STATUS[path]} {path}!"):
        endpoint.post(f"/{path}")


def test_answers_come_in_the_order_of_their_questions_each_with_its_seed(
    endpoint: Endpoint, tuned_chat: "Chat"
) -> None:
    asked = [[Message(role="user", content=f"question {n}")] for n in range(20)]
    answers = answer_all(endpoint, tuned_chat, asked, Sampling(8), 100, "test")
    texts = [tuned_chat.tokenizer.decode(answer.tokens) for answer in answers]
    assert texts == [f"question {n} {100 + n}" for n in range(20)]
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_a_backend_that_is_not_here_says_so_itself(
    copied: "Trained", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALETHEIA_VLLM", str(tmp_path))
    with (
        pytest.raises(UserError, match="vLLM's environment is not installed here; try make setup-vllm"),
        own_server(copied.job(), copied.merge, "vllm"),
    ):
        pass
