"""One record as a page: everything that is there, with its certainty, nothing that is not, and never a traceback."""

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.records.file import LINE, RecordFile
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

Run = Callable[..., "Said"]
Write = Callable[..., RecordFile]
EXP = "EXP-2026-01-01-001"
CHANGE = {
    "before": {"value": 5.98, "ci_low": 5.9, "ci_high": 6.06, "n": 25},
    "after": {"value": 5.43, "ci_low": 5.34, "ci_high": 5.52, "n": 25},
    "delta": {"value": -0.55, "ci_low": -0.58, "ci_high": -0.51, "n": 25},
    "unit": "nats a token",
}
WITHIN_NOISE = {
    "before": {"value": 0.2, "n": 30},
    "after": {"value": 0.23, "n": 30},
    "delta": {"value": 0.03, "ci_low": -0.03, "ci_high": 0.1, "n": 30},
}


def page(said: "Said") -> dict[str, list[str]]:
    """The lines of each label."""
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    edge = next(len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines if line.startswith("status"))
    found: dict[str, list[str]] = {}
    label = ""
    for line in filter(None, lines):
        label = line[:edge].strip() or label
        found.setdefault(label, []).append(line[edge:].strip())
    return found


def test_the_page_has_what_was_asked_found_and_noted(aletheia: Run, place: Workspace, write_record: Write) -> None:
    facts = {
        "history": [
            {"status": "running", "at": "2026-01-01T10:00:00Z"},
            {"status": "complete", "at": "2026-01-01T10:05:00Z", "note": "resumed"},
        ],
        "lineage": {
            "parent": "EXP-2026-01-01-009",
            "base": {"name": "tiny", "sha256": "d" * 64},
            "inputs": [{"id": "EXP-2026-01-01-008", "stage": "sft", "path": "x", "sha256": "e" * 64}],
            "children": ["EXP-2026-01-01-010"],
        },
        "overrides": {"sft_config.lora_rank": 32, "sft_config.shuffle_answers": True},
        "data": {"train": {"rows": 35, "sha256": "a" * 64, "domains": {"x": 30, "y": 5}}, "rejected": 0},
        "results": {"eval_loss": CHANGE, "benchmarks": {"choices": WITHIN_NOISE}, "judge": "words"},
        "visualizations": [{"path": "EXP/loss.png", "purpose": "whether it still falls"}],
        "artifacts": [{"path": "a", "sha256": "x", "bytes": 1_500_000}, {"path": "b", "sha256": "x", "bytes": 500_000}],
        "code": {"commit": "c" * 40, "dirty": True, "patch": {"path": f"{EXP}/code.patch"}, "command": "aletheia sft"},
        "resources": {
            "wall_seconds": 300.0, "peak_memory_gb": 1.9, "gpu_hours": 0.5,
            "energy": {"kwh": 0.001, "co2_kg": 0.0004, "how": "estimated: 10 W a busy core"},
            "cost": {"amount": 0.3, "currency": "USD"},
        },
    }  # fmt: skip
    person = (
        "description: More rows\nhypothesis: Loss falls.\nobservations: [It fell.]\nconclusion: Keep it.\nnext_steps:\n"
        '  - longer\n  - "[x] shorter"\n  - {step: wider, done: true, promoted_to: EXP-2026-01-02-001}\n'
        "journal: [{learned: a lot}]\n"
    )
    write_record(place, EXP, facts, person)
    found = page(aletheia(place, "exp", "show", EXP))
    assert found[EXP] == ["sft, profile small"]
    assert found["status"] == ["complete"]
    assert found["description"] == ["More rows"]
    assert found["hypothesis"] == ["Loss falls."]
    assert found["history"] == ["running 2026-01-01 10:00:00Z → complete 2026-01-01 10:05:00Z (resumed)"]
    header, loss, choices = found["figures"]
    assert header.split("  ")[0] == "value"
    assert " ".join(loss.split()) == "eval_loss 5.98 → 5.43 -0.55 [-0.58, -0.51] 25 nats a token"
    assert " ".join(choices.split()) == "benchmarks.choices 0.2 → 0.23 +0.03 [-0.03, +0.1] 30 no difference shown"
    assert found["and"][0].split() == ["judge", "words"]
    assert found["overrides"] == ["sft_config.lora_rank = 32", "sft_config.shuffle_answers = true"]
    assert found["data"] == [f"train  35 rows of 2 domains  {'a' * 12}"]
    assert [line.split() for line in found["lineage"]] == [
        ["base", "tiny", "d" * 12],
        ["took", "sft", "EXP-2026-01-01-008", "e" * 12],
        ["parent", "EXP-2026-01-01-009"],
        ["children", "EXP-2026-01-01-010"],
    ]
    assert found["artifacts"] == ["2 files, 2 MB"]
    assert found["pictures"] == ["EXP/loss.png  whether it still falls"]
    assert found["resources"] == [
        "5 min 00 s wall clock, 0.5 GPU hours",
        "1.9 GB memory at most",
        "0.001 kWh, 0.0004 kg CO2, 0.3 USD  (estimated: 10 W a busy core)",
    ]
    assert found["code"] == [f"{'c' * 12} with changes, kept in experiments/{EXP}/code.patch", "aletheia sft"]
    assert found["observations"] == ["It fell."]
    assert found["conclusion"] == ["Keep it."]
    assert found["next steps"] == ["[ ] longer", "[x] shorter", "[x] wider → EXP-2026-01-02-001"]
    assert found["journal"] == ["- learned: a lot"]


