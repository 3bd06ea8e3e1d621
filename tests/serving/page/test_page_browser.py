"""The page in a real browser, where there is one: a person types, reads, stops, rates; what a model says never runs."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serving.page.browser import CHROMIUM, Browser, Tab
from tests.serving.page.scripted import Serving

if TYPE_CHECKING:
    from tests.conftest import Said, Trained
    from tests.serving.conftest import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
KEY = "s3cret"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


Start = Callable[..., Serving]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Serving] = []

    def serving(key: str = "") -> Serving:
        started.append(Serving(tmp_path / "EXP-2026-01-01-001" / "feedback.jsonl", key))
        return started[-1]

    yield serving
    for one in started:
        one.stop()


@pytest.fixture
def served(start: Start) -> Serving:
    return start()


def ask(tab: Tab, question: str) -> None:
    tab.run("find('#question').focus()")
    tab.type(question)
    tab.press("Enter")


def finished(tab: Tab, number: int = 1) -> str:
    """The text of the last answer, once it is all there."""
    tab.wait(f"all('.answered[aria-busy=false]').length === {number}")
    return str(tab.run("all('.answered .text').at(-1).innerText"))


# ── what a person does ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_streams_in_and_a_thumb_down_with_its_reason_lands_in_the_file(
    browser: Browser, served: Serving
) -> None:
    tab = browser.open(served.address)
    assert tab.run("find('#model').value") == "tiny-merged" and tab.run("keyForm.hidden")
    ask(tab, "slow")
    tab.wait("find('.answered .text')?.innerText === 'First'")
    assert tab.run("find('.answered').ariaBusy") == "true" and tab.run("find('.rate').hidden")
    served.script.go_on.set()
    assert finished(tab) == "First and\u2028second."
    tab.click(".rate [value=down]")
    tab.wait("!find('.why').hidden && find('.rate [value=down]').ariaPressed === 'true'")
    assert [one.rating for one in served.kept()] == ["down"], "kept at the click: the text may never come"
    tab.type("Says nothing.")  # the focus is in the field
    tab.click(".why [name=better]")
    tab.type("A lock lets one in.")
    tab.click(".why button")
    tab.wait("find('.told').innerText === 'Kept with your remarks.'")
    one = served.kept()[-1]
    assert one.messages == ({"role": "user", "content": "slow"},) and one.answer == "First and\u2028second."
    assert (one.rating, one.text, one.better) == ("down", "Says nothing.", "A lock lets one in.")
    assert (one.model, one.contract, one.completion_id) == ("tiny-merged", "c0ffee", "chatcmpl-7")
    assert tab.complaints() == []


def test_a_conversation_goes_on_with_its_settings_until_a_new_one(browser: Browser, served: Serving) -> None:
    tab = browser.open(served.address)
    tab.run("find('#settings').open = true")
    tab.click("#temperature")
    tab.type("0.5")
    tab.click("#max-tokens")
    tab.type("9")
    tab.run("find('#question').focus()")
    tab.type("a lock?")
    tab.press("Enter", modifiers=8)  # Shift
    tab.type("and a latch?")
    tab.press("Enter")
    assert finished(tab) == "A lock."
    ask(tab, "cut")
    finished(tab, 2)
    assert tab.run("all('.note').at(-1).innerText") == "Cut at the limit of tokens."
    first, second = served.script.asked
    question = {"role": "user", "content": "a lock?\nand a latch?"}
    assert first == {
        "model": "tiny-merged", "messages": [question], "stream": True, "temperature": 0.5, "max_tokens": 9,
    }  # fmt: skip
    assert second["messages"] == [
        question,
        {"role": "assistant", "content": "A lock."},
        {"role": "user", "content": "cut"},
    ]
    tab.click("#new")
    assert tab.run("all('article').length") == 0 and not tab.run("find('#welcome').hidden")
    ask(tab, "again")
    finished(tab)
    assert served.script.asked[-1]["messages"] == [{"role": "user", "content": "again"}]


def test_what_a_model_says_stays_text(browser: Browser, served: Serving) -> None:
    tab = browser.open(served.address)
    ask(tab, "hostile")
    finished(tab)
    assert tab.run("document.title") == "Aletheia: chat"
    tags = set(tab.run("all('.answered .text *').map((one) => one.localName)"))
    assert tags == {"p", "code", "strong", "figure", "figcaption", "pre"}
    assert tab.run("all('.answered .text *').flatMap((one) => one.getAttributeNames())") == ["tabindex"]
    shown = tab.run("find('.answered .text').textContent")
    for part in (
        "<img src=x onerror=\"document.title='run'\">",
        "[click](javascript:",
        "&lt;b&gt;",
        "<u>u</u>",
        "<iframe",
        "</script>",
    ):
        assert part in shown
    code = tab.run("all('.answered pre code').map((one) => one.textContent)")
    assert code == ["</pre></code><script>document.title='run'</script>"]
    ask(tab, "<img src=x onerror=document.title='run'>")
    finished(tab, 2)
    assert tab.run("all('.asked .text').at(-1).innerHTML") == "<p>&lt;img src=x onerror=document.title='run'&gt;</p>"
    assert tab.run("document.title") == "Aletheia: chat" and tab.complaints() == []


def test_stopping_hangs_up_so_that_the_slot_is_free(browser: Browser, served: Serving) -> None:
    tab = browser.open(served.address)
    for how in ("Escape", "#stop", "#new"):
        served.script.left.clear()
        tab.click("#new")
        ask(tab, "long")
        tab.wait("find('.answered .text')?.innerText.length > 20")
        assert not served.script.left.is_set() and tab.run("find('#send').hidden")
        if how == "Escape":
            tab.press("Escape")
        else:
            tab.click(how)
        assert served.script.left.wait(10), "the connection is closed"
        if how == "#new":
            tab.wait("all('article').length === 0")
        else:
            said = finished(tab)
            assert tab.run("find('.note').innerText") == "Stopped." and "on and on and" in said
        assert not tab.run("find('#send').hidden") and tab.run("document.activeElement.id") == "question"
        ask(tab, "and now?")
        tab.wait("all('.answered[aria-busy=false] .text').at(-1)?.innerText === 'A lock.'")
        before = served.script.asked[-1]["messages"][:-1]
        assert [m["role"] for m in before] == ([] if how == "#new" else ["user", "assistant"])


def test_an_error_is_shown_as_the_server_tells_it(browser: Browser, served: Serving) -> None:
    tab = browser.open(served.address)
    errors = {
        "ends early": "the connection ended in the middle of the answer",
        "breaks": "generation failed: no memory",
        "error": "the queue is full; try again in 2 s",
    }
    for number, (question, told) in enumerate(errors.items(), 1):
        ask(tab, question)
        finished(tab, number)
        assert tab.run("all('.answered .fault').at(-1).innerText") == told
        assert tab.run("find('#question').value") == ("error" if question == "error" else ""), "to send again"


def test_a_key_is_asked_for_when_the_server_does_and_kept_for_the_tab_alone(browser: Browser, start: Start) -> None:
    served = start(KEY)
    tab = browser.open(served.address)
    tab.wait("!keyForm.hidden && document.activeElement.id === 'key'")
    assert "missing or wrong" in tab.run("find('#fault').innerText")
    tab.type("wrong")
    tab.press("Enter")
    tab.wait("!keyForm.hidden && find('#key').value === ''")
    tab.type(KEY)
    tab.press("Enter")
    tab.wait("find('#model').value === 'tiny-merged' && keyForm.hidden && find('#fault').hidden")
    ask(tab, "a lock?")
    assert finished(tab) == "A lock."
    tab.click(".rate [value=up]")
    tab.wait("find('.told').innerText === 'Kept.'")
    assert served.kept()[0].rating == "up"
    assert tab.run("Object.values(sessionStorage)") == [KEY]
    assert tab.run("Object.values(localStorage).length + document.cookie.length") == 0
    assert tab.run("keyForm.hidden") and not start().script.key
    other = browser.open(served.address)
    other.wait("!keyForm.hidden")


def test_all_can_be_done_with_keys_alone(browser: Browser, served: Serving) -> None:
    tab = browser.open(served.address)
    assert tab.run("document.activeElement.id") == "question"
    ask(tab, "a lock?")
    finished(tab)
    reached = []
    for _ in range(12):
        tab.press("Tab")
        reached.append(
            tab.run("document.activeElement.value || document.activeElement.id || document.activeElement.localName")
        )
    assert {"up", "down", "new", "tiny-merged", "summary", "question", "send"} <= {*reached, "question"}
    for _ in range(12):
        if tab.run("document.activeElement.value") == "up":
            break
        tab.press("Tab")
    ring = tab.run("getComputedStyle(document.activeElement).outlineStyle")
    tab.press(" ")
    tab.wait("find('.told').innerText === 'Kept.'")
    assert ring == "solid" and served.kept()[0].rating == "up"


CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (one) => { for (; one; one = one.parentElement) {
    const found = rgb(getComputedStyle(one).backgroundColor); if (found.length === 3 || found[3] === 1) return found; } };
  return all("body *").filter((one) => one.checkVisibility() && !one.closest(".unseen") &&
      [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((one) => {
    const [a, b] = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    return [one.innerText.slice(0, 30), (a + 0.05) / (b + 0.05)];
  });
})()"""


