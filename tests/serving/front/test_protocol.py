"""OpenAI's request shapes, as far as they are kept; the rest is refused by name."""

import json
from typing import Any

import pytest

from serving.front.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parsed,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hello"}


def chat(**changes: Any) -> ChatRequest:
    return parsed(ChatRequest, json.dumps(CHAT | changes).encode())


def completion(**changes: Any) -> CompletionRequest:
    return parsed(CompletionRequest, json.dumps(TEXT | changes).encode())


def refusal(kind: Any, body: Any) -> tuple[int, str | None, str | None, str]:
    with pytest.raises(ApiError) as raised:
        parsed(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    error = raised.value.body["error"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return raised.value.status, error["param"], error["code"], error["message"]


def test_the_defaults_are_openais() -> None:
    request = chat()
    assert (request.temperature, request.top_p, request.n, request.stream, request.stop) == (1.0, 1.0, 1, False, [])
    assert request.wanted_tokens is request.seed is request.top is None
    assert completion().top is None
    assert completion().echo is False


def test_null_is_the_default() -> None:
    for kind, body, needed in ((ChatRequest, CHAT, "messages"), (CompletionRequest, TEXT, "prompt")):
        optional = set(kind.model_fields) - {"model", needed}
        assert parsed(kind, json.dumps(body | dict.fromkeys(optional)).encode()) == parsed(
            kind, json.dumps(body).encode()
        )


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_stops_are_a_list_however_they_come(stop: Any, stops: list[str]) -> None:
    assert chat(stop=stop).stop == stops


@pytest.mark.parametrize("stop", ["", ["a", ""], 5, [5], list("abcdefghijklmnopq"), "x" * 1001, {"a": 1}])
def test_a_stop_that_cannot_be_is_refused(stop: Any) -> None:
    assert refusal(ChatRequest, CHAT | {"stop": stop})[:2] == (400, "stop")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_text_or_ids_or_several_of_them(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "prompt", [[], "", [""], [[]], [True], [1.0], ["a", [1]], [[1], "a"], [1, "a"], 7, {}, [["a"]]]
)
def test_a_prompt_that_is_neither_is_refused(prompt: Any) -> None:
    status, param, _, message = refusal(CompletionRequest, TEXT | {"prompt": prompt})
    assert (status, param) == (400, "prompt")
    assert "token ids" in message


@pytest.mark.parametrize("name", ["maxtokens", "guided_json", "functions", "min_p_", "max_completion_token"])
def test_an_unknown_parameter_is_an_error_never_ignored(name: str) -> None:
    assert refusal(ChatRequest, CHAT | {name: 1})[1:3] == (name, "unsupported_parameter")


SUPPORTED_ONLY_AS_NOTHING = [
    ("presence_penalty", 0, 0.5), ("frequency_penalty", 0.0, -1), ("repetition_penalty", 1.0, 1.1), ("top_k", -1, 50),
    ("logit_bias", {}, {"5": 1}), ("ignore_eos", False, True), ("response_format", {"type": "text"}, {"type": "json_object"}),
    ("tools", [], [{"type": "function"}]), ("tool_choice", "none", "auto"), ("min_tokens", 0, 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "nothing", "something"), SUPPORTED_ONLY_AS_NOTHING)
def test_what_is_not_there_may_be_asked_for_as_far_as_it_does_nothing(name: str, nothing: Any, something: Any) -> None:
    assert chat(**{name: nothing}) == chat()
    assert refusal(ChatRequest, CHAT | {name: something})[1:3] == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "1"), ("max_tokens", True), ("max_tokens", 1.0), ("max_tokens", 0), ("max_tokens", -1),
        ("max_completion_tokens", 0), ("temperature", -1), ("temperature", 2.1), ("temperature", "1"), ("top_p", 0),
        ("top_p", 1.1), ("n", 0), ("n", 129), ("n", 1.5), ("seed", 2**63), ("seed", 1.5), ("stream", 1), ("stream", "true"),
        ("logprobs", 5), ("top_logprobs", 21), ("top_logprobs", -1), ("model", 5), ("user", 5), ("stream_options", True),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_name(name: str, value: Any) -> None:
    status, param, _, message = refusal(ChatRequest, CHAT | {"logprobs": True} | {name: value})
    assert (status, param) == (400, name)
    assert name in message


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1" * 5000, b"1e-400000"])
@pytest.mark.parametrize("name", ["temperature", "max_tokens", "seed", "n", "top_p"])
def test_a_number_that_is_none_is_refused(name: str, number: bytes) -> None:
    body = json.dumps(CHAT).encode()[:-1] + b', "%s": %s}' % (name.encode(), number)
    try:
        parsed(ChatRequest, body)
    except ApiError as error:
        assert error.status == 400
    else:
        assert (name, number) == ("temperature", b"1e-400000")  # which is 0


def test_some_parameters_are_of_use_with_another_alone() -> None:
    assert "stream" in refusal(ChatRequest, CHAT | {"stream_options": {"include_usage": True}})[3]
    assert "logprobs" in refusal(ChatRequest, CHAT | {"top_logprobs": 2})[3]
    assert chat(logprobs=True, top_logprobs=2).top == 2
    assert chat(logprobs=True).top == 0
    assert completion(logprobs=0).top == 0
    assert completion(max_tokens=0).wanted_tokens == 0


def test_the_newer_name_of_max_tokens_goes_first() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7


@pytest.mark.parametrize(
    ("message", "role", "content"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "user", "a\nb"),
        ({"role": "developer", "content": "be brief"}, "system", "be brief"),
        ({"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None}, "assistant", "x"),
    ],
    ids=["parts of text", "developer", "as the client gave it back"],
)
def test_a_message_may_come_as_openais_clients_send_it(message: Any, role: str, content: str) -> None:
    [found] = chat(messages=[message]).messages
    assert (found.role, found.content) == (role, content)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "user", "content": " \n"}, "messages.0.content"),
        ({"role": "user", "content": ["x"]}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": "x", "name": "Ann"}, "messages.0.name"),
        ("x", "messages.0"),
    ],
)
def test_a_message_that_cannot_be_taken_is_refused_with_its_place(message: Any, param: str) -> None:
    assert refusal(ChatRequest, CHAT | {"messages": [message]})[:2] == (400, param)


@pytest.mark.parametrize("content", ["", " \n"])
def test_a_blank_message_is_called_so(content: str) -> None:
    messages = [{"role": "user", "content": content}]
    assert refusal(ChatRequest, CHAT | {"messages": messages})[3] == "messages.0.content: is blank"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"x"', b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"model": "m"} {}', b"\x00", b"nan",
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    assert refusal(ChatRequest, body)[0] == 400


def test_a_nul_is_a_character() -> None:
    assert chat(messages=[{"role": "user", "content": "a\0b"}]).messages[0].content == "a\0b"


def test_tokenize_takes_text_or_messages() -> None:
    assert parsed(TokenizeRequest, b'{"prompt": ""}').prompt == ""
    assert "either" in refusal(TokenizeRequest, {})[3]
    assert "either" in refusal(TokenizeRequest, {"prompt": "x", "messages": CHAT["messages"]})[3]
    assert refusal(TokenizeRequest, {"messages": CHAT["messages"], "add_special_tokens": True})[0] == 400
    assert refusal(DetokenizeRequest, {"tokens": "x"})[1] == "tokens"


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error")]
)
def test_an_error_has_openais_shape(status: int, kind: str) -> None:
    error = ApiError(status, "what", param="n", code="c")
    assert error.body == {"error": {"message": "what", "type": kind, "param": "n", "code": "c"}}