def test_what_is_empty_is_not_shown(aletheia: Run, place: Workspace, write_record: Write) -> None:
    person = "description:\nhypothesis:\noverrides: {}\nobservations: []\nconclusion:\nnext_steps: []\ntags: []\n"
    write_record(place, EXP, {}, person)
    said = aletheia(place, "exp", "show", EXP)
    assert said.out.splitlines() == [f"{EXP}  sft, profile small", "status              complete"]


def test_the_verdict_shows_each_criterion_the_n_it_needs_and_what_was_changed_after_the_start(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    judged = [
        {
            "criterion": "eval_loss < 5.5", "finding": "supported",
            "observed": "5.43 [5.34, 5.49] n=25", "why": "the interval is below",
        },
        {
            "criterion": "win_rate > 0.5", "role": "guardrail", "finding": "inconclusive",
            "observed": "0.6 [0.4, 0.8] n=30", "why": "the interval holds 0.5", "n_needed": 120,
        },
    ]  # fmt: skip
    verdict = {
        "frozen_at": "2026-01-01T10:00:00Z", "finding": "inconclusive", "judged": judged,
        "changed_after_start": ["eval_loss < 5.5 was eval_loss < 5.2"],
    }  # fmt: skip
    write_record(place, EXP, {"verdict": verdict}, "success_criteria: [something else]\n")
    found = page(aletheia(place, "exp", "show", EXP))
    finding, _, first, second, changed = found["verdict"]
    assert finding.startswith("inconclusive; criteria frozen 2026-01-01")
    assert first.split("  ")[0] == "eval_loss < 5.5"
    assert "supported" in first
    assert "5.43 [5.34, 5.49] n=25" in first
    assert "guardrail" in second
    assert second.endswith("  120       the interval holds 0.5")
    assert changed == "changed after start: eval_loss < 5.5 was eval_loss < 5.2"
    assert "something else" not in str(found)


def test_a_failure_says_what_at_which_step_on_which_rows_and_where_to_read_on(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    failure = {
        "kind": "StageFailed", "message": "loss is nan", "step": 7, "traceback": f"{EXP}/traceback.txt",
        "rows": [f"row-{i}" for i in range(12)],
    }  # fmt: skip
    write_record(place, EXP, {"status": "failed", "failure": failure})
    found = page(aletheia(place, "exp", "show", EXP))
    message, step, rows, traceback = found["failure"]
    assert (message, step) == ("loss is nan", "at step 7")
    assert rows.endswith("row-9 and 2 more")
    assert traceback == f"traceback in experiments/{EXP}/traceback.txt"


def test_a_run_whose_process_is_gone_is_shown_as_dead(aletheia: Run, place: Workspace, write_record: Write) -> None:
    gone = {"status": "running", "at": "2026-01-01T00:00:00Z", "host": os.uname().nodename, "pid": 1, "started": 1.0}
    write_record(place, EXP, {"status": "running", "history": [gone]})
    assert page(aletheia(place, "exp", "show", EXP))["status"][0] == "dead"
    assert json.loads(aletheia(place, "exp", "show", EXP, "--json").out)["liveness"] == "dead"


def test_a_plan_is_shown_with_its_criteria(aletheia: Run, place: Workspace, write_record: Write) -> None:
    person = (
        "stages: [sft, eval]\nprofile: tiny\nhypothesis: It helps.\noverrides: {sft_config.epochs: 3.0}\n"
        "success_criteria:\n  - eval_loss < 5\n  - {criterion: win_rate > 0.5, role: guardrail}\n"
    )
    write_record(place, EXP, None, person)
    found = page(aletheia(place, "exp", "show", EXP))
    assert found[EXP] == ["sft, eval, profile tiny"]
    assert found["status"] == ["planned"]
    assert found["criteria"] == ["eval_loss < 5", "win_rate > 0.5 (role guardrail)"]
    assert found["overrides"] == ["sft_config.epochs = 3"]
    assert json.loads(aletheia(place, "exp", "show", EXP, "--json").out)["facts"] is None


def test_a_broken_upper_half_is_named_with_its_place_and_the_rest_is_shown(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    file = write_record(place, EXP, {"results": {"eval_loss": CHANGE}})
    file.path.write_bytes(file.path.read_bytes().replace(b"# mine\n", b'# mine\nhypothesis: "unfinished\n', 1))
    found = page(aletheia(place, "exp", "show", EXP))
    assert f"{EXP}.yaml:3:1: " in found["problem"][0]
    assert found["figures"][1].startswith("eval_loss")
    assert "problems" in json.loads(aletheia(place, "exp", "show", EXP, "--json").out)


def test_a_broken_lower_half_is_named_and_the_person_s_half_is_shown(
    aletheia: Run, place: Workspace, write_record: Write
) -> None:
    file = write_record(place, EXP, None, "hypothesis: It helps.\n")
    file.path.write_text(f"hypothesis: It helps.\n{LINE}\nstatus: splendid\n", "utf-8")
    found = page(aletheia(place, "exp", "show", EXP))
    assert found["status"] == ["unreadable"]
    assert EXP in found["problem"][0]
    assert found["hypothesis"] == ["It helps."]


def test_what_cannot_be_read_at_all_is_one_line(aletheia: Run, place: Workspace, write_record: Write) -> None:
    file = write_record(place, EXP, None)
    file.path.write_bytes(bytes(range(256)) * 40)
    said = aletheia(place, "exp", "show", EXP)
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1, said.err
    said = aletheia(place, "exp", "show", "EXP-2026-01-01-002")
    assert said.code == 2
    assert f"there is no record `EXP-2026-01-01-002`; try {EXP}" in said.err


def test_json_is_id_person_facts_and_liveness_alone(aletheia: Run, place: Workspace, write_record: Write) -> None:
    results = {"eval_loss": CHANGE, "odd": float("nan")}
    write_record(
        place, EXP, {"results": results}, "date: 2026-01-01\nexperimenter: me\nrate: .nan\n2026-01-01: odd key\n"
    )
    said = aletheia(place, "exp", "show", EXP, "--json")
    assert (said.code, said.err) == (0, ""), said.err
    data = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(data) == {"id", "person", "facts", "liveness"}
    assert data["person"] == {"date": "2026-01-01", "experimenter": "me", "rate": None, "2026-01-01": "odd key"}
    assert data["facts"]["results"]["eval_loss"] == CHANGE


HOSTILE: dict[str, dict[str, Any]] = {
    "figures of text": {"results": {"eval_loss": {"before": {"value": "x"}, "after": 3, "delta": []}, "win_rate": None}},
    "results of lists": {"results": {"a": [1, [2]], "b": {"c": [{"d": 1}]}, "unit": {"unit": 3}}},
    "numbers without end": {"results": {"a": 10**400, "b": float("inf"), "c": {"value": 1e308, "n": True}}},
    "terminal codes": {"profile": "\x1b[2Jx", "results": {"a": "\x1b[31mred\r\nnew"}, "code": {"reason": "\x07"}},
    "resources of text": {"resources": {"wall_seconds": "long", "energy": 3, "cost": {"amount": [], "currency": {}}}},
    "times of NaN": {"resources": {"wall_seconds": float("nan"), "cpu_seconds": -1.0, "gpu_hours": float("inf")}},
    "data of another shape": {"data": {"train": 5, "held_out": {"rows": {}, "sha256": 3, "domains": []}, "x": [1] * 9}},
    "a base without a name": {"lineage": {"base": {"name": [], "sha256": 5}}},
    "code of another shape": {"code": {"commit": 5, "dirty": "yes", "patch": "x", "command": ["a"]}},
    "external, deep": {"external": {"a": {"b": {"c": {}}}, "d": [{}]}},
    "failure of many lines": {"status": "failed", "failure": {"kind": "x", "message": "one\ntwo\x1b[2J"}},
}  # fmt: skip
ODD_PERSONS = {
    "all of another shape": "description: [1, {a: 2}]\nhypothesis: 3\nsuccess_criteria: {a: }\noverrides: [1, 2]\n"
    "observations: {a: 1}\nconclusion: false\nnext_steps: 7\ntags: {x}\n",
    "lists of odd things": "success_criteria: [null, {}, [], 3, {role: null}]\nnext_steps: [null, {}, {step: [1]}, 2026-01-01]\n"
    "observations: [null, {}, 2026-01-01, !!binary aGk=]\n",
    "odd keys": "? 2026-01-01\n: 1\n1: 2\ntrue: 3\n? !!binary aGk=\n: 4\nnull: 5\n",
}


@pytest.mark.parametrize("name", [*HOSTILE, *ODD_PERSONS])
def test_odd_contents_are_shown_without_a_traceback_or_a_control_character(
    aletheia: Run, place: Workspace, write_record: Write, name: str
) -> None:
    write_record(place, EXP, HOSTILE.get(name, {}), ODD_PERSONS.get(name, "# mine\n"))
    said = aletheia(place, "exp", "show", EXP)
    assert said.code == 0, said.err
    assert said.out.startswith(EXP)
    assert not any(ord(letter) < 32 and letter != "\n" for letter in said.out)
    said = aletheia(place, "exp", "show", EXP, "--json")
    assert said.code == 0, said.err
    json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
