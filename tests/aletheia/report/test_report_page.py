"""The page: what stands in it, and that nothing a record says can do anything."""

import base64
import hashlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aletheia.report import write_report
from aletheia.report.page import HERE, totals
from aletheia.report.project import Project
from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.records.file import LINE
from pipeline.workspace import Workspace
from tests.aletheia.report.conftest import Put, change

if TYPE_CHECKING:
    from tests.conftest import Said

VOID = {"meta", "link", "input", "br", "img", "hr"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
JUDGED = {
    "criterion": "eval_loss < 1.20",
    "finding": "inconclusive",
    "observed": "1.16 [1.13, 1.23] n=200",
    "why": "the interval holds 1.20",
    "n_needed": 640,
}


class Page(HTMLParser):
    """Elements with their attributes, the text of each script and style, and the text that a reader sees."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        within = self._open[-1] if self._open else ""
        if within == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif within == "style":
            self.styles.append(data)
        else:
            self.text += data

    @property
    def code(self) -> list[str]:
        """What a browser would run."""
        return [text for attributes, text in self.scripts if attributes.get("type") != "application/json"]

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]

    def island(self, name: str) -> Any:
        return next(json.loads(text) for attributes, text in self.scripts if attributes.get("id") == name)


@pytest.fixture
def page(place: Workspace) -> Callable[[], Page]:
    def write() -> Page:
        return Page((place.root / write_report(place, None, markdown=False)).read_text("utf-8"))

    return write


def test_nothing_is_loaded_from_anywhere(put: Put, page: Callable[[], Page]) -> None:
    put("EXP-2026-01-01-001", {"results": {"eval_loss": change(2, 1)}}, {"notes": "see https://example.org/a?b=1."})
    put("EXP-2026-01-01-002", {"results": {"eval_loss": change(2, 1)}}, log=[{"step": 1, "loss": 2.0}])
    found = page()
    for tag, attributes in found.elements:
        for name in ("src", "srcset", "data", "poster", "action", "background"):
            assert name not in attributes, (tag, attributes)
        if "href" in attributes and not (attributes["href"] or "").startswith(("#", "EXP-")):
            assert (tag, attributes["href"]) in (("a", "https://example.org/a?b=1"), ("link", "data:,"))
    assert {tag for tag, _ in found.elements}.isdisjoint({"iframe", "object", "embed", "img", "base"})
    assert found.styles and not re.search(r"url\(|@import", "".join(found.styles))
    [policy] = found.having("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy["content"] or "") and "unsafe-eval" not in (policy["content"] or "")


def test_an_evaluations_own_page_is_linked_where_there_is_one(put: Put, page: Callable[[], Page]) -> None:
    for name in ("EXP-2026-01-01-001", "EXP-2026-01-01-002"):
        file = put(name, {"stage": "eval", "results": {"eval_loss": change(2, 1)}})
    file.folder.mkdir(exist_ok=True)
    (file.folder / "result.html").write_text("<html>")
    linked = [a["href"] for a in page().having("a") if (a["href"] or "").endswith("result.html")]
    assert linked == ["EXP-2026-01-01-002/result.html"]


def test_only_the_pages_own_scripts_may_run(put: Put, page: Callable[[], Page]) -> None:
    put("EXP-2026-01-01-001", {"results": {"eval_loss": change(2, 1)}}, log=[{"step": 1, "loss": 2.0}])
    found = page()
    [policy] = found.having("meta", **{"http-equiv": "Content-Security-Policy"})
    allowed = set(re.findall(r"'sha256-([^']+)'", policy["content"] or ""))
    assert len(found.code) == 3
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found.code} == allowed


def test_what_a_record_says_is_text_and_nothing_else(put: Put, page: Callable[[], Page], place: Workspace) -> None:
    person = {key: HOSTILE for key in ("description", "hypothesis", "conclusion", "profile", "experimenter", HOSTILE)}
    person |= {
        "tags": [HOSTILE],
        "observations": [f"{HOSTILE} https://example.org {HOSTILE}", "[x](javascript:alert(3))", "{{ 7 * 7 }}"],
        "learnings": {HOSTILE: [HOSTILE]},
        "journal": [{"date": HOSTILE, "learned": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}],
        "next_steps": [HOSTILE, {"step": HOSTILE, "done": True, "promoted_to": "javascript:alert(4)"}],
        "issues": HOSTILE,
        "visualizations": [{"path": "javascript:alert(5)", "purpose": HOSTILE}],
        "success_criteria": [HOSTILE],
    }
    facts = {
        "profile": HOSTILE,
        "stage": HOSTILE,
        "lineage": {
            "base": {"name": HOSTILE, "sha256": HOSTILE},
            "inputs": [dict.fromkeys(("id", "stage", "path", "sha256"), HOSTILE)],
            "parent": HOSTILE,
        },
        "overrides": {HOSTILE: HOSTILE},
        "configuration": {HOSTILE: {HOSTILE: HOSTILE}},
        "results": {"eval_loss": change(2, 1) | {"unit": HOSTILE}, HOSTILE: 1.0, "benchmarks": {HOSTILE: change(0, 1)}},
        "verdict": {
            "frozen_at": HOSTILE,
            "finding": "refuted",
            "judged": [JUDGED | {"criterion": HOSTILE, "observed": HOSTILE, "why": HOSTILE}],
            "changed_after_start": [HOSTILE],
        },
        "failure": {"kind": HOSTILE, "message": HOSTILE, "rows": [HOSTILE], "traceback": HOSTILE},
        "code": {"command": HOSTILE, "commit": HOSTILE},
        "environment": {"gpus": [HOSTILE], "host": HOSTILE},
        "resources": {"energy": {"how": HOSTILE}, "cost": {"amount": 1.0, "currency": HOSTILE}, "gpu_hours": HOSTILE},
        "external": {HOSTILE: HOSTILE},
        "visualizations": [{"path": "../../../../etc/passwd", "purpose": HOSTILE}],
    }
    log = [{"step": 1, "loss": 2.0, HOSTILE: 1.0, "grad_norm_by_layer": {HOSTILE: 1.0}}]
    for number in (1, 2):
        file = put(f"EXP-2026-01-01-00{number}", facts, person, log)
    answer = {"id": HOSTILE, "prompt": HOSTILE, "model": HOSTILE, "base": {HOSTILE: HOSTILE}, "score": HOSTILE}
    (file.folder / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    put("EXP-2026-01-01-003").path.write_text(f"{HOSTILE}: [")
    (place.experiments / f"{HOSTILE.replace('/', '')}.yaml").write_text("a: 1")
    found = page()
    assert len(found.code) == 3
    assert {tag for tag, _ in found.elements}.isdisjoint({"img", "iframe", "object", "embed"})
    for _, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert (attributes.get("href") or "#").startswith(("#", "EXP-", "data:,", "https://example.org")), attributes
    assert HOSTILE in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert found.source.count("alert(1)</script>") == 0


def test_every_record_is_in_the_index_whatever_became_of_it(
    put: Put, page: Callable[[], Page], place: Workspace
) -> None:
    put("EXP-2026-01-01-001", {"results": {"eval_loss": change(2, 1)}})
    put(
        "EXP-2026-01-01-002",
        {
            "status": "failed",
            "failure": {"kind": "StageFailed", "message": "no space left", "step": 12, "rows": ["row-7"]},
        },
    )
    put("EXP-2026-01-01-003", {"status": "cancelled"})
    put(
        "EXP-2026-01-01-004",
        {
            "status": "running",
            "history": [
                {
                    "status": "running",
                    "at": "2026-01-01T10:00:00Z",
                    "host": socket.gethostname(),
                    "pid": 2**22 - 3,
                    "started": 1.0,
                }
            ],
        },
    )
    put("EXP-2026-01-01-005", None, {"stages": ["sft", "dpo"], "description": "to be done"})
    put("EXP-2026-01-01-006").path.write_text("a: [\n")
    broken = put("EXP-2026-01-01-007")
    broken.path.write_text("description: mine\nb: {\n" + broken.path.read_text().partition("\n")[2])
    edited = put("EXP-2026-01-01-008", {"results": {"rows": 7}})
    edited.path.write_text(edited.path.read_text().replace("rows: 7", "rows: 9"))
    (place.experiments / "EXP-2026-XX-XX-001.yaml").write_text("a: 1\n")
    found = page()
    rows = {row["data-id"]: row["data-status"] for row in found.having("tr") if "data-id" in row}
    assert rows == {
        "EXP-2026-01-01-001": "complete",
        "EXP-2026-01-01-002": "failed",
        "EXP-2026-01-01-003": "cancelled",
        "EXP-2026-01-01-004": "dead",
        "EXP-2026-01-01-005": "planned",
        "EXP-2026-01-01-006": "complete",  # its upper half alone cannot be read
        "EXP-2026-01-01-007": "complete",
        "EXP-2026-01-01-008": "complete",
    }
    assert {a["id"] for a in found.having("details") if "record" in (a.get("class") or "")} == set(rows)
    attention = found.text.partition("Needs a look")[2].partition("Filter")[0]
    assert (
        "experiments/EXP-2026-01-01-006.yaml:2:1" in attention and "experiments/EXP-2026-01-01-007.yaml:3" in attention
    )
    assert "EXP-2026-01-01-004 its process is gone" in attention and "aletheia exp repair" in attention
    assert "EXP-2026-01-01-008 was edited below the line" in attention
    assert "EXP-2026-XX-XX-001.yaml" in attention
    assert "no space left" in found.text and "row-7" in found.text and "at step 12" in found.text
    assert edited.path.read_text().count("rows: 9") == 1  # a report writes into no record


def test_a_pipelines_stages_stand_below_it_in_the_order_they_ran(put: Put, page: Callable[[], Page]) -> None:
    put("EXP-2026-01-01-001", {"stage": "pipeline"})
    put("EXP-2026-01-01-002", {"lineage": {"parent": "EXP-2026-01-01-001"}})
    put("EXP-2026-01-01-003", {"stage": "dpo", "lineage": {"parent": "EXP-2026-01-01-001"}})
    put("EXP-2026-01-02-001")
    for number, parent in ((1, 2), (2, 1), (3, 3)):  # each other's parents, and one its own
        put(f"EXP-2026-01-03-00{number}", {"lineage": {"parent": f"EXP-2026-01-03-00{parent}"}})
    rows = [(row["data-id"], "class" in row) for row in page().having("tr") if "data-id" in row]
    assert rows[:4] == [
        ("EXP-2026-01-02-001", False),
        ("EXP-2026-01-01-001", False),
        ("EXP-2026-01-01-002", True),
        ("EXP-2026-01-01-003", True),
    ]
    assert sorted(name for name, _ in rows[4:]) == [f"EXP-2026-01-03-00{n}" for n in (1, 2, 3)]


def test_numbers_are_sorted_as_numbers(put: Put, page: Callable[[], Page]) -> None:
    for number, seconds in ((1, 9.0), (2, 75.5), (3, 1e4)):
        resources = {"wall_seconds": seconds, "cost": {"amount": seconds / 1e6, "currency": "USD"}}
        put(f"EXP-2026-01-01-00{number}", {"resources": resources})
    put("EXP-2026-01-01-004", {"resources": {"wall_seconds": "long", "cost": "much"}})
    found = page()
    numeric = [a for a in found.having("th") if a.get("data-sort") == "number"]
    assert len(numeric) == 3
    keys = [
        float(a["data-key"] or -1)
        for a in found.having("td", **{"class": "right"})
        if not re.match(r"\d{4}-", a.get("data-key") or "")
    ]
    assert keys == [-1, -1, 1e4, 0.01, 75.5, 7.55e-05, 9.0, 9e-06]


def test_data_for_the_browser_is_json(put: Put, page: Callable[[], Page]) -> None:
    put(
        "EXP-2026-01-01-001",
        {"results": {"eval_loss": change(2, 1), "x": 1.0}, "configuration": {"a": {"b": 1, "c": float("nan")}}},
    )
    put("EXP-2026-01-02-001", {"results": {"eval_loss": change(2, 1.5), "y": 1.0}, "configuration": {"a": {"b": 2}}})
    found = page()
    trends = found.island("trends-data")
    assert trends["profiles"] == ["small"]
    assert set(trends["trends"]) == {"sft/eval_loss", "sft/eval_loss.before", "sft/eval_loss.delta"}  # what both have
    assert trends["trends"]["sft/eval_loss"]["points"] == [
        ["EXP-2026-01-01-001", "2026-01-01 10:00", "small", 1, 0.9, 1.1, 25],
        ["EXP-2026-01-02-001", "2026-01-02 10:00", "small", 1.5, 1.4, 1.6, 25],
    ]
    compared = found.island("compare-data")
    assert compared["EXP-2026-01-01-001"]["parts"]["configuration"] == {"a.b": 1, "a.c": None}
    assert compared["EXP-2026-01-02-001"]["metrics"]["y"] == [1.0, None, None, None]


def test_a_verdict_says_what_was_observed_and_what_would_decide(put: Put, page: Callable[[], Page]) -> None:
    verdict = {
        "frozen_at": "2026-01-01T10:00:00Z",
        "finding": "inconclusive",
        "judged": [JUDGED],
        "changed_after_start": ["was 1.25"],
    }
    put("EXP-2026-01-01-001", {"verdict": verdict}, {"hypothesis": "More data lowers it."})
    text = page().text
    rolled_up, _, section = text.rpartition("Each record")
    for part in (rolled_up, section):
        assert (
            "eval_loss < 1.20" in part
            and "1.16 [1.13, 1.23] n=200" in part
            and "640" in part
            and "inconclusive" in part
        )
    assert "the interval holds 1.20" in section and "was 1.25" in section


def test_no_change_inside_the_noise_is_called_one(put: Put, page: Callable[[], Page]) -> None:
    results = {"inside": change(1.0, 0.95), "outside": change(1.0, 0.5)}
    put("EXP-2026-01-01-001", {"results": results})
    rows = page().text.partition("Results [95 % interval]")[2].split("\n")
    assert [line.strip() for line in rows if line.strip() in ("fell", "no difference shown")] == [
        "no difference shown",
        "fell",
    ]
    assert "-0.05 [-0.15, 0.05]" in " ".join(rows) and "better" not in " ".join(rows)


def test_answers_are_a_sample_and_say_so(put: Put, page: Callable[[], Page]) -> None:
    file = put("EXP-2026-01-01-001", {"stage": "eval"})
    lines = [
        json.dumps({"id": f"q-{n}", "prompt": f"asked {n}", "model": "m", "base": "b", "score": 0.5}) for n in range(30)
    ]
    (file.folder / "answers.jsonl").write_text("\n".join(["no json", *lines]) + "\n")
    text = page().text
    assert "3 of 31; 1 could not be read" in text
    assert "asked 2" in text and "asked 3" not in text


def test_a_log_that_is_thinned_says_so_on_its_chart(put: Put, page: Callable[[], Page]) -> None:
    put("EXP-2026-01-01-001", log=[{"step": step, "loss": 1 + step % 7, "entropy": 1.0} for step in range(1, 5001)])
    found = page()
    [chart] = found.island("curves-EXP-2026-01-01-001")
    assert len(chart["lines"][0]["x"]) <= 1000
    assert "1,000 of 5,000 points" in chart["note"] and chart["note"] in found.text
    assert "not drawn: entropy" in found.text


def test_older_records_are_in_the_index_alone_and_the_page_says_so(
    put: Put, page: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aletheia.report.project.FULL", 2)
    for number in range(1, 5):
        put(
            f"EXP-2026-01-01-00{number}",
            {"results": {"eval_loss": change(2, 1)}},
            {"observations": [f"seen {number}"]},
            log=[{"step": 1, "loss": 1.0}],
        )
    found = page()
    assert len([row for row in found.having("tr") if "data-id" in row]) == 4
    assert [a["id"] for a in found.having("details") if a.get("class") == "record"] == [
        "EXP-2026-01-01-004",
        "EXP-2026-01-01-003",
    ]
    assert set(found.island("compare-data")) == {"EXP-2026-01-01-004", "EXP-2026-01-01-003"}
    assert len(found.island("trends-data")["trends"]["sft/eval_loss"]["points"]) == 4
    assert "seen 1" in found.text
    assert "The newest 2 of 4 records have a section" in found.text
    assert not any(a.get("href") == "#EXP-2026-01-01-001" for a in found.having("a"))  # it would lead nowhere


def test_no_records_make_a_page_too(page: Callable[[], Page]) -> None:
    found = page()
    assert "No records yet" in found.text and found.island("compare-data") == {}


def test_a_text_too_long_for_a_page_says_how_much_more_there_is(put: Put, page: Callable[[], Page]) -> None:
    put("EXP-2026-01-01-001", {}, {"notes": "long " * 10_000, "observations": ["x"] * 1000})
    text = page().text
    assert "… (30,000 more characters in the record)" in text
    assert "700 more stand in the records." in text


def test_a_file_that_is_no_report_is_not_replaced(put: Put, place: Workspace, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    with pytest.raises(UserError, match="was not written by this command"):
        write_report(place, mine, markdown=False)
    assert mine.read_text() == "mine"
    own = tmp_path / "new" / "own.html"
    for _ in range(2):  # its own it replaces
        assert write_report(place, own, markdown=False) == str(own)


def test_the_command_prints_the_path_alone(aletheia: "Callable[..., Said]", put: Put, place: Workspace) -> None:
    put("EXP-2026-01-01-001")
    said = aletheia(place, "report")
    assert (said.code, said.out) == (0, "experiments/report.html\n")
    assert "reads records  1/1" in said.err


def test_the_pages_script_is_javascript(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    for name in ("page.js", "theme.js"):
        subprocess.run([node, "--check", HERE / name], check=True, capture_output=True)


def test_time_and_cost_are_not_counted_twice(put: Put, project: Callable[[], Project]) -> None:
    def resources(seconds: float, currency: str = "USD") -> dict[str, Any]:
        return {"wall_seconds": seconds, "cost": {"amount": seconds / 10, "currency": currency}}

    put("EXP-2026-01-01-001", {"stage": "pipeline", "resources": resources(30)})
    put("EXP-2026-01-01-002", {"lineage": {"parent": "EXP-2026-01-01-001"}, "resources": resources(20)})
    put("EXP-2026-01-01-003", {"resources": resources(5, "EUR")})
    assert totals(project()) == {"seconds": 35, "cost": {"USD": 3.0, "EUR": 0.5}}


def test_blocks_of_any_shape_are_shown_or_passed_over(put: Put, page: Callable[[], Page]) -> None:
    odd: list[Any] = [
        None,
        "",
        -1,
        1e308,
        float("inf"),
        True,
        [[]],
        {"a": [None]},
        10**400,
        "2026-02-30",
        b"\x00",
        {1: {2: 3}},
    ]
    odd += [{"value": "x"}, {"before": 1, "after": None}, {"value": 1, "ci_low": 2, "ci_high": -2, "n": True}]
    keys = (
        "rows",
        "eval_loss",
        "benchmarks",
        "train",
        "sft",
        "wall_seconds",
        "energy",
        "cost",
        "gpus",
        "commit",
        "sft_config",
    )
    for number, value in enumerate(odd):
        blocks = ("results", "data", "configuration", "resources", "environment", "code", "external", "overrides")
        block = dict.fromkeys(keys, value)
        facts = dict.fromkeys(blocks, block) | {"lineage": {"base": {"name": value, "sha256": value}}}
        file = put(f"EXP-2026-01-01-{number:03d}", {}, {"variables": value, "hypothesis": value, "deployment": [value]})
        text = file.path.read_text()
        lower = yamlio.dump({"status": "complete", "stage": "data", "profile": "small", **facts})
        file.path.write_text(text.partition(LINE)[0] + LINE + "\n" + lower)
        shutil.rmtree(file.folder)  # as in another checkout: nothing tells that it was edited
    rows = [row for row in page().having("tr") if "data-id" in row]
    assert [row["data-status"] for row in rows] == ["complete"] * len(odd)
