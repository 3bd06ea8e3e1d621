"""The page in a real browser, by its keyboard alone: votes, ratings, undo, two tabs, a server that goes away, hostile answers."""

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from eval.review.session import Review
from eval.review.store import Line
from tests.eval.review.reviewing import HOSTILE, ReviewTab, Serving, make_review, write_answers
from tests.serving.page.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


Start = Callable[..., Serving]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Serving] = []

    def serving(review: Review, reviewer: str = "", port: int = 0) -> Serving:
        started.append(Serving(review, reviewer, port))
        return started[-1]

    yield serving
    for one in started:
        one.stop()


def lines(review: Review) -> list[Line]:
    return review.store.read().lines


def choices(review: Review) -> list[str]:
    return [line.choice for line in lines(review)]


def test_a_whole_review_by_keys_alone(browser: Browser, start: Start, tmp_path: Path) -> None:
    review = make_review(tmp_path, 5)
    tab = ReviewTab(browser, start(review).address)
    assert tab.run("document.activeElement.id") == "name"
    tab.type("Anna")
    tab.press("Enter")
    tab.wait("!find('#work').hidden")
    assert tab.place == "Question 1 of 6" and tab.run("document.activeElement.id") == "place"
    tab.vote("a")
    tab.call("Page.reload")
    tab.wait("document.readyState === 'complete' && find('#place')?.innerText === 'Question 2 of 6'")
    for letter in "btds":
        tab.vote(letter)
        assert tab.run("document.activeElement.id") == "place", "reading goes on at the question"
    assert tab.run("find('#told').innerText") == "Kept: Skipped."
    tab.vote("a")
    assert tab.run("document.activeElement.id") == "thanks" and tab.run("find('#work').hidden")
    assert "6 of 6 judged" in tab.run("find('#left').innerText") and "can be opened" in tab.run(
        "find('#then').innerText"
    )
    tab.key("u")
    tab.wait("!find('#work').hidden")
    assert tab.place == "Question 6 of 6"
    tab.key("u")
    tab.wait("find('#place').innerText === 'Question 5 of 6'")
    assert tab.run("all('button.was').map((one) => one.value)") == ["skip"], "what was chosen before is shown"
    tab.vote("b")
    assert choices(review) == ["left", "right", "tie", "bad", "skip", "left", "undo", "undo", "right"]
    assert {line.reviewer for line in lines(review)} == {"anna"} and tab.complaints() == []


def test_ratings_and_a_remark_by_keys_go_along_with_the_vote(browser: Browser, start: Start, tmp_path: Path) -> None:
    review = make_review(tmp_path)
    tab = ReviewTab(browser, start(review, "anna").address)
    tab.key("r")
    assert tab.run("find('#more').open")
    for letter in "54":  # accuracy of A and of B
        tab.key(letter)
    tab.key("0")  # of helpfulness of A nothing
    tab.press("Tab")
    tab.key("3")
    tab.key("c")
    assert tab.run("document.activeElement.id") == "comment"
    for letter in "a bad tie":
        tab.key(letter)
    assert choices(review) == [], "what is written is no vote"
    tab.press("Escape")
    assert tab.run("document.activeElement.id") == "place"
    tab.vote("b")
    (line,) = lines(review)
    assert (line.choice, line.comment) == ("right", "a bad tie")
    assert line.ratings == {"left": {"accuracy": 5}, "right": {"accuracy": 4, "helpfulness": 3}}
    assert tab.run("all('input:checked').length") == 1 and tab.run("find('#comment').value") == "", (
        "the next begins empty"
    )
    tab.key("u")
    tab.wait("find('#comment').value === 'a bad tie' && all('#ratings input:checked').length === 3")


def test_a_key_that_is_held_or_with_control_or_switched_off_does_not_vote(
    browser: Browser, start: Start, tmp_path: Path
) -> None:
    review = make_review(tmp_path)
    tab = ReviewTab(browser, start(review, "anna").address)
    tab.vote("a")
    tab.key("a", repeat=True)
    tab.call("Input.dispatchKeyEvent", type="rawKeyDown", key="d", windowsVirtualKeyCode=68, modifiers=2)
    tab.run("find('#keys').focus()")
    tab.press(" ")
    tab.key("b")
    assert tab.run("find('#keys').checked") is False
    tab.run("find('#choices [value=tie]').focus()")
    tab.press("Enter")
    tab.wait("find('#place').innerText === 'Question 3 of 13'")
    assert choices(review) == ["left", "tie"]


def test_two_tabs_of_one_person_count_nothing_twice(browser: Browser, start: Start, tmp_path: Path) -> None:
    review = make_review(tmp_path)
    address = start(review, "anna").address
    one, other = ReviewTab(browser, address), ReviewTab(browser, address)
    one.vote("a")
    other.key("b")
    other.wait("find('#fault').innerText.startsWith('Another tab went on')")
    assert other.place == "Question 2 of 13" and choices(review) == ["left"]
    other.vote("t")
    assert choices(review) == ["left", "tie"] and other.run("find('#fault').hidden")


