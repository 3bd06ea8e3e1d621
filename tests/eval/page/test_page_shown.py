"""The page in a browser: it asks for nothing, follows the system's light or dark, fits a telephone, and can be heard."""

import json
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from eval.page.page import write_page
from tests.eval.page.facts import lineage
from tests.serving.page.browser import CHROMIUM, Browser, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Opened(Tab):
    """A file in a tab of its own, every request and complaint of which is heard."""

    def __init__(self, browser: Browser, path: Path, width: int, dark: bool) -> None:
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, 9000, dark)  # so high that all of it is in sight
        self.call("Page.navigate", url=path.as_uri())
        end = time.monotonic() + 20
        while not self.value("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < end
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def faults(self) -> list[tuple[str, str]]:
        """By WCAG 2.1 A and AA and good practice (axe-core); what it could not decide counts too."""
        self.value(resources.files("axe_core_python").joinpath("axe.min.js").read_text("utf-8"))
        told = self.call("Runtime.evaluate", expression="axe.run().then(JSON.stringify)", awaitPromise=True)
        found = json.loads(told["result"]["value"])
        assert len(found["passes"]) >= 10
        return [(f["id"], n["html"][:90]) for f in found["violations"] + found["incomplete"] for n in f["nodes"]]

    @property
    def asked(self) -> list[str]:
        sent = [
            e["params"]["request"]["url"] for e in self.browser.events if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith("data:")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.close()


def test_it_shows_light_and_dark_wide_and_narrow_and_asks_for_nothing(browser: Browser, tmp_path: Path) -> None:
    path, grounds = write_page(lineage(tmp_path)), set()
    for width, dark in ((1180, False), (390, True)):
        tab = Opened(browser, path, width, dark)
        assert tab.value("document.documentElement.scrollWidth") <= width
        grounds.add(tab.value("getComputedStyle(document.body).backgroundColor"))
        bars = tab.value(
            "[...document.querySelectorAll('.forest svg')].map((one) => one.getBoundingClientRect().width)"
        )
        assert len(bars) == 13 and min(bars) > 200
        assert tab.asked == [path.as_uri()] * len(grounds) and tab.complaints() == []
        assert tab.faults() == []
    assert len(grounds) == 2
