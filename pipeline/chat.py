"""Messages into token ids and a loss mask: the only place where that happens, for every stage.

The tokenizer's own chat template is the single source. A conversation is built as it will be met in use: each prompt is
the template's rendering up to the assistant's turn, each completion is what the template puts after it, up to and with
its one end-of-turn token. Only completions are trained; nothing follows the last end-of-turn.

A template is a program of its own. `Chat` tries it on fixed conversations and refuses one that cannot be trained as it
is used; a row that it would not render so is refused by itself. What is handled: an end-of-turn that is not the eos token
(Gemma, Phi-3), today's date (written as one fixed date), and a template that renders earlier turns otherwise than the
last one (Qwen3 drops their `<think>`), with which rows of one answer and preference pairs are trained.

The contract is a hash over the token ids of those conversations. It is written beside the adapter, carried by merge and
checked by serve and eval, so that the prompt which is served is the prompt that was trained.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from pipeline.data.rows import Message, PreferencePair
from pipeline.encoded import Encoded
from pipeline.errors import UserError

T = TypeVar("T")

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
DATE = date(2024, 7, 26)  # what Llama-3's template falls back on
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class RewrittenTurn(UserError):
    """Turns that cannot be trained in one sequence: an earlier one is not what it was when it was the last."""


@dataclass(frozen=True)
class Contract:
    """What training and serving must agree on; and what was found of the template, which is not compared.

    A file of an earlier version does not say what was found: None.
    """

    sha256: str
    end_of_turn: str
    end_of_turn_id: int
    bos_id: int | None
    bos_tokens: int | None = field(default=None, compare=False)  # that a sequence begins with
    end_of_turn_tokens: int | None = field(default=None, compare=False)
    end_of_turn_trained: bool | None = field(default=None, compare=False)  # once in every trained turn
    prefix_preserving: bool | None = field(default=None, compare=False)  # else only rows of one answer are trained
    keeps_white_space: bool | None = field(default=None, compare=False)  # else it is stripped around a text
    takes_system: bool | None = field(default=None, compare=False)
    date: str | None = field(default=None, compare=False)  # that stands where the template would write today's

    def facts(self) -> dict[str, Any]:
        """For the record, beside the hash."""
        return {key: value for key, value in asdict(self).items() if key != "sha256" and value is not None}

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


class Turn(NamedTuple):
    """Text of a prompt and of the answer after it, up to and with its end-of-turn."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class Chat:
    """A tokenizer, checked once to keep the contract. Raises `UserError` where its template cannot."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._known: dict[Any, Any] | None = None
        if not tokenizer.chat_template:
            raise UserError("its tokenizer has no chat template", where=name, remedy="an instruct model")
        if tokenizer.eos_token is None:
            raise UserError("its tokenizer has no end-of-turn (eos) token", where=name)
        self.bos_id: int | None = tokenizer.bos_token_id
        # Llama-3 names only two of its own
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.reserved_tokens = [t for t in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if t.strip()]
        line, word, both = tokenizer(["\n", "a", "\na"], add_special_tokens=False)["input_ids"]
        self._apart = line + word == both  # an answer can be tokenised apart from its prompt
        date = self._fix_date()
        self._one_token(tokenizer.eos_token)
        self.end_of_turn = self._find_end_of_turn()
        self.end_of_turn_id = self._one_token(self.end_of_turn)
        self.contract = self._contract(date)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready for the assistant's turn: in training, in serving and in evaluation."""
        return self._tokenize([self._prompt(messages)])[0]

    def remember(self) -> Self:
        """From now on keeps what it encodes: a training asks for each row when it is checked, predicted and trained."""
        self._known = {}
        return self

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """The whole conversation; each assistant's turn and its one end-of-turn is trained, nothing else."""
        return self._once(lambda: self._conversation(messages), messages)

    def _conversation(self, messages: Sequence[Message]) -> Encoded:
        turns = [self._last_turn(messages[: n + 1]) for n, m in enumerate(messages) if m.role == "assistant"]
        if not turns:
            return Encoded([], [])
        if not all(turns[-1].text.startswith(turn.text) for turn in turns):
            what = "its template renders an earlier turn otherwise once more turns follow"
            raise RewrittenTurn(f"{what}: with it, only rows of one answer can be trained", where=self.name)
        *prompts, ids = self._tokenize([*(turn.prompt for turn in turns), self._rest(turns[-1])])
        return self._masked(prompts, ids)

    def pair(self, pair: PreferencePair) -> tuple[Encoded, Encoded]:
        """Prompt + chosen and prompt + rejected; only the completions are trained."""
        return self._once(lambda: self._pair(pair), pair.prompt, pair.chosen, pair.rejected)

    def _pair(self, pair: PreferencePair) -> tuple[Encoded, Encoded]:
        sides = [self._last_turn([*pair.prompt, *answer]) for answer in (pair.chosen, pair.rejected)]
        prompt, chosen, rejected = self._tokenize([sides[0].prompt, *map(self._rest, sides)])
        return self._masked([prompt], chosen), self._masked([prompt], rejected)

    def reserved_in(self, messages: Sequence[Message]) -> str | None:
        """A special token that stands in a message's text, where it would end or forge a turn; None when there is none."""
        return next((token for m in messages if (token := self.reserved(m.content))), None)

    def reserved(self, text: str) -> str | None:
        return next((token for token in self.reserved_tokens if token in text), None)

    def _once(self, encode: Callable[[], T], *parts: Sequence[Message]) -> T:
        if self._known is None:
            return encode()
        key = tuple(tuple((m.role, m.content) for m in part) for part in parts)
        if key not in self._known:
            self._known[key] = encode()
        found: T = self._known[key]
        return found

    # ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template may raise anything: it is a program of its own
            raise UserError(f"its chat template refuses the messages: {error}", where=self.name) from None
        return text

    def _prompt(self, messages: Sequence[Message]) -> str:
        """What comes before the assistant's turn. Its own earlier ones may be shortened: Qwen3 drops their `<think>`."""
        text = self._render(messages, generation_prompt=True)
        given = Counter((m.content.strip(), m.role) for m in messages if m.role != "assistant")
        if lost := next((role for (content, role), times in given.items() if text.count(content) < times), None):
            raise UserError(f"its template drops or changes the {lost}'s text", where=self.name)
        return text

    def _last_turn(self, messages: Sequence[Message]) -> Turn:
        """The last message as it is generated after those before it."""
        prompt, whole = self._prompt(messages[:-1]), self._render(messages)
        if not whole.startswith(prompt):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
            raise UserError(
                f"its template renders a prompt otherwise than a whole conversation, which has no {prompt[same:][:80]!r} there",
                where=self.name,
            )
        answer, found, _ = whole[len(prompt) :].partition(self.end_of_turn)
        if not found:
            raise UserError(f"its template does not end the assistant's turn with {self.end_of_turn}", where=self.name)
        if messages[-1].content.strip() not in answer:
            raise UserError("its template changes the assistant's text", where=self.name)
        return Turn(prompt, answer + self.end_of_turn)

    # ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Of whole renderings: the template brings its own BOS."""
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        if self.bos_id is not None and any(ids[:2] == [self.bos_id] * 2 for ids in found):
            raise UserError("its template gives two BOS tokens", where=self.name)
        return found

    def _rest(self, turn: Turn) -> str:
        """What is tokenised beside the prompt: the answer, or both where a tokenizer puts a space before every text."""
        return turn.answer if self._apart else turn.text

    def _masked(self, prompts: Sequence[list[int]], rest: list[int]) -> Encoded:
        """A sequence that begins with each of the prompts, trained after each of them up to the next end-of-turn."""
        ids = prompts[-1] + rest if self._apart else rest
        mask = [False] * len(ids)
        for prompt in prompts:
            start = len(prompt)
            if ids[:start] != prompt:
                if prompt is prompts[-1]:
                    raise UserError("its tokenizer joins the prompt's end and the answer's beginning", where=self.name)
                what = "an earlier turn gives other tokens once more turns follow, as where it begins with white space"
                raise RewrittenTurn(what, where=self.name)
            if self.end_of_turn_id not in ids[start:]:
                raise UserError(f"its tokenizer breaks {self.end_of_turn} up after an answer", where=self.name)
            end = ids.index(self.end_of_turn_id, start) + 1
            mask[start:end] = [True] * (end - start)
        return Encoded(ids, mask)

    # ── The contract ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _fix_date(self) -> str | None:
        """Puts `DATE` where the template would write today's: what is trained now is served and measured on other days."""
        given = self.tokenizer.chat_template
        every = given if isinstance(given, dict) else {"": given}
        fixed = {name: _TODAY.sub(lambda at: repr(DATE.strftime(at[2])), text) for name, text in every.items()}
        if any("strftime_now(" in text for text in fixed.values()):
            raise UserError("its template writes today's date in a way that cannot be fixed", where=self.name)
        if fixed == every:
            return None
        self.tokenizer.chat_template = fixed if isinstance(given, dict) else fixed[""]
        return DATE.isoformat()

    def _one_token(self, text: str) -> int:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(f"{text} is {len(ids)} tokens, so it cannot be learnt as a stop", where=self.name)
        return ids[0]

    def _find_end_of_turn(self) -> str:
        """The special token that the template puts after an answer: mostly, not always, the eos token."""
        answer = PROBES[0][-1].content
        _, found, after = self._render(PROBES[0]).rpartition(answer)
        if not found:
            raise UserError("its template changes the assistant's text", where=self.name)
        ends = [token for token in self.reserved_tokens if token in after]
        if not ends:
            shredded = f", but with {after.strip()!r}, which is no token" if after.strip() else ""
            raise UserError(
                f"its template does not end the assistant's turn with a special token{shredded}", where=self.name
            )
        end = min(ends, key=lambda token: (after.index(token), -len(token)))
        if after.count(end) > 1:
            raise UserError(f"its template ends the assistant's turn with {end} more than once", where=self.name)
        return end

    def _contract(self, date: str | None) -> Contract:
        self._check_start()
        sequences, prefix_preserving = [], True
        for probe in PROBES:
            try:
                sequences.append(self.conversation(probe))
            except RewrittenTurn:
                prefix_preserving, turn = False, self._last_turn(probe)
                prompt, rest = self._tokenize([turn.prompt, self._rest(turn)])
                sequences.append(self._masked([prompt], rest))
        with_system = self._with_system()
        canonical = json.dumps([e and [e.ids, e.mask] for e in (*sequences, with_system)])
        return Contract(
            hashlib.sha256(canonical.encode()).hexdigest(),
            self.end_of_turn,
            self.end_of_turn_id,
            self.bos_id,
            bos_tokens=int(sequences[0].ids[0] == self.bos_id),
            end_of_turn_tokens=1,
            end_of_turn_trained=all(encoded.labels[-1] == self.end_of_turn_id for encoded in sequences),
            prefix_preserving=prefix_preserving,
            keeps_white_space=PROBES[1][0].content in self._prompt(PROBES[1][:1]),
            takes_system=with_system is not None,
            date=date,
        )

    def _check_start(self) -> None:
        """A sequence begins with the BOS that the tokenizer puts before any text; the template begins the turn itself."""
        question, answer = PROBES[0]
        prompt = self._prompt([question])
        bos_first = [self.bos_id] == self.tokenizer("a")["input_ids"][:1]
        if bos_first and self._tokenize([prompt])[0][0] != self.bos_id:
            raise UserError(
                "its template gives no BOS, which its tokenizer puts before any other text",
                where=self.name,
                remedy="a copy of it whose chat template begins with {{ bos_token }}",
            )
        header, _, _ = self._render(PROBES[0]).removeprefix(prompt).partition(answer.content)
        if prompt == self._render([question]) and header.strip():
            raise UserError(
                f"its template has no generation prompt: {header!r} would be left to the model", where=self.name
            )
        if PROBES[1][1].content not in self._prompt(PROBES[1][:3]):
            raise UserError("its template drops or changes the assistant's earlier text", where=self.name)

    def _with_system(self) -> Encoded | None:
        """None where the template takes no system message, as Gemma's."""
        try:
            return self.conversation(_SYSTEM_PROBE)
        except UserError:
            return None
