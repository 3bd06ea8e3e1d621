"""OpenAI's request shapes, as far as they are kept."""

from typing import Any

import pytest
from pydantic import ValidationError

from serving.protocol import ApiError, ChatRequest, CompletionRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_the_defaults_are_openais() -> None:
    request = ChatRequest.model_validate(CHAT)
    assert (request.temperature, request.top_p, request.n, request.stream, request.stops) == (1.0, 1.0, 1, False, [])
    assert request.max_tokens is request.max_completion_tokens is None


def test_null_is_the_default() -> None:
    optional = set(ChatRequest.model_fields) - {"model", "messages"}
    assert ChatRequest.model_validate(CHAT | dict.fromkeys(optional)) == ChatRequest.model_validate(CHAT)


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_stops_are_a_list_however_they_come(stop: Any, stops: list[str]) -> None:
    assert ChatRequest.model_validate(CHAT | {"stop": stop}).stops == stops


@pytest.mark.parametrize("name", ["seed", "tools", "logprobs", "response_format", "presence_penalty", "maxtokens"])
def test_an_unknown_parameter_is_an_error_never_ignored(name: str) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        ChatRequest.model_validate(CHAT | {name: 1})


@pytest.mark.parametrize("value", ["1", True, 1.0])
def test_a_number_is_not_guessed_from_another_type(value: Any) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | {"max_tokens": value})


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3]])
def test_a_prompt_is_text_or_token_ids(prompt: Any) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (500, "server_error")])
def test_an_error_has_openais_shape(status: int, kind: str) -> None:
    error = ApiError(status, "what", param="n", code="c")
    assert error.body == {"error": {"message": "what", "type": kind, "param": "n", "code": "c"}}
