"""The gate: each rule fires on a planted fault, with file and line, and clean data gives nothing."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Check
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.gate.admit import forbid
from pipeline.gate.finding import Finding
from pipeline.gate.gate import Gate, Tokenized, run
from pipeline.gate.leaks import Leaks
from pipeline.gate.rules import BY_NAME, RULES, selected
from pipeline.gate.tokens import Totals
from pipeline.model import Base
from pipeline.workspace import CHECKOUT, Workspace

TOPICS = (
    "partial indexes in PostgreSQL", "leader election with fencing tokens", "CPU cache lines and false sharing",
    "blue-green deployments behind a proxy", "cursor pagination of a list endpoint", "write skew under snapshot isolation",
    "consistent hashing with virtual nodes", "allocation profiles of a Go service", "systemd timers instead of cron",
    "idempotency keys for payments", "vacuum and transaction wraparound", "hedged requests and tail latency",
)  # fmt: skip
ENDINGS = (
    "Measure first, then change one thing at a time.", "The plan shows which of the two it is.",
    "Roll it out behind a flag, and watch the error rate.", "Keep the old path until the new one has run for a week.",
)  # fmt: skip
AWS_KEY = "AKIA" + "Q7RZ4M2KJXV5TB3N"  # in two parts, so that no scanner takes it for one


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(n: int, answer: str | None = None, question: str | None = None, **more: Any) -> dict[str, Any]:
    """A clean conversation, the n-th of a dozen."""
    topic, ending = TOPICS[n % len(TOPICS)], ENDINGS[n % len(ENDINGS)]
    asked = question or f"What should I know about {topic} before I rely on it in production, case {n}?"
    said = (
        answer or f"With {topic}, the usual surprise is number {n}: it holds only while nothing else writes. {ending}"
    )
    return {"messages": [turn("user", asked), turn("assistant", said)]} | more


def pair(n: int, chosen: str | None = None, rejected: str | None = None, **more: Any) -> dict[str, Any]:
    draw = random.Random(n)
    topic, words = TOPICS[n % len(TOPICS)], ["".join(draw.choices("abcdefgh", k=5)) for _ in range(24)]
    return {
        "prompt": [turn("user", f"Is it safe to rely on {topic} with {words[0]} and {words[1]}, in case {n}?")],
        "chosen": [turn("assistant", chosen or f"Yes: {' '.join(words[2 : 12 + n % 2])}.")],
        "rejected": [turn("assistant", rejected or f"Not: {' '.join(words[13 : 23 + (n + 1) % 2])}.")],
    } | more


def question(prompt: str, reference: str) -> dict[str, Any]:
    return {"prompt": prompt, "key_points": ["k"], "reference": reference}


CLEAN = [talk(n) for n in range(12)]


@pytest.fixture
def home(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


Judge = Callable[..., list[Finding]]


@pytest.fixture
def judge(home: Workspace, base: Base) -> Judge:
    """`judge(rows)`: what the gate finds in rows.jsonl. A row may be given as bytes, to plant what JSON cannot say."""

    def found(
        rows: Iterable[Any],
        check: Check | None = None,
        max_length: int | None = None,
        forbidden: Iterable[dict[str, Any]] = (),
        run_code: bool = False,
    ) -> list[Finding]:
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        home.path("rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        check = check or Check()
        leaks = Leaks(check.leak_words, check.near_duplicate)
        for number, row in enumerate(forbidden, 1):
            for text in (row["prompt"], row["reference"]):
                leaks.forbid(text, f"eval.jsonl:{number}")
        totals = {kind: Totals(max_length or 2048) for kind in (Conversation, PreferencePair)}
        gate = Gate(check, Tokenized(base.chat(), totals) if max_length else None, leaks, run_code)
        findings: list[Finding] = []
        run(gate, [(s, None) for s in sources(home, "rows.jsonl")], findings.append, quiet=True)
        return findings

    return found


LONG = " ".join(f"word{n}" for n in range(400))
LEAKED = (
    "The replica applied the change before the primary had acknowledged it, "
    "because synchronous_commit was set to local in this session"
)
WRITE_SKEW = "Which isolation level stops write skew on two rows"
# rule → rows, the lines where it must fire (0: the set), further arguments
FAULTS: dict[str, tuple[list[Any], list[int], dict[str, Any]]] = {
    "encoding": ([*CLEAN, b'{"messages": "\xff"}'], [13], {}),
    "broken-json": ([*CLEAN[:2], b'{"messages": [', *CLEAN[2:]], [3], {}),
    "unknown-shape": ([*CLEAN, {"text": "x"}], [13], {}),
    "missing-field": ([{"messages": [{"role": "user"}, turn("assistant", "a")]}, *CLEAN], [1], {}),
    "wrong-type": ([*CLEAN, {"messages": "hello"}, b"[1, 2]"], [13, 14], {}),
    "empty-field": ([*CLEAN, {"messages": [turn("user", "q"), turn("assistant", " \n")]}], [13], {}),
    "role-order": ([*CLEAN, {"messages": [turn("assistant", "a"), turn("user", "q")]}], [13], {}),
    "id-twice": ([talk(0, id="one"), talk(1), talk(2, id="one")], [3], {}),
    "special-token": ([*CLEAN, talk(20, "It ends with <|EOT|> here, always.")], [13], {}),
    "odd-characters": ([*CLEAN, talk(20, "It\ufffds broken: the caf\ufffd is closed.")], [13], {}),
    "completion-length": ([*CLEAN, talk(20, "?")], [13], {}),
    "refusal": ([*CLEAN, talk(20, "I'm sorry, but I can't assist with that request.")], [13], {}),
    "secret": ([*CLEAN, talk(20, f"Set AWS_ACCESS_KEY_ID={AWS_KEY} and run it.")], [13], {}),
    "personal-data": ([*CLEAN, talk(20, "Write to jane.doe1984@gmail.com about it.")], [13], {}),
    "code-syntax": ([*CLEAN, talk(20, "So:\n\n```python\ndef f(:\n    pass\n```\n")], [13], {}),
    "code-fence": ([*CLEAN, talk(20, "So:\n\n```python\nprint(1)\n")], [13], {}),
    "code-fails": ([*CLEAN, talk(20, "So:\n\n```python\nassert 1 == 2\n```", run=True)], [13], {"run_code": True}),
    "edge-whitespace": ([*CLEAN, talk(20, "It ends in a blank line.\n\n")], [13], {}),
    "too-long": ([*CLEAN, talk(20, LONG)], [13], {"max_length": 600}),
    "no-end-of-turn": ([*CLEAN, talk(20, LONG)], [13], {"max_length": 600}),
    "nothing-trained": ([*CLEAN, talk(20, question=LONG)], [13], {"max_length": 600}),
    "same-when-cut": ([pair(20, f"{LONG} yes", f"{LONG} no")], [1], {"max_length": 600}),
    "duplicate": ([*CLEAN, talk(3, domain="elsewhere", id="other")], [13], {}),
    "near-duplicate": ([talk(20, LONG), *CLEAN, talk(20, LONG.replace("word200", "otherword"))], [14], {}),
    "leak": (
        [*CLEAN, talk(20, f"In short: {LEAKED}.")], [13],
        {"forbidden": [question("A long question?", f"{LEAKED}. So set it to on.")]},
    ),
    "near-leak": (
        [*CLEAN, talk(20, question=f"{WRITE_SKEW} in PostgreSQL?")], [13],
        {"forbidden": [question(f"In PostgreSQL: {WRITE_SKEW}?", "r")], "check": Check(near_duplicate=0.6)},
    ),
    "unbalanced-domains": (
        [talk(n, domain="b" if n == 3 else f"a{n % 2}") for n in range(12)], [0], {"check": Check(domain_share=0.5)},
    ),
    "same-sides": ([pair(0), pair(1, "the same", " the same\n")], [2], {}),
    "prompt-mismatch": (
        [{"chosen": [turn("user", "one"), turn("assistant", "a")], "rejected": [turn("user", "two"), turn("assistant", "b")]}],
        [1], {},
    ),
    "refusal-chosen": ([pair(0), pair(1, "I'm sorry, but I can't help with that.")], [2], {}),
    "swapped": ([pair(0), pair(7, "Use a lock.", "Use none."), pair(1), pair(7, "Use none.", "Use a lock.")], [2, 4], {}),
    "length-bias": ([pair(n, f"Yes, and {n} is {'very ' * (n + 9)}right.", f"No, {n}.") for n in range(24)], [0], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_of_each_rule_is_found_with_file_and_line(judge: Judge, name: str) -> None:
    rows, lines, options = FAULTS[name]
    found = [f for f in judge(rows, **options) if f.rule.name == name]
    assert sorted(f.line for f in found) == lines, [f.text for f in judge(rows, **options)]
    assert all(f.file == ("rows.jsonl" if f.line or name == "length-bias" else "the set") and f.reason for f in found)


def test_every_rule_has_a_planted_fault() -> None:
    elsewhere = {"broken-file": "test_source.py", "template": "test_tokens.py"}
    assert {rule.name for rule in RULES} == set(FAULTS) | set(elsewhere)
    for file in elsewhere.values():
        assert list((CHECKOUT / "tests").rglob(file))


def test_clean_rows_give_no_finding(judge: Judge) -> None:
    assert judge(CLEAN, max_length=2048) == []
    assert judge([pair(n) for n in range(30)], max_length=2048) == []


def test_codes_and_names_are_unique_and_each_rule_says_what_to_do() -> None:
    assert len({r.code for r in RULES}) == len({r.name for r in RULES}) == len(RULES)
    assert all(rule.finds and rule.remedy and rule.code[0] == "D" and len(rule.code) == 4 for rule in RULES)
    assert [r.code for r in RULES] == sorted(r.code for r in RULES)


def test_rejected_row_takes_no_further_part(judge: Judge) -> None:
    bad = talk(3, f"Set AWS_ACCESS_KEY_ID={AWS_KEY} and run it.")
    assert [(f.rule.name, f.line) for f in judge([bad, bad])] == [("secret", 1), ("secret", 2)], (
        "no duplicate of a reject"
    )


def test_a_row_is_dropped_once_however_many_rules_it_breaks(home: Workspace) -> None:
    rows = [pair(0, id="x"), pair(0, id="x")]
    home.path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = Gate(Check())
    run(gate, [(s, None) for s in sources(home, "rows.jsonl")], lambda finding: None, quiet=True)
    assert gate.dropped == {1} and gate.total.rejected == 1 and gate.total.rows == 2


def test_duplicates_are_found_across_files(home: Workspace) -> None:
    for name in ("a", "b"):
        home.path(name).mkdir()
        home.path(f"{name}/rows.jsonl").write_text(json.dumps(talk(1)) + "\n")
    found: list[Finding] = []
    run(Gate(Check()), [(s, None) for name in "ab" for s in sources(home, name)], found.append, quiet=True)
    assert [(f.where, f.rule.name, f.reason) for f in found] == [
        ("b/rows.jsonl:1", "duplicate", "its text stands at a/rows.jsonl:1 already")
    ]


def test_rows_that_pass_come_in_the_order_of_their_numbers(home: Workspace) -> None:
    rows = [talk(0), {"messages": []}, talk(1), talk(0), talk(2)]
    home.path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate, passed = Gate(Check()), []
    run(gate, [(s, None) for s in sources(home, "rows.jsonl")], lambda finding: None, passed.append, quiet=True)
    kept = [row.line for number, row in enumerate(passed) if number not in gate.dropped]
    assert kept == [1, 3, 5]


def test_where_the_first_of_equal_rows_is_dropped_the_next_one_stands_for_it(judge: Judge) -> None:
    rows = [talk(0, id="a"), talk(1, id="a"), talk(1, id="b"), talk(1, id="c")]
    assert [(f.rule.name, f.line, f.reason) for f in judge(rows)] == [
        ("id-twice", 2, "its id stands at rows.jsonl:1 too"),
        ("duplicate", 4, "its text stands at rows.jsonl:3 already"),
    ]


def test_the_same_id_in_conversations_and_pairs_is_no_fault(judge: Judge) -> None:
    assert judge([talk(0, id="one"), pair(1, id="one")]) == []


@pytest.mark.parametrize("part", ["prompt", "key point"])
def test_a_whole_prompt_and_a_key_point_leak_however_short(home: Workspace, part: str) -> None:
    key_point = "The replica may lag behind, so reads after a write go to the primary or wait for its position"
    home.path("eval.jsonl").write_text(json.dumps({"prompt": "What is WAL?", "key_points": [key_point]}))
    leaks = Leaks(13, 0.8)
    assert forbid(leaks, sources(home, "eval.jsonl")) == 1
    row = talk(1, question="what is wal") if part == "prompt" else talk(1, f"Mind this. {key_point}.")
    home.path("rows.jsonl").write_text(json.dumps(row))
    found: list[Finding] = []
    run(Gate(Check(), leaks=leaks), [(s, None) for s in sources(home, "rows.jsonl")], found.append, quiet=True)
    assert [f.rule.name for f in found] == ["leak"] and "eval.jsonl:1" in found[0].reason


# ── Choosing rules ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("word", ["D206", "personal-data", "D20", "D2"])
def test_rule_is_left_out_by_code_name_or_start_of_code(judge: Judge, word: str) -> None:
    rows = [*CLEAN, talk(20, "Write to jane.doe1984@gmail.com about it.")]
    assert judge(rows, check=Check(ignore=[word])) == []


def test_severity_is_the_profiles(judge: Judge, home: Workspace) -> None:
    mail = [*CLEAN, talk(20, "Write to jane.doe1984@gmail.com about it.")]
    assert [f.rule.severity for f in judge(mail)] == ["warning"]
    assert [f.rule.severity for f in judge(mail, check=Check(errors=["personal-data"]))] == ["error"]
    twice = [*CLEAN, talk(0)]
    assert [f.rule.severity for f in judge(twice, check=Check(warnings=["D401"]))] == ["warning"]


@pytest.mark.parametrize(
    ("word", "remedy"), [("near-duplicat", "near-duplicate"), ("E501", "D501"), ("?", "aletheia data check --rules")]
)
def test_rule_that_there_is_not_is_refused_with_the_nearest(word: str, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"there is no rule `.*{word[-3:].replace('?', '.')}`; try {remedy}"):
        selected(Check(ignore=[word]))


@pytest.mark.parametrize("name", ["broken-json", "id-twice", "role-order", "too-long"])
def test_rule_without_which_no_row_can_be_told_is_not_left_out(name: str) -> None:
    with pytest.raises(UserError, match="cannot be left out"):
        selected(Check(ignore=[name]))
    with pytest.raises(UserError, match="cannot be left out"):
        selected(Check(warnings=[name]))
    assert BY_NAME[name].name in selected(Check(ignore=["D"])), "the start of a code leaves them in"
