"""llama.cpp's server behind our front: what it generates and scores is the exported model's, and nothing of it is left."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import torch

from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import StageFailed
from pipeline.to_gguf.llamacpp import LlamaCpp
from pipeline.workspace import CHECKOUT
from serving.engine import Answer, Sampling
from serving.llamacpp_backend.engine import LlamaCppEngine, request, slots

if TYPE_CHECKING:
    from tests.conftest import Trained

needs_llamacpp = pytest.mark.skipif(LlamaCpp.find() is None, reason="llama.cpp is not installed: make setup-llamacpp")
RUNNER = asyncio.Runner()  # an engine belongs to one event loop
LONG = Sampling(400, 100.0, seed=1, top_logprobs=20)  # rarely ends by itself, and is more than a socket holds unread
TEXTS = ("What is a lock?", "Explain an index in one line.", "你好", "def f(x):\n    return", "Why?", "Name a queue.")

# ── What is asked of it ──────────────────────────────────────────────────────────────────────────────────────────────


def test_its_own_defaults_play_no_part() -> None:
    greedy = request([1, 2], Sampling(8, 0.0, seed=7))
    assert (greedy["samplers"], greedy["top_k"], greedy["repeat_penalty"]) == (["top_k"], 1, 1.0)
    assert (greedy["n_predict"], greedy["seed"], greedy["cache_prompt"]) == (8, 7, False)
    drawn = request([1, 2], Sampling(8, 0.7, 0.9, top_logprobs=0))
    assert (drawn["samplers"], drawn["temperature"], drawn["top_p"]) == (["temperature", "top_p"], 0.7, 0.9)
    assert drawn["n_probs"] == 1 and "n_probs" not in greedy
    assert request([1], Sampling(8, 1.0, seed=-1))["seed"] >= 0


def test_the_cache_is_what_was_allowed() -> None:
    shape = {"block_count": 30, "embedding_length": 4096, "attention.head_count": 32, "attention.head_count_kv": None}
    facts = shape | {"attention.key_length": None, "attention.value_length": None}
    gb_a_sequence = 2 * 2 * 30 * 4096 * 4096 / 1e9  # K and V, of 16 bits, at 4,096 tokens
    assert slots(facts, 4096, 16, 4.5 * gb_a_sequence) == 4
    assert slots(facts, 4096, 2, 4.5 * gb_a_sequence) == 2
    assert slots(facts, 4096, 16, 0.001) == 1


# ── Generated and scored ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gguf(trained: "Trained", tuned_chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "f16.gguf"
    LlamaCpp.required().convert(trained.output("merge"), file, tuned_chat.end_of_turn_id)
    return file


@pytest.fixture(scope="module")
def engine(gguf: Path, tuned_chat: Chat) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(gguf, tuned_chat, 512, max_concurrent=4, threads=1)
    engine.start()
    yield engine
    engine.stop()
    assert not engine.alive


@pytest.fixture(scope="module")
def model(trained: "Trained") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(trained.output("merge")).eval()


@pytest.fixture(scope="module")
def prompts(tuned_chat: Chat) -> list[list[int]]:
    return [tuned_chat.prompt([Message(role="user", content=text)]) for text in TEXTS]


def log_probs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    return found


async def last(answers: AsyncGenerator[Answer]) -> Answer:
    return [answer async for answer in answers][-1]


async def together(engine: LlamaCppEngine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
    return list(await asyncio.gather(*(last(engine.generate(prompt, sampling)) for prompt in prompts)))


def busy(engine: LlamaCppEngine) -> int:
    with httpx.Client(transport=httpx.HTTPTransport(uds=engine._socket), base_url="http://llama") as client:
        return sum(slot["is_processing"] for slot in client.get("/slots").json())


async def within(seconds: float, fulfilled: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not fulfilled() and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return fulfilled()


@needs_llamacpp
def test_greedy_answers_in_a_batch_are_those_of_plain_generate(
    engine: LlamaCppEngine, model: Any, tuned_chat: Chat, prompts: list[list[int]], greedy: Callable[..., list[int]]
) -> None:
    """Where one turns, both tokens were within 16-bit rounding of each other to the model itself."""
    end, equal = tuned_chat.end_of_turn_id, 0
    for prompt, answer in zip(prompts, RUNNER.run(together(engine, prompts, Sampling(24, 0.0))), strict=True):
        expected = greedy(Path(model.name_or_path), prompt, 24)
        found = answer.tokens + [end] * (answer.finish_reason == "stop")
        turn = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        if turn is None:
            equal += 1
            assert found == expected
        else:
            row = log_probs(model, prompt + expected[:turn])[-1]
            assert abs(row[found[turn]] - row[expected[turn]]) < 0.01
    assert equal >= len(prompts) - 2


@needs_llamacpp
def test_the_end_of_turn_ends_the_answer_and_is_not_in_it(
    engine: LlamaCppEngine, model: Any, tuned_chat: Chat, prompts: list[list[int]]
) -> None:
    end = tuned_chat.end_of_turn_id
    drawn = RUNNER.run(together(engine, prompts * 8, Sampling(100, 1.5, top_logprobs=1)))
    stopped = [answer for answer in drawn if answer.finish_reason == "stop"]
    assert stopped, "no answer ended: the test shows nothing"
    assert all(end not in answer.tokens and len(answer.scores) == len(answer.tokens) < 100 for answer in stopped)


@needs_llamacpp
def test_every_token_arrives_also_where_characters_are_cut(engine: LlamaCppEngine, prompts: list[list[int]]) -> None:
    """At this temperature every token is about as likely, and many are a part of some character. Seeded, and one at a
    time, so that the same ones are drawn each time."""
    drawn = (Sampling(100, 100.0, seed=seed, top_logprobs=0) for seed in range(6))
    answers = [RUNNER.run(last(engine.generate(prompts[0], sampling))) for sampling in drawn]
    cut = 0
    for answer in answers:
        assert answer.finish_reason == "stop" or len(answer.tokens) == 100
        assert len(answer.scores) == len(answer.tokens)
        cut += engine.chat.tokenizer.decode(answer.tokens).count("\ufffd")
    assert cut, "no character was cut: the test shows nothing"


@needs_llamacpp
def test_log_probs_are_the_models_before_temperature(
    engine: LlamaCppEngine, model: Any, prompts: list[list[int]]
) -> None:
    for sampling in (Sampling(16, 0.0, top_logprobs=3), Sampling(16, 1.7, 0.9, seed=3, top_logprobs=3)):
        answer = RUNNER.run(last(engine.generate(prompts[0], sampling)))
        rows = log_probs(model, prompts[0] + answer.tokens)[len(prompts[0]) - 1 :]
        for row, token, score in zip(rows, answer.tokens, answer.scores, strict=False):
            assert score.logprob == pytest.approx(row[token].item(), abs=0.02)
            values, ids = row.topk(3)
            assert list(score.top.values()) == pytest.approx(values.tolist(), abs=0.02)
            assert values[2] - row.topk(4)[0][3] < 0.05 or set(score.top) == set(ids.tolist())


@needs_llamacpp
def test_scores_of_given_tokens_are_the_models(engine: LlamaCppEngine, model: Any, prompts: list[list[int]]) -> None:
    async def score() -> Any:
        return await asyncio.gather(*(engine.score(prompt, 2) for prompt in prompts))

    for prompt, scores in zip(prompts, RUNNER.run(score()), strict=True):
        assert scores[0] is None and len(scores) == len(prompt)
        rows = log_probs(model, prompt)
        expected = [rows[place, token].item() for place, token in enumerate(prompt[1:])]
        assert [s.logprob for s in scores[1:]] == pytest.approx(expected, abs=0.02)
        assert all(len(s.top) == 2 for s in scores[1:])
    assert RUNNER.run(engine.score([5], 1)) == [None]


@needs_llamacpp
def test_a_seed_draws_the_same_answer_again(engine: LlamaCppEngine, prompts: list[list[int]]) -> None:
    seeded = [RUNNER.run(together(engine, prompts[:1], Sampling(30, 1.0, seed=seed))) for seed in (1, 1, 2)]
    tokens = [answers[0].tokens for answers in seeded]
    assert tokens[0] == tokens[1] != tokens[2]
    free = RUNNER.run(together(engine, [prompts[0]] * 3, Sampling(30, 1.0)))
    assert len({tuple(answer.tokens) for answer in free}) == 3


@needs_llamacpp
def test_an_answer_that_nobody_waits_for_frees_its_slot(engine: LlamaCppEngine, prompts: list[list[int]]) -> None:
    async def give_up() -> None:
        started = [engine.generate(prompt, LONG) for prompt in prompts[:4]]
        for answers in started:
            await anext(answers)
        assert busy(engine) > 0
        waiting = asyncio.create_task(last(engine.generate(prompts[4], Sampling(4, 0.0))))
        await asyncio.sleep(0.05)
        for answers in started:
            await answers.aclose()
        assert await within(5, lambda: busy(engine) == 0)
        await asyncio.wait_for(waiting, 5)

    RUNNER.run(give_up())


@needs_llamacpp
def test_an_answer_may_fill_the_context(engine: LlamaCppEngine, prompts: list[list[int]]) -> None:
    prompt = (prompts[0] * 30)[: engine.context - 8]
    answer = RUNNER.run(last(engine.generate(prompt, Sampling(8, 0.0))))
    assert answer.finish_reason == "stop" or len(answer.tokens) == 8
    with pytest.raises(RuntimeError, match="llama-server: "):
        RUNNER.run(last(engine.generate(prompt + prompt, Sampling(8, 0.0))))


# ── Its end ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_llamacpp
def test_a_killed_server_fails_the_request_and_shows(gguf: Path, tuned_chat: Chat, prompts: list[list[int]]) -> None:
    engine = LlamaCppEngine(gguf, tuned_chat, 512, max_concurrent=1, threads=1)
    engine.start()
    folder = engine._folder

    async def cut_off() -> None:
        answers = engine.generate(prompts[0], LONG)
        await anext(answers)
        assert engine._child
        engine._child.process.kill()
        async for _ in answers:
            pass

    with pytest.raises(RuntimeError, match="llama-server"):
        RUNNER.run(cut_off())
    assert RUNNER.run(within(5, lambda: not engine.alive))
    assert engine.ended.startswith("llama-server was killed by SIGKILL while it served")
    engine.stop()
    assert not folder.path.exists()


@needs_llamacpp
def test_one_file_is_generated_and_scored_from_whatever_has_its_name_by_then(
    gguf: Path, tuned_chat: Chat, prompts: list[list[int]], engine: LlamaCppEngine, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And a process that scores and dies is told without a path, and is not the last."""
    (tmp_path / "export").mkdir()
    own = LlamaCppEngine(Path(shutil.copy(gguf, tmp_path / "export" / "f16.gguf")), tuned_chat, 512, 1, threads=1)
    assert own.precision == "float16"
    own.start()
    try:
        os.rename(tmp_path / "export", tmp_path / "moved")
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "f16.gguf").write_bytes(b"another")
        expected = RUNNER.run(engine.score(prompts[0], 1))
        assert RUNNER.run(own.score(prompts[0], 1)) == expected
        assert own._scorer
        own._scorer._process.kill()
        with pytest.raises(RuntimeError) as failure:
            RUNNER.run(own.score(prompts[0], 1))
        assert "/" not in str(failure.value) and "scoring failed" in capsys.readouterr().err
        assert RUNNER.run(own.score(prompts[0], 1)) == expected
    finally:
        own.stop()


@needs_llamacpp
def test_a_file_it_cannot_load_is_told_in_one_line(tuned_chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "f16.gguf").write_bytes(b"GGUF")
    with pytest.raises(StageFailed, match=r"f16\.gguf"):
        LlamaCppEngine(tmp_path / "f16.gguf", tuned_chat, 512, max_concurrent=1)


STARTS = """
import sys, time
from pathlib import Path
from serving.child import Child
child = Child(sys.argv[2:], Path(sys.argv[1]), {}, drain=0, name="llama-server").__enter__()
print(child.process.pid, flush=True)
time.sleep(60)
"""


@needs_llamacpp
def test_it_ends_with_the_process_that_started_it(gguf: Path, tmp_path: Path) -> None:
    server = [LlamaCpp.required().tool("llama-server"), "--model", str(gguf), "--host", str(tmp_path / "a.sock")]
    command = [sys.executable, "-c", STARTS, str(tmp_path / "log"), *server]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        os.kill(parent.pid, signal.SIGKILL)
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone
