"""The page of `data show --html`: each token as training has it, nothing loaded, and nothing that a row says is obeyed."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aletheia.data.examples import MARK
from aletheia.data.page import BINS, HEIGHT, WIDTH, bars
from pipeline.chat import Chat, Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.model import Base
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

SMALL = ("--profile", "small")
VOID = {"meta", "link", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>document.title='run'</script></pre></details></script>]]><img src=x onerror=\"document.title='run'\">"
    "<!-- {{ 7 * 7 }} \x1b[31m \u202eevil\u202c nul\0 \x9b \r\n zero\u200b &amp; 'q'"
)


class Page(HTMLParser):
    """Elements, scripts, what a reader sees, and the tokens of each sequence: (ids, class of the run, ends, text)."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.sequences: list[list[tuple[list[int], str, bool, str]]] = []
        self.positions: list[list[str]] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag in VOID:
            return
        self._open.append((tag, found))
        if tag == "script":
            self.scripts.append("")
        if tag == "pre":
            self.sequences.append([])
            self.positions.append([])
        if tag == "i" and self._within("pre"):
            place, _, rest = (found["title"] or "").partition(" · id ")
            ids = [int(n) for n in rest.partition(" · ")[0].split()]
            state = next(a["class"] or "" for t, a in reversed(self._open) if t == "span")
            self.sequences[-1].append((ids, state, found.get("class") == "end", ""))
            self.positions[-1].append(place)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        within = self._open[-1][0] if self._open else ""
        if within == "script":
            self.scripts[-1] += data
        elif within == "style":
            self.styles.append(data)
        else:
            self.text += data
        if self._within("pre"):
            ids, state, ends, text = self.sequences[-1][-1]
            self.sequences[-1][-1] = ids, state, ends, text + data

    def _within(self, tag: str) -> bool:
        return any(t == tag for t, _ in self._open)

    def having(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and name in ["", *(a.get("class") or "").split()]]


Write = Callable[..., Page]


@pytest.fixture
def page(aletheia: "Callable[..., Said]", workspace: Workspace) -> Write:
    def write(path: str, *arguments: str) -> Page:
        target = workspace.root / "out" / "page.html"
        said = aletheia(workspace, "data", "show", path, *SMALL, "--html", str(target), *arguments)
        assert (said.code, said.out) == (0, "out/page.html\n"), said.err
        return Page(target.read_text("utf-8"))

    return write


@pytest.fixture(scope="module")
def chat(base: Base) -> Chat:
    return base.chat()


def put(workspace: Workspace, *rows: dict[str, Any] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (workspace.root / "mine.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return "mine.jsonl"


def row(id: str, answer: str, domain: str = "db") -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
    return {"id": id, "domain": domain, "messages": messages}


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_sequences(found: Page, expected: list[Encoded], chat: Chat) -> None:
    assert len(found.sequences) == len(expected)
    for sequence, positions, encoded in zip(found.sequences, found.positions, expected, strict=True):
        flat = [(token, state == "trained") for ids, state, _, _ in sequence for token in ids]
        assert flat == list(zip(encoded.ids, encoded.mask, strict=True))
        assert "".join(text for *_, text in sequence) == chat.tokenizer.decode(encoded.ids)
        assert [ids for ids, _, ends, _ in sequence if ends] == [[chat.end_of_turn_id]]
        assert int(positions[-1]) == len(encoded.ids) - 1 and positions[0] == "0"


def test_each_token_is_marked_as_training_masks_it(page: Write, workspace: Workspace, chat: Chat) -> None:
    talks = [chat.conversation(r.messages) for r in read_rows(workspace, "data/sft", Conversation)]
    check_sequences(page("data/sft"), talks, chat)
    sides = [side for r in read_rows(workspace, "data/dpo", PreferencePair) for side in chat.pair(r)]
    found = page("data/dpo")
    check_sequences(found, sides, chat)
    assert len(found.having("div", "two")) == len(sides) / 2


def test_what_a_cut_would_lose_is_marked_and_said(page: Write, workspace: Workspace, chat: Chat) -> None:
    long = row("long", "word " * 50)
    encoded = chat.conversation(Conversation.model_validate(long).messages)
    limit = len(encoded.ids) - 7
    found = page(put(workspace, row("short", "Yes."), long), "--set", f"sft_config.max_length={limit}")
    states = [[(state, len(ids)) for ids, state, _, _ in sequence] for sequence in found.sequences]
    assert sum(n for state, n in states[1] if state == "past") == 7
    assert not any(state == "past" for state, _ in states[0])
    assert ["data-long" in attributes for attributes in found.having("details")] == [False, True]
    assert "7 past max_length" in found.text and "Training rejects this row: " in found.text
    assert "1 sequence; a cut would lose 7 tokens" in found.text
    assert found.having("line", "limit")


def test_totals_are_those_of_all_rows_and_what_was_left_out_is_said(
    page: Write, aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    found = page("data/sft", "--rows", "2")
    totals = json.loads(aletheia(workspace, "data", "show", "data/sft", *SMALL, "--json").out)["totals"][
        "conversations"
    ]
    assert len(found.having("details")) == 2 and "2 of 15 rows shown" in found.text
    assert f"{totals['tokens']:,}" in found.text and f"{totals['trained_share']:.1%}" in found.text
    for domain, spread in totals["lengths"].items():
        [cells] = re.findall(rf'domain">{domain}</td>(.*?)\n', found.source)
        assert re.findall(r">([\d,]+)<", cells) == [f"{n:,}" for n in spread.values()]
    assert len(found.having("svg", "spread")) == len(totals["lengths"])


def test_all_rows_up_to_two_hundred_are_shown(page: Write, workspace: Workspace) -> None:
    found = page(put(workspace, *(row(f"row-{n}", "Yes.") for n in range(205))))
    assert len(found.having("details")) == 200 and "200 of 205 rows shown" in found.text


def test_broken_rows_are_named_on_the_page(page: Write, workspace: Workspace) -> None:
    found = page(put(workspace, "{", row("a", "Yes."), *['{"text": 1}'] * 30))
    assert re.search(r"mine\.jsonl:1 is not JSON", found.text)
    assert "and 11 more:" in found.text and "not counted: 31 rows" in found.text


def test_a_page_replaces_a_page(page: Write, workspace: Workspace) -> None:
    first, second = page("data/sft", "--rows", "1"), page("data/dpo", "--rows", "1")
    assert MARK in first.source and first.source != second.source


def test_bars_hold_every_length_on_one_scale() -> None:
    assert bars([100], 100) == [(pytest.approx(240 - 240 / BINS), pytest.approx(7.0), HEIGHT)]
    found = bars([0, 1, 1, 99], 100)
    assert [(left, height) for left, _, height in found] == [(0, HEIGHT), (232, round(HEIGHT / 3, 2))]
    assert len(bars(range(1, 1001), 1000)) == BINS


def test_what_is_longer_than_the_scale_stands_in_a_last_bar_of_its_own() -> None:
    width = WIDTH / BINS
    found = bars([0, 50, 100, 101, 19_030, 19_030], 100, more=True)
    assert [(left, height) for left, _, height in found] == [
        (0, round(HEIGHT / 3, 2)),
        (pytest.approx((BINS - 2) / 2 * width), round(HEIGHT / 3, 2)),
        (pytest.approx((BINS - 3) * width), round(HEIGHT / 3, 2)),
        (pytest.approx((BINS - 1) * width), HEIGHT),
    ]


def test_one_long_row_does_not_squeeze_the_others_into_one_bar(page: Write, workspace: Workspace) -> None:
    rows = [row(f"r{n}", "word " * 14 * n) for n in range(1, 11)]
    found = page(put(workspace, *rows, row("long", "word " * 5_000)), "--set", "sft_config.max_length=240")
    places = [float(bar["x"] or 0) for bar in found.having("rect")]
    assert len(places) >= 8 and max(places) == WIDTH * (BINS - 1) / BINS
    assert len(found.having("rect", "more")) == 1 and "300 tokens, more" in found.text
    [limit] = found.having("line", "limit")
    assert float(limit["x1"] or 0) == pytest.approx(240 / 300 * WIDTH * (BINS - 2) / BINS, abs=0.1)
    assert "The last bar is all of more than 300 tokens." in found.text


def test_without_a_row_much_longer_than_max_length_the_scale_ends_at_the_longest(
    page: Write, workspace: Workspace
) -> None:
    found = page(put(workspace, row("a", "Yes."), row("b", "word " * 60)))
    assert not found.having("rect", "more") and not found.having("em")
    assert max(float(bar["x"] or 0) for bar in found.having("rect")) == WIDTH * (BINS - 1) / BINS


# ── what others wrote ────────────────────────────────────────────────────────────────────────────────────────────────


def hostile(workspace: Workspace) -> str:
    one = row(f"id {HOSTILE}", f"a {HOSTILE} z", HOSTILE)
    pair = {
        "prompt": one["messages"][:1],
        "chosen": one["messages"][1:],
        "rejected": [{"role": "assistant", "content": f"{HOSTILE}{HOSTILE}"}],
        "domain": f"{HOSTILE} 2",
    }
    return put(workspace, one, json.dumps({HOSTILE: 1}), pair)


def test_nothing_is_loaded_from_anywhere_and_only_the_pages_own_scripts_may_run(
    page: Write, workspace: Workspace
) -> None:
    for found in (page("data/sft"), page(hostile(workspace), "--set", "sft_config.max_length=60")):
        for tag, attributes in found.elements:
            assert tag not in ("img", "iframe", "object", "embed", "base", "image", "use")
            assert not any(name.startswith("on") or name in ("src", "srcset", "action", "style") for name in attributes)
            assert (attributes.get("href") or "#").startswith(("#", "data:,")), attributes
        assert found.styles and not re.search(r"url\(|@import", "".join(found.styles))
        policy = next(a["content"] or "" for a in found.having("meta") if "http-equiv" in a)
        assert "default-src 'none'" in policy and "unsafe-eval" not in policy
        hashes = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts}
        assert len(found.scripts) == 2 and set(re.findall(r"'sha256-([^']+)'", policy)) == hashes


def test_what_a_row_says_is_text_and_its_hidden_characters_are_seen(page: Write, workspace: Workspace) -> None:
    found = page(hostile(workspace))
    assert {c for c in found.source if not c.isprintable()} <= {"\n", "\t"}
    seen = re.sub("[\0\x1b\u202e\u202c\x9b\r\u200b]", lambda m: f"U+{ord(m[0]):04X}", HOSTILE)
    assert f"a {seen} z" in found.text and f"id {seen}" in found.text
    assert found.having("b") and '<b title="Right-to-left override">U+202E</b>' in found.source
    assert found.source.count('onerror="') == 0 and "49" not in found.text.partition("7 * 7")[0][-5:]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser_the_filter_works_and_no_row_runs(page: Write, workspace: Workspace, tmp_path: Path) -> None:
    rows = [row("a", "Yes.", "db"), row("b", f"No. {HOSTILE}", "api"), row("c", "word " * 90, "db")]
    found = page(put(workspace, *rows), "--set", "sft_config.max_length=170")
    act = "const f = document.forms.filter; f.domain.value = '2'; f.long.checked = true; f.dispatchEvent(new Event('input'));"
    digest = base64.b64encode(hashlib.sha256(act.encode()).digest()).decode()
    acted = found.source.replace("script-src ", f"script-src 'sha256-{digest}' ")
    target = tmp_path / "acted.html"
    target.write_text(acted.replace("</body>", f"<script>{act}</script></body>"), "utf-8")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'browser'}",
         "--virtual-time-budget=3000", "--dump-dom", f"{target.as_uri()}#dark"],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    after = Page(shown)
    assert 'data-theme="dark"' in shown and "<title>mine.jsonl: rows as they are trained</title>" in shown
    assert ["hidden" in attributes for attributes in after.having("details")] == [True, True, False]
    assert "1 of 3 rows" in after.text
