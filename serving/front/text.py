"""Tokens into text while they arrive: no half character is told, and nothing that may begin a stop string.

    text = AnswerText(Vocabulary(tokenizer), stops=["\\n\\n"])
    text.push(token, score)
    part, tokens = text.take()        # what may be sent by now

A decoder that looks at all of an answer for each of its tokens would take ten times as long for one three times as long.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.engine import TokenScore

HALF = "\ufffd"  # what a decoder gives for bytes that are no character, or not one yet
CHARACTER = 4  # bytes of the longest UTF-8 character, so at most so many tokens
BEFORE = 5  # tokens of a prompt that its completion is decoded after

_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = _VISIBLE + [byte for byte in range(256) if byte not in _VISIBLE]
# byte-level BPE writes each byte as a letter: the visible ones as themselves, the others from 256 on (GPT-2's table)
_BYTE_OF = {chr(byte if n < len(_VISIBLE) else 256 + n - len(_VISIBLE)): byte for n, byte in enumerate(_BYTES)}


class Vocabulary:
    """What a tokenizer's tokens are: their bytes, their names, and which of them are special and no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.size = tokenizer, len(tokenizer)
        self._added = tokenizer.added_tokens_decoder
        self.special = {token for token, added in self._added.items() if added.special} | {*tokenizer.all_special_ids}
        # the Rust one where there is one: the wrapper's may clean spaces up, which changes text that was told already
        self._decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode
        self._found: dict[int, bytes] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are shown."""
        text: str = self._decode(list(tokens), skip_special_tokens=False)
        return text

    def bytes_of(self, token: int) -> bytes:
        """Also where they are a part of a character only."""
        if token not in self._found:
            self._found[token] = self._bytes_of(token)
        return self._found[token]

    def name(self, token: int, prefix: str = "") -> str:
        """Its text; where that is no whole character its bytes, `\\xe4\\xbd`, as OpenAI writes them after `prefix`."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token].content).encode()
        once, twice = self.decode([token]), self.decode([token, token])
        if HALF not in once + twice:
            return twice[len(once) :].encode()  # the second one: at a text's beginning some decoders strip the space
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        if all(letter in _BYTE_OF for letter in piece):
            return bytes(_BYTE_OF[letter] for letter in piece)
        return once.encode()


class Detokenizer:
    """One text, token by token; all parts together are what `decode` gives of all tokens without the special ones.

    A token's text depends on those around it: spaces at a text's beginning, characters of several tokens. So the last few
    are decoded together, whatever the text's length.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._told = [token for token in before if token not in vocabulary.special][-BEFORE:]
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        if token in self._vocabulary.special:
            return ""
        self._pending.append(token)
        if not self._vocabulary.decode(self._told + self._pending).endswith(HALF):
            return self._tell(len(self._pending))
        if len(self._pending) > 2 * CHARACTER:  # noise: only the last three can still become a character
            return self._tell(len(self._pending) - CHARACTER + 1)
        return ""

    def flush(self) -> str:
        """The half character that the text ended in."""
        return self._tell(len(self._pending))

    def _tell(self, count: int) -> str:
        now, self._pending = self._pending[:count], self._pending[count:]
        before, after = self._vocabulary.decode(self._told), self._vocabulary.decode(self._told + now)
        self._told = now or self._told
        return after[len(before) :]


@dataclass(frozen=True)
class Token:
    """A token of an answer (or of a prompt that is echoed); `start` is its place in the text, in characters."""

    id: int
    start: int
    score: TokenScore | None = None


def echoed(
    vocabulary: Vocabulary, prompt: Sequence[int], text: str, scores: Sequence[TokenScore | None]
) -> list[Token]:
    """The tokens of a prompt that is told as `text`. What that does not show, a BOS or a stripped space, was at its begin."""
    decoder, starts, length = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
    for token in prompt:
        starts.append(length)
        length += len(decoder.decode(vocabulary.bytes_of(token)))
    hidden = max(length - len(text), 0)
    return [
        Token(token, max(start - hidden, 0), score) for token, start, score in zip(prompt, starts, scores, strict=True)
    ]


class AnswerText:
    """An answer's text up to the first stop string, with the tokens that it is made of.

    `before` is the prompt's end, where the answer continues it instead of being a text of its own; `begin` is the length
    of the echoed prompt, from which places are counted.
    """

    def __init__(
        self, vocabulary: Vocabulary, stops: Sequence[str] = (), before: Sequence[int] = (), begin: int = 0
    ) -> None:
        self.count, self.stopped = 0, False  # tokens taken; whether a stop string came
        self._detokenizer = Detokenizer(vocabulary, before)
        self._stops, self._longest = stops, max(map(len, stops), default=0)
        # a special token is no text, so as a stop it is known by its id
        self._ends = {token for token in vocabulary.special if vocabulary.name(token) in stops} if stops else set()
        self._tokens: list[Token] = []
        self._unsent, self._sent, self._length, self._closed = "", begin, begin, False

    def push(self, token: int, score: TokenScore | None = None) -> None:
        self.count += 1
        if token in self._ends:
            self._add(self._detokenizer.flush())
            self.stopped = True
            return
        self._tokens.append(Token(token, self._length, score))
        self._add(self._detokenizer.push(token))

    def close(self) -> None:
        """No token follows: what was held back is told."""
        if not self.stopped:
            self._add(self._detokenizer.flush())
        self._closed = True

    def take(self) -> tuple[str, list[Token]]:
        """The text that may be sent by now, and the tokens that begin in it."""
        held = 0 if self.stopped or self._closed else self._held()
        text, self._unsent = self._unsent[: len(self._unsent) - held], self._unsent[len(self._unsent) - held :]
        self._sent += len(text)
        if self._closed and not self.stopped:
            ready = len(self._tokens)
        else:
            ready = next((n for n, token in enumerate(self._tokens) if token.start >= self._sent), len(self._tokens))
        tokens, self._tokens = self._tokens[:ready], self._tokens[ready:]
        return text, tokens

    def _add(self, new: str) -> None:
        searched = max(len(self._unsent) - self._longest + 1, 0)
        self._unsent += new
        self._length += len(new)
        places = [at for stop in self._stops if (at := self._unsent.find(stop, searched)) >= 0]
        if places:
            self._unsent, self.stopped = self._unsent[: min(places)], True

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._unsent)), 0, -1):
            if any(stop.startswith(self._unsent[-length:]) for stop in self._stops):
                return length
        return 0
