"""vLLM itself, where its environment is installed: an adapter over its base, another beside it, through OpenAI's client."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from pipeline.chat import Chat
from pipeline.data.rows import Message
from serving.backends import Environment
from serving.serve import load_source, servable
from tests.serving.processes import until

if TYPE_CHECKING:
    from tests.conftest import Trained
    from tests.serving.conftest import Server

pytestmark = pytest.mark.skipif(Environment.find("vllm") is None, reason="vLLM is not installed: make setup-vllm")
CLOSE = 2e-3  # nats, in float32


@pytest.fixture(scope="module")
def server(
    serve: "Callable[..., Server]", trained: "Trained", tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Server]":
    copy = trained.copy_to(tmp_path_factory.mktemp("vllm") / "root")
    beside = f"serve_config.adapters=[{copy.sft}]"
    options = ["--backend", "vllm", "--from", copy.dpo, "--set", beside, "--set", "serve_config.max_concurrent=2"]
    yield serve(copy.workspace, *options)


@pytest.fixture(scope="module")
def log_probs(trained: "Trained") -> Callable[[str, list[int]], list[float]]:
    """`log_probs("dpo", tokens)`: of each token but the first, by plain peft."""
    import torch

    models: dict[str, Any] = {}

    def compute(stage: str, tokens: list[int]) -> list[float]:
        if stage not in models:
            source, base, _ = servable(trained.job(source=getattr(trained, stage)))
            models[stage] = load_source(source, base)
        with torch.inference_mode():
            scores = models[stage](input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        return [scores[at, token].item() for at, token in enumerate(tokens[1:])]

    return compute


def test_the_models_are_the_adapter_named_those_beside_it_and_their_base(server: "Server", trained: "Trained") -> None:
    assert server.model == "small-dpo"
    assert [model.id for model in server.client.models.list()] == ["small-dpo", trained.sft, "tiny"]
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="gpt-4", prompt="a")
    assert server.post("completions", json={"prompt": "a"}).status_code == 400  # vLLM's answer would be the base's
    assert server.post("responses", json={"model": "small-dpo", "input": "a"}).status_code == 404


def test_a_chat_is_rendered_as_in_training_and_streams_what_it_says_whole(
    server: "Server", tuned_chat: Chat, question: str
) -> None:
    messages: Any = [{"role": "user", "content": question}]
    prompt = tuned_chat.prompt([Message(role="user", content=question)])
    root = server.address.removesuffix("/v1")
    body = {"model": server.model, "messages": messages}
    assert httpx.post(f"{root}/tokenize", json=body, timeout=60).json()["tokens"] == prompt
    ask: Any = {
        "model": server.model,
        "messages": messages,
        "max_tokens": 24,
        "temperature": 0,
        "stop": ["\u2603"] * 16,
    }
    whole = server.client.chat.completions.create(**ask)
    parts = server.client.chat.completions.create(**ask, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert whole.usage and whole.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_each_adapters_log_probs_are_pefts(
    server: "Server", trained: "Trained", tuned_chat: Chat, question: str, stage: str,
    log_probs: Callable[[str, list[int]], list[float]],
) -> None:  # fmt: skip
    name = server.model if stage == "dpo" else trained.sft
    tokens = tuned_chat.prompt([Message(role="user", content=question)])
    ask: Any = {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    scored = server.client.completions.create(**ask).choices[0].logprobs
    assert scored and scored.token_logprobs
    served = [score or 0.0 for score in scored.token_logprobs[1 : len(tokens)]]
    other = log_probs("sft" if stage == "dpo" else "dpo", tokens)

    def off(expected: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(served, expected, strict=True))

    assert off(log_probs(stage, tokens)) < CLOSE < off(other)


def test_it_stops_at_the_end_of_turn_and_draws_the_same_with_the_same_seed(server: "Server", question: str) -> None:
    ask: Any = {"model": server.model, "messages": [{"role": "user", "content": question}], "max_tokens": 200}
    for seed in (7, -1):  # which vLLM itself takes for none
        drawn = [server.client.chat.completions.create(**ask, seed=seed).choices[0] for _ in range(2)]
        assert drawn[0].message.content == drawn[1].message.content
    reasons = [server.client.chat.completions.create(**ask, seed=seed).choices[0].finish_reason for seed in range(8)]
    assert "stop" in reasons


def test_the_page_and_feedback_are_there_and_other_sites_are_not_let_in(server: "Server") -> None:
    root = server.address.removesuffix("/v1")
    assert httpx.get(f"{root}/").headers["content-type"].startswith("text/html")
    rating = {"answer": "a", "rating": "up", "messages": [{"role": "user", "content": "q"}]}
    assert server.post("feedback", json=rating).status_code == 201
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{server.address}/models", headers=asked).headers


def test_sigterm_lets_it_finish_and_the_record_counts(server: "Server") -> None:
    """Last in this file: it ends the server."""
    ask: Any = {
        "model": server.model,
        "prompt": "def",
        "max_tokens": 400,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    parts = server.client.completions.create(**ask, stream=True)
    tokens = bool(next(parts).choices[0].text)
    server.process.terminate()
    until(lambda: httpx.get(server.address.removesuffix("/v1") + "/ready").status_code == 503)
    assert server.post("completions", json={"model": server.model, "prompt": "a"}).status_code == 503
    tokens += sum(bool(part.choices[0].text) for part in parts)
    code, _, facts = server.ended()
    assert code == 0 and facts.status == "complete" and tokens > 300
    assert facts.results["backend"] == "vllm" and facts.results["requests"] > 10
    assert facts.results["completion_tokens"] >= 400 and math.isfinite(facts.results["prompt_tokens"])
