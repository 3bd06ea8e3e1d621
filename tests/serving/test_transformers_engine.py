"""The engine in this process: what it generates and scores is what the model alone would, whoever else asks."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import StageFailed
from serving.engine import Answer, Sampling
from serving.transformers_engine import PAGE, PASS, TransformersEngine, generate_all, use_threads

if TYPE_CHECKING:
    from tests.conftest import Trained

CONTEXT = 2048


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


def prompts(chat: Chat, count: int) -> list[list[int]]:
    """Of many lengths, one of them longer than a page of the cache."""
    texts = [f"Explain lock number {i}. " + "Be exact. " * (i % 4) for i in range(count - 1)] + ["word " * (PAGE + 20)]
    return [chat.prompt([Message(role="user", content=text)]) for text in texts]


async def answer(engine: TransformersEngine, prompt: Sequence[int], sampling: Sampling, after: float = 0) -> Answer:
    await asyncio.sleep(after)
    return [answer async for answer in engine.generate(prompt, sampling)][-1]


async def within(seconds: float, fulfilled: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not fulfilled() and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return fulfilled()


def is_idle(engine: TransformersEngine) -> bool:
    total, free = engine.cache_bytes
    return engine.requests == 0 and free == total


# ── greedy ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batched_greedy_answers_are_those_of_plain_generate(
    model: Any, folder: Path, tuned_chat: Chat, greedy: Callable[..., list[int]]
) -> None:
    asked = prompts(tuned_chat, 7)
    answers = generate_all(model, tuned_chat, asked, Sampling(24, 0.0), seed=1, what="test")
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = greedy(folder, prompt, 24)
        ended = tokens[-1] == tuned_chat.end_of_turn_id
        assert (answer.tokens, answer.finish_reason) == ((tokens[:-1], "stop") if ended else (tokens, "length"))


def test_an_answer_grows_and_only_its_last_part_is_finished(engine: TransformersEngine, tuned_chat: Chat) -> None:
    async def grow() -> list[Answer]:
        return [answer async for answer in engine.generate(prompts(tuned_chat, 1)[0], Sampling(6, 0.0))]

    answers = asyncio.run(grow())
    assert [len(a.tokens) for a in answers] == sorted({len(a.tokens) for a in answers})
    assert [a.finish_reason for a in answers[:-1]] == [None] * (len(answers) - 1)
    assert (answers[-1].finish_reason, len(answers[-1].tokens)) == ("length", 6)


# ── drawn ────────────────────────────────────────────────────────────────────────────────────────────────────────────


SEEDED = [Sampling(20, 1.0, seed=seed) for seed in range(8)]


async def crowd(engine: TransformersEngine, asked: list[list[int]], stagger: float = 0) -> list[list[int]]:
    """Request i comes in the 7·i-th place."""
    after = [stagger * (7 * i % len(asked)) for i in range(len(asked))]
    answers = await asyncio.gather(*map(answer, [engine] * len(asked), asked, SEEDED, after))
    return [answer.tokens for answer in answers]


async def one_by_one(engine: TransformersEngine, asked: list[list[int]]) -> list[list[int]]:
    return [(await answer(engine, prompt, sampling)).tokens for prompt, sampling in zip(asked, SEEDED, strict=False)]


def test_a_seed_draws_the_same_answer_alone_and_in_any_crowd(engine: TransformersEngine, tuned_chat: Chat) -> None:
    asked = prompts(tuned_chat, 8)
    alone = asyncio.run(one_by_one(engine, asked))
    assert asyncio.run(crowd(engine, asked)) == asyncio.run(crowd(engine, asked, 0.01)) == alone
    assert len({tuple(tokens) for tokens in alone}) == 8
    other = asyncio.run(answer(engine, asked[0], replace(SEEDED[0], seed=99))).tokens
    assert other != alone[0]


def test_a_request_that_is_evicted_and_computed_again_goes_on_as_it_would_have(
    model: Any, engine: TransformersEngine, start: Callable[..., TransformersEngine], tuned_chat: Chat
) -> None:
    """Each outgrows its page while it is answered, and the cache has but four."""
    config, evicted = model.config, list[bool]()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 + PASS * 4 + 8
    narrow = start(model, kv_cache_gb=(4 + 2.5) * PAGE * token / 1e9)
    assert narrow.context == 4 * PAGE
    manager = narrow._manager.batch_processor.offloading_manager
    offload = manager.offload_requests

    def seen() -> bool:
        evicted.append(offload())
        return evicted[-1]

    manager.offload_requests = seen
    text = tuned_chat.tokenizer("A lock is held by one. " * 60)["input_ids"]
    asked = [text[i : PAGE - 10] for i in range(6)]

    async def with_log_probs() -> list[Answer]:
        samplings = [replace(sampling, top_logprobs=1) for sampling in SEEDED[:6]]
        return list(await asyncio.gather(*map(answer, [narrow] * 6, asked, samplings)))

    alone = asyncio.run(one_by_one(engine, asked))
    found = asyncio.run(with_log_probs())
    assert any(evicted)
    assert [a.tokens for a in found] == alone
    for prompt, a in zip(asked, found, strict=True):
        rows = log_probs(model, prompt + a.tokens)[len(prompt) - 1 :]
        expected = [row[token].item() for row, token in zip(rows, a.tokens, strict=False)]
        assert [score.logprob for score in a.scores] == pytest.approx(expected, abs=1e-4)


def test_a_whole_evaluation_is_drawn_again_by_its_seed(model: Any, tuned_chat: Chat) -> None:
    asked = [prompts(tuned_chat, 2)[0]] * 4  # one prompt: the answers must differ all the same
    first, again, other = (
        [a.tokens for a in generate_all(model, tuned_chat, asked, Sampling(8, 1.0), seed=seed, what="test")]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert len({tuple(tokens) for tokens in [*first, *other]}) == 8


def test_temperature_and_top_p_draw_from_what_they_name(
    engine: TransformersEngine, model: Any, tuned_chat: Chat
) -> None:
    """400 first tokens against softmax(logits / temperature): the 50 likeliest are not the only ones drawn."""
    import torch

    prompt, count = tuned_chat.tokenizer("The cache")["input_ids"], 400

    async def first_tokens(temperature: float, top_p: float = 1.0) -> list[int]:
        samplings = [Sampling(1, temperature, top_p, seed=seed) for seed in range(count)]
        answers = await asyncio.gather(*(answer(engine, prompt, sampling) for sampling in samplings))
        return [a.tokens[0] if a.tokens else tuned_chat.end_of_turn_id for a in answers]

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    likeliest = logits.argsort(descending=True).tolist()
    for temperature in (0.7, 2.0):
        share = torch.softmax(logits / temperature, -1)[likeliest[:50]].sum().item()
        inside = sum(token in likeliest[:50] for token in asyncio.run(first_tokens(temperature)))
        assert abs(inside - share * count) < 5 * (count * share * (1 - share)) ** 0.5
    cumulated = torch.softmax(logits, -1)[likeliest].cumsum(0)
    nucleus = likeliest[: int((cumulated < 0.5).sum()) + 1]
    drawn = asyncio.run(first_tokens(1.0, top_p=0.5))
    assert set(drawn) <= set(nucleus)
    assert len(set(drawn)) > 1


def test_without_a_seed_every_answer_is_another(engine: TransformersEngine, tuned_chat: Chat) -> None:
    prompt = prompts(tuned_chat, 1)[0]
    drawn = [tuple(asyncio.run(answer(engine, prompt, Sampling(12, 1.0))).tokens) for _ in range(3)]
    assert len(set(drawn)) == 3


# ── log-probs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def log_probs(model: Any, tokens: list[int]) -> Any:
    """(positions, vocabulary), of one plain pass."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.6, 0.5)])
