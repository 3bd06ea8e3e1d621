"""The rows in data/: as many and of the shape that they claim, through the gate, and nothing but quality to prefer."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from pipeline.config import Check
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, MultipleChoice, PreferencePair, Question, Row
from pipeline.data.source import sources
from pipeline.gate import code
from pipeline.gate.admit import forbid
from pipeline.gate.finding import Finding
from pipeline.gate.gate import Gate, Tokenized, run
from pipeline.gate.leaks import Leaks
from pipeline.gate.tokens import Totals
from pipeline.model import Base
from pipeline.tasks import find_tasks
from pipeline.workspace import CHECKOUT, Workspace

SHIPPED = Workspace(CHECKOUT)
DOMAINS = {"api-design", "databases", "devops", "distributed-systems", "performance"}
KINDS: dict[str, type[Row]] = {
    "sft": Conversation,
    "dpo": PreferencePair,
    "eval/questions": Question,
    "eval/choices": MultipleChoice,
}
FIELDS = {
    "sft": {"quality", "messages"},
    "dpo": {"prompt", "chosen", "rejected", "fault"},
    "eval/questions": {"prompt", "key_points", "must_not", "reference"},
    "eval/choices": {"question", "choices", "answer"},
}
LONGEST_PROFILE = 2048  # tokens: max_length of the profiles that are shipped


@functools.cache
def rows(name: str) -> Sequence[Row]:
    return tuple(read_rows(SHIPPED, f"data/{name}", KINDS[name]))


CONVERSATIONS = cast(Sequence[Conversation], rows("sft"))
PAIRS = cast(Sequence[PreferencePair], rows("dpo"))
QUESTIONS = cast(Sequence[Question], rows("eval/questions"))
CHOICES = cast(Sequence[MultipleChoice], rows("eval/choices"))


@pytest.mark.parametrize("name", KINDS)
def test_rows_have_all_their_fields_and_stand_in_the_file_of_their_domain(name: str) -> None:
    for row in rows(name):
        values = row.model_dump(exclude_unset=True)
        assert set(values) - {"run"} == {"id", "domain", "difficulty"} | FIELDS[name], row.id
        assert Path(row.where.split(":")[0]).stem == row.domain, row.id
        assert row.difficulty in {"beginner", "intermediate", "expert"}, row.id
    assert {row.domain for row in rows(name)} == DOMAINS


LEAST = {"sft": 150, "dpo": 80, "eval/questions": 140, "eval/choices": 150}


@pytest.mark.parametrize("name", KINDS)
def test_there_are_enough_rows_of_every_domain_and_level(name: str) -> None:
    found = rows(name)
    assert len(found) >= LEAST[name]
    counts = Counter((row.domain, row.difficulty) for row in found)
    assert len(counts) == 15 and min(counts.values()) >= 3
    card = (CHECKOUT / "data" / "README.md").read_text("utf-8")
    assert re.search(rf"^\| `{name}/` \| {len(found)}, {len(found) // 5} a domain \|", card, re.MULTILINE), (
        "the card counts"
    )


def test_the_set_passes_its_own_gate_with_all_rules_and_its_code_runs(base: Base) -> None:
    check = Check()
    leaks = Leaks(check.leak_words, check.near_duplicate)
    forbid(leaks, sources(SHIPPED, "data/eval"))
    totals = {kind: Totals(LONGEST_PROFILE) for kind in (Conversation, PreferencePair)}
    findings: list[Finding] = []
    gate = Gate(check, Tokenized(base.chat(), totals), leaks, run_code=True)
    run(
        gate,
        [(s, KINDS[name]) for name in KINDS for s in sources(SHIPPED, f"data/{name}")],
        findings.append,
        quiet=True,
    )
    assert [f"{f.where} {f.text}" for f in findings] == []
    assert sum(t.too_long for t in totals.values()) == 0 and gate.total.rows == sum(len(rows(name)) for name in KINDS)


def test_answers_are_of_the_length_that_the_card_says() -> None:
    lengths = [len(row.answers[0]) for row in CONVERSATIONS]  # 100 to 800 tokens, at some four characters each
    assert min(lengths) >= 400 and max(lengths) <= 3400 and 1200 <= sum(lengths) / len(lengths) <= 2400


def test_tasks_are_wired_with_versions() -> None:
    tasks = find_tasks(CHECKOUT / "data/eval", ["aletheia_choices", "aletheia_questions"])
    assert all(isinstance(task, dict) and task["metadata"]["version"] for task in tasks)


def test_ids_are_unique_over_all_files() -> None:
    ids = Counter(row.id for name in KINDS for row in rows(name))
    assert [i for i, count in ids.items() if count > 1] == []


# ── Pairs: length and form must not tell which side is chosen ────────────────────────────────────────────────────────


def auc(measure: Callable[[str], float]) -> float:
    """P(a random chosen answer measures more than a random rejected one), ties half: Mann and Whitney's."""
    chosen, rejected = ([measure(getattr(p, side)[0].content) for p in PAIRS] for side in ("chosen", "rejected"))
    return sum((c > r) + 0.5 * (c == r) for c in chosen for r in rejected) / len(PAIRS) ** 2


