"""The page and the terminal: the same result, safe to open, and honest about what it cost."""

import html
import io
import re
from pathlib import Path
from typing import Any

import pytest

from eval.page.page import page, write_page
from eval.page.result import cost_lines, read
from eval.page.spent import spent
from eval.page.told import print_result, told
from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from tests.eval.page.facts import EVAL, SFT, change, figure, lineage, resources, results, win_rate, write

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\"'&\x1b[31m"


def shown(root: Path, found: dict[str, Any] | None = None, **more: Any) -> tuple[str, str]:
    """The page's source, and what the terminal shows."""
    file = lineage(root, found, **more)
    path = write_page(file)
    assert path == root / "experiments" / EVAL / "result.html"
    facts, out = file.facts(), io.StringIO()
    assert facts
    print_result(facts, spent(file, facts), out)
    return path.read_text("utf-8"), out.getvalue()


def card(source: str, kind: str) -> str:
    return source.partition(f'<section class="card {kind}"')[2].partition("</section>")[0]


def test_page_and_terminal_sort_the_same_claims(tmp_path: Path) -> None:
    source, terminal = shown(tmp_path)
    assert (
        "Better in 3, worse in 1, not known of 6." in source and "Better in 3, worse in 1, not known of 6." in terminal
    )
    for kind, names in (
        ("better", ["held-out loss", "win-rate, judged by key-point words", "aletheia_choices acc"]),
        ("worse", ["answers that end by themselves"]),
    ):
        assert sorted(re.findall("<b>(.*?)</b>", card(source, kind))) == sorted(names)
        lines = terminal.partition(f"\n{kind.capitalize()}\n")[2].partition("\n\n")[0]
        assert all(name in lines for name in names) and len(lines.splitlines()) == len(names)
    assert "−0.200 [−0.220, −0.180] nats a token" in source and "−0.200 [−0.220, −0.180] nats a token" in terminal
    assert card(source, "open").count("rows would decide it") == 6
    assert "Of 10 figures, chance alone would put about 0.5 outside its noise." in source


def test_what_stands_behind_the_claims_is_on_both(tmp_path: Path) -> None:
    judges = {"weighty": win_rate(0.7) | {"judge": "a large model"}, "agreement": {"alpha": figure(0.4, 0.1)}}
    found = results() | {
        "judges": judges,
        "others": {"sft": {"eval_loss": change(1.8, 1.79)}},
        "human_review": {"share_of_wins": figure(0.7, 0.1, 80), "wins": 56, "losses": 24, "opened": "at the planned n"},
        "judging": {"a-large-model": {"calls": 480, "tokens_in": 90000, "tokens_out": 4000, "cost": 1.5}},
        "ranking": {"strengths": {"model": figure(0.4, 0.2), "base": figure(-0.4, 0.2)}},
    }
    found["win_rate"] = win_rate(
        unscored=4, positions={"consistent": figure(0.81, 0.07)}, if_unscored_lost=figure(0.6, 0.08),
        if_unscored_won=figure(0.64, 0.08), by_domain={"databases": figure(0.8, 0.1, 30) | {"holm_p": 0.01}},
    )  # fmt: skip
    for text in shown(tmp_path, found):
        for part in (
            "if the longer answer simply won", "same verdict with sides swapped", "were all without a verdict lost",
            "the base against itself", "a large model", "Krippendorff", "Against sft", "All contestants in order",
            "Held-out pairs by fault", "inaccurate", "p(end-of-turn)", "equal where compared", "480 items would show",
            "Opened at the planned n", "480 calls", "p = 0.07 (Holm", "nine tenths are",
        ):  # fmt: skip
            assert part in text, part


def test_a_guard_that_was_lost_is_in_the_headline(tmp_path: Path) -> None:
    guards = {"tasks": {"hellaswag": {"finding": "regressed", "why": "−0.1, p 0.001 among the guards"}}, "margin": 0.03}
    for text in shown(tmp_path, results() | {"guards": guards}):
        assert "A guard was lost: hellaswag." in text


def test_what_was_asked_of_the_record_is_answered(tmp_path: Path) -> None:
    judged = {
        "criterion": "eval_loss < 1.2", "finding": "inconclusive", "observed": "1.16 [1.13, 1.23]",
        "why": "the interval holds 1.2", "n_needed": 640,
    }  # fmt: skip
    verdict = {"frozen_at": "2026-01-01T10:00:00Z", "finding": "inconclusive", "judged": [judged]}
    for text in shown(tmp_path, verdict=verdict):
        assert "about 640 rows would decide it" in text and "Together: inconclusive." in text


