"""A server that answers by script, behind the page: for what talks to any server with OpenAI's API."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from serving.page import feedback
from serving.page.page import Page

HOSTILE = (
    "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\n\n"
    "[click](javascript:document.title='run') <a href=\"javascript:document.title='run'\">x</a> &lt;b&gt; "
    "`<img src=x onerror=document.title='run'>` **<u>u</u>**\n"
    "```\"><svg onload=document.title='run'>\n</pre></code><script>document.title='run'</script>\n```\n"
    "<iframe srcdoc=\"<script>top.document.title='run'</script>\"></iframe><style>*{display:none}</style>"
)

TERMINAL = (
    "\x1b]0;run\x07\x1b[31mred\x9b1A \u202eevil\u202c a\rb\u2028c\u00a0d\u200be\ufeff\x7f \U000e0041 "
    "naïve 你好 👩\u200d💻\n\tend"
)


class Script:
    """Answers `slow` piece by piece as the test says, `long` until nobody listens, and fails in several ways."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.left = threading.Event()
        self.asked: list[dict[str, Any]] = []
        self.key = ""
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)

    async def models(self, request: Request) -> Any:
        return self.refused(request) or {"object": "list", "data": [{"id": "tiny-merged"}]}

    async def chat(self, request: Request) -> Any:
        if refused := self.refused(request):
            return refused
        self.asked.append(await request.json())
        question = self.asked[-1]["messages"][-1]["content"]
        if question == "error":
            return JSONResponse({"error": {"message": "the queue is full; try again in 2 s"}}, 429)
        return StreamingResponse(self.stream(question), media_type="text/event-stream")

    def refused(self, request: Request) -> JSONResponse | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
        return None

    async def stream(self, question: str) -> AsyncIterator[str]:
        def event(**choice: Any) -> str:
            return f"data: {json.dumps({'id': 'chatcmpl-7', 'choices': [choice]}, ensure_ascii=False)}\r\n\r\n"

        yield event(delta={"role": "assistant", "content": ""})
        if question == "slow":
            yield event(delta={"content": "First"})
            await asyncio.to_thread(self.go_on.wait, 20)
            yield event(delta={"content": " and\u2028second."})
        elif question == "long":
            try:
                while True:
                    yield event(delta={"content": "on and "})
                    await asyncio.sleep(0.01)
            finally:
                self.left.set()
        elif question == "breaks":
            yield event(delta={"content": "Half"})
            yield f"data: {json.dumps({'error': {'message': 'generation failed: no memory'}})}\n\ndata: [DONE]\n\n"
            return
        elif question == "ends early":
            yield event(delta={"content": "Half"})
            return
        else:
            for letter in {"hostile": HOSTILE, "terminal": TERMINAL}.get(question, "A lock."):
                yield event(delta={"content": letter})
        yield event(delta={}, finish_reason="length" if question == "cut" else "stop")
        yield "data: [DONE]\n\n"


class Serving:
    """The script behind the page, on a free port."""

    def __init__(self, file: Path, key: str = "") -> None:
        self.file, self.script = file, Script()
        self.script.key = key
        app = Page(self.script.app, feedback=file, model="tiny-merged", contract="c0ffee", api_key=key or None)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.address = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def kept(self) -> list[feedback.Feedback]:
        return [one for _, one in feedback.read(self.file) if isinstance(one, feedback.Feedback)]

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
