"""A running server from the outside: what is asked of any OpenAI-compatible endpoint, and one of our own as a child.

The API key is taken from ALETHEIA_API_KEY, by both sides.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import StageFailed, UserError
from pipeline.profile import as_assignments
from pipeline.progress import Progress
from pipeline.stage import Job
from pipeline.workspace import CHECKOUT
from serving.client import address_of, api_key
from serving.engine import Answer, Sampling

REQUEST_TIMEOUT = 600.0  # seconds: a long answer on a CPU
START_TIMEOUT = 900.0  # seconds until a server answers; a large model is read from disk first
STOP_TIMEOUT = 60.0  # seconds to drain after SIGTERM
TOGETHER = 8  # requests of an evaluation at once


class Lacks(Exception):
    """The endpoint does not do what it was asked: 4xx or 501, in its own words."""


class Endpoint:
    """A server and the one of its models that is meant: the first of `wanted` that it has, or the only one it has.

    Raises `UserError` when it cannot be reached, wants a key, or has several and none of them is meant.
    """

    def __init__(self, url: str, wanted: Sequence[str] = ()) -> None:
        import httpx

        self.root, key = address_of(url).removesuffix("/v1"), api_key()
        self._client = httpx.Client(
            base_url=self.root, timeout=REQUEST_TIMEOUT, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        try:
            names = [card["id"] for card in self._ask("GET", "/v1/models", None)["data"]]
        except (Lacks, KeyError, TypeError) as error:
            raise UserError(f"shows no models at /v1/models ({error})", where=self.root) from None
        if not names:
            raise UserError("serves no model", where=self.root)
        if wanted and len(names) > 1 and not {*wanted} & {*names}:  # the first may be the base below an adapter
            what = f"serves {', '.join(names)}; none of them is {' or '.join(wanted)}"
            raise UserError(what, where=self.root, remedy="the --profile and --from that are served there")
        self.model: str = next((name for name in wanted if name in names), names[0])

    def post(self, path: str, **body: Any) -> Any:
        """The answer's JSON. Raises `Lacks`, or `StageFailed` when the server failed."""
        return self._ask("POST", path, {"model": self.model, **body})

    def chat(self, messages: Sequence[Message], **body: Any) -> Any:
        return self.post("/v1/chat/completions", messages=as_json(messages), **body)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        import httpx

        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            what = f"cannot be reached ({type(error).__name__})"
            raise UserError(what, where=self.root, remedy="aletheia serve") from None
        status = response.status_code
        if status in (401, 403):
            raise UserError("wants another API key", where=self.root, remedy="ALETHEIA_API_KEY=… before the command")
        if status < 400:
            try:
                return response.json()
            except ValueError:
                raise Lacks("answers something else than JSON") from None
        said = f"{status} {_message(response)}".strip()
        if (status < 500 and status != 429) or status == 501:
            raise Lacks(said)
        raise StageFailed(f"{self.root}{path} answered {said}")


def as_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _message(response: Any) -> str:
    """OpenAI's shape where it is kept; else the beginning of the body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:200]


def answer_all(
    endpoint: Endpoint, chat: Chat, asked: Sequence[Sequence[Message]], sampling: Sampling, seed: int, what: str
) -> list[Answer]:
    """The answer to each chat, in order, some at once. Its tokens are its text's, tokenised here.

    Raises `StageFailed` when one is refused.
    """

    def answer(number: int) -> Answer:
        choice = endpoint.chat(
            asked[number], max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=seed + number
        )["choices"][0]
        text = choice["message"]["content"] or ""
        return Answer(chat.tokenizer(text, add_special_tokens=False)["input_ids"], choice["finish_reason"])

    answers = []
    with ThreadPoolExecutor(TOGETHER) as pool, Progress(what, len(asked), "answer") as progress:
        try:
            for found in pool.map(answer, range(len(asked))):
                answers.append(found)
                progress.advance()
        except Lacks as why:
            raise StageFailed(f"{endpoint.root}/v1/chat/completions: {why}") from None
    return answers


@contextmanager
def own_server(job: Job, source: str, backend: str) -> Iterator[str]:
    """`aletheia serve` of the record `source`, as a child on a free port; yields its address, http://127.0.0.1:8000/v1.

    Raises `UserError` with the server's own last line when it ends before it answers: the backend is not installed here.
    """
    command = [
        sys.executable, "-m", "aletheia.cli", "serve", "--profile", str(job.profile.path), "--from", source,
        "--backend", backend, "--host", "127.0.0.1", "--port", "0", "--follow", str(os.getpid()),
        *(word for pair in as_assignments(job.profile.overrides) for word in ("--set", pair)),
    ]  # fmt: skip
    environment = os.environ | {"ALETHEIA_ROOT": str(job.workspace.root), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        yield _address_of(process, said, reader)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address_of(process: "subprocess.Popen[str]", said: list[str], reader: threading.Thread) -> str:
    """Waits until it has said where it listens, and answers there."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        found = next((at[1] for line in list(said) if (at := re.match(r"serving \S+ at (\S+)", line))), None)
        if found and _answers(found):
            return found
        time.sleep(0.1)
    reader.join(1)
    lines = [line.strip() for line in said if line.strip()]
    last = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
    if process.poll() is None:
        raise StageFailed(f"the server did not answer within {START_TIMEOUT:.0f} s")
    raise UserError(last or f"the server ended: {lines[-1] if lines else 'it said nothing'}")


def _answers(address: str) -> bool:
    import httpx

    try:
        return httpx.get(address.removesuffix("/v1") + "/health", timeout=10).is_success
    except httpx.HTTPError:
        return False