def paired_auc(measure: Callable[[str], float]) -> float:
    """The same within each pair, as a preference loss sees it."""
    sides = [(measure(p.chosen[0].content), measure(p.rejected[0].content)) for p in PAIRS]
    return sum((c > r) + 0.5 * (c == r) for c, r in sides) / len(sides)


@pytest.mark.parametrize("share", [auc, paired_auc])
def test_length_in_tokens_does_not_tell_which_side_is_chosen(base: Base, share: Callable[..., float]) -> None:
    tokenizer = base.tokenizer()
    assert 0.4 <= share(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])) <= 0.6


@pytest.mark.parametrize("share", [auc, paired_auc])
@pytest.mark.parametrize(
    "measure",
    [len, lambda text: text.count("```"), lambda text: len(re.findall(r"^\s*[-*] ", text, re.MULTILINE))],
    ids=["characters", "code blocks", "list items"],
)
def test_form_does_not_tell_which_side_is_chosen(share: Callable[..., float], measure: Callable[[str], float]) -> None:
    assert 0.4 <= share(measure) <= 0.6


def test_every_pair_names_its_fault() -> None:
    assert {p.fault for p in PAIRS} == {"generic", "incomplete", "inaccurate", "outdated", "insecure"}
    assert max(Counter(p.fault for p in PAIRS).values()) < 0.5 * len(PAIRS)


# ── Choices: neither place nor length gives the answer away ──────────────────────────────────────────────────────────


def test_answers_are_spread_over_the_places_and_are_not_the_longest_by_habit() -> None:
    places = Counter(c.answer for c in CHOICES)
    assert set(places) == {0, 1, 2, 3} and max(places.values()) <= 2 * min(places.values())
    longest = sum(len(c.choices[c.answer]) == max(map(len, c.choices)) for c in CHOICES)
    assert 0.1 <= longest / len(CHOICES) <= 0.4, "chance is a quarter"
    assert all(len(c.choices) == len(set(c.choices)) == 4 for c in CHOICES)


# ── Code blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def answers() -> Iterator[tuple[str, str]]:
    for row in CONVERSATIONS:
        yield from ((row.id, m.content) for m in row.messages if m.role == "assistant")
    for pair in PAIRS:
        yield from ((f"{pair.id} {side}", getattr(pair, side)[0].content) for side in ("chosen", "rejected"))
    for question in QUESTIONS:
        yield question.id, question.reference or ""


def test_most_answers_show_code_and_much_of_it_is_checked() -> None:
    counts: Counter[str] = Counter()
    for _, answer in answers():
        counts.update(block.language for block in code.blocks(answer)[0])
    checked = sum(counts[name] for name in ("sql", "python", "json", "yaml", "bash", "sh", "toml"))
    assert checked >= 0.5 * counts.total() and counts.total() > 500
    assert sum("```" in row.answers[0] for row in CONVERSATIONS) > 0.7 * len(CONVERSATIONS)
    assert sum(bool(getattr(row, "run", False)) for row in CONVERSATIONS) >= 20


def test_code_blocks_are_closed_and_name_their_language() -> None:
    for where, answer in answers():
        fences = re.findall(r"^ *```(\S*)$", answer, re.MULTILINE)
        assert len(fences) == answer.count("```") and len(fences) % 2 == 0, where
        assert all(fences[::2]) and not any(fences[1::2]), where


# ── No leak, stricter than the gate ─────────────────────────────────────────────────────────────────────────────────────────


def words_and_shingles(text: str, size: int = 4) -> tuple[set[object], set[object]]:
    """Its words, and all that stand `size` in a row."""
    found = re.findall(r"\w+", text.lower())
    return set(found), {tuple(found[n : n + size]) for n in range(max(1, len(found) - size + 1))}


PROMPTS = {
    "sft": [(r.id, m.content) for r in CONVERSATIONS for m in r.messages if m.role == "user"],
    "dpo": [(p.id, p.prompt[-1].content) for p in PAIRS],
    "eval": [(q.id, q.prompt) for q in QUESTIONS] + [(c.id, c.question) for c in CHOICES],
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PROMPTS, 2)))
def test_no_prompt_stands_in_two_sets_even_reworded(one: str, other: str) -> None:
    ones, others = ([(name, *words_and_shingles(text)) for name, text in PROMPTS[which]] for which in (one, other))
    alike = [
        (a, b)
        for (a, a_words, a_shingles), (b, b_words, b_shingles) in itertools.product(ones, others)
        if overlap(a_words, b_words) > 0.5 or overlap(a_shingles, b_shingles) > 0.2
    ]
    assert alike == []


def overlap(one: set[object], other: set[object]) -> float:
    """Jaccard's: shared over all."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
