"""The front over an engine that says what a test wrote: the shapes of its answers, and what it counts."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from pipeline.chat import Chat
from serving.front.app import Usage
from tests.serving.front.scripted_engine import CHAT, CHATS, QUESTION, TEXT, TEXTS, Scripted, content, events, over


def test_a_chat_has_openais_shape(shared: TestClient) -> None:
    answer = shared.post(CHATS, json=CHAT).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "scripted")
    message = {"role": "assistant", "content": "one two three", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("include", [False, True])
def test_a_streamed_chat_has_openais_parts(shared: TestClient, include: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include else {}
    response = shared.post(CHATS, json=CHAT | {"stream": True} | options)
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = events(response.text)
    assert len({part["id"] for part in parts}) == 1
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    if include:
        *parts, last = parts
        assert last["choices"] == []
        assert last["usage"] == shared.post(CHATS, json=CHAT).json()["usage"]
        assert all(part["usage"] is None for part in parts)
    else:
        assert not any("usage" in part for part in parts)
    assert content(parts) == "one two three"
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]


def test_the_usage_so_far_can_be_had_in_each_part(shared: TestClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    parts = events(shared.post(CHATS, json=CHAT | options).text)
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert parts[-1]["choices"] == []


@pytest.mark.parametrize("path", [CHATS, TEXTS])
def test_several_choices_each_have_their_seed_and_index(chat: Chat, path: str) -> None:
    request = {"n": 3, "seed": 7, "temperature": 1} | (CHAT if path == CHATS else TEXT)
    engine = Scripted(chat, "SEED it is")
    with over(engine) as client:
        answer = client.post(path, json=request).json()
        parts = events(client.post(path, json=request | {"stream": True}).text)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]
    assert texts == ["7 it is", "8 it is", "9 it is"]
    assert [content(parts, index) for index in range(3)] == texts
    assert answer["usage"]["prompt_tokens"] == len(engine.asked[0][0]), "the prompt counts once"
    assert answer["usage"]["completion_tokens"] == sum(len(engine.ids(text)) for text in texts)


@pytest.mark.parametrize(("seed", "given"), [(-1, 2**63 - 1), (2**63 - 1, 2**63 - 1), (0, 0)])
def test_an_engine_is_given_seeds_of_63_bits(chat: Chat, seed: int, given: int) -> None:
    engine = Scripted(chat)
    with over(engine) as client:
        assert client.post(CHATS, json=CHAT | {"seed": seed, "n": 2}).status_code == 200
    assert [sampling.seed for _, sampling in engine.asked] == [given, (given + 1) % 2**63]


@pytest.mark.parametrize("ids", [False, True])
def test_several_prompts_are_answered_in_order(chat: Chat, ids: bool) -> None:
    engine = Scripted(chat, "SEED!")
    prompts: list[Any] = ["first", "the second prompt"]
    if ids:
        prompts = [engine.ids(prompt) for prompt in prompts]
    with over(engine) as client:
        answer = client.post(TEXTS, json=TEXT | {"prompt": prompts, "n": 2, "seed": 3, "echo": True}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [
        "first3!", "first4!", "the second prompt3!", "the second prompt4!",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", [None, "never said"])
def test_no_half_character_is_streamed(chat: Chat, stop: str | None) -> None:
    text = "naïve 你好 🙂🙃 — done é \u2028 end"
    with over(Scripted(chat, text)) as client:
        response = client.post(CHATS, json=CHAT | {"stream": True, "stop": stop})
    parts = [part["choices"][0]["delta"].get("content", "") for part in events(response.text)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert "\u2028" not in response.text, "which some clients take for a line's end"


@pytest.mark.parametrize(
    ("text", "said"), [("one two END three", "one two "), ("one two EN", "one two EN"), ("END", ""), ("EEND", "E")]
)
def test_no_part_of_a_stop_string_is_told(chat: Chat, text: str, said: str) -> None:
    engine = Scripted(chat, text)
    with over(engine) as client:
        whole = client.post(CHATS, json=CHAT | {"stop": ["END"]}).json()
        parts = events(client.post(CHATS, json=CHAT | {"stop": ["END"], "stream": True}).text)
    assert whole["choices"][0]["message"]["content"] == content(parts) == said
    assert whole["choices"][0]["finish_reason"] == parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert engine.running == 0


# ── /tokenize and the like ───────────────────────────────────────────────────────────────────────────────────────────


def test_tokenize_tells_what_the_model_is_given(shared: TestClient, chat: Chat) -> None:
    from pipeline.data.rows import Message

    tokens = shared.post("/tokenize", json={"messages": QUESTION}).json()
    assert tokens["tokens"] == chat.prompt([Message.model_validate(QUESTION[0])])
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 2048
    assert tokens["token_strs"] is None
    plain = shared.post("/tokenize", json={"messages": QUESTION, "add_generation_prompt": False}).json()
    expected = chat.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=False, return_dict=False)
    assert plain["tokens"] == expected
    assert plain["count"] < tokens["count"]


@pytest.mark.parametrize("special", [None, True, False])
def test_tokenize_and_back(shared: TestClient, chat: Chat, special: bool | None) -> None:
    text = "def é(你): 🙂"
    request = {"model": "scripted", "prompt": text, "add_special_tokens": special, "return_token_strs": True}
    found = shared.post("/tokenize", json=request).json()
    assert found["tokens"] == chat.tokenizer(text, add_special_tokens=special is not False)["input_ids"]
    assert found["token_strs"] == chat.tokenizer.convert_ids_to_tokens(found["tokens"])
    back = shared.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back["prompt"] == chat.tokenizer.decode(found["tokens"])


def test_lm_evals_remote_tokenizer_works(shared: TestClient, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests
    from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

    def answered(self: Any, method: str, url: str, json: Any = None, **_: Any) -> Any:
        found = shared.request(method, url.removeprefix("http://there"), json=json)
        found.ok = found.is_success  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(requests.Session, "request", answered)
    assert check_remote_tokenizer_support("http://there/v1/completions")
    remote = RemoteTokenizer("http://there/v1/completions")
    assert remote.eos_token_id == chat.tokenizer.eos_token_id
    assert remote.decode(remote.encode("a lock")) == "a lock"
    assert remote.apply_chat_template(
        QUESTION, bos_token=chat.tokenizer.bos_token
    ) == chat.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


# ── what it counts ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_done_is_counted_truly(chat: Chat) -> None:
    usage, engine = Usage(), Scripted(chat)
    with over(engine, usage) as client:
        answers = [client.post(CHATS, json=CHAT).json(), client.post(TEXTS, json=TEXT | {"n": 2}).json()]
        client.post(CHATS, json=CHAT | {"stream": True})
        for _ in range(3):
            client.post(CHATS, json=CHAT | {"model": "x"})
        client.get("/nothing")
        text = client.get("/metrics").text
    prompts, completions = (
        sum(a["usage"][name] for a in [*answers, answers[0]]) for name in ("prompt_tokens", "completion_tokens")
    )
    assert (usage.requests, usage.refused, usage.errors, usage.cut_off, usage.timed_out) == (3, 4, 0, 0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompts, completions)
    for line in (
        f'aletheia_requests_total{{endpoint="{CHATS}",status="200"}} 2',
        f'aletheia_requests_total{{endpoint="{CHATS}",status="404"}} 3',
        'aletheia_requests_total{endpoint="other",status="404"} 1',
        f"aletheia_completion_tokens_total {completions}",
        "aletheia_first_token_seconds_count 3",
        "aletheia_request_seconds_count 3",
        "aletheia_running 0",
        "aletheia_waiting 0",
    ):
        assert line in text.splitlines()