def test_cost_is_divided_by_gains_outside_their_noise_alone(tmp_path: Path) -> None:
    file = lineage(tmp_path)
    facts = file.facts()
    assert facts
    lines = cost_lines(read(facts, spent(file, facts)))
    assert lines[1].startswith("Together: 3 USD; 0.8 kWh")
    assert any(line.startswith("1 percentage point of win-rate") and "0.25 [0.15, 0.75] USD" in line for line in lines)
    assert any(line.startswith("1 % of held-out perplexity lost: 0.17 [0.15, 0.18] USD") for line in lines)
    assert not any("hellaswag" in line or "end by themselves" in line for line in lines)


def test_without_a_gain_nothing_is_divided(tmp_path: Path) -> None:
    for text in shown(tmp_path, {"model": "m", "against": "b", "eval_loss": change(2.0, 1.99, 0.02)}):
        assert "No gain is shown, so the cost is not divided by one." in text
        assert "percentage point of" not in text and "perplexity lost:" not in text


def test_costs_that_do_not_add_up_are_not_added(tmp_path: Path) -> None:
    file = lineage(tmp_path, resources=resources(1.0, 0.1) | {"cost": {"amount": 1.0, "currency": "EUR"}})
    facts = file.facts()
    assert facts and spent(file, facts).cost is None
    file.path.with_stem(SFT).unlink()
    found = spent(file, facts)
    assert found.gone and any("breaks off" in line for line in cost_lines(read(facts, found)))


def test_nothing_that_a_record_says_can_do_anything(tmp_path: Path) -> None:
    found = results() | {"model": HOSTILE, "against": HOSTILE, HOSTILE: change(1.0, 2.0, unit=HOSTILE)}
    found["benchmarks"] = {HOSTILE: change(0.4, 0.6, 0.1, metric=HOSTILE)}
    found["by_domain"] = {"eval_loss": {HOSTILE: change(2.0, 1.0)}, "preference_accuracy": {HOSTILE: figure(0.5)}}
    found["by_fault"] = {HOSTILE: figure(0.5)}
    found["win_rate"] = win_rate(judge=HOSTILE, weakness=HOSTILE, verdict=HOSTILE)
    found["guards"] = {"tasks": {HOSTILE: {"finding": HOSTILE, "why": HOSTILE}}}
    found["others"] = {HOSTILE: {"eval_loss": change(2.0, 1.0)}}
    source, terminal = shown(tmp_path, found, code={"command": HOSTILE, "commit": HOSTILE}, profile_used=HOSTILE)
    assert "<script" not in source and "<img" not in source and "onerror=alert(2)&gt;" in source
    assert source.count("</style>") == 1
    assert "\u202e" not in source + terminal and "\x1b" not in source + terminal


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    source = html.unescape(shown(tmp_path)[0])
    assert "default-src 'none'; style-src 'unsafe-inline'" in source and "script-src" not in source
    assert re.findall(r"(?:href|src)=\"(.*?)\"", source) == ["data:,"]
    assert not re.search(r"url\(|@import|<script|\son\w+=|http://|https://", source)


ODD = [None, 3, "text", [1], {"a": {"b": [None]}}, {"tasks": [1]}, {"value": float("nan"), "n": 2}, {"eval_loss": [3]}]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_record_of_another_shape_still_has_a_page(tmp_path: Path, odd: Any) -> None:
    file = RecordFile(tmp_path / f"{EVAL}.yaml")
    further = ("others", "judges", "judging", "ranking", "human_review", "win_rate_unknown")
    for key in (*results(), *further):
        facts = Facts(status="complete", stage="eval", profile="p", results=results() | {key: odd})
        assert page(file, facts).endswith("</html>")
        assert [*told(read(facts))]
    facts = Facts(
        status="complete", stage="eval", profile="p", results=dict.fromkeys([*results(), *further], odd),
        resources={"cost": odd, "energy": odd, "wall_seconds": odd},
    )  # fmt: skip
    assert "Nothing was compared." in page(file, facts)


def test_results_without_anything_are_said_to_be_none(tmp_path: Path) -> None:
    for text in shown(tmp_path, {}, status="failed"):
        assert "Nothing was compared." in text and "is failed" in text


def test_a_record_that_is_no_evaluation_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a record of sft"):
        write_page(write(tmp_path, SFT, {"stage": "sft"}))


def test_a_result_can_be_told_without_its_lineage() -> None:
    out = io.StringIO()
    print_result(Facts(status="complete", stage="eval", profile="p", results=results()), out=out, whole=False)
    assert "Better" in out.getvalue() and "Cost" not in out.getvalue() and "Guards" not in out.getvalue()
