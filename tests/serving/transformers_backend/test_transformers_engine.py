"""The engine in this process: greedy it says what the model alone would; its cache and threads are what was allowed."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat import Chat
from pipeline.errors import StageFailed
from serving.engine import Answer, Sampling
from serving.transformers_backend.engine import PAGE, TransformersEngine, generate_all, use_threads
from tests.serving.transformers_backend.asking import CONTEXT, answer, prompts


def test_batched_greedy_answers_are_those_of_plain_generate(
    model: Any, folder: Path, tuned_chat: Chat, greedy: Callable[..., list[int]]
) -> None:
    asked = prompts(tuned_chat, 7)
    answers = generate_all(model, tuned_chat, asked, Sampling(24, 0.0), seed=1, what="test")
    for prompt, found in zip(asked, answers, strict=True):
        tokens = greedy(folder, prompt, 24)
        ended = tokens[-1] == tuned_chat.end_of_turn_id
        assert (found.tokens, found.finish_reason) == ((tokens[:-1], "stop") if ended else (tokens, "length"))


def test_an_answer_grows_and_only_its_last_part_is_finished(engine: TransformersEngine, tuned_chat: Chat) -> None:
    async def grow() -> list[Answer]:
        return [answer async for answer in engine.generate(prompts(tuned_chat, 1)[0], Sampling(6, 0.0))]

    answers = asyncio.run(grow())
    assert [len(a.tokens) for a in answers] == sorted({len(a.tokens) for a in answers})
    assert [a.finish_reason for a in answers[:-1]] == [None] * (len(answers) - 1)
    assert (answers[-1].finish_reason, len(answers[-1].tokens)) == ("length", 6)


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