def test_log_probs_are_the_models_own_before_temperature_and_top_p(
    engine: TransformersEngine, model: Any, tuned_chat: Chat, temperature: float, top_p: float
) -> None:
    asked = prompts(tuned_chat, 5)
    sampling = Sampling(16, temperature, top_p, seed=3, top_logprobs=4)

    async def some_ask() -> list[Answer]:
        plain = replace(sampling, top_logprobs=None)
        return list(
            await asyncio.gather(*(answer(engine, p, sampling if i % 2 else plain) for i, p in enumerate(asked)))
        )

    for index, (prompt, found) in enumerate(zip(asked, asyncio.run(some_ask()), strict=True)):
        assert len(found.scores) == (len(found.tokens) if index % 2 else 0)
        expected = log_probs(model, prompt + found.tokens)[len(prompt) - 1 :]
        for score, token, row in zip(found.scores, found.tokens, expected, strict=False):
            assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(4)
            assert list(score.top) == best.indices.tolist()
            assert list(score.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, PASS, PASS + 1, 2 * PASS + 40])
def test_a_scored_sequence_is_one_plain_pass_also_while_others_generate(
    engine: TransformersEngine, model: Any, tuned_chat: Chat, length: int
) -> None:
    tokens = (tuned_chat.tokenizer("A lock is held by one. " * 120)["input_ids"])[:length]
    asked, sampling = prompts(tuned_chat, 4), Sampling(24, 1.0, seed=5)

    async def scene() -> tuple[Any, list[Answer]]:
        running = [asyncio.create_task(answer(engine, prompt, sampling)) for prompt in asked]
        await asyncio.sleep(0.02)
        return await engine.score(tokens, 2), [await task for task in running]

    async def undisturbed() -> list[Answer]:
        return list(await asyncio.gather(*(answer(engine, prompt, sampling) for prompt in asked)))

    scores, answers = asyncio.run(scene())
    assert scores[0] is None and len(scores) == length
    expected = log_probs(model, tokens)
    for score, token, row in zip(scores[1:], tokens[1:], expected, strict=False):
        assert score.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert list(score.top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert answers == asyncio.run(undisturbed())


def test_a_model_with_eager_attention_is_scored_and_generates_alike(
    folder: Path, start: Callable[..., TransformersEngine], tuned_chat: Chat, greedy: Callable[..., list[int]]
) -> None:
    """Continuous batching gives it `paged|eager`, with which a plain pass would fail."""
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    engine, prompt = start(eager), prompts(tuned_chat, 1)[0]
    tokens = greedy(folder, prompt, 12)

    async def scene() -> tuple[Any, list[int]]:
        return await engine.score(prompt, 1), (await answer(engine, prompt, Sampling(12, 0.0))).tokens

    scores, generated = asyncio.run(scene())
    assert generated == [token for token in tokens if token != tuned_chat.end_of_turn_id]
    engine.stop()
    assert eager.config._attn_implementation == "eager"
    expected = [row[token].item() for row, token in zip(log_probs(eager, prompt), prompt[1:], strict=False)]
    assert [score.logprob for score in scores[1:]] == pytest.approx(expected, abs=1e-4)


# ── what is refused, what ends early, what fails ─────────────────────────────────────────────────────────────────────


def test_what_could_never_be_answered_is_refused_and_others_are_not_touched(
    engine: TransformersEngine, tuned_chat: Chat
) -> None:
    """Planted: a token that the model does not have would end the generation thread."""
    vocabulary = engine._vocabulary
    wrong = [
        ([], Sampling(1)),
        ([vocabulary], Sampling(1)),
        ([-1], Sampling(1)),
        ([1] * 2000, Sampling(49)),
        ([1], Sampling(1, top_logprobs=-1)),
        ([1], Sampling(1, temperature=-1.0)),
    ]

    async def refused(prompt: list[int], sampling: Sampling) -> bool:
        with pytest.raises(ValueError):
            await answer(engine, prompt, sampling)
        with pytest.raises(ValueError):
            await engine.score(prompt * 2, 0)
        return True

    async def scene() -> tuple[Answer, list[bool]]:
        other = asyncio.create_task(answer(engine, prompts(tuned_chat, 1)[0], Sampling(24, 0.0)))
        await asyncio.sleep(0.05)
        return await other, [await refused(*request) for request in wrong[:4]]

    found, answers = asyncio.run(scene())
    assert len(found.tokens) == 24 and all(answers)
    for prompt, sampling in wrong[4:]:
        with pytest.raises(ValueError):
            asyncio.run(answer(engine, prompt, sampling))
    assert engine.alive and is_idle(engine)


def test_closing_an_answer_frees_its_place_and_its_cache_at_once(
    start: Callable[..., TransformersEngine], model: Any, tuned_chat: Chat
) -> None:
    """Planted: cancelled at any moment, also before the thread has seen the request."""
    engine = start(model, max_concurrent=2)

    async def leave(after: float) -> None:
        asked = engine.generate(prompts(tuned_chat, 2)[1], Sampling(1500, 1.0, top_logprobs=2))
        if after:
            await anext(asked)
            await asyncio.sleep(after)
            await asked.aclose()
        else:
            task = asyncio.create_task(anext(asked))
            await asyncio.sleep(0)
            task.cancel()

    async def scene() -> tuple[bool, float]:
        for after in (0, 0.001, 0.01, 0.03, 0):
            await asyncio.gather(*(leave(after) for _ in range(6)))
        idle = await within(5, lambda: is_idle(engine))
        began = time.monotonic()
        await answer(engine, [1, 2, 3], Sampling(2, 0.0))
        return idle, time.monotonic() - began

    idle, seconds = asyncio.run(scene())
    assert idle
    assert seconds < 1, "both places were free"
    assert not engine._drawer._told and engine._manager.output_router.output_queue.empty()


def test_one_that_waits_and_leaves_does_not_get_its_turn(
    start: Callable[..., TransformersEngine], model: Any, tuned_chat: Chat
) -> None:
    engine = start(model, max_concurrent=1)
    waiting = engine._manager.batch_processor.scheduler.waiting_requests

    async def scene() -> tuple[bool, bool]:
        running = asyncio.create_task(answer(engine, [1, 2, 3], Sampling(1500, 0.0)))
        await asyncio.sleep(0.1)
        late = [asyncio.create_task(answer(engine, [1, 2, 3], Sampling(1500, 0.0))) for _ in range(3)]
        came = await within(10, lambda: len(waiting) == 3)
        for task in late:
            task.cancel()
        left = await within(2, lambda: not waiting and not running.done())
        running.cancel()
        return came, left

    assert asyncio.run(scene()) == (True, True)


async def outcome(asked: Awaitable[Any]) -> Any:
    """Its result, or what went wrong; never waits for ever."""
    try:
        return await asyncio.wait_for(asked, timeout=30)
    except RuntimeError as error:
        return str(error)


def test_a_stopped_engine_refuses_instead_of_keeping_one_waiting(
    model: Any, start: Callable[..., TransformersEngine]
) -> None:
    engine = start(model, max_concurrent=1)

    async def scene() -> list[Any]:
        running = [asyncio.create_task(outcome(answer(engine, [1, 2, 3], Sampling(1500, 0.0)))) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert engine.alive
        engine.stop()
        return [await task for task in running]

    assert all("before this request completed" in error for error in asyncio.run(scene()))
    assert not engine.alive
    assert asyncio.run(outcome(answer(engine, [1, 2, 3], Sampling(4)))) == "the generation thread has ended"
    assert "shutdown" in asyncio.run(outcome(engine.score([1, 2, 3], 0)))


@pytest.mark.parametrize("silently", [False, True])
def test_a_model_that_breaks_fails_every_request_and_shows(
    start: Callable[..., TransformersEngine], model: Any, monkeypatch: pytest.MonkeyPatch, silently: bool
) -> None:
    """Planted: also a thread that ends without telling anyone."""

    def breaks(*_: Any) -> None:
        raise RuntimeError("out of memory")

    engine = start(model, max_concurrent=2)
    if silently:
        monkeypatch.setattr(engine._manager, "_fail_all_remaining_requests", lambda *_: None)

    async def scene() -> list[Any]:
        running = [asyncio.create_task(outcome(answer(engine, [1, 2, 3], Sampling(1500, 0.0)))) for _ in range(5)]
        await asyncio.sleep(0.1)
        hook = model.register_forward_pre_hook(breaks)
        try:
            failed = [await task for task in running]
            assert await within(10, lambda: not engine.alive)
            late = [await outcome(answer(engine, [1, 2, 3], Sampling(4))), await outcome(engine.score([1, 2, 3], 0))]
            return [*failed, *late]
        finally:
            hook.remove()

    ended = "the generation thread has ended"
    *failed, late, scored = asyncio.run(scene())
    assert failed == [ended if silently else "out of memory"] * 5
    assert (late, scored) == (ended, "Cannot pause generation while no generation loop is running.")


# ── the KV cache and the threads ─────────────────────────────────────────────────────────────────────────────────────


def test_the_cache_keeps_to_its_cap_and_says_what_it_cannot_hold(
    model: Any, start: Callable[..., TransformersEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    ample = start(model)
    assert (ample.context, capsys.readouterr().err) == (CONTEXT, "")

    tight = start(model, kv_cache_gb=0.1)
    assert tight.context == CONTEXT and tight.cache_bytes[0] <= 1e8 < ample.cache_bytes[0]
    said = capsys.readouterr().err
    assert "the KV cache of 0.1 GB holds" in said and "not 16" in said

    small = start(model, kv_cache_gb=0.01)
    assert 0 < small.context < CONTEXT and small.context % PAGE == 0 and small.cache_bytes[0] <= 1e7
    assert f"holds {small.context} tokens, so the context is that, not {CONTEXT}" in capsys.readouterr().err
    whole = asyncio.run(answer(small, [1] * (small.context - 10), Sampling(10, 0.0)))
    assert whole.finish_reason in ("length", "stop")
    with pytest.raises(ValueError, match=f"exceed the context of {small.context}"):
        asyncio.run(answer(small, [1] * (small.context - 10), Sampling(11)))


@pytest.mark.parametrize(("size", "said"), [(1e-6, "holds nothing: a page of 256 tokens"), (1e5, "does not fit")])
def test_a_cache_that_cannot_be_is_one_line(model: Any, tuned_chat: Chat, size: float, said: str) -> None:
    with pytest.raises(StageFailed, match=said) as failed:
        TransformersEngine(model, tuned_chat, 10**9, max_concurrent=16, kv_cache_gb=size)
    assert "serve_config.kv_cache_gb" in str(failed.value) and "\n" not in str(failed.value)


def test_threads_are_those_of_the_environment_then_the_profile_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert use_threads(3) == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr("psutil.cpu_count", lambda logical: 64 if logical else 1)
        assert (use_threads(3), use_threads(None)) == (3, 1)
    finally:
        torch.set_num_threads(before)
