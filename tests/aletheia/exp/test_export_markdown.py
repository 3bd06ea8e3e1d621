"""A record as a page for a wiki, read back with a CommonMark parser."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from aletheia.exp.export import export
from aletheia.exp.exporters.page import outline, plain, quoted
from aletheia.exp.exporters.record import besides
from pipeline.records.file import LINE, RecordFile
from pipeline.workspace import Workspace

EXP = "EXP-2026-01-01-001"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
PARSER = MarkdownIt("commonmark").enable("table")
LOSS = {
    "before": {"value": 6.0, "ci_low": 5.9, "ci_high": 6.1, "n": 25},
    "after": {"value": 5.4, "ci_low": 5.3, "ci_high": 5.5, "n": 25},
    "delta": {"value": -0.6, "ci_low": -0.7, "ci_high": -0.5, "n": 25},
    "unit": "nats a token",
}
NOISE = {
    "before": {"value": 0.2, "ci_low": 0.1, "ci_high": 0.4, "n": 30},
    "after": {"value": 0.23, "ci_low": 0.12, "ci_high": 0.41, "n": 30},
    "delta": {"value": 0.03, "ci_low": -0.03, "ci_high": 0.1, "n": 30},
}
FACTS: dict[str, Any] = {
    "history": [
        {"status": "running", "at": "2026-01-01T10:00:00Z", "host": "here"},
        {"status": "complete", "at": "2026-01-01T11:00:00Z"},
    ],
    "configuration": {"name": "small", "seed": 42, "sft_config": {"learning_rate": 2e-4}, "dpo_config": {"beta": 0.1}},
    "data": {"train": {"rows": 35, "sha256": "ab" * 32, "domains": {"devops": 20, "databases": 15}}},
    "results": {"eval_loss": LOSS, "benchmarks": {"choices": NOISE | {"metric": "acc"}}, "training": {"steps": 54}},
    "resources": {"wall_seconds": 3600.0},
    "code": {"commit": "c" * 40, "dirty": True, "patch": {"path": f"{EXP}/code.patch", "sha256": "0" * 64}},
}
PERSON = """\
experiment_id: EXP-2026-01-01-001
date: 2026-01-01
profile: small
stages: [sft]
description: SFT on all rows
hypothesis: |
  More rows lower the held-out loss.
  The second line stays.
overrides: {}
observations: [the loss fell at once, "`a < b` held"]
conclusion: It works.
next_steps: ["[x] read the rows", more epochs]
journal:
  - {date: 2026-01-02, learned: a fence survives, difficult: the night}
  - {date: 2026-01-03, learned: rest}
analysis:
  worked: [more rows]
  did_not_work: []
  unexpected: {what: speed, why: {deep: "no idea"}}
my_own_key: 17
"""


def page_of(place: Workspace, **options: Any) -> str:
    path = place.root / export(place, EXP, "markdown", None, options.get("output"), options.get("force", False))
    return path.read_text("utf-8")


def shown(text: str) -> str:
    """All text of the page as a reader sees it."""

    def inline(tokens: list[Any]) -> str:
        return "".join(inline(t.children) if t.children else "\n" if "break" in t.type else t.content for t in tokens)

    return "\n".join(inline(t.children) if t.type == "inline" else t.content for t in PARSER.parse(text) if t.content)


def sections(text: str) -> dict[str, str]:
    """The text as it is written below each heading of level 2."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    found: list[list[str]] = []
    tokens = PARSER.parse(text)
    for token, following in pairwise(tokens):
        if token.type == "tr_open":
            found.append([])
        if token.type in ("td_open", "th_open"):
            found[-1].append("".join(c.content for c in following.children or []))
    return found


