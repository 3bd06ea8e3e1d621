"""Stands where vLLM's environment would: the same command, variables, middleware, signals and log, and no model.

`install(folder)` makes `folder/bin/python`, which runs this file. FAKE_VLLM says what goes wrong: `dies`, `never ready`,
`crashes` (asked for ONE_TOO_MANY tokens) or `stubborn` (no signal but SIGKILL ends it).
"""

import argparse
import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

from pipeline.workspace import INSTALLED

VERSION = "0.32.0"
VLLM = ("serve_config.backend=vllm", "serve_config.port=0", "serve_config.drain_timeout=5.0")  # a job's
ONE_TOO_MANY = 2049
LAST_WORDS = """\
(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1]     raise ValueError(
(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1] ValueError: To serve at least one request, 9 GiB KV cache is needed
(APIServer pid=6)   File "api_server.py", line 1, in <module>
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""


def install(folder: Path, build: str = "cpu") -> Path:
    """A whole environment, as `serving.vllm_backend.setup` leaves one."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    python.chmod(0o755)
    (folder / INSTALLED).write_text(json.dumps({"build": build, "version": VERSION, "pins": ""}))
    return folder


def main() -> None:
    assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
    how = os.environ.get("FAKE_VLLM", "")
    engine = subprocess.Popen(["sleep", "600"])  # vLLM's engine is a process of its own
    Path("engine.pid").write_text(str(engine.pid))
    if how == "dies":
        sys.stderr.write(LAST_WORDS)
        engine.kill()
        sys.exit(1)
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while how == "never ready":
        time.sleep(0.1)
    serve(arguments(), how, engine)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "served-model-name", "host", "dtype", "chat-template", "chat-template-content-format"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "max-model-len", "max-num-seqs", "shutdown-timeout", "kv-cache-memory-bytes"):
        parser.add_argument(f"--{name}", required=True, type=int)
    for name in ("generation-config", "allowed-origins"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--middleware", action="append")
    parser.add_argument("--lora-modules", nargs="+", default=[], type=json.loads)
    for name in ("max-loras", "max-lora-rank"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    return parser.parse_args(sys.argv[3:])


def serve(args: argparse.Namespace, how: str, engine: "subprocess.Popen[bytes]") -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    generated, running = 0, 0

    async def health(_: Request) -> Any:
        return PlainTextResponse("")

    async def chat(request: Request) -> Any:
        nonlocal generated
        wanted = (await request.json())["max_tokens"]
        if how == "crashes" and wanted == ONE_TOO_MANY:
            os.kill(os.getpid(), signal.SIGSEGV)
        if wanted == ONE_TOO_MANY:
            return JSONResponse({"error": {"message": "max_tokens"}}, status_code=400)

        async def events() -> Any:
            nonlocal generated, running
            running += 1
            for _ in range(wanted):
                generated += 1
                yield "data: word\n\n"
                await asyncio.sleep(0.02)
            yield "data: [DONE]\n\n"
            running -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    async def invocations(_: Request) -> Any:
        return PlainTextResponse("generated")

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/invocations", invocations, methods=["POST"]),
        ]
    )
    sample = types.SimpleNamespace(name="vllm:generation_tokens_total", value=0)
    family = types.SimpleNamespace(name="vllm:generation_tokens", samples=[sample])

    def collect() -> list[Any]:
        sample.value = generated
        return [family]

    metrics: Any = types.ModuleType("prometheus_client")
    metrics.REGISTRY = types.SimpleNamespace(collect=collect)
    sys.modules["prometheus_client"] = metrics
    for middleware in args.middleware:
        module, name = middleware.rsplit(".", 1)
        app.add_middleware(getattr(importlib.import_module(module), name))
    options = uvicorn.Config(
        app, host=args.host, port=args.port, timeout_graceful_shutdown=args.shutdown_timeout, log_level="info"
    )
    server = uvicorn.Server(options)

    async def end_when_idle() -> None:
        while running:
            await asyncio.sleep(0.02)
        server.should_exit = True

    def handle_exit(*_: Any) -> None:
        """As vLLM does: it goes on listening, and answering, until its engine has nothing left to do."""
        if how != "stubborn":
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.create_task, end_when_idle())

    server.handle_exit = handle_exit  # type: ignore[method-assign]
    server.run()
    engine.kill()


if __name__ == "__main__":
    main()
