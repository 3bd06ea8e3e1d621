"""The endpoint, as its users meet it: through the openai client, over a socket, from a process of its own."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import openai
import pytest

from pipeline.chat import Chat
from pipeline.data.rows import Message

if TYPE_CHECKING:
    from tests.conftest import Trained
    from tests.serving.conftest import Server

QUESTION = [{"role": "user", "content": "How do I find out why a PostgreSQL query is slow?"}]
TALK = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "  def f():\n    return 1\n"},
    {"role": "assistant", "content": "It returns 1."},
    {"role": "user", "content": "And é, 你好, 🙂?"},
]
SLOTS = 2


@pytest.fixture(scope="module")
def server(
    serve: "Callable[..., Server]", trained: "Trained", tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Server]":
    copied = trained.copy_to(tmp_path_factory.mktemp("app") / "root")
    yield serve(copied.workspace, "--set", f"serve_config.max_concurrent={SLOTS}")


def ids_of(chat: Chat, messages: Sequence[dict[str, str]]) -> list[int]:
    return chat.prompt([Message.model_validate(m) for m in messages])


def ask(server: "Server", **request: Any) -> Any:
    """The answer, whole: its choice and its usage."""
    wanted = {"messages": QUESTION, "max_tokens": 40, "temperature": 0} | request
    answer = server.client.chat.completions.create(model=server.model, **wanted)
    return answer.choices[0], answer.usage


def stream(server: "Server", **request: Any) -> tuple[str, str | None, Any]:
    """The answer, streamed: its text, its finish reason and its usage."""
    wanted = {"messages": QUESTION, "max_tokens": 40, "temperature": 0} | request
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(server.client.chat.completions.create(model=server.model, **wanted, **options))
    choices = [c.choices[0] for c in chunks if c.choices]
    assert choices[0].delta.role == "assistant"
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason, chunks[-1].usage


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("talk", [False, True], ids=["question", "talk"])
def test_whole_streamed_and_plain_transformers_say_the_same(
    server: "Server", trained: "Trained", tuned_chat: Chat, greedy: Callable[..., list[int]], question: str, talk: bool
) -> None:
    messages = TALK if talk else [{"role": "user", "content": question}]
    prompt = ids_of(tuned_chat, messages)
    tokens = greedy(trained.output("merge"), prompt, 40)
    text = tuned_chat.tokenizer.decode(tokens, skip_special_tokens=True)
    choice, usage = ask(server, messages=messages)
    assert choice.message.content == text
    assert choice.message.role == "assistant"
    assert usage.prompt_tokens == len(prompt)
    assert usage.completion_tokens == len([t for t in tokens if t != tuned_chat.end_of_turn_id])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert stream(server, messages=messages) == (text, choice.finish_reason, usage)


def test_a_chat_is_the_completion_of_the_prompt_that_was_trained(server: "Server", tuned_chat: Chat) -> None:
    prompt = ids_of(tuned_chat, TALK)
    create = server.client.completions.create
    completion = create(model=server.model, prompt=prompt, max_tokens=40, temperature=0)
    choice, usage = ask(server, messages=TALK)
    assert completion.choices[0].text == choice.message.content
    assert completion.usage == usage


def test_text_and_its_token_ids_complete_alike_whole_and_streamed(server: "Server", tuned_chat: Chat) -> None:
    text = "def read(path):"
    answers = []
    for prompt in (text, tuned_chat.tokenizer(text)["input_ids"]):
        request: Any = {"model": server.model, "prompt": prompt, "max_tokens": 20, "temperature": 0}
        answers.append(server.client.completions.create(**request).choices[0].text)
        chunks = server.client.completions.create(**request, stream=True)
        answers.append("".join(chunk.choices[0].text for chunk in chunks))
    assert answers[0]
    assert answers == [answers[0]] * 4


def test_the_models_list_names_the_one_model_and_its_context(server: "Server") -> None:
    [model] = server.client.models.list().data
    assert model.id == server.model == "small-merged"
    assert model.model_dump()["max_model_len"] == 2048
    assert server.client.models.retrieve(server.model) == model


def test_temperature_draws_and_zero_does_not(server: "Server") -> None:
    drawn, fixed = ({ask(server, temperature=t)[0].message.content for _ in range(3)} for t in (1.5, 0))
    assert len(drawn) == 3
    assert len(fixed) == 1


# ── where it ends ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_is_kept_and_said(server: "Server", limit: str) -> None:
    request = {"model": server.model, "messages": QUESTION, "temperature": 0, limit: 7}
    answer = server.client.chat.completions.create(**request)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


def test_an_answer_that_ends_by_itself_says_stop(server: "Server") -> None:
    answers = [ask(server, temperature=1.0, max_tokens=200) for _ in range(4)]
    assert {choice.finish_reason for choice, _ in answers} >= {"stop"}
    for choice, usage in answers:
        assert (choice.finish_reason == "length") == (usage.completion_tokens == 200)
        assert "<|" not in choice.message.content


def inside_a_token(pieces: list[str]) -> str:
    return next(p.strip() for p in pieces[3:] if len(p.strip()) >= 2)


def across_two_tokens(pieces: list[str]) -> str:
    """Neither token holds it; together they do."""
    return next(a[-1] + b[0] for a, b in pairwise(pieces[3:]) if len(a) > 1 and len(b) > 1)


@pytest.mark.parametrize(
    "stop",
    [
        inside_a_token,
        across_two_tokens,
        lambda pieces: "".join(pieces[4:9]),
        lambda pieces: ["never said", "".join(pieces[6:8]), inside_a_token(pieces)],
    ],
    ids=["in a token", "across two", "long", "the first of several"],
)
def test_a_stop_string_ends_the_answer_before_it(
    server: "Server", tuned_chat: Chat, stop: Callable[[list[str]], str | list[str]]
) -> None:
    text = ask(server)[0].message.content
    tokens = tuned_chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [tuned_chat.tokenizer.decode([token]) for token in tokens]
    assert "".join(pieces) == text
    wanted = stop(pieces)
    stops = [wanted] if isinstance(wanted, str) else wanted
    so_far = next(told for told in accumulate(pieces) if any(s in told for s in stops))
    cut = min(so_far.index(s) for s in stops if s in so_far)
    choice, usage = ask(server, stop=wanted)
    assert (choice.message.content, choice.finish_reason) == (text[:cut], "stop")
    assert 0 < usage.completion_tokens < 40
    assert stream(server, stop=wanted) == (text[:cut], "stop", usage)


def test_a_stop_string_that_never_comes_changes_nothing(server: "Server") -> None:
    text, reason, _ = stream(server)
    assert stream(server, stop=["never said" * 5])[:2] == (text, reason)


# ── several choices, seeds and log-probs ─────────────────────────────────────────────────────────────────────────────


def test_a_seed_draws_the_same_again_and_each_choice_its_own(server: "Server") -> None:
    request: Any = {"model": server.model, "messages": QUESTION, "max_tokens": 20, "temperature": 1.0, "n": 3}
    create = server.client.chat.completions.create
    first, again, other = (
        [choice.message.content for choice in create(**request, seed=seed).choices] for seed in (5, 5, 50)
    )
    assert first == again
    assert len({*first, *other}) == 6
    streamed = {0: "", 1: "", 2: ""}
    for part in create(**request, seed=5, stream=True):
        streamed[part.choices[0].index] += part.choices[0].delta.content or ""
    assert list(streamed.values()) == first


def test_a_chats_log_probs_are_those_of_its_tokens_scored_afterwards(server: "Server", tuned_chat: Chat) -> None:
    choice, _ = ask(server, logprobs=True, top_logprobs=3, max_tokens=10)
    told = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in told).decode() == choice.message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in told), "greedy takes the likeliest"
    prompt = ids_of(tuned_chat, QUESTION)
    answer = tuned_chat.tokenizer(choice.message.content, add_special_tokens=False)["input_ids"]
    scored: Any = server.client.completions.create(
        model=server.model, prompt=[*prompt, *answer], echo=True, logprobs=1, max_tokens=0
    )
    again = scored.choices[0].logprobs.token_logprobs[len(prompt) :]
    assert [entry.logprob for entry in told] == pytest.approx(again, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_meets_its_own_exceptions(server: "Server", stream: bool) -> None:
    create = server.client.chat.completions.create
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-4", messages=QUESTION, stream=stream)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError):
        create(model=server.model, messages=QUESTION, temperature=-1, stream=stream)  # type: ignore[call-overload]


# ── many, and those who leave ────────────────────────────────────────────────────────────────────────────────────────


def test_many_at_once_each_get_their_own_answer(server: "Server") -> None:
    questions = [
        [{"role": "user", "content": f"What is {i} plus {i}?" + " Say it again." * (i % 5)}] for i in range(16)
    ]
    alone = [ask(server, messages=messages, max_tokens=16)[0].message.content for messages in questions]

    async def all_at_once() -> list[Any]:
        common: Any = {"model": server.model, "max_tokens": 16, "temperature": 0}
        async with server.async_client as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(messages=messages, **common) for messages in questions))

    assert [a.choices[0].message.content for a in asyncio.run(all_at_once())] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("streamed", [True, False], ids=["in mid-stream", "waiting for the whole"])
def test_a_client_that_leaves_frees_its_slot(server: "Server", streamed: bool) -> None:
    """All slots but one are taken for long; the leaver's must serve another while they still are."""
    long: Any = {"model": server.model, "prompt": "def", "max_tokens": 1500, "temperature": 0}  # greedy, it never ends

    async def drain(stream: Any) -> None:
        async for _ in stream:
            pass

    async def scene() -> bool:
        async with server.async_client as client:
            create = client.completions.create
            staying = [asyncio.ensure_future(drain(await create(**long, stream=True))) for _ in range(SLOTS - 1)]
            if streamed:
                leaver = await create(**long, stream=True)
                await anext(aiter(leaver))
                await leaver.close()
            else:
                with pytest.raises(openai.APITimeoutError):
                    await create(**long, timeout=0.2)
            await create(model=server.model, prompt="def", max_tokens=2)
            others_still_there = not any(task.done() for task in staying)
            for task in staying:
                task.cancel()
            await asyncio.gather(*staying, return_exceptions=True)
            return others_still_there

    assert asyncio.run(scene())
    assert ask(server)[0].message.content  # and the server lives on
