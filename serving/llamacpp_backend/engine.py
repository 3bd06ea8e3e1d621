"""The `llamacpp` backend: llama.cpp's own server as a child, on a private socket, for a file that was exported.

It batches continuously; the front stays ours. Token ids go in and come out: neither its chat template nor its tokenizer
is used. Greedy is the likeliest token and nothing else; a temperature acts before `top_p`, and no other of its samplers
runs. One request is one slot; the rest wait here, so a request that is given up before its turn costs nothing. Weights
and KV cache are those of the file and f16: log-probs are of that model.

A seed repeats an answer only where nothing runs beside it. llama.cpp multiplies a batch of one by other kernels than a
batch of several (`llamafile_sgemm`), which moves log-probs by up to 0.002 nats; and it draws by adding up probabilities
in the vocabulary's order, where that moves every bound between two tokens. A long answer nearly always turns somewhere.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from pipeline.chat import Chat
from pipeline.errors import StageFailed, UserError
from pipeline.progress import say
from pipeline.records import find
from pipeline.stage import Job, Source
from pipeline.to_gguf.llamacpp import (
    SETUP,
    LlamaCpp,
    Reader,
    ReaderFailed,
    check_metadata,
    clean_environment,
    compute_threads,
)
from serving.child import Child
from serving.engine import Answer, Sampling, TokenScore
from serving.llamacpp_backend.folder import PrivateFolder

CACHE_SHARE = 0.25  # of the free memory, at most, for the KV cache
LEAST = -104.0  # nats: float32 has no smaller probability, and the server gives 0 for it
LOAD_TIMEOUT = 600.0  # seconds
PRECISIONS = {"f16": "float16"}  # torch's names, of the types that it has
SEEDS = 2**32 - 1  # and one that means "any"


def find_gguf(job: Job, source: Source) -> Path:
    """The newest export of this very merged model: its first file in the order of `export_config.formats`.

    Raises `UserError` where there is none, or the file is not what its record says.
    """
    remedy = f"aletheia export gguf --profile {job.profile.id}"
    if LlamaCpp.find() is None:
        raise UserError(
            "llama.cpp is not installed", where="serve_config.backend", remedy=f"`{SETUP}`, then `{remedy}`"
        )
    if source.facts.stage != "merge":
        what = f"{source.file.id} is an adapter, and llama.cpp serves a merged model"
        raise UserError(
            what, where="serve_config.backend", remedy=f"make merge PROFILE={job.profile.id}, then `{remedy}`"
        )
    wanted = job.config.export_config.formats
    for file, facts in find.records(job.workspace, lambda known: (known.stage, known.status) == ("export", "complete")):
        if [(taken.id, taken.sha256) for taken in facts.lineage.inputs] != [(source.file.id, source.input.sha256)]:
            continue
        written = {Path(artifact.path).name: artifact for artifact in facts.artifacts}
        for kind in wanted:
            if artifact := written.get(f"{kind}.gguf"):
                path = job.workspace.path(artifact.path)
                if not path.is_file() or find.sha256(path) != artifact.sha256:
                    what = f"its artifact {artifact.path} is gone or was changed since"
                    raise UserError(what, where=job.workspace.shown(file.path), remedy=f"`{remedy}` again")
                return path
    raise UserError(f"{source.file.id} has no complete export as {' or '.join(wanted)}", remedy=f"`{remedy}`")


class LlamaCppEngine:
    """A GGUF file behind a queue (`serving.engine.Engine`). `context`: tokens; `kv_cache_gb`: None takes what is needed,
    a quarter of the free memory at most, and fewer slots where that is too little."""

    def __init__(
        self,
        gguf: Path,
        chat: Chat,
        context: int,
        max_concurrent: int,
        threads: int | None = None,
        kv_cache_gb: float | None = None,
    ) -> None:
        self.chat, self._gguf, self._llama = chat, gguf, LlamaCpp.required()
        self.precision = PRECISIONS.get(gguf.stem, gguf.stem)
        self._threads = threads or compute_threads()
        with Reader(self._llama, gguf) as reader:
            facts = reader.facts
        check_metadata(facts, chat, facts["vocabulary"], gguf.name)
        self.context = min(context, facts["context_length"] or context)
        self.slots = slots(facts, self.context, max_concurrent, kv_cache_gb)
        self.version = f"llama.cpp of llama-cpp-python {self._llama.version}, {gguf.name}"
        self._ends = set(facts["ends"])
        self._turn = asyncio.Semaphore(self.slots)
        self._child: Child | None = None
        self._scorer: Reader | None = None
        self._scoring = threading.Lock()  # not asyncio's: a thread goes on when nobody waits for it any more

    def start(self) -> None:
        """Returns when the model is loaded. Raises `StageFailed`, quoting the server, when it cannot be."""
        if self._child:
            return
        # by its descriptor both processes read this very file, whatever has its name by then
        self._file = self._gguf.open("rb")
        self._model = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        self._folder = PrivateFolder()
        self._socket = str(self._folder.path / "llama.sock")
        command = [
            *(self._llama.tool("llama-server"), "--model", str(self._model), "--host", self._socket),
            *("--ctx-size", str(self.slots * self.context), "--parallel", str(self.slots)),
            *("--threads", str(self._threads), "--threads-batch", str(self._threads)),
            *("--cache-ram", "0"),  # else prompts are kept in up to 8 GB
            *("--chat-template", "chatml", "--reasoning-format", "none", "--no-webui"),  # none of it is used
            *("--offline", "--fit", "off", "--log-verbosity", "1"),
        ]
        log = self._folder.path / "llama-server.log"
        child = Child(command, log, clean_environment(), drain=0, name="llama-server")
        try:
            child.__enter__()
            _wait(child, self._socket)
        except BaseException:
            self._end(child)
            raise
        self._child = child

    def stop(self) -> None:
        if self._scorer:
            self._scorer.close()
        if self._child:
            self._child.drain()
            self._end(self._child)
        self._child = self._scorer = None

    def _end(self, child: Child) -> None:
        child.__exit__(None, None, None)
        self._folder.remove()
        self._file.close()

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.process.poll() is None

    @property
    def ended(self) -> str:
        try:
            if self._child:
                self._child.check("while it served")
        except StageFailed as failure:
            return failure.what
        return "llama-server was stopped"

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Answer]:
        """Yields the answer as it grows; the last one has its finish reason. Closing the iterator frees the slot."""
        import httpx

        tokens: list[int] = []
        scores: list[TokenScore] = []
        transport = httpx.AsyncHTTPTransport(uds=self._socket, verify=False)  # a certificate store would be read
        try:
            async with (
                self._turn,
                httpx.AsyncClient(transport=transport, base_url="http://llama", timeout=None) as client,
                client.stream("POST", "/completion", json=request(prompt, sampling)) as response,
            ):
                if response.status_code != 200:
                    raise RuntimeError(_message(await response.aread()))
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(_message(event))
                    if event["stop"]:
                        reason = "stop" if event["stop_type"] == "eos" else "length"
                        yield Answer(list(tokens), reason, list(scores))
                        return
                    if not event["tokens"] or event["tokens"][0] in self._ends:
                        continue
                    tokens += event["tokens"]
                    if sampling.top_logprobs is not None:
                        scores.append(_score(event["completion_probabilities"][0], sampling.top_logprobs))
                    yield Answer(list(tokens), None, list(scores))
        except httpx.HTTPError as error:
            raise RuntimeError(f"llama-server has ended: {error}") from None
        raise RuntimeError("llama-server ended its answer too early")

    async def score(self, tokens: Sequence[int], top: int) -> list[TokenScore | None]:
        """Each token given those before it; None for the first. By a process of its own: the server cannot.

        It starts with the first question and reads the same file, whose pages both share.
        """
        return await asyncio.to_thread(self._score_all, list(tokens), top)

    def _score_all(self, tokens: list[int], top: int) -> list[TokenScore | None]:
        import torch

        from serving.transformers_backend.sampling import token_scores

        found: list[TokenScore | None] = [None]
        with self._scoring:
            if len(tokens) < 2:
                return found[: len(tokens)]
            try:
                if self._scorer is None:
                    self._scorer = Reader(self._llama, self._model, self.context, self._threads)
                for block in self._scorer.logits(tokens[:-1], range(len(tokens) - 1)):
                    log_probs = torch.from_numpy(block).log_softmax(-1)
                    found += token_scores(log_probs, tokens[len(found) : len(found) + len(block)], top)
            except ReaderFailed as failure:  # its words may name paths, which are no client's business
                self._scorer = None
                say(f"note: scoring failed: {failure}")
                raise RuntimeError("llama.cpp's process that scores has ended") from None
        return found


def request(prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """What llama.cpp's server is asked: these samplers and no other, whatever its defaults are."""
    greedy = sampling.temperature == 0
    body = {
        "prompt": list(prompt),
        "n_predict": sampling.max_tokens,
        "stream": True,
        "return_tokens": True,
        "samplers": ["top_k"] if greedy else ["temperature", "top_p"],
        "top_k": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repeat_penalty": 1.0,
        "seed": random.randrange(SEEDS) if sampling.seed is None else sampling.seed % SEEDS,
        "cache_prompt": sampling.seed is None,  # what another prompt left is not bit for bit what would be computed
    }
    if sampling.top_logprobs is not None:
        body["n_probs"] = max(1, sampling.top_logprobs)  # 0 would give none, of the drawn token neither
    return body


