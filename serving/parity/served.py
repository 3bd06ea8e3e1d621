"""A server, asked over HTTP what parity asks of each way to run the model."""

from collections.abc import Iterator
from typing import Any

from pipeline.chat import Chat
from pipeline.progress import track
from serving.endpoint import Endpoint, Lacks, as_json
from serving.parity.compared import Compared
from serving.parity.probes import ANSWER_TOKENS, NEVER_ENDS, Probe, Reference, Scores


def said_precision(endpoint: Endpoint) -> str | None:
    """That it computes in, where it says so beside its model, as this project's own server does."""
    try:
        cards = endpoint._ask("GET", "/v1/models", None)["data"]
        said = next(card.get("precision") for card in cards if card["id"] == endpoint.model)
    except (Lacks, AttributeError, KeyError, StopIteration, TypeError):
        return None
    return said if isinstance(said, str) else None


def compare(
    endpoint: Endpoint, name: str, chat: Chat, probes: list[Probe], reference: Reference, precision: str | None
) -> Compared:
    """What the server makes of the probes. Raises `StageFailed` when it fails, `UserError` when it is gone."""
    found = Compared(name, reference.bound(precision), reference.moved)
    differences: list[float] = []
    exact = zip(reference.exact.first, reference.exact.tokens, strict=True)
    for probe, (first, tokens) in zip(track(probes, f"{name}: parity", "prompt"), exact, strict=True):
        _ids(found, endpoint, chat, probe)
        differences += _chat(found, endpoint, chat, probe, first)
        differences += _forced(found, endpoint, probe, tokens)
    _stop(found, endpoint, reference.exact)
    found.judge(differences, precision or reference.stored)
    return found


def _ids(found: Compared, endpoint: Endpoint, chat: Chat, probe: Probe) -> None:
    try:
        served = endpoint.post("/tokenize", messages=as_json(probe.messages)).get("tokens")
        if not served:
            raise Lacks("takes no messages")
    except Lacks as why:
        for check in ("token ids", "BOS"):
            found.lacks(check, f"/tokenize: {why}")
    else:
        found.saw_ids(chat, probe, served)


def _chat(found: Compared, endpoint: Endpoint, chat: Chat, probe: Probe, first: float) -> Iterator[float]:
    """A short greedy answer; yields how far the log-prob of its first token is off, where the server tells it."""
    asked: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
    try:
        try:
            answer = endpoint.chat(probe.messages, **asked, logprobs=True)
        except Lacks:
            answer = endpoint.chat(probe.messages, **asked)
    except Lacks as why:
        return found.lacks("stop", f"/v1/chat/completions: {why}")
    choice, count = answer["choices"][0], (answer.get("usage") or {}).get("prompt_tokens", len(probe.prompt))
    if count != len(probe.prompt):
        what = f"a chat of `{probe.name}` is answered from {count} tokens, in training it was {len(probe.prompt)}"
        found.saw("token ids", False, what)
    if special := chat.reserved(choice["message"]["content"] or ""):
        found.saw("stop", False, f"the answer to `{probe.name}` holds {special}")
    if told := (choice.get("logprobs") or {}).get("content"):
        yield abs(told[0]["logprob"] - first)


def _forced(found: Compared, endpoint: Endpoint, probe: Probe, exact: list[float]) -> list[float]:
    """Differences of the log-probs of given tokens, asked for as lm-eval does; what is told last is a generated one's."""
    asked: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    try:
        answer = endpoint.post("/v1/completions", prompt=probe.forced, **asked)
        told = ((answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or [])[1 : len(probe.forced)]
        if len(told) < len(exact) or None in told:
            raise Lacks("echo tells no log-prob of every token")
    except Lacks as why:
        found.lacks("log-probs", f"/v1/completions: {why}")
        return []
    if (answer.get("usage") or {}).get("prompt_tokens", len(probe.forced)) != len(probe.forced):
        found.saw("BOS", False, "tokens are added to a prompt that is given as token ids")
    return [abs(a - b) for a, b in zip(told, exact, strict=True)]


def _stop(found: Compared, endpoint: Endpoint, exact: Scores) -> None:
    if exact.ending is None:
        return found.lacks("stop", NEVER_ENDS)
    try:
        answer = endpoint.post("/v1/completions", prompt=exact.ending[1], max_tokens=ANSWER_TOKENS, temperature=0)
    except Lacks as why:
        return found.lacks("stop", f"/v1/completions: {why}")
    choice = answer["choices"][0]
    what = f"where the model ends its turn the server goes on: {choice['text']!r} ({choice['finish_reason']})"
    return found.saw("stop", choice["finish_reason"] == "stop" and choice["text"] == "", what)