def test_the_verdict_comes_first_with_what_each_criterion_rests_on(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    verdict = {
        "frozen_at": "2026-01-01T10:00:00Z",
        "finding": "inconclusive",
        "judged": [
            {"criterion": "eval_loss < 5.5", "finding": "supported", "observed": "5.4 [5.3, 5.5]", "why": "all below"},
            {
                "criterion": "choices.delta > 0 | x",
                "role": "guardrail",
                "finding": "inconclusive",
                "observed": "0.03 [-0.03, 0.1]",
                "why": "crosses 0",
                "n_needed": 400,
            },
        ],
        "changed_after_start": ["eval_loss < 5.6 was eval_loss < 5.5"],
    }
    write_record(place, EXP, FACTS | {"verdict": verdict}, person=PERSON)
    text = page_of(place)
    assert list(sections(text))[:2] == ["Verdict", "Hypothesis"]
    part = sections(text)["Verdict"]
    assert "Inconclusive, by criteria frozen at 2026-01-01T10:00:00Z." in part
    assert rows(part)[1:] == [
        ["eval_loss < 5.5", "primary", "supported", "5.4 [5.3, 5.5]", "all below"],
        ["choices.delta > 0 | x", "guardrail", "inconclusive", "0.03 [-0.03, 0.1]", "crosses 0; n needed: 400"],
    ]
    assert "changed after the start, and not used: eval_loss &lt; 5.6 was" in part


def test_figures_carry_intervals_and_no_difference_is_claimed_inside_the_noise(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    write_record(place, EXP, FACTS, person=PERSON)
    part = sections(page_of(place))["Results"]
    table = rows(part)
    assert ["eval_loss", "6", "5.4", "-0.6", "[-0.7, -0.5]", "25", "fell"] in table
    assert ["benchmarks.choices", "0.2", "0.23", "+0.03", "[-0.03, +0.1]", "30", "no difference shown"] in table
    assert ["eval_loss.before", "6", "[5.9, 6.1]", "25"] in table
    assert ["training.steps", "54", "", ""] in table
    assert "Before: the base; after: this record." in part
    assert "**eval_loss.unit:** nats a token" in part
    assert "better" not in part


def test_all_that_its_person_wrote_is_there_known_keys_or_not(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    write_record(place, EXP, FACTS, person=PERSON)
    text = page_of(place)
    assert text.startswith(f"# {EXP}: SFT on all rows\n")
    parts = sections(text)
    order = ["Observations", "Conclusion", "Analysis", "Next steps", "Journal", "My own key"]
    assert [name for name in parts if name in order] == order
    assert parts["Hypothesis"].strip() == "> More rows lower the held-out loss.\n> The second line stays."
    assert "- [x] read the rows\n- more epochs" in parts["Next steps"]
    assert rows(parts["Journal"]) == [
        ["Date", "Learned", "Difficult"],
        ["2026-01-02", "a fence survives", "the night"],
        ["2026-01-03", "rest", ""],
    ]
    assert "- **Did not work:** none" in parts["Analysis"]
    assert "    - **Deep:** no idea" in parts["Analysis"]
    assert parts["My own key"].strip().startswith("17")


def test_nothing_in_a_record_becomes_html_or_breaks_a_table(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    evil = "<script>alert(1)</script> | <!-- never closed <img src=x onerror=y> &amp; *a* [b](javascript:c) `d`"
    block = '"<div>\\n\\n```\\n# Verdict\\n<!--\\n| a |\\n"'
    person = "".join(f"{key}: '{evil}'\n" for key in ("description", "hypothesis", "conclusion", "'<b>'", "tags"))
    person += f"observations: [{block}, '{evil}', {{'k|<i>': '{evil}'}}]\njournal: {block}\n"
    person += f"metrics: [{{'a|b': '{evil[:60]}', b: 1}}, {{'a|b': '|', b: \"x\\ny\"}}]\n"
    facts = FACTS | {
        "results": {evil: 1.0, "noted": evil, "eval_loss": LOSS | {"unit": evil}, "lines": "a\n<script>\n```\n"},
        "overrides": {evil: evil},
        "configuration": {"sft_config": {evil: f"{evil}\n{evil}"}},
        "failure": {"kind": evil, "message": f"{evil}\n{evil}", "rows": [evil]},
        "artifacts": [{"path": evil, "sha256": evil, "bytes": 1}],
        "code": {"commit": f"{evil}\n```\n<b>", "command": f"{evil}\n```\n<b>", "dirty": True},
        "environment": {evil: [evil]},
        "lineage": {
            "parent": evil,
            "children": [evil],
            "base": {"name": evil, "sha256": evil},
            "inputs": [{"id": evil, "stage": evil, "path": evil, "sha256": evil}],
        },
        "verdict": {
            "frozen_at": evil,
            "finding": "supported",
            "judged": [{"criterion": evil, "finding": "supported", "observed": evil, "why": f"{evil}\n{evil}"}],
            "changed_after_start": [evil],
        },
        "external": {evil: {evil: evil}},
        "visualizations": [{"path": evil, "purpose": evil}],
        "profile": evil,
    }
    write_record(place, EXP, facts, person=person)
    text = page_of(place)
    tokens = PARSER.parse(text)
    html = [t.content for t in tokens if t.type == "html_block"]
    html += [c.content for t in tokens for c in t.children or [] if c.type == "html_inline"]
    assert html == []
    widths: list[set[int]] = []
    for token in tokens:
        if token.type == "table_open":
            widths.append(set())
            count = 0
        elif token.type in ("td_open", "th_open"):
            count += 1
        elif token.type == "tr_close":
            widths[-1].add(count)
            count = 0
    assert all(len(width) == 1 for width in widths)
    lines = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-")]
    assert sum(1 for t in tokens if t.type == "tr_open") == len(lines)  # no row fell out of its table
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open" and t.level == 0]
    assert headings.count("Verdict") == 1
    assert "<script>alert(1)</script> | <!-- never closed" in shown(text)  # still there to be read


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("eval_loss", "eval_loss"),
        ("_x_", "\\_x\\_"),
        ("a|b", "a\\|b"),
        ("< 1e-5", "&lt; 1e-5"),
        ("~3e-8", "\\~3e-8"),
        ("AT&T &lt;", "AT&T &amp;lt;"),
        ("a\r\n\n  b", "a b"),
        (None, ""),
        (0, "0"),
    ],
)
def test_a_value_reads_as_it_was_written(text: Any, written: str) -> None:
    assert plain(text) == written
    tokens = MarkdownIt("commonmark").parse(f"x {written}")
    seen = "".join(c.content for c in tokens[1].children or [])
    assert seen == f"x {' '.join(str(text).split()) if text is not None else ''}".rstrip()


def test_a_persons_code_stays_code() -> None:
    kept = "Use `Vec<T>`:\n\n```rust\nlet a: Vec<T> = b;\n```"
    assert quoted(kept) == "\n".join(f"> {line}".rstrip() for line in kept.splitlines())
    assert "&lt;b>" in quoted("a <b> tag and `code`")


def test_what_someone_opens_in_a_list_ends_with_its_entry() -> None:
    text = outline(["```\nnever closed", "after", {"a": ["# not a heading", {"b": "x\n<!-- y"}]}])
    tokens = PARSER.parse(f"{text}\n\n## Next\n")
    assert not [t for t in tokens if t.type == "html_block"]
    assert [t.tag for t in tokens if t.type == "heading_open" and t.level == 0] == ["h2"]
    assert "after" in [t.content for t in tokens if t.type == "inline"]


def test_set_up_data_and_how_to_reproduce_are_told(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    write_record(place, EXP, FACTS | {"overrides": {"seed": 42}}, person=PERSON)
    parts = sections(page_of(place))
    table = rows(parts["Set-up"])
    assert ["learning_rate", "0.0002"] in table
    assert ["data: train.domains", "devops 20, databases 15"] in table
    assert ["set by hand: seed", "42"] in table
    assert not [row for row in table if row[0] == "beta"]  # another stage's
    assert (
        f"git checkout {'c' * 40}\ngit apply experiments/{EXP}/code.patch\naletheia exp reproduce {EXP}"
        in parts["How to reproduce"]
    )
    assert ["wall_seconds", "3600.0"] in rows(parts["How to reproduce"])


def test_links_and_pictures_are_relative_to_where_the_page_lies(
    place: Workspace,
    write_record: Callable[..., RecordFile],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = "EXP-2026-01-01-009"
    write_record(place, source)
    facts = FACTS | {
        "visualizations": [
            {"path": f"experiments/{EXP}/loss curve.png", "purpose": "whether it learns"},
            {"path": f"{EXP}/gone.png", "purpose": "gone"},
        ],
        "lineage": {"inputs": [{"id": source, "stage": "sft", "path": "x", "sha256": "0" * 64}]},
    }
    file = write_record(place, EXP, facts)
    (file.folder / "loss curve.png").write_bytes(PNG)
    for output in (None, tmp_path / "a wiki"):
        name = export(place, EXP, "markdown", None, output, False)
        page = place.root / name
        text = page.read_text("utf-8")
        targets = re.findall(r"\]\(([^)]*)\)", text)
        assert len(targets) == 4  # the record twice, its source, the picture
        assert all((page.parent / unquote(target)).is_file() for target in targets)
        assert "![whether it learns](" in text
    assert "names the picture EXP-2026-01-01-001/gone.png, which is not there" in capsys.readouterr().err


def test_a_pipelines_page_has_a_line_a_stage(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    child, gone = "EXP-2026-01-01-002", "EXP-2026-01-01-003"
    write_record(place, child, FACTS | {"lineage": {"parent": EXP}})
    write_record(place, EXP, {"stage": "pipeline", "lineage": {"children": [child, gone]}})
    table = rows(sections(page_of(place))["Stages"])
    assert table[1][:3] == [child, "sft", "complete"]
    assert "held-out loss 6.00 → 5.40, change -0.60 [-0.70, -0.50] n=25" in table[1][3]
    assert table[2] == [gone, "?", "not there", ""]


def test_a_failure_is_told_with_its_step_and_rows(place: Workspace, write_record: Callable[..., RecordFile]) -> None:
    failure = {"kind": "StageFailed", "message": "loss is nan", "step": 3, "rows": ["a-1", "b-2"]}
    write_record(place, EXP, FACTS | {"status": "failed", "failure": failure})
    part = sections(page_of(place))["Failure"]
    assert " ".join(part.split()) == "StageFailed at step 3: loss is nan Rows: a-1, b-2"


def test_what_is_not_finite_or_of_another_shape_is_shown_as_it_is(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    assert besides({"a": {"value": math.nan, "n": 3}}) == {"a.value": pytest.approx(math.nan, nan_ok=True), "a.n": 3}
    results = {"a": {"value": "nan", "n": 3}, "b": [1, {"c": None}], "eval_loss": "oops", "benchmarks": 7}
    facts = {
        "results": results,
        "resources": {"wall_seconds": "long"},
        "data": {"train": [1]},
        "configuration": {"sft_config": 3},
    }
    write_record(place, EXP, facts)
    text = page_of(place)
    assert "**a.value:** nan" in text
    assert "**Eval loss:** oops" in text
    assert "| benchmarks | 7 |" in text


def test_a_record_that_cannot_be_read_whole_is_written_as_far_as_it_goes(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    file = write_record(place, EXP, FACTS, person=PERSON)
    whole = file.path.read_text("utf-8")
    file.path.write_text(whole.replace("conclusion: It works.", "conclusion: [It works."), "utf-8")
    text = page_of(place)
    assert f"{EXP}.yaml:" in shown(text).split("Verdict")[0]
    assert ["eval_loss", "6", "5.4", "-0.6", "[-0.7, -0.5]", "25", "fell"] in rows(text)

    (file.folder / "below.yaml").unlink()
    file.path.write_text(f"{PERSON}\n{LINE}\nstatus: [", "utf-8")
    text = page_of(place, force=True)
    assert "Not whole: " in text
    assert "unreadable" in text
    assert "It works." in text


def test_a_plan_shows_what_is_to_run_and_by_what_it_will_be_judged(
    place: Workspace, write_record: Callable[..., RecordFile]
) -> None:
    person = PERSON.replace("stages: [sft]", "stages: [sft, dpo]").replace("overrides: {}", "overrides: {seed: 7}")
    write_record(place, EXP, None, person=f"{person}success_criteria: [eval_loss < 5.5]\nvariables: [{{name: seed}}]\n")
    text = page_of(place)
    parts = sections(text)
    assert "None: criteria were set, and nothing has run." in parts["Verdict"]
    assert rows(parts["Set-up"]) == [["", ""], ["stages", "sft, dpo"], ["profile", "small"], ["overrides.seed", "7"]]
    assert "eval_loss < 5.5" in parts["Success criteria"]
    assert "seed" in parts["Variables"]
    assert "Results" not in parts
    assert text.rstrip().endswith("Nothing has run yet: it is a plan.")