def test_it_can_be_read_light_and_dark_on_a_small_screen_and_every_control_has_a_name(
    browser: Browser, served: Serving
) -> None:
    tab = browser.open(served.address)
    tab.size(360, 640)
    ask(tab, "hostile")
    finished(tab)
    tab.click(".rate [value=down]")
    tab.wait("!find('.why').hidden")
    ask(tab, "error")
    finished(tab, 2)
    tab.run("(find('#settings').open = true, keyForm.hidden = false)")
    for dark in (False, True):
        tab.size(360, 640, dark)
        assert (tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(19, 22, 24)") == dark
        contrasts = tab.run(CONTRAST)
        assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == [] and len(contrasts) > 12
        for scrolled in ("document.documentElement", "find('main')"):
            assert tab.run(f"{scrolled}.scrollWidth") <= 360
        assert tab.run("document.documentElement.scrollHeight") <= 640, "the conversation scrolls, the page does not"
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "spinbutton", "DisclosureTriangle", "log", "form")
    named = {(n["role"]["value"], n["name"]["value"]) for n in nodes if n["role"]["value"] in roles}
    assert [role for role, name in named if not name] == []
    assert {name for _, name in named} >= {
        "Good answer", "Bad answer", "Question", "Model", "Send", "New conversation", "API key", "Max tokens",
    }  # fmt: skip


