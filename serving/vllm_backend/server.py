"""The `vllm` backend: vLLM's own OpenAI server, in its own environment, as a child of this process.

Held to what the other backends promise: the chat template is the contract's, generation stops at the end-of-turn that was
trained, and what a request does not say has OpenAI's defaults, not those of the base's generation_config (a repetition
penalty there would make temperature 0 not greedy). The API key travels by environment. An adapter is served unmerged over
its base, and `serve_config.adapters` beside it, each after the checks that a merge makes.

Not ours here: vLLM has no limit on waiting requests nor on their time, and a request that names no `max_tokens` gets what
the context holds in a chat, 16 in a completion.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from pipeline.chat import Chat
from pipeline.model import Base
from pipeline.records.lifecycle import Record
from pipeline.records.schema import Input
from pipeline.stage import Job, Source
from pipeline.workspace import CHECKOUT
from serving.backends import Environment
from serving.child import Child
from serving.client import api_key
from serving.front.protocol import MAX_STOPS
from serving.page.feedback import NAME as FEEDBACK
from serving.vllm_backend.loras import Lora, lora, room
from serving.vllm_backend.loras import beside as loras_beside

LOG, FILES = "vllm.log", "vllm"  # in the record's folder
COUNTS, ENDING = "counts.json", "ending"  # in the latter
MIDDLEWARE = ("serving.vllm_backend.guard.Guard", "serving.page.page.PageOfEnvironment")  # the last one is outermost
START = {  # the CPU build cannot run the `vllm` command, which asks for a distribution of that name
    "cuda": ("vllm.entrypoints.cli.main", "serve"),
    "cpu": ("vllm.entrypoints.openai.api_server",),
}
CACHE_SHARE = 0.25  # of a CPU machine's free memory, at most, for the KV cache
# What would undo a promise, and what to use instead. A `*` stands for any ending.
REFUSED = {
    "host": "serve_config.host", "port": "serve_config.port", "uds": "serve_config.host", "root-path": "a proxy's own path",
    "ssl-*": "TLS in a proxy before it", "api-key": "the environment variable ALETHEIA_API_KEY",
    "served-model-name": "the profile's name", "model": "--from", "lora-modules": "serve_config.adapters",
    "chat-template*": "training with that template", "default-chat-template-kwargs": "training with that template",
    "trust-request-chat-template": "training with that template", "tokenizer*": "--from", "hf-config-path": "--from",
    "generation-config": "the request's own values", "override-generation-config": "the request's own values",
    "trust-remote-code": "trust_remote_code of the profile", "allowed-origins": "a proxy before it",
    "max-model-len": "serve_config.context", "config": "the words themselves",
    "tensor-parallel-size": "serve_config.tensor_parallel", "pipeline-parallel-size": "serve_config.pipeline_parallel",
    "shutdown-timeout": "serve_config.drain_timeout", "disable-log-stats": "nothing: the record's tokens are counted there",
    "headless": "vLLM's own command", "grpc": "vLLM's own command",
}  # fmt: skip


@dataclass(frozen=True)
class VllmServer:
    job: Job
    environment: Environment
    base: Base
    chat: Chat
    folder: Path  # of the weights: the merged model, or the base below an adapter
    name: str  # of these weights
    context: int
    loras: tuple[Lora, ...]
    inputs: tuple[Input, ...]  # the adapters beside

    @classmethod
    def prepare(
        cls, job: Job, environment: Environment, source: Source, base: Base, chat: Chat, name: str, context: int
    ) -> Self:
        """Raises `UserError` for an adapter that is not these weights', and for words that would undo a promise."""
        check_args(job)
        _check_nodes(job, environment)
        merged = source.facts.stage == "merge"
        folder = source.output if merged else base.folder
        loras, inputs = loras_beside(job, folder, base, chat)
        if not merged:
            loras.insert(0, lora(job, name, source.output))
            name = base.name
        return cls(job, environment, base, chat, folder, name, context, tuple(loras), tuple(inputs))

    def command(self, host: str, port: int, files: Path) -> list[str]:
        """`files`: the folder that `write_files` has filled."""
        config = self.job.config.serve_config
        words: dict[str, Any] = {
            "--model": self.folder,
            "--served-model-name": self.name,
            "--host": host,
            "--port": port,
            "--dtype": self.base.dtype or _stored_dtype(self.folder, self.base),
            "--max-model-len": self.context,
            "--max-num-seqs": config.max_concurrent,
            "--chat-template": files / "chat_template.jinja",
            "--chat-template-content-format": "string",  # as in training: a text, not a list of parts
            "--generation-config": files,
            "--allowed-origins": "[]",  # no other web site's script may read an answer
            "--shutdown-timeout": round(config.drain_timeout),
        }
        if (kv_bytes := self._kv_cache_bytes()) is not None:
            words["--kv-cache-memory-bytes"] = kv_bytes
        if config.tensor_parallel > 1:
            words["--tensor-parallel-size"] = config.tensor_parallel
        if config.pipeline_parallel > 1:
            words["--pipeline-parallel-size"] = config.pipeline_parallel
        if _needs_ray(self.job, self.environment):
            words["--distributed-executor-backend"] = "ray"
        if self.loras:
            words |= {"--max-loras": len(self.loras), "--max-lora-rank": room(self.loras)}
        command = [str(self.environment.python), "-m", *START[self.environment.build]]
        command += [str(word) for pair in words.items() for word in pair]
        if self.loras:
            modules = [json.dumps({"name": one.name, "path": str(one.folder)}) for one in self.loras]
            command += ["--enable-lora", "--lora-modules", *modules]
        for middleware in MIDDLEWARE:
            command += ["--middleware", middleware]
        if self.base.trust_remote_code:
            command.append("--trust-remote-code")
        return [*command, "--disable-uvicorn-access-log", *config.vllm_args]

    def names(self, model: str) -> list[str]:
        """Of all that is served, the one that was asked for first: clients take the first. An adapter's base is the last."""
        return sorted([*(lora.name for lora in self.loras), self.name], key=lambda name: name != model)

    def variables(self, files: Path, feedback: Path, model: str) -> dict[str, str]:
        """The child's environment: this process's, and what vLLM, the page and the guard read there."""
        import psutil

        config = self.job.config.serve_config
        variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}  # all it needs is on disk
        variables |= os.environ
        variables |= {
            "PYTHONPATH": str(CHECKOUT),  # for the page and the guard
            "PYTHONUNBUFFERED": "1",
            "ALETHEIA_MODEL": model,
            "ALETHEIA_MODELS": json.dumps(self.names(model)),
            "ALETHEIA_CONTEXT": str(self.context),
            "VLLM_MAX_STOP_STRINGS": str(MAX_STOPS),  # else 4
            "ALETHEIA_FEEDBACK": str(feedback),
            "ALETHEIA_CONTRACT": self.chat.contract.sha256,
            "ALETHEIA_COUNTS": str(files / COUNTS),
            "ALETHEIA_ENDING": str(files / ENDING),
            "ALETHEIA_DRAIN": str(math.ceil(max(config.drain_timeout, 1))),
            "ALETHEIA_MAX_BODY": str(int(config.max_body_mb * 1e6)),
            "ALETHEIA_RESERVED": json.dumps(self.chat.reserved_tokens),
        }
        if self.environment.build == "cpu":
            allowed = len(os.sched_getaffinity(0))
            threads = config.threads or min(psutil.cpu_count(logical=False) or allowed, allowed)
            variables = {"OMP_NUM_THREADS": str(threads)} | variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if key := api_key():
            variables["VLLM_API_KEY"] = key
        return variables

    def write_files(self, files: Path) -> None:
        files.mkdir(parents=True, exist_ok=True)
        for left in (COUNTS, ENDING):
            (files / left).unlink(missing_ok=True)
        tokenizer = self.chat.tokenizer
        (files / "chat_template.jinja").write_text(tokenizer.get_chat_template(), "utf-8")
        roles = {
            "eos_token_id": self.chat.end_of_turn_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        (files / "generation_config.json").write_text(json.dumps(roles), "utf-8")

    def serve(self, record: Record, host: str, port: int, model: str, ready: Callable[[], None]) -> None:
        """Returns when someone asked to stop and the server has drained.

        Raises `StageFailed` when vLLM ends by itself, `Interrupted` when stopped before it was ready.
        """
        files = record.folder / FILES
        self.write_files(files)
        command, variables = self.command(host, port, files), self.variables(files, record.folder / FEEDBACK, model)
        drain = self.job.config.serve_config.drain_timeout
        meanwhile = f"no new requests; those that run have {drain:.0f} s to end"
        with (
            record.stop.deferred(meanwhile),
            Child(command, record.folder / LOG, variables, drain, "vLLM") as child,
        ):
            child.wait_until(lambda: _healthy(host, port), record.stop)
            ready()
            child.watch(record.stop)
            with suppress(OSError):  # a full disk does not stand in the way of those that run
                (files / ENDING).touch()  # for the guard: vLLM itself goes on taking requests, and fails at them
            child.drain()

    def _kv_cache_bytes(self) -> int | None:
        """None: what vLLM finds free on the GPU. On a CPU what `max_concurrent` needs, as far as the memory goes."""
        config = self.job.config.serve_config
        if config.kv_cache_gb is not None:
            return int(config.kv_cache_gb * 1e9)
        if self.environment.build == "cuda":
            return None
        import psutil

        shape = _shape(self.folder, self.base)
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        # 4 bytes hold any dtype; 128 tokens more for pages that are not full
        sequence = 2 * shape.num_hidden_layers * heads * size * 4 * (self.context + 128)
        return max(
            sequence, min(sequence * config.max_concurrent, int(psutil.virtual_memory().available * CACHE_SHARE))
        )


def check_args(job: Job) -> None:
    """Raises `UserError` for a word of `serve_config.vllm_args` that would undo a promise."""
    for word in job.config.serve_config.vllm_args:
        if not word.startswith("--"):
            continue
        name = word[2:].partition("=")[0].partition(".")[0].replace("_", "-").removeprefix("no-")
        for refused, instead in REFUSED.items():  # vLLM takes any unambiguous beginning of a name, and `_` for `-`
            if refused.startswith(name) or fnmatch(name, refused):
                what = f"`{word}` would undo what this server promises"
                raise job.profile.error("serve_config.vllm_args", what, instead)


def counts(record: Record) -> dict[str, int]:
    """What the guard has counted: requests, refused, errors, prompt_tokens, completion_tokens. Empty where it could not."""
    try:
        found = json.loads((record.folder / FILES / COUNTS).read_text("utf-8"))
        return {str(name): int(number) for name, number in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _check_nodes(job: Job, environment: Environment) -> None:
    if _needs_ray(job, environment) and not environment.has("ray"):
        what = "more GPUs than this machine shows are reached through Ray, which vLLM's environment lacks"
        remedy = f"`{environment.python} -m pip install 'ray[cgraph]'` on each node"
        key = "pipeline_parallel" if job.config.serve_config.pipeline_parallel > 1 else "tensor_parallel"
        raise job.profile.error(f"serve_config.{key}", what, remedy)


def _needs_ray(job: Job, environment: Environment) -> bool:
    """Whether the GPUs asked for are more than this machine's, and nothing else was said of how to reach them."""
    config = job.config.serve_config
    wanted = config.tensor_parallel * config.pipeline_parallel
    if wanted == 1 or environment.build == "cpu":
        return False
    if any(word.startswith(("--distributed-executor-backend", "--nnodes")) for word in config.vllm_args):
        return False
    import torch

    return wanted > torch.cuda.device_count()


def _shape(folder: Path, base: Base) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=base.trust_remote_code).get_text_config()


def _stored_dtype(folder: Path, base: Base) -> str:
    """Said aloud, since vLLM's `auto` makes 16 bits of a float32 model."""
    return str(_shape(folder, base).dtype or "auto").removeprefix("torch.")


def _healthy(host: str, port: int) -> bool:
    import httpx

    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        url = f"http://{f'[{local}]' if ':' in local else local}:{port}/health"
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
