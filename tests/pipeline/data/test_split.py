"""Splits and the control: who is held out, by which strategy, whatever the rows' order."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config import Validation
from pipeline.data.rows import Conversation, MultipleChoice, PreferencePair, Question, Row, describe
from pipeline.data.split import described, sample, shuffle_answers, split
from pipeline.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def conversations(count: int, domains: int = 1, turns: int = 1) -> list[Conversation]:
    return [
        Conversation(
            id=f"c{n}",
            domain=f"d{n % domains}",
            messages=[m for t in range(turns) for m in ({**USER}, {**ASSISTANT, "content": f"answer {n}.{t}"})],  # type: ignore[misc]
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("strategy", ["stratified", "random"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.34, 0.9])
def test_split_is_a_partition_in_the_order_of_the_rows(strategy: Any, fraction: float) -> None:
    rows = conversations(25, domains=3)
    train, held_out = split(rows, Validation(fraction=fraction, strategy=strategy, seed=1))
    assert sorted([*train, *held_out], key=rows.index) == rows
    assert train == [r for r in rows if r not in held_out]
    assert abs(len(held_out) - 25 * fraction) < 3 * 0.5 + 1e-9


def test_stratified_split_holds_out_the_share_of_each_domain() -> None:
    _, held_out = split(conversations(60, domains=3), Validation(fraction=0.1, seed=1))
    assert describe(held_out)["domains"] == {"d0": 2, "d1": 2, "d2": 2}


def test_split_follows_the_seed_and_not_the_order() -> None:
    rows = conversations(40)

    def held_out(rows: list[Conversation], seed: int) -> set[str]:
        return {r.id for r in split(rows, Validation(fraction=0.25, seed=seed))[1]}

    assert held_out(rows, 1) == held_out(rows[::-1], 1) != held_out(rows, 2)


def test_adding_a_row_moves_at_most_one_other() -> None:
    rows, validation = conversations(60), Validation(fraction=0.1, seed=1)
    for n in range(1, 60):
        before, after = ({r.id for r in split(rows[:size], validation)[1]} for size in (n, n + 1))
        assert len((before ^ after) - {rows[n].id}) <= 1


def test_adding_a_row_moves_at_most_one_of_its_domain_and_one_of_another() -> None:
    rows = conversations(90, domains=7)
    for fraction in (0.1, 0.34):
        validation = Validation(fraction=fraction, seed=1)
        for n in range(1, 90):
            before, after = ({r.id: r for r in split(rows[:size], validation)[1]} for size in (n, n + 1))
            moved = [r.domain == rows[n].domain for r in rows[:n] if (r.id in before) != (r.id in after)]
            assert moved.count(True) <= 1 and moved.count(False) <= 1


def test_small_domains_have_their_share_together() -> None:
    rows = conversations(200, domains=50)
    _, held_out = split(rows, Validation(fraction=0.1, seed=1))
    assert len(held_out) == 20 == len({r.domain for r in held_out})
    assert {r.domain for r in held_out} != {r.domain for r in split(rows, Validation(fraction=0.1, seed=2))[1]}
    assert held_out[::-1] == split(rows[::-1], Validation(fraction=0.1, seed=1))[1]


def test_share_goes_to_the_domains_with_the_largest_remainders() -> None:
    sizes = {"a": 19, "b": 12, "c": 9}  # shares of a quarter: 4.75, 3.0, 2.25
    rows = conversations(40)
    for row, domain in zip(rows, [d for d, size in sizes.items() for _ in range(size)], strict=True):
        row.domain = domain
    assert describe(split(rows, Validation(fraction=0.25))[1])["domains"] == {"a": 5, "b": 3, "c": 2}


@pytest.mark.parametrize("strategy", ["stratified", "random", "group"])
def test_nothing_held_out_of_too_few_rows_is_said(strategy: Any, capsys: Any) -> None:
    for count in (4, 5):
        assert split(conversations(count), Validation(fraction=0.1, strategy=strategy))[1] == []
        assert f"note: no row is held out: {count} rows × 0.1 is at most half a row" in capsys.readouterr().err
    split(conversations(4), Validation(fraction=0.0, strategy=strategy))
    split(conversations(3), Validation(fraction=0.9, strategy="random"))
    split([], Validation(fraction=0.1, strategy=strategy))
    assert capsys.readouterr().err == "", "nothing was asked for, or something is held out"


def test_nothing_held_out_of_one_large_family_is_said(capsys: Any) -> None:
    assert split(grouped(families=1, size=20), Validation(fraction=0.2, strategy="group"))[1] == []
    assert "no row is held out: rows that stay together are more than twice the 4" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["stratified", "random", "group", "temporal"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_equal_text_stay_together(strategy: Any, seed: int) -> None:
    rows = grouped(families=12, size=5, date=lambda n: n)
    for n, row in enumerate(rows):
        row.domain, row.messages[0].content = f"d{n % 3}", f"question {n % 20}"
        row.messages[1].content = f"answer {n % 20}"  # each text thrice, in other families, domains and years
    for ordered in (rows, rows[::-1]):
        train, held_out = split(ordered, Validation(fraction=0.3, strategy=strategy, seed=seed))
        assert not {r.messages[1].content for r in train} & {r.messages[1].content for r in held_out}
        if strategy == "group":
            assert not {r.group for r in train} & {r.group for r in held_out}  # type: ignore[attr-defined]
        elif strategy != "temporal":  # here no text is wholly later than the others
            assert abs(len(held_out) - 18) <= 4
    if strategy != "temporal":
        assert {r.id for r in held_out} == {
            r.id for r in split(rows, Validation(fraction=0.3, strategy=strategy, seed=seed))[1]
        }


def test_same_answer_to_another_question_is_no_equal_text() -> None:
    rows = conversations(40)
    for n, row in enumerate(rows):
        row.messages[0].content, row.messages[1].content = f"question {n}", "yes"
    assert len(split(rows, Validation(fraction=0.25, strategy="random"))[1]) == 10


def test_text_that_stands_earlier_too_is_not_held_out_as_late() -> None:
    rows = grouped(families=2, size=10, date=lambda n: n)
    rows[19].messages[1].content = rows[0].messages[1].content
    _, held_out = split(rows, Validation(fraction=0.2, strategy="temporal"))
    assert [r.id for r in held_out] == ["c15", "c16", "c17", "c18"]


def test_nothing_older_is_held_out_in_place_of_rows_of_equal_text() -> None:
    rows = grouped(families=2, size=10, date=lambda n: n)
    rows[16].messages[1].content = rows[17].messages[1].content = rows[18].messages[1].content
    _, held_out = split(rows, Validation(fraction=0.1, strategy="temporal"))
    assert [r.id for r in held_out] == ["c16", "c17", "c18", "c19"]


def test_split_of_rows_without_ids_does_not_depend_on_their_line(
    read: Callable[..., list[Any]],
) -> None:
    lines = [json.dumps({"messages": r.model_dump()["messages"]}) for r in conversations(40)]

    def held_out(*lines: str) -> set[str]:
        return {r.messages[1].content for r in split(read(*lines), Validation(fraction=0.25, seed=1))[1]}

    assert held_out(*lines) == held_out("", *reversed(lines))


# ── Groups and time ──────────────────────────────────────────────────────────────────────────────────────────────────


def grouped(families: int, size: int, **fields: Any) -> list[Conversation]:
    rows = conversations(families * size)
    for n, row in enumerate(rows):
        row.__pydantic_extra__ = {"group": f"family {n % families}"} | {k: v(n) for k, v in fields.items()}
    return rows


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_one_family_stay_together(fraction: float, seed: int) -> None:
    rows = grouped(families=12, size=5)
    train, held_out = split(rows, Validation(fraction=fraction, strategy="group", seed=seed))
    assert held_out and not {r.group for r in train} & {r.group for r in held_out}  # type: ignore[attr-defined]
    assert abs(len(held_out) - 60 * fraction) <= 5


def test_without_a_family_named_prompts_that_differ_in_numbers_and_code_alone_stay_together() -> None:
    asked = [f"Why is the query `SELECT {n}` slow on {n} rows?" for n in range(8)] + [
        f"What is a {w}?" for w in "abcdefgh"
    ]
    rows = [Conversation(messages=[{**USER, "content": a}, ASSISTANT], id=a) for a in asked]  # type: ignore[list-item]
    for seed in range(6):
        _, held_out = split(rows, Validation(fraction=0.5, strategy="group", seed=seed))
        assert len([r for r in held_out if r.id.startswith("Why")]) in (0, 8)


def turns(*texts: str) -> list[dict[str, str]]:
    """The first is the system's, where it begins so."""
    said = [("system", t) if t.startswith("You are") else ("", t) for t in texts]
    first = len([r for r, _ in said if r])
    return [
        {"role": role or ("user", "assistant")[(n - first) % 2], "content": text} for n, (role, text) in enumerate(said)
    ]