# ── with the project's own server ────────────────────────────────────────────────────────────────────────────────────


def test_a_rating_of_the_served_model_becomes_a_pair_that_passes_the_gate(
    browser: Browser,
    serve: "Callable[..., Server]",
    trained_copy: "Trained",
    aletheia: "Callable[..., Said]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(trained_copy.workspace, "--set", "serve_config.max_tokens=12")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a mutex?"))
    piped = aletheia(trained_copy.workspace, "chat", "--endpoint", server.address)
    assert piped.code == 0 and len(piped.out.strip()) > 3
    tab = browser.open(server.address.removesuffix("v1"))
    tab.run("find('#settings').open = true")
    tab.click("#temperature")
    tab.type("0")
    ask(tab, "What is a mutex?")
    finished(tab)
    tab.click(".rate [value=down]")
    tab.wait("!find('.why').hidden")
    tab.click(".why [name=better]")
    tab.type("A lock that one thread holds at a time.")
    tab.click(".why button")
    tab.wait("find('.told').innerText === 'Kept with your remarks.'")
    target = trained_copy.workspace.root / "data" / "dpo" / "feedback.jsonl"
    said = aletheia(trained_copy.workspace, "data", "feedback", "--to", str(target))
    assert (said.code, said.out) == (0, "data/dpo/feedback.jsonl\n"), said.err
    [row] = map(json.loads, target.read_text().splitlines())
    assert row["prompt"] == [{"role": "user", "content": "What is a mutex?"}]
    asked = {"model": server.model, "messages": row["prompt"], "temperature": 0}
    answer = server.post("chat/completions", json=asked).json()
    said_by_model = answer["choices"][0]["message"]["content"]  # the page shows it as markdown
    assert row["rejected"] == [{"role": "assistant", "content": said_by_model}]
    assert row["chosen"][0]["content"] == "A lock that one thread holds at a time."
    [record] = trained_copy.workspace.experiments.glob("EXP-*/feedback.jsonl")
    assert row["records"] == [record.parent.name] and row["models"] == [server.model]
    contract = json.loads(record.read_text().splitlines()[0])["contract"]
    assert row["contracts"] == [contract]
    assert aletheia(trained_copy.workspace, "data", "check", str(target)).code == 0
