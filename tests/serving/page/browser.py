"""Chromium driven through its debugging pipe: pages opened, keys pressed, places clicked, pictures taken."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-quic",
]  # fmt: skip
NAMES = """const find = (query) => document.querySelector(query), all = (query) => [...document.querySelectorAll(query)];
const keyForm = find('#key-form'), place = (query) => { const one = find(query); one.scrollIntoView({ block: 'nearest' });
  const { x, y, width, height } = one.getBoundingClientRect(); return [x + width / 2, y + height / 2]; };"""


class Browser:
    """Chromium with its pages. Messages are JSON ended by a zero byte, on its file descriptors 3 and 4."""

    def __init__(self, folder: Path) -> None:
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 50) for end in (*os.pipe(), *os.pipe())]  # not 3 or 4
        its_in, self._to, self._from, its_out = ours
        start = ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "-", str(CHROMIUM), *FLAGS]
        self.process = subprocess.Popen(
            [*start, f"--user-data-dir={folder}"], pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL
        )
        os.close(its_in)
        os.close(its_out)
        self._rest, self._last = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._from, 1 << 16)
                assert read, "the browser ended"
                self._rest += read
            found, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(found)
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]  # type: ignore[no-any-return]
            self.events.append(answer)

    def open(self, address: str) -> "Tab":
        return Tab(self, address)

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self.process.kill()
        self.process.wait()


class Tab:
    READY = "find('#model').options.length || !keyForm.hidden || !find('#fault').hidden"

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        context = browser.call("Target.createBrowserContext")["browserContextId"]  # its own storage
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)
        loaded = "document.readyState === 'complete' && location.protocol === 'http:'"
        self.wait(f"{loaded} && ({self.READY})")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def run(self, expression: str) -> Any:
        whole = f"(() => {{ {NAMES} return {expression}; }})()"
        found = self.call("Runtime.evaluate", expression=whole, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.run(expression)):
            assert time.monotonic() < end, f"never: {expression}; {self.run('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, **more: Any) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key)
        down = {"type": "keyDown" if text else "rawKeyDown"} | ({"text": text} if text else {})
        for kind in (down, {"type": "keyUp"}):
            self.call("Input.dispatchKeyEvent", key=key, windowsVirtualKeyCode=codes[key], **kind, **more)

    def click(self, selector: str) -> None:
        """As a person does: at a place on the screen, where another thing may lie."""
        x, y = self.run(f"place({selector!r})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Exceptions of the page's script, and what its policy has stopped."""
        mine = [e for e in self.browser.events if e.get("sessionId") == self.session]
        logged = [e["params"]["entry"] for e in mine if e["method"] == "Log.entryAdded"]
        thrown = [json.dumps(e["params"]) for e in mine if e["method"] == "Runtime.exceptionThrown"]
        return thrown + [entry["text"] for entry in logged if entry["source"] != "network"]
