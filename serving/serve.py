"""Serve: an OpenAI-compatible endpoint for the newest merged model, else the newest adapter.

    aletheia serve --profile tiny        make serve PROFILE=tiny BACKEND=vllm

Listens on 127.0.0.1:8000 until Ctrl-C or SIGTERM, which end it in order: what runs is answered, and the record is complete
and says what was served, by what, and how much. Says which backend it took and why (`serving.backends`). Refuses a model
whose chat template is not the one that was trained. The API key is the environment's ALETHEIA_API_KEY.
"""

import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pipeline.chat import Chat, Contract
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base, check_trained_on, find_base, load_model
from pipeline.progress import duration, say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take
from serving.backends import Choice, choose
from serving.client import api_key
from serving.engine import Engine
from serving.page.feedback import NAME as FEEDBACK
from serving.vllm_backend.server import LOG, VllmServer, counts

HEADER_BYTES = 1 << 16  # of a request's head, at most
KEEP_ALIVE = 15  # seconds that a connection may be idle
CLOSING = 5  # seconds, once all is answered, for clients to read it
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # all interfaces, and which of them is this machine's own


@dataclass
class Serve:
    name: ClassVar[str] = "serve"

    job: Job
    base: Base
    chat: Chat
    source: Source
    choice: Choice
    context: int
    gguf: Path | None  # llamacpp's model
    vllm: VllmServer | None
    listener: socket.socket
    inputs: list[Input]

    def __post_init__(self) -> None:
        self.host, self.port = self.listener.getsockname()[:2]
        self.model_name = model_name(self.job, self.source)

    @classmethod
    def prepare(cls, job: Job) -> Self:
        api_key()  # one that cannot work is refused now
        choice = choose(job)
        source, base, chat = servable(job)
        context, gguf, vllm, inputs = _context(job, base), None, None, [source.input]
        if choice.environment:
            vllm = VllmServer.prepare(job, choice.environment, source, base, chat, model_name(job, source), context)
            inputs += vllm.inputs
        if choice.backend == "llamacpp":
            from serving.llamacpp_backend.engine import find_gguf

            gguf = find_gguf(job, source)
        config = job.config.serve_config
        listener = _listen(config.host, config.port)
        return cls(job, base, chat, source, choice, context, gguf, vllm, listener, inputs)

    @property
    def address(self) -> str:
        """That this machine reaches it at, also where it listens on all interfaces."""
        host = EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    @property
    def shown_address(self) -> str:
        return self.address + (f" and on all interfaces of {socket.gethostname()}" if self.host in EVERYWHERE else "")

    def plan(self) -> list[tuple[str, str]]:
        rows = [
            ("model", f"{self.model_name} ({self.source.file.id})"),
            ("backend", str(self.choice)),
            ("address", self.shown_address),
        ]
        if self.gguf:
            rows.append(("file", self.job.workspace.shown(self.gguf)))
        if self.vllm and self.vllm.loras:
            rows.append(("adapters", ", ".join(f"{lora.name}, rank {lora.rank}" for lora in self.vllm.loras)))
        return rows

    def run(self, record: Record) -> None:
        began, facts = time.monotonic(), record.facts
        facts.lineage.base = {"name": self.base.name, "revision": self.base.revision}
        facts.data = {"contract": self.chat.contract.sha256, "template": self.chat.contract.facts()}
        results = {
            "address": self.address,
            "model": self.model_name,
            "backend": self.choice.backend,
            "version": self.choice.version,
            "reason": self.choice.reason,
        } | ({"gguf": self.job.workspace.shown(self.gguf)} if self.gguf else {})

        def ready() -> None:
            """The record tells the address from now on."""
            say(f"serving {self.model_name} at {self.shown_address}  {self.choice}")
            say(f"ready after {duration(time.monotonic() - began)}; Ctrl-C stops it")
            facts.results = results
            record.save()

        if not _is_loopback(self.host) and not api_key():
            say(
                f"note: {self.host} is open to the network without an API key: set ALETHEIA_API_KEY, or anyone can use it"
            )
        counted = self._vllm(record, ready) if self.vllm else self._front(record, ready)
        facts.results = results | counted
        told = (counted.get(name, "unknown") for name in ("requests", "completion_tokens", "refused", "errors"))
        say("served {} requests, {} tokens; {} refused, {} failed".format(*told))

    def _front(self, record: Record, ready: Callable[[], None]) -> dict[str, Any]:
        """This project's own server, around an engine."""
        import uvicorn

        from serving.front.app import build_app
        from serving.front.connection import Connection
        from serving.front.drain import DrainingServer
        from serving.front.metrics import Usage
        from serving.page.page import Page

        config, usage, engine = self.job.config.serve_config, Usage(), self._engine()
        app = build_app(engine, self.model_name, config, usage, api_key())
        page = Page(
            app,
            feedback=record.folder / FEEDBACK,
            model=self.model_name,
            api_key=api_key(),
            contract=self.chat.contract.sha256,
        )
        options = uvicorn.Config(
            page,
            log_level="warning",
            http=Connection,
            ws="none",
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=CLOSING,
        )
        ready()  # the socket listens: who comes now waits for the event loop
        if threading.current_thread() is threading.main_thread():  # a closed terminal: uvicorn heeds only the other two
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        server = DrainingServer(options, app.state.gate, engine)
        with record.stop.deferred():  # uvicorn takes the first signal, drains, and passes it on when it is done
            server.run(sockets=[self.listener])
        counted = {name: value for name, value in asdict(usage).items() if name != "started"}
        if server.failure or not record.stop.requested:
            record.facts.results |= counted
            raise StageFailed(server.failure or "the server ended by itself")
        return counted

    def _vllm(self, record: Record, ready: Callable[[], None]) -> dict[str, Any]:
        """vLLM's server, as a child."""
        assert self.vllm is not None
        self.listener.close()  # bound to see that the port is free; vLLM binds it itself
        say(f"starting vLLM, a minute or more; its log is {record.workspace.shown(record.folder / LOG)}")
        try:
            self.vllm.serve(record, self.host, self.port, self.model_name, ready)
        finally:  # of one that crashed too
            record.facts.results |= counts(record)
        return dict(counts(record))

    def _engine(self) -> Engine:
        config = self.job.config.serve_config
        if self.gguf:
            from serving.llamacpp_backend.engine import LlamaCppEngine

            llama = LlamaCppEngine(
                self.gguf, self.chat, self.context, config.max_concurrent, config.threads, config.kv_cache_gb
            )
            llama.start()  # here, where it can be told that it does not
            return llama
        from serving.transformers_backend.engine import TransformersEngine, use_threads

        if self.base.device == "cpu":
            use_threads(config.threads)
        model = load_source(self.source, self.base)
        return TransformersEngine(model, self.chat, self.context, config.max_concurrent, config.kv_cache_gb)