def test_what_was_not_kept_is_said_and_can_be_sent_again(browser: Browser, start: Start, tmp_path: Path) -> None:
    review = make_review(tmp_path)
    served = start(review, "anna")
    tab = ReviewTab(browser, served.address)
    tab.key("r")
    tab.key("5")
    served.stop()
    tab.key("a")
    tab.wait("find('#fault').innerText === 'Not kept: the server cannot be reached. Try again.'")
    assert tab.place == "Question 1 of 13" and choices(review) == []
    start(make_review(tmp_path), "anna", served.port)
    tab.vote("a")
    assert choices(review) == ["left"] and lines(review)[0].ratings == {"left": {"accuracy": 5}}
    tab.call("Page.reload")
    tab.wait("document.readyState === 'complete' && find('#place')?.innerText === 'Question 2 of 13'")


def test_what_an_answer_says_stays_text_and_fetches_nothing(browser: Browser, start: Start, tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.jsonl", 3, **{key: lambda i: HOSTILE for key in ("prompt", "model", "base")})
    tab = ReviewTab(browser, start(make_review(tmp_path), "anna").address)
    assert tab.run("document.title") == "Blind review"
    found = "all('.text *').flatMap((one) => one.getAttributeNames().map((name) => `${one.localName} ${name}`))"
    assert set(tab.run(found)) == {"pre tabindex", "div class", "div tabindex"}
    known = {"p", "span", "pre", "mark", "div", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert set(tab.run("all('.text *').map((one) => one.localName)")) == known
    said = tab.run("find('#left-text').textContent")
    for part in (
        "<img src=x onerror=",
        "javascript:",
        "<iframe srcdoc=",
        "[picture: seen] (http://evil.example/p.png)",
        "U+202E",
    ):
        assert part in said
    asked = tab.run("performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)")
    assert set(asked) == {"/api/review", "/api/next"} and tab.complaints() == []


# ── seen by all ──────────────────────────────────────────────────────────────────────────────────────────────────────


def long_answers(i: int) -> str:
    code = f"```\nx = {'1 + ' * 80}1\n```\n"
    wide = f"|a|b|\n|-|-|\n|{'wide ' * 40}|2|\n\n"
    return f"# Heading {i}\n\ntext with `code` and \u202emarks\n\n{code}\n> said\n\n{wide}1. one\n2. two"


@pytest.fixture
def shown(browser: Browser, start: Start, tmp_path: Path) -> ReviewTab:
    write_answers(tmp_path / "answers.jsonl", 4, model=long_answers, base=long_answers)
    return ReviewTab(browser, start(make_review(tmp_path)).address)


def test_it_fits_a_small_screen_moves_for_nobody_who_minds_and_every_control_has_a_name(shown: ReviewTab) -> None:
    shown.type("anna")
    shown.press("Enter")
    shown.wait("!find('#work').hidden")
    shown.key("r")
    for dark in (False, True):
        shown.size(320, 640, dark)
        assert (shown.run("getComputedStyle(document.body).backgroundColor") == "rgb(19, 22, 24)") == dark
        assert shown.run("document.documentElement.scrollWidth") <= 320
    still = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    shown.call("Emulation.setEmulatedMedia", features=still)
    assert shown.run("all('*').every((one) => getComputedStyle(one).transitionDuration === '0s')")
    nodes = shown.call("Accessibility.getFullAXTree")["nodes"]
    roles = (
        "button",
        "textbox",
        "checkbox",
        "radio",
        "radiogroup",
        "group",
        "progressbar",
        "DisclosureTriangle",
        "region",
    )
    named = [
        (n["role"]["value"], n["name"]["value"]) for n in nodes if n["role"]["value"] in roles and not n["ignored"]
    ]
    assert [role for role, name in named if not name and role != "group"] == []
    names = {name for _, name in named}
    assert {"Progress", "Answer A", "Answer B", "Your vote", "Clarity of answer B, 1 to 5", "Shortcut keys"} <= names


def test_axe_finds_nothing_in_any_state_of_the_page_in_light_and_in_dark(shown: ReviewTab) -> None:
    axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
    shown.call("Runtime.evaluate", expression=axe)

    def check(state: str) -> None:
        """By WCAG 2.1 A and AA and good practice; what axe could not decide counts too. Dark changes colours alone."""
        for dark, options in ((False, "{}"), (True, "{runOnly: ['color-contrast']}")):
            shown.size(1100, 2400, dark)  # so high that nothing lies under the bar of buttons
            run = f"axe.run({options}).then(JSON.stringify)"
            told = shown.call("Runtime.evaluate", expression=run, awaitPromise=True)
            found: dict[str, Any] = json.loads(told["result"]["value"])
            faults = [(one["id"], node["html"][:90]) for one in found["violations"] for node in one["nodes"]]
            unsure = [(one["id"], node["html"][:90]) for one in found["incomplete"] for node in one["nodes"]]
            assert (state, dark, faults, unsure) == (state, dark, [], [])
            assert len(found["passes"]) >= (1 if dark else 10)

    check("who are you")
    shown.type("anna")
    shown.press("Enter")
    shown.wait("!find('#work').hidden")
    shown.key("r")
    shown.key("4")
    check("a question with ratings")
    for _ in range(5):
        shown.vote("t")
    check("done")
    assert shown.complaints() == []
