"""Serve: an OpenAI-compatible endpoint for the newest merged model, else the newest adapter.

    aletheia serve --profile tiny        make serve PROFILE=tiny

Listens on 127.0.0.1:8000 until Ctrl-C or SIGTERM, which end it in order: the record is then complete and says what was
served. Refuses a model whose chat template is not the one that was trained. One backend for now: `transformers`,
continuous batching in this environment; the merged folder also loads in any server that takes a transformers folder.
"""

import socket
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pipeline.chat import Chat, Contract
from pipeline.errors import StageFailed, UserError
from pipeline.model import Base, check_trained_on, find_base, load_model
from pipeline.progress import duration, say
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source, take

BACKENDS = ("auto", "transformers")


@dataclass
class Serve:
    name: ClassVar[str] = "serve"

    job: Job
    base: Base
    chat: Chat
    source: Source
    listener: socket.socket
    inputs: list[Input]

    @classmethod
    def prepare(cls, job: Job) -> Self:
        source, base, chat = servable(job)
        config = job.config.serve_config
        return cls(job, base, chat, source, _listen(config.host, config.port), [source.input])

    @property
    def model_name(self) -> str:
        return model_name(self.job, self.source)

    def plan(self) -> list[tuple[str, str]]:
        host, port = self.listener.getsockname()[:2]
        return [("model", f"{self.model_name} ({self.source.file.id})"), ("address", f"http://{host}:{port}/v1")]

    def run(self, record: Record) -> None:
        import uvicorn

        from serving.app import Usage, build_app
        from serving.transformers_engine import TransformersEngine

        config = self.job.config.serve_config
        began = time.monotonic()
        record.facts.lineage.base = {"name": self.base.name, "revision": self.base.revision}
        record.facts.data = {"contract": self.chat.contract.sha256, "template": self.chat.contract.facts()}
        model = load_source(self.source, self.base)
        context = int(model.config.max_position_embeddings)
        usage = Usage()
        app = build_app(
            TransformersEngine(model, self.chat, context, config.max_concurrent),
            self.model_name,
            config.max_tokens,
            usage,
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30))
        host, port = self.listener.getsockname()[:2]
        address = f"http://{host}:{port}/v1"
        say(
            f"serving {self.model_name} at {address}  backend transformers on {self.base.device}, the only one built yet"
        )
        if not host.startswith("127.") and host != "::1":
            say(f"note: {host} is open to the network and there is no API key: anyone who reaches it can use it")
        say(f"ready after {duration(time.monotonic() - began)}; Ctrl-C stops it")
        record.facts.results = {"address": address, "model": self.model_name, "backend": "transformers"}
        record.save()
        with record.stop.deferred():  # uvicorn drains on the first signal and passes it on when it is done
            server.run(sockets=[self.listener])
        if not record.stop.requested:
            raise StageFailed("the server ended by itself")
        record.facts.results |= {
            "requests": usage.requests,
            "refused": usage.refused,
            "errors": usage.errors,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        say(
            f"served {usage.requests} requests, {usage.completion_tokens} tokens; {usage.refused} refused, {usage.errors} failed"
        )


def servable(job: Job) -> tuple[Source, Base, Chat]:
    """What can answer: a merged model or an adapter, its base, and the chat template, checked against the trained one."""
    source = take(job, ["merge", "dpo", "sft"], "")
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