def kinds(n: int, question: str) -> list[Row]:
    """A row of each kind with this question, each unlike every other `n`'s in all else."""
    other, answer = f"You are {'very ' * n}terse.", turns("q", f"answer {n}")[1:]
    return [
        Conversation(messages=turns(other, question, "a", "go " * n + "on", f"b {n}"), id="c"),  # type: ignore[arg-type]
        PreferencePair(
            prompt=turns(other, question, "a", "go " * n + "on"),  # type: ignore[arg-type]
            chosen=answer,  # type: ignore[arg-type]
            rejected=turns("q", "c")[1:],  # type: ignore[arg-type]
        ),
        Question(prompt=question, key_points=[f"point {n}"]),
        MultipleChoice(question=question, choices=["a", f"b {n}"], answer=0),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_family_without_a_name_is_told_by_the_first_question_of_each_kind(kind: int) -> None:
    rows = [kinds(n + 1, asked)[kind] for n, asked in enumerate(["Why is it slow?"] * 6 + list("abcdef"))]
    for seed in range(6):
        _, held_out = split(rows, Validation(fraction=0.5, strategy="group", seed=seed))
        assert len([r for r in held_out if r in rows[:6]]) in (0, 6) and held_out


@pytest.mark.parametrize("field", ["file", "json", "where", "model_extra"])
def test_field_named_as_an_attribute_of_the_row_is_its_own_and_no_method(field: str) -> None:
    rows = conversations(40)
    for strategy, key in (("group", "group_by"), ("temporal", "time_by")):
        with pytest.raises(UserError, match=f"has (no )?`{field}`"):
            split(rows, Validation(fraction=0.5, strategy=strategy, **{key: field}))
    for n, row in enumerate(rows):
        row.__pydantic_extra__ = {field: n // 10}
    _, held_out = split(rows, Validation(fraction=0.25, strategy="group", group_by=field))
    assert len(held_out) == 10 and len({n // 10 for n, r in enumerate(rows) if r in held_out}) == 1
    _, held_out = split(rows, Validation(fraction=0.25, strategy="temporal", time_by=field))
    assert held_out == rows[30:]


def test_declared_field_groups_where_rows_set_it() -> None:
    _, held_out = split(conversations(40, domains=4), Validation(fraction=0.25, strategy="group", group_by="domain"))
    assert len(held_out) == 10 and len({r.domain for r in held_out}) == 1
    with pytest.raises(UserError, match="no row has `difficulty`"):  # that all are "unknown" makes no family of them
        split(conversations(40), Validation(fraction=0.25, strategy="group", group_by="difficulty"))


def test_field_that_no_row_has_is_named_with_the_nearest_that_rows_have() -> None:
    rows = grouped(families=4, size=3, team=lambda n: n % 4)
    with pytest.raises(UserError, match=r"no row has `teem`; try training_data.validation.group_by: team$"):
        split(rows, Validation(strategy="group", group_by="teem"))
    with pytest.raises(UserError, match=r"no row has `xyz`; try another training_data.validation.group_by$"):
        split(rows, Validation(strategy="group", group_by="xyz"))


def test_rows_without_the_field_that_others_have_are_counted(capsys: Any) -> None:
    rows = grouped(families=4, size=3, team=lambda n: n % 4) + conversations(73)[12:]
    split(rows, Validation(fraction=0.25, strategy="group", group_by="team"))
    said = capsys.readouterr().err
    assert said == "note: 12 of 73 rows have `team`; the others are grouped by their prompt\n"
    split(rows[:12], Validation(fraction=0.25, strategy="group", group_by="team"))
    split(rows[13:], Validation(fraction=0.5, strategy="group"))
    assert capsys.readouterr().err == ""


def test_a_large_family_does_not_take_the_whole_set() -> None:
    rows = grouped(families=1, size=20) + conversations(3)
    rows[-1].messages[0].content, rows[-2].messages[0].content = "another", "a third"
    for seed in range(6):
        train, held_out = split(rows, Validation(fraction=0.1, strategy="group", seed=seed))
        assert len(train) >= 20 and len(held_out) <= 3


@pytest.mark.parametrize(
    "made", [lambda n: f"2026-01-{n + 1:02d}", lambda n: n * 1000, lambda n: f"2026-01-01T{n:02d}:00:00+02:00"]
)
def test_temporal_split_holds_out_the_latest(made: Any) -> None:
    rows = grouped(families=2, size=10, date=made)
    train, held_out = split(rows[::-1], Validation(fraction=0.25, strategy="temporal"))
    assert {r.id for r in held_out} == {r.id for r in rows[-5:]} and len(train) == 15


@pytest.mark.parametrize(
    ("value", "said"), [("soon", "date: 'soon' is no date"), (None, "has no `date`"), (True, "no date")]
)
def test_row_without_a_date_is_named(value: Any, said: str) -> None:
    rows = grouped(families=2, size=2, date=lambda n: value if n == 2 else "2026-01-01")
    with pytest.raises(UserError, match=said):
        split(rows, Validation(fraction=0.5, strategy="temporal"))


@pytest.mark.parametrize("strategy", ["group", "temporal"])
def test_split_by_family_or_time_does_not_depend_on_the_order(strategy: Any) -> None:
    rows = grouped(families=5, size=4, date=lambda n: "2026-01-01")

    def held_out(rows: list[Conversation]) -> set[str]:
        return {r.id for r in split(rows, Validation(fraction=0.4, strategy=strategy, seed=3))[1]}

    assert held_out(rows) == held_out(rows[::-1])


def test_how_rows_were_split_is_described() -> None:
    same = {"fraction": 0.1, "seed": 42}
    assert described(Validation(path="data/own")) == {"path": "data/own"}
    assert described(Validation()) == {"strategy": "stratified", **same}
    assert described(Validation(strategy="group", group_by="team")) == {"strategy": "group", **same, "group_by": "team"}
    assert described(Validation(strategy="temporal")) == {"strategy": "temporal", **same, "time_by": "date"}


# ── The control ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rows", "turns"), [(2, 1), (7, 1), (2, 3), (9, 2)])
def test_control_puts_every_answer_under_another_rows_question(rows: int, turns: int) -> None:
    before = conversations(rows, turns=turns)
    for seed in range(5):
        after = shuffle_answers(before, seed)
        for was, now in zip(before, after, strict=True):
            assert [m.role for m in now.messages] == [m.role for m in was.messages]
            assert not {m.content for m in now.messages[1::2]} & {m.content for m in was.messages[1::2]}
            assert now.messages[::2] == was.messages[::2] and (now.id, now.where) == (was.id, was.where)
        texts = [sorted(m.content for r in side for m in r.messages) for side in (before, after)]
        assert texts[0] == texts[1]
    assert before == conversations(rows, turns=turns), "the rows themselves stay as they are"


def test_control_mixes_conversations_of_different_length_too() -> None:
    rows = [*conversations(3, turns=2), *(r.model_copy(update={"id": f"x{r.id}"}) for r in conversations(9)[3:])]
    for was, now in zip(rows, shuffle_answers(rows, 42), strict=True):
        assert not {m.content for m in now.messages[1::2]} & {m.content for m in was.messages[1::2]}


def test_control_is_the_same_for_the_same_seed() -> None:
    rows = conversations(9)
    assert shuffle_answers(rows, 1) == shuffle_answers(rows, 1) != shuffle_answers(rows, 2)


def test_control_of_too_few_rows_is_refused() -> None:
    with pytest.raises(UserError, match="too few rows to shuffle"):
        shuffle_answers(conversations(1), 1)


def test_a_sample_is_the_same_every_time_and_of_each_domain() -> None:
    rows = conversations(40, domains=4)
    found = sample(rows, 12)
    assert len(found) == 12 and {row.domain for row in found} == {"d0", "d1", "d2", "d3"}
    assert {r.id for r in sample(rows[::-1], 12)} == {r.id for r in found}
    assert sample(rows, None) == sample(rows, 40) == rows
