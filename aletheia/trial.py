"""Starts the server as a person would, asks it through the openai client, and stops it with SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

from pipeline.errors import StageFailed
from pipeline.profile import as_assignments
from pipeline.progress import say
from pipeline.records import find
from pipeline.records.lifecycle import liveness
from pipeline.stage import Job

READY_WITHIN = 900.0  # seconds for the server: a large model is read from disk first
ENDS_WITHIN = 90.0  # seconds after SIGTERM
QUESTION = "How do I find out why a PostgreSQL query is slow?"


def serve_and_ask(job: Job) -> dict[str, Any]:
    """What was asked and answered. The server's record is `job.parent`'s child. Raises `StageFailed`."""
    command = [sys.executable, "-m", "aletheia.cli", "serve", "--profile", str(job.profile.path), "--port", "0"]
    command += ["--from", job.source] if job.source else []
    command += ["--parent", job.parent] if job.parent else []
    command += ["--follow", str(os.getpid())]  # killed outright, we leave no server behind
    command += [word for text in as_assignments(job.profile.overrides) for word in ("--set", text)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        results = _ready(job, server)
        said = _talk(results["address"], results["model"])
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            server.kill()
            raise StageFailed(f"the server did not end within {ENDS_WITHIN:.0f} s of SIGTERM") from None
    if code != 0:
        raise StageFailed(f"the server ended with exit code {code}")
    return said


def _ready(job: Job, server: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """The address stands in the server's record as soon as it listens."""
    import httpx

    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise StageFailed(f"the server ended with exit code {server.returncode} before it was ready")
        for _, facts in find.children(job.workspace, job.parent or ""):
            if facts.stage == "serve" and liveness(facts) == "running" and "address" in facts.results:
                try:
                    if httpx.get(facts.results["address"].removesuffix("/v1") + "/health").status_code == 200:
                        return facts.results
                except httpx.TransportError:
                    pass
        time.sleep(0.2)
    raise StageFailed(f"the server was not ready within {READY_WITHIN:.0f} s")


def _talk(address: str, model: str) -> dict[str, Any]:
    """One question through the openai client, whole and streamed; a model that is not there."""
    import openai

    client = openai.OpenAI(base_url=address, api_key=os.environ.get("ALETHEIA_API_KEY") or "none", max_retries=0)
    ask: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**ask)
    text = answer.choices[0].message.content or ""
    chunks = client.chat.completions.create(**ask, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    if streamed != text:
        raise StageFailed("the streamed greedy answer is not the whole one")
    try:
        client.chat.completions.create(**ask | {"model": "no-such-model"})
    except openai.NotFoundError as error:
        refusal = str(error.body["message"]) if isinstance(error.body, dict) else str(error)
    else:
        raise StageFailed("the server answered for a model it does not have")
    say(f"asked: {QUESTION}\nit said: {text.strip()[:200]!r}\nunknown model: {refusal}")
    return {"question": QUESTION, "answer": text, "streamed_equals_whole": True, "unknown_model": refusal}
