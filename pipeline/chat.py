"""Messages into token ids and a loss mask: the only place where that happens, for every stage.

The tokenizer's own chat template is the single source. A conversation is built as it will be met in use: each prompt is
the template's rendering up to the assistant's turn, each completion is what the template puts after it, up to and with
its one end-of-turn token. Only completions are trained; nothing follows the last end-of-turn.

The contract is a hash over the token ids of fixed conversations. It is written beside the adapter, carried by merge and
checked by serve and eval, so that the prompt which is served is the prompt that was trained.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.rows import Message, PreferencePair
from pipeline.errors import UserError

CONTRACT_FILE = "chat_contract.json"
PROBES = (
    [
        Message(role="user", content="What is an index?"),
        Message(role="assistant", content="A sorted copy of a column."),
    ],
    [
        Message(role="user", content="  def f():\n    return 1\n"),
        Message(role="assistant", content="```python\nf()\n```"),
        Message(role="user", content="And é, 你好?"),
        Message(role="assistant", content="\n- one\n- two"),
    ],
)
_SYSTEM_PROBE = [Message(role="system", content="Be brief."), *PROBES[0]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence and, for each, whether it is trained."""

    ids: list[int]
    mask: list[bool]

    @property
    def labels(self) -> list[int]:
        """-100 where nothing is trained, as in transformers."""
        return [token if trained else -100 for token, trained in zip(self.ids, self.mask, strict=True)]


@dataclass(frozen=True)
class Contract:
    """What training and serving must agree on."""

    sha256: str
    end_of_turn: str
    end_of_turn_id: int
    bos_id: int | None

    def save(self, folder: Path) -> None:
        (folder / CONTRACT_FILE).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Contract":
        try:
            return cls(**json.loads((folder / CONTRACT_FILE).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"has no readable {CONTRACT_FILE}", where=str(folder), remedy="making it again with this pipeline"
            ) from None


class Chat:
    """A tokenizer, checked once to keep the contract. Raises `UserError` where its template cannot."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        if not tokenizer.chat_template:
            raise UserError("its tokenizer has no chat template", where=name, remedy="an instruct model")
        if tokenizer.eos_token is None:
            raise UserError("its tokenizer has no end-of-turn (eos) token", where=name)
        self.end_of_turn: str = tokenizer.eos_token
        pieces = tokenizer.encode(self.end_of_turn, add_special_tokens=False)
        if len(pieces) != 1:
            raise UserError(f"{self.end_of_turn} is {len(pieces)} tokens, so it cannot be learnt as a stop", where=name)
        self.end_of_turn_id: int = pieces[0]
        self.bos_id: int | None = tokenizer.bos_token_id
        added = [
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special
        ]  # Llama-3 names only two of its own
        self._reserved = [t for t in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if t.strip()]
        self.contract = self._contract()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready for the assistant's turn: in training, in serving and in evaluation."""
        text = self._render(messages, generation_prompt=True)
        lost = next((m.role for m in messages if m.role != "assistant" and m.content.strip() not in text), None)
        if lost:
            raise UserError(f"its template drops or changes the {lost}'s text", where=self.name)
        ids = self._tokenize(text)
        if self.bos_id is not None and ids.count(self.bos_id) > 1:
            raise UserError(f"its template gives {ids.count(self.bos_id)} BOS tokens", where=self.name)
        return ids

    def completion(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the last message's turn, given those before it, up to and with its end-of-turn."""
        prompt = self._render(messages[:-1], generation_prompt=True)
        whole = self._render(messages, generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError("its template renders a prompt otherwise than a whole conversation", where=self.name)
        turn, found, _ = whole[len(prompt) :].partition(self.end_of_turn)
        if not found:
            raise UserError(f"its template does not end the assistant's turn with {self.end_of_turn}", where=self.name)
        if messages[-1].content.strip() not in turn:
            raise UserError("its template changes the assistant's text", where=self.name)
        return self._tokenize(turn + self.end_of_turn)

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """The whole conversation; each assistant's turn and its one end-of-turn is trained, nothing else."""
        ids: list[int] = []
        mask: list[bool] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.prompt(messages[:index])
            if prompt[: len(ids)] != ids:
                raise UserError("an earlier turn gives other tokens once more turns follow", where=self.name)
            completion = self.completion(messages[: index + 1])
            mask += [False] * (len(prompt) - len(ids)) + [True] * len(completion)
            ids = prompt + completion
        return Encoded(ids, mask)

    def pair(self, pair: PreferencePair) -> tuple[Encoded, Encoded]:
        """Prompt + chosen and prompt + rejected; only the completions are trained."""
        prompt = self.prompt(pair.prompt)
        sides = []
        for answer in (pair.chosen, pair.rejected):
            completion = self.completion([*pair.prompt, *answer])
            sides.append(Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
        return sides[0], sides[1]

    def reserved_in(self, messages: Sequence[Message]) -> str | None:
        """A special token that stands in a message's text, where it would end or forge a turn; None when there is none."""
        return next((token for m in messages if (token := self.reserved(m.content))), None)

    def reserved(self, text: str) -> str | None:
        return next((token for token in self._reserved if token in text), None)

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        turns = [m.model_dump() for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template may raise anything: it is a program of its own
            raise UserError(f"its chat template refuses the messages: {error}", where=self.name) from None
        return text

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template brings its own BOS
        return ids

    def _contract(self) -> Contract:
        sequences = [self.conversation(probe) for probe in PROBES]
        for encoded in sequences:
            turns = sum(
                1 for t, trained in zip(encoded.ids, encoded.mask, strict=True) if trained and t == self.end_of_turn_id
            )
            if encoded.ids[-1] != self.end_of_turn_id or not encoded.mask[-1] or turns == 0:
                raise UserError("its end-of-turn would not be trained", where=self.name)
        canonical = json.dumps([e and [e.ids, e.mask] for e in (*sequences, self._with_system())])
        return Contract(
            hashlib.sha256(canonical.encode()).hexdigest(), self.end_of_turn, self.end_of_turn_id, self.bos_id
        )

    def _with_system(self) -> Encoded | None:
        """None where the template takes no system message, as Gemma's."""
        try:
            return self.conversation(_SYSTEM_PROBE)
        except UserError:
            return None