def servable(job: Job, record: str | None = None) -> tuple[Source, Base, Chat]:
    """What can answer: a merged model or an adapter, its base, and the chat template, checked against the trained one.

    Of `record`, else of the job's source.
    """
    source = take(replace(job, source=record) if record else job, ["merge", "dpo", "sft"], "")
    source.output = source.output / ("model" if source.facts.stage == "merge" else "adapter")
    base = find_base(job.workspace, job.profile)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.output, trust_remote_code=base.trust_remote_code)
    chat = Chat(tokenizer, job.workspace.shown(source.output))
    if Contract.load(source.output) != chat.contract:
        raise UserError("its chat template is not the one it was trained with", where=chat.name)
    if source.facts.stage != "merge":
        check_trained_on(base, base.chat(), job.workspace, source)
    return source, base, chat


def load_source(source: Source, base: Base) -> Any:
    """The merged model, or the base with its adapter unmerged."""
    if source.facts.stage == "merge":
        return load_model(source.output, base)
    from peft import PeftModel

    return PeftModel.from_pretrained(base.load(), source.output).eval().get_base_model()


def model_name(job: Job, source: Source) -> str:
    """The name of the link in checkpoints/: tiny-merged, tiny-dpo, tiny-sft."""
    return f"{job.config.name}-{'merged' if source.facts.stage == 'merge' else source.facts.stage}"


def _context(job: Job, base: Base) -> int:
    """Tokens, prompt and answer together. Raises `UserError` for more than the model was made for."""
    wanted, most = job.config.serve_config.context, base.context
    if wanted and most and wanted > most:
        raise job.profile.error("serve_config.context", f"the model holds {most} tokens, not {wanted}", f"{most}")
    if not wanted and not most:
        what = "the model does not say how many tokens it holds"
        raise job.profile.error("serve_config.context", what, "--set serve_config.context=4096")
    return int(wanted or most or 0)


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol is named because asyncio sets TCP_NODELAY only then; without it every token waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # at once: two sockets may be bound to one port until one of them listens
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}", remedy=f"--port {port + 1 if port else 8000}"
        ) from None
    return listener