def slots(facts: dict[str, Any], context: int, wanted: int, kv_cache_gb: float | None) -> int:
    """How many sequences of `context` tokens the KV cache may hold, in f16: at least one, at most `wanted`.

    `wanted` where the file has another number of heads in each layer.
    """
    import psutil

    heads = facts["attention.head_count_kv"] or facts["attention.head_count"]
    if not heads:
        return wanted
    head = facts["embedding_length"] // (facts["attention.head_count"] or heads)
    width = (facts["attention.key_length"] or head) + (facts["attention.value_length"] or head)
    sequence = 2 * facts["block_count"] * heads * width * context
    room = kv_cache_gb * 1e9 if kv_cache_gb else CACHE_SHARE * psutil.virtual_memory().available
    return max(1, min(wanted, int(room / sequence)))


def _wait(child: Child, socket: str) -> None:
    import httpx

    transport = httpx.HTTPTransport(uds=socket, verify=False)
    until = time.monotonic() + LOAD_TIMEOUT
    with httpx.Client(transport=transport, base_url="http://llama", timeout=10) as client:
        while child.process.poll() is None and time.monotonic() < until:
            try:
                if client.get("/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
    raise StageFailed(f"llama-server did not start: {child.last_line()[:300]}")


def _score(told: dict[str, Any], top: int) -> TokenScore:
    likeliest = {one["id"]: max(one["logprob"], LEAST) for one in told["top_logprobs"][:top]}
    return TokenScore(max(told["logprob"], LEAST), likeliest)


def _message(body: bytes | dict[str, Any]) -> str:
    value = json.loads(body) if isinstance(body, bytes) else body
    return f"llama-server: {value.get('error', {}).get('message', value)}"
