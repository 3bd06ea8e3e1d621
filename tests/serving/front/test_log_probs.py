"""Log-probs as OpenAI's clients and lm-eval read them, over an engine whose scores are known."""

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipeline.chat import Chat
from tests.serving.front.scripted_engine import CHAT, CHATS, TEXT, TEXTS, Scripted, events, over


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_log_probs_have_openais_shape(chat: Chat, stream: bool) -> None:
    engine = Scripted(chat, "a 🙂 b END c")
    request = CHAT | {"logprobs": True, "top_logprobs": 2, "stop": "END", "stream": stream}
    with over(engine) as client:
        response = client.post(CHATS, json=request)
    choices = [p["choices"][0] for p in events(response.text)] if stream else [response.json()["choices"][0]]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    told = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert told in ("a 🙂 b ", "a 🙂 b E"), "up to the token that the stop string begins in"
    for token, entry in zip(engine.ids(engine.text), entries, strict=False):
        score = engine.score_of(token, 2)
        assert entry["logprob"] == score.logprob
        assert [top["logprob"] for top in entry["top_logprobs"]] == sorted(score.top.values(), reverse=True)
        assert entry["token"] in [top["token"] for top in entry["top_logprobs"]]
    assert any(entry["token"].startswith("\\x") for entry in entries)


def test_log_probs_without_likeliest_tokens(shared: TestClient) -> None:
    entries = shared.post(CHATS, json=CHAT | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert entries and all(entry["top_logprobs"] == [] for entry in entries)
    told = shared.post(TEXTS, json=TEXT | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert all(list(top) == [token] for top, token in zip(told["top_logprobs"], told["tokens"], strict=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_a_completions_log_probs_cover_the_echoed_prompt(chat: Chat, ids: bool, stream: bool) -> None:
    engine = Scripted(chat, " and é")
    text = "naïve 你 x"
    prompt = chat.tokenizer(text)["input_ids"]
    shown = chat.tokenizer.decode(prompt) if ids else text
    request = {"prompt": prompt if ids else text, "echo": True, "logprobs": 2, "stream": stream}
    with over(engine) as client:
        response = client.post(TEXTS, json=TEXT | request)
    choices = [p["choices"][0] for p in events(response.text)] if stream else [response.json()["choices"][0]]
    assert "".join(choice["text"] for choice in choices) == shown + " and é"
    told = {name: [v for c in choices for v in c["logprobs"][name]] for name in choices[0]["logprobs"]}
    tokens = [*prompt, *engine.ids(" and é")]
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(told, len(tokens))
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    assert told["token_logprobs"][1:] == [engine.score_of(token, 2).logprob for token in tokens[1:]]
    assert told["text_offset"] == sorted(told["text_offset"])
    for name, at in zip(told["tokens"], told["text_offset"], strict=True):
        hidden = not ids and name == chat.tokenizer.bos_token
        assert name.startswith("bytes:") or hidden or (shown + " and é")[at:].startswith(name)


def test_a_prompts_log_probs_alone(chat: Chat) -> None:
    engine = Scripted(chat)
    prompt = engine.ids("only this")
    with over(engine) as client:
        answer = client.post(TEXTS, json=TEXT | {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("only this", "length")
    assert len(choice["logprobs"]["tokens"]) == len(prompt) == answer["usage"]["total_tokens"]
    assert engine.asked == []


def lm_eval_answers(client: TestClient, prompts: list[list[int]], context: int) -> list[tuple[float, bool]]:
    """As lm-eval asks and reads, by its own code."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asking: Any = SimpleNamespace(model="scripted", _max_gen_toks=256)
    payload = LocalCompletionsAPI._create_payload(asking, prompts, generate=False)
    response = client.post(TEXTS, json=payload)
    assert response.status_code == 200, response.text
    found: list[tuple[float, bool]] = LocalCompletionsAPI.parse_logprobs(
        response.json(), ctxlens=[context] * len(prompts)
    )
    return found


@pytest.mark.parametrize("after", ["<end of turn>", " on"])
def test_lm_eval_gets_each_continuations_log_prob_whatever_would_follow(chat: Chat, after: str) -> None:
    engine = Scripted(chat, after=chat.end_of_turn if after.startswith("<") else "x")
    prompts = [[10, 12, 14, 16], [10, 12, 14, 17, 18], [10, 12, 21]]
    with over(engine) as client:
        found = lm_eval_answers(client, prompts, context=2)
    for prompt, (said, greedy) in zip(prompts, found, strict=True):
        assert said == pytest.approx(sum(engine.score_of(token, 1).logprob for token in prompt[2:]))
        assert greedy == all(token % 2 == 0 for token in prompt[2:])
    assert sorted(engine.scored) == sorted([*prompt, chat.end_of_turn_id] for prompt in prompts), "one pass a prompt"
    assert engine.asked == []


def test_lm_eval_is_not_misled_by_two_tokens_of_one_name(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(chat)
    with over(engine) as client:
        monkeypatch.setattr("serving.front.text.Vocabulary.name", lambda *_: "same")
        assert lm_eval_answers(client, [[10, 12, 21]], context=2) == [(engine.score_of(21, 1).logprob, False)]


def test_lm_evals_generation_is_taken_with_all_its_stops(chat: Chat) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asking: Any = SimpleNamespace(model="scripted", _max_gen_toks=256)
    until = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    engine = Scripted(chat, "return 1\ndef g")
    payload = LocalCompletionsAPI._create_payload(
        asking,
        [[10, 11], [12]],
        generate=True,
        gen_kwargs={"until": until, "max_gen_toks": 40},
        eos=chat.tokenizer.eos_token,
    )
    with over(engine) as client:
        answer = client.post(TEXTS, json=payload).json()
    assert LocalCompletionsAPI.parse_generations(answer) == ["return 1"] * 2
    assert {sampling.temperature for _, sampling in engine.asked} == {0}


def test_minus_infinity_and_no_number_are_told_as_json_can(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.engine import TokenScore

    class Broken(Scripted):
        def score_of(self, token: int, top: int) -> TokenScore:
            return TokenScore(float("-inf"), {token: float("nan")})

    with over(Broken(chat)) as client:
        for path, request in ((CHATS, CHAT | {"logprobs": True, "top_logprobs": 1}), (TEXTS, TEXT | {"logprobs": 1})):
            assert "-9999.0" in client.post(path, json=request).text
