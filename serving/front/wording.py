"""How OpenAI words an answer: whole and in parts, as a chat and as a completion, with the log-probs of either.

https://platform.openai.com/docs/api-reference/chat/object, …/chat-streaming, …/completions/object
"""

from collections.abc import Sequence
from typing import Any, Protocol

from serving.front.text import Token, Vocabulary

LEAST = -9999.0  # nats; JSON has no minus infinity, and OpenAI and vLLM write this


class Wording(Protocol):
    """Of one endpoint. `top`: likeliest tokens to tell beside each one; None: no log-probs."""

    prefix: str  # of the answer's id
    object: str
    part_object: str

    def opening(self) -> dict[str, Any] | None:
        """What is sent of a choice before its first text."""
        ...

    def whole(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]: ...

    def part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]: ...


class ChatWording:
    prefix, object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary, top: int | None) -> None:
        self._vocabulary, self._top = vocabulary, top

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def whole(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(tokens)}

    def part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        content = []
        for token in tokens:
            assert token.score is not None
            likeliest = sorted(token.score.top.items(), key=lambda item: -item[1])[: self._top]
            entry = self._entry(token.id, token.score.logprob)
            content.append(entry | {"top_logprobs": [self._entry(*item) for item in likeliest]})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = list(self._vocabulary.bytes_of(token))
        return {"token": self._vocabulary.name(token), "logprob": max(LEAST, logprob), "bytes": raw}


class CompletionWording:
    prefix, object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, vocabulary: Vocabulary, top: int | None) -> None:
        self._vocabulary, self._top = vocabulary, top

    def opening(self) -> dict[str, Any] | None:
        return None

    def whole(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(tokens)}

    part = whole

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """A list a figure. The first token of an echoed prompt has none: nothing comes before it."""
        if self._top is None:
            return None
        return {
            "text_offset": [token.start for token in tokens],
            "token_logprobs": [token.score and max(LEAST, token.score.logprob) for token in tokens],
            "tokens": [self._name(token.id) for token in tokens],
            "top_logprobs": [token.score and self._likeliest(token) for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """The token itself is always among them, so there may be one more than asked for."""
        assert token.score is not None
        found = sorted(token.score.top.items(), key=lambda item: -item[1])[: self._top]
        by_id = dict(found) | {token.id: token.score.logprob}
        # two tokens may have one name: the likelier is kept, since lm-eval asks whether any is likelier than the token
        return {self._name(i): max(LEAST, logprob) for i, logprob in sorted(by_id.items(), key=lambda item: item[1])}

    def _name(self, token: int) -> str:
        return self._vocabulary.name(token, "bytes:")
