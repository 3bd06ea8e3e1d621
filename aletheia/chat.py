"""`aletheia chat`: a conversation in the terminal with any server that speaks OpenAI's API.

    aletheia chat                          with the server of `aletheia serve`
    echo "What is a B-tree?" | aletheia chat          all of stdin is one question; the answer alone on stdout

The API key is `ALETHEIA_API_KEY`. Characters that a terminal would obey are escaped: the model may have learnt them anywhere.
"""

import json
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.progress import say
from serving.client import address_of, api_key

if TYPE_CHECKING:
    from openai import APIError, OpenAI

HELP = """\
/new           a new conversation
/system TEXT   what the model is told first, from now on; without TEXT: nothing
/up [TEXT]     the last answer is good; kept by the server, with TEXT
/down [TEXT]   the last answer is bad
/save FILE     the conversation as a row of training data, at the end of FILE
/help          these lines
Ctrl-C stops an answer, Ctrl-D leaves."""
COMMANDS = ("new", "system", "up", "down", "save", "help")
JOINERS = "\u200c\u200d"  # within words of many scripts, and in emoji; harmless


def chat(endpoint: str, system: str = "", model: str = "") -> None:
    """Until Ctrl-D; or, where stdin is no terminal, one question and its answer.

    Raises `UserError` where no server answers, it refuses the key or has no such model.
    """
    talk = Talk.begin(endpoint, system, model)
    if sys.stdin.isatty():
        _converse(talk)
        return
    question = sys.stdin.read().strip()
    if not question:
        raise UserError("stdin holds no question", where="chat", remedy='echo "What is a B-tree?" | aletheia chat')
    _print(talk.ask(question))


def visible(text: str) -> str:
    """Without characters that a terminal would obey, or that would hide what is said: each by its escape."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t" + JOINERS
        else " "
        if letter.isspace()
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


@dataclass
class Talk:
    """One conversation: what was said, and what it takes to go on."""

    client: "OpenAI"
    model: str
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    completion_id: str = ""  # of the last answer

    @classmethod
    def begin(cls, endpoint: str, system: str, model: str) -> "Talk":
        from openai import APIError, NotFoundError, OpenAI

        endpoint = address_of(endpoint)
        client = OpenAI(base_url=endpoint, api_key=api_key() or "none", max_retries=0)
        try:
            names = [card.id for card in client.models.list()]
        except NotFoundError:
            what = "a server answers, but shows no models here"
            raise UserError(what, where=endpoint, remedy="--endpoint http://HOST:PORT/v1") from None
        except APIError as error:
            raise _told(error, endpoint) from None
        if not names or (model and model not in names):
            raise UserError(
                f"the server has no model `{model}`" if model else "the server has no model",
                where=endpoint,
                remedy=f"--model {names[0]}" if names else "another --endpoint",
            )
        return cls(client, model or names[0], system)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, question: str) -> Generator[str]:
        """The answer in parts, fit for a terminal. What was said of it stays in the conversation, also when it is stopped.

        Raises `UserError` with what the server says. A question that got no answer at all is not part of the conversation.
        """
        from openai import APIError

        asked = {"role": "user", "content": question}
        messages: Any = [*self.messages, asked]
        answer, finish, completion_id = "", None, ""
        try:
            stream = self.client.chat.completions.create(model=self.model, messages=messages, stream=True)
            with stream:  # leaving it closes the connection, which frees the server's slot
                for event in stream:
                    completion_id = event.id or completion_id
                    for choice in event.choices[:1]:
                        finish = choice.finish_reason or finish
                        answer += choice.delta.content or ""
                        yield visible(choice.delta.content or "")
        except APIError as error:
            raise _told(error, str(self.client.base_url)) from None
        finally:
            if answer.strip():
                self.turns += [asked, {"role": "assistant", "content": answer}]
                self.completion_id = completion_id
        if finish == "length":
            say("\n(cut at the limit of tokens)")
        elif finish is None:
            raise UserError("the connection ended in the middle of the answer", where=str(self.client.base_url))

    def rate(self, rating: str, text: str) -> None:
        """Raises `UserError` where there is no answer yet, or the server does not keep it."""
        from openai import APIError

        if not self.turns:
            raise UserError("there is no answer yet to rate", where=f"/{rating}")
        body = {
            "messages": self.messages[:-1],
            "answer": self.turns[-1]["content"],
            "rating": rating,
            "text": text or None,
            "model": self.model,
            "completion_id": self.completion_id or None,
        }
        try:
            self.client.post("/feedback", body=body, cast_to=object)
        except APIError as error:
            if getattr(error, "status_code", 0) in (404, 405):
                raise UserError("this server keeps no feedback", where=f"/{rating}") from None
            raise _told(error, str(self.client.base_url)) from None

    def save(self, name: str) -> None:
        """Raises `UserError` where there is nothing to save, or no file to save it to."""
        from pydantic import ValidationError

        from pipeline.data.rows import Conversation

        if not name or not self.turns:
            raise UserError("needs a file" if not name else "there is no answer yet to save", where="/save")
        try:
            row = Conversation.model_validate({"messages": self.messages})
            with Path(name).expanduser().open("a", encoding="utf-8") as out:
                out.write(json.dumps(row.model_dump(mode="json", include={"messages"}), ensure_ascii=False) + "\n")
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"], where="/save") from None
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}", where="/save") from None


def _converse(talk: Talk) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has history, and a pasted text stays one question

    say(f"{visible(talk.model)} at {talk.client.base_url}  /help lists what else there is")
    while True:
        try:
            line = _line("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D leaves)")
            continue
        word, _, rest = line.strip().partition(" ")
        try:
            if word.startswith("/") and word[1:] in COMMANDS:
                _obey(talk, word[1:], rest.strip())
            elif word.startswith("/") and word[1:].isalpha():
                say(f"there is no {word}; /help lists what there is")
            elif word:
                _print(talk.ask(line))
        except KeyboardInterrupt:
            say("(stopped)")
        except UserError as error:
            say(f"error: {error}")


def _print(answer: Generator[str]) -> None:
    """As it comes. However that ends, the answer is closed, and with it its connection."""
    try:
        with closing(answer):
            for part in answer:
                print(part, end="", flush=True)
    finally:
        print()


def _obey(talk: Talk, command: str, rest: str) -> None:
    if command == "help":
        say(HELP)
    elif command == "new":
        talk.turns.clear()
        say("a new conversation")
    elif command == "system":
        talk.system = rest
        say("the model is told that first, from now on" if rest else "the model is told nothing first")
    elif command == "save":
        talk.save(rest)
        say(f"saved to {rest}")
    else:
        talk.rate(command, rest)
        say("kept")


def _line(prompt: str) -> str:
    """One line of the person's. The prompt goes where the person is: stdout may be a file."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _told(error: "APIError", endpoint: str) -> UserError:
    """What the server says, in one line."""
    from openai import APIConnectionError, APITimeoutError, AuthenticationError

    if isinstance(error, APITimeoutError):
        return UserError("the server did not answer in time", where=endpoint)
    if isinstance(error, APIConnectionError):
        return UserError(
            "no server answers", where=endpoint, remedy="`aletheia serve` in another terminal, or --endpoint"
        )
    if isinstance(error, AuthenticationError):
        return UserError("the server does not take this API key", where=endpoint, remedy="ALETHEIA_API_KEY=…")
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return UserError(visible(str(said or error.message)), where=endpoint)
