"""A judge behind any OpenAI-compatible endpoint: a model that reads both answers and gives its reason.

Structured output where the server has it, else a last line in plain text (`prompt.py`). A request that failed is sent again,
waiting longer each time; an answer without a verdict is asked for anew, under another mark. What stays without one is
unscored. Verdicts are kept as they come (`kept.py`); tokens are counted, and priced where the profile has prices.

The key is the environment's, and stands in no record: ALETHEIA_JUDGE_API_KEY; without it OPENAI_API_KEY where OpenAI is
asked, ALETHEIA_API_KEY where this machine is. No host is sent another's.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from eval.judges import prompt
from eval.judges.at_once import at_once
from eval.judges.judge import Duel, Spent, Verdict
from eval.judges.kept import Kept, key
from pipeline.config import EndpointJudge as Settings
from pipeline.errors import UserError
from pipeline.progress import Progress, printable, say
from pipeline.workspace import Workspace
from serving.client import address_of, api_key

KEY = "ALETHEIA_JUDGE_API_KEY"
NO_KEY = "none"  # the client wants one
READINGS = 3  # answers asked for until one holds a verdict
IN_A_ROW = 5  # duels that the server failed, one after the other: it is gone
NOT_ITS_SHAPE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # a page of HTML, half of a JSON
CHARACTERS_A_TOKEN = 3  # of English and code, rather few: a forecast may be too high


@dataclass(frozen=True)
class Manner:
    """How the server wants to be asked: learnt from its refusals."""

    structured: bool = True
    tokens: str = "max_tokens"  # newer models of OpenAI's want the other name
    temperature: bool = True
    system: bool = True  # some templates know no such role

    def after(self, said: str) -> "Manner | None":
        """The next to try; None where the refusal is about something else."""
        if self.tokens == "max_tokens" and "max_completion_tokens" in said:
            return replace(self, tokens="max_completion_tokens")
        if self.temperature and "temperature" in said:
            return replace(self, temperature=False)
        if self.system and "system role" in said.lower():
            return replace(self, system=False)
        return replace(self, structured=False) if self.structured else None


class Endpoint:
    """Raises `UserError` when the server cannot be reached, wants another key, or has no such model."""

    limits = "a model judging models: it may like its own family's style, and how far people agree with it is not known"
    order_blind = False

    def __init__(self, settings: Settings, workspace: Workspace, currency: str = "USD") -> None:
        from openai import OpenAI

        self.settings, self.currency, self.spent = settings, currency, Spent()
        address, _, model = settings.endpoint.partition("#")
        if model:
            raise UserError("a judge's address has no #", where=settings.endpoint, remedy=f"model: {model}")
        self.root = address_of(address)
        self._client = OpenAI(
            base_url=self.root, api_key=_key(self.root), timeout=settings.timeout, max_retries=settings.retries
        )
        self.cards = self._shown()
        self.model = self._named()
        self.based_on = str(self._card(self.model).get("parent") or "")
        self.name = printable(f"{self.model} at {urlsplit(self.root).netloc}")
        self._depends = (self.root, self.known_as(self.model), settings.temperature, settings.max_tokens)
        self._kept = Kept(workspace, key(*self._depends))
        self._manner, self._lock = Manner(), Lock()
        self._failed = 0  # duels one after the other

    # ── Before ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _shown(self) -> list[dict[str, Any]]:
        """The server's cards; none where it does not show them."""
        from openai import APIConnectionError, APIError, AuthenticationError, PermissionDeniedError

        try:
            return [card.model_dump() for card in self._client.with_options(max_retries=1).models.list()]
        except (AuthenticationError, PermissionDeniedError):
            raise UserError("wants another API key", where=self.root, remedy=f"{KEY}=… before the command") from None
        except APIConnectionError as error:
            what = f"the judge cannot be reached ({type(error).__name__})"
            raise UserError(what, where=self.root, remedy="eval_config.judges") from None
        except (APIError, *NOT_ITS_SHAPE):
            return []

    def _named(self) -> str:
        names, wanted = [str(card.get("id")) for card in self.cards], self.settings.model
        if wanted and (wanted in names or not names):
            return wanted
        if not wanted and len(names) == 1:
            return names[0]
        what = f"has no model `{wanted}`" if wanted else "needs to be told which model judges"
        said = f"model: {' or '.join(names[:5])}" if names else "model: its name"
        raise UserError(what, where=self.root, remedy=said)

    def known_as(self, model: str) -> list[str]:
        """Its name, and the weights that the server says are behind it, as vLLM does: a model may have several names."""
        return [model, str(self._card(model).get("root") or "")]

    def _card(self, model: str) -> dict[str, Any]:
        return next((card for card in self.cards if card.get("id") == model), {})

    def forecast(self, duels: Sequence[Duel]) -> str:
        new = [duel for duel in duels if self._kept.get(self._known_as(duel)) is None]
        letters = sum(len(m["content"]) for duel in new for m in prompt.Asked(duel, "", False).messages)
        tokens_in, tokens_out = letters // CHARACTERS_A_TOKEN, len(new) * self.settings.max_tokens
        cost = self._price(tokens_in, tokens_out)
        priced = "no price known" if cost is None else f"about {cost:.2f} {self.currency}"
        known = f" ({len(duels) - len(new)} kept from before)" if len(new) < len(duels) else ""
        return (
            f"up to {len(new)} calls{known}, about {tokens_in:,} tokens in and up to "
            f"{tokens_out:,} out: {priced}, {READINGS} times as much where none can be read"
        )

    def _price(self, tokens_in: int, tokens_out: int) -> float | None:
        a, b = self.settings.price_in, self.settings.price_out
        return None if a is None or b is None else (a * tokens_in + b * tokens_out) / 1e6

    def _known_as(self, duel: Duel) -> str:
        """Whatever mark its request will have."""
        return key(*self._depends, prompt.Asked(duel, "", False).messages)

    # ── Judging ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        names = [self._known_as(duel) for duel in duels]
        found = {name: kept for name in names if (kept := self._kept.get(name))}
        new = {name: duel for name, duel in zip(names, duels, strict=True) if name not in found}
        self.spent.kept += len(found)
        self._failed = 0
        with Progress(f"{self.name}: verdicts", len(found) + len(new), "duel", len(found)) as progress:
            for (name, _), verdict in at_once(self._verdict, [*new.items()], self.settings.concurrency):
                found[name] = verdict
                progress.advance(note=self._so_far())
        unscored = [verdict.why for verdict in found.values() if verdict.score is None]
        if unscored:
            say(f"note: {self.name}: {len(unscored)} of {len(found)} unscored, the first: {unscored[0]}")
        return [found[name] for name in names]

    def _so_far(self) -> str:
        return "" if self.spent.cost is None else f"{self.spent.cost:.2f} {self.currency}"

    def _verdict(self, asked: tuple[str, Duel]) -> Verdict:
        """All that the server may do wrong ends in a verdict without a score."""
        from openai import APIConnectionError, APIError, APIStatusError

        if self._failed >= IN_A_ROW:
            return Verdict(None, f"not asked: the server failed {IN_A_ROW} times, one after the other")
        name, duel = asked
        try:
            verdict = self._read(duel)
        except APIStatusError as error:
            lasting = error.status_code >= 500 or error.status_code in (401, 403, 404, 429)
            verdict = Verdict(None, f"{error.status_code} {self._said(error)}")
        except APIConnectionError as error:  # a timeout too
            lasting, verdict = True, Verdict(None, f"no answer ({type(error).__name__})")
        except APIError as error:
            lasting, verdict = False, Verdict(None, f"no answer that can be used ({type(error).__name__})")
        else:
            lasting = False
        with self._lock:
            self._failed = self._failed + 1 if lasting else 0
        if verdict.score is not None:
            self._kept.put(name, verdict)
        return verdict

    def _read(self, duel: Duel) -> Verdict:
        why = ""
        for _ in range(READINGS):
            try:
                asked, choice = self._ask(duel)
                text = choice.message.content or ""
                verdict = prompt.read(text, asked)
            except NOT_ITS_SHAPE as error:
                why = f"the answer has not OpenAI's shape ({type(error).__name__})"
                continue
            if choice.finish_reason == "length":  # what came last may not be its last word
                why = f"cut off at {self.settings.max_tokens} tokens"
            elif verdict:
                return verdict
            else:
                why = f"no verdict in its answer: {' '.join(text.split())[-80:]!r}"
                if asked.as_json and text.strip():  # it takes the schema, and does not keep to it
                    self._manner = replace(self._manner, structured=False)
        return Verdict(None, why)

    def _ask(self, duel: Duel) -> tuple[prompt.Asked, Any]:
        """The answer's first choice, in the manner that the server takes."""
        from openai import BadRequestError, UnprocessableEntityError

        refused, manner = False, self._manner
        while True:
            asked = prompt.Asked.of(duel, manner.structured)
            messages: Any = asked.messages if manner.system else _as_one(asked.messages)
            try:
                answer = self._client.chat.completions.create(
                    model=self.model, messages=messages, **self._options(manner)
                )
            except (BadRequestError, UnprocessableEntityError) as error:
                simpler = manner.after(self._said(error))
                if simpler is None:
                    raise
                refused, manner = True, simpler
            else:
                if refused:  # and the simpler manner was not: refused for its length, say, a duel teaches nothing
                    self._manner = manner
                self._count(answer.usage)
                return asked, answer.choices[0]

    def _options(self, manner: Manner) -> dict[str, Any]:
        options: dict[str, Any] = {manner.tokens: self.settings.max_tokens}
        if manner.temperature:
            options["temperature"] = self.settings.temperature
        if manner.structured:
            options["response_format"] = prompt.SCHEMA
        return options

    def _said(self, error: Any) -> str:
        """By the server, in short; of a key that it repeats, nothing."""
        body = error.body if isinstance(error.body, dict) else {}
        said, key = str(body.get("message") or error.message), self._client.api_key
        return " ".join((said if key == NO_KEY else said.replace(key, "…")).split())[:200]

    def _count(self, usage: Any) -> None:
        spent = self.spent
        with self._lock:
            spent.calls += 1
            spent.tokens_in += _number(getattr(usage, "prompt_tokens", 0))
            spent.tokens_out += _number(getattr(usage, "completion_tokens", 0))
            spent.cost = self._price(spent.tokens_in, spent.tokens_out)


def _number(said: Any) -> int:
    return said if isinstance(said, int) else 0


def _as_one(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]


def is_here(host: str) -> bool:
    """Whether it is this machine, however that is spelt: localhost, 127.1, ::1, 0.0.0.0. No name is looked up."""
    with suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))
    try:
        address = ip_address(host)
    except ValueError:
        return host.rstrip(".") == "localhost"
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _key(root: str) -> str:
    host = urlsplit(root).hostname or ""
    own = os.environ.get(KEY)
    if not own and (host == "api.openai.com" or host.endswith(".api.openai.com")):
        own = os.environ.get("OPENAI_API_KEY")
    if not own and is_here(host):
        own = api_key()
    if own and not (own.isascii() and own.isprintable() and own == own.strip()):
        what = "holds a space at an end, a control character or one beyond ASCII, which no request can send"
        raise UserError(what, where=KEY)
    return own or NO_KEY
