"""Formats: whatever shape the same content comes in, the same row comes out, and what cannot be said is refused."""

import json
from typing import Any

import pytest

from pipeline.data.formats import FORMATS, Format, converted
from pipeline.data.rows import (
    Conversation,
    MultipleChoice,
    PreferencePair,
    Question,
    Row,
    RowFault,
    row_hash,
    validated,
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
Q, A, Q2, A2, BAD = user("one"), assistant("two"), user("three"), assistant("four"), assistant("five")


def shared(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """As ShareGPT."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def parts(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        m | {"content": [{"type": "text", "text": m["content"]}], "name": "x", "tool_calls": None} for m in messages
    ]


def dialogue(*messages: dict[str, Any]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


ONE_TURN: list[dict[str, Any]] = [
    {"messages": [Q, A]},
    {"messages": parts(Q, A)},
    {"messages": [Q | {"weight": 1, "id": 7, "function_call": {}}, A | {"tool_calls": [], "refusal": None}]},
    {"messages": [Q, A], "system": "", "tools": [], "images": None},
    {"conversations": shared(Q, A)},
    {"conversations": [Q, A], "tools": "[]"},
    {"conversations": [{"from": "user", "value": "one", "weight": None}, {"from": "assistant", "value": "two"}]},
    {"prompt": "one", "completion": "two"},
    {"prompt": [Q], "completion": [A]},
    {"prompt": [Q], "completion": "two"},
    {"prompt": "one", "completion": A},
    {"prompt": "one", "response": "two"},
    {"instruction": "one", "output": "two"},
    {"instruction": "one", "input": "", "output": "two", "history": [], "system": None},
    {"instruction": "one", "response": "two", "context": ""},
    {"question": "one", "answer": "two"},
    {"question": "one", "response": "two", "system_prompt": ""},
    {"query": "one", "response": "two"},
    {"prompt": dialogue(Q) + "\n\nAssistant:", "completion": "two"},
]
TWO_TURNS: list[dict[str, Any]] = [
    {"messages": [SYSTEM, Q, A, Q2, A2]},
    {"messages": [SYSTEM | {"role": "developer"}, Q, A, Q2, A2]},
    {"messages": [Q, A, Q2, A2], "system": "Be brief."},
    {"messages": [SYSTEM, Q, A, Q2, A2], "system": "Be brief."},
    {"conversations": shared(SYSTEM, Q, A, Q2, A2)},
    {"conversations": shared(Q, A, Q2, A2), "system": "Be brief."},
    {"conversations": shared(Q, A, Q2, A2), "system": "", "system_prompt": "Be brief."},
    {"prompt": [SYSTEM, Q, A, Q2], "completion": [A2]},
    {"prompt": [SYSTEM, Q], "completion": [A, Q2, A2]},
    {"instruction": "three", "output": "four", "history": [["one", "two"]], "system": "Be brief."},
]
PAIR: list[dict[str, Any]] = [
    {"prompt": [Q], "chosen": [A], "rejected": [BAD]},
    {"prompt": "one", "chosen": "two", "rejected": "five"},
    {"prompt": "one", "chosen": A, "rejected": BAD},
    {"prompt": "one", "chosen": [Q, A], "rejected": [Q, BAD]},
    {"prompt": [Q], "chosen": [Q, A], "rejected": [BAD]},
    {"chosen": [Q, A], "rejected": [Q, BAD]},
    {"chosen": shared(Q, A), "rejected": shared(Q, BAD)},
    {"chosen": dialogue(Q, A), "rejected": dialogue(Q, BAD)},
    {"prompt": dialogue(Q) + "\n\nAssistant:", "chosen": " two".strip(), "rejected": "five"},
    {"prompt": dialogue(Q) + "\n\nAssistant:", "chosen": dialogue(Q, A), "rejected": dialogue(Q, BAD)},
    {"question": "one", "chosen": "two", "rejected": "five", "system": ""},
    {"instruction": "one", "input": "", "chosen": "two", "rejected": "five"},
    {"conversations": shared(Q), "chosen": shared(A)[0], "rejected": shared(BAD)[0]},
]
LONG_PAIR: list[dict[str, Any]] = [
    {"prompt": [SYSTEM, Q, A, Q2], "chosen": [A2], "rejected": [BAD]},
    {"prompt": [Q, A, Q2], "chosen": "four", "rejected": "five", "system": "Be brief."},
    {"prompt": [SYSTEM, Q, A, Q2], "chosen": [Q, A, Q2, A2], "rejected": [SYSTEM, Q, A, Q2, BAD]},
    {"chosen": [SYSTEM, Q, A, Q2, A2], "rejected": [SYSTEM, Q, A, Q2, BAD]},
    {"chosen": dialogue(Q, A, Q2, A2), "rejected": dialogue(Q, A, Q2, BAD), "system": "Be brief."},
]
EVALUATION: list[dict[str, Any]] = [
    {"prompt": "one", "key_points": ["k"]},
    {"question": "one", "choices": ["a", "b"], "answer": 0},
]
SAME = {"one turn": ONE_TURN, "two turns": TWO_TURNS, "pair": PAIR, "long pair": LONG_PAIR}
REST = {"id": "r", "domain": "d", "difficulty": "expert", "quality": "high", "group": "g", "date": "2026-11-20",
        "run": True, "source": "wiki"}  # fmt: skip


def row(values: dict[str, Any], kind: type[Row] | None = None) -> Row:
    found, own = converted(values, kind)
    return validated(own, found, "a.jsonl", 1)


def fault(values: dict[str, Any], kind: type[Row] | None = None) -> RowFault:
    with pytest.raises(RowFault) as raised:
        row(values, kind)
    return raised.value


# ── The same content ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", SAME)
def test_every_format_of_the_same_content_is_the_same_row(content: str) -> None:
    first, *others = SAME[content]
    expected = row(first | REST)
    assert expected.model_dump() == first | REST | ({"fault": "unknown"} if "chosen" in first else {})
    for other in others:
        for values in (other | REST, REST | other, dict(reversed((other | REST).items()))):
            for kind in (None, type(expected)):
                assert row(values, kind).model_dump() == expected.model_dump(), other
                assert row_hash(row(values, kind)) == row_hash(expected)


def test_every_published_format_is_among_those_tested() -> None:
    tested = [values.keys() for content in SAME.values() for values in content]
    own = [{"prompt", "key_points"}, {"question", "choices", "answer"}]
    for known in FORMATS:
        assert any(
            keys - {*known.optional, "tools", "images", "system_prompt"} == {*known.fields} for keys in [*tested, *own]
        ), known.name
        assert all(field in known.shape for field in known.fields)


@pytest.mark.parametrize("content", SAME)
def test_conversion_leaves_what_it_is_given_as_it_was(content: str) -> None:
    for values in SAME[content]:
        before = json.dumps(values)
        converted(values)
        assert json.dumps(values) == before


def test_own_shapes_of_evaluation_stay_as_they_are() -> None:
    question = {"prompt": "q", "key_points": ["k"], "must_not": ["m"], "reference": "r"} | REST
    choice = {"question": "q", "choices": ["a", "b"], "answer": 0} | REST
    assert converted(question) == (Question, question) == converted(question, Question)
    assert converted(choice) == (MultipleChoice, choice) == converted(choice, MultipleChoice)


def test_what_an_instruction_is_about_follows_it() -> None:
    asked = "Sum.\n\n1 2"
    for values in (
        {"instruction": "Sum.", "input": "1 2", "output": "3"},
        {"instruction": "Sum.", "context": "1 2", "response": "3"},
        {"instruction": "Sum.", "input": "1 2", "chosen": "3", "rejected": "4"},
        {"instruction": "", "input": "Sum.\n\n1 2", "output": "3"},
    ):
        assert row(values).asked == [asked]


def test_parts_of_a_text_are_joined_by_line_ends() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert row({"messages": [{"role": "user", "content": content}, A]}).asked == ["a\nb"]


def test_number_as_an_id_is_its_digits() -> None:
    assert row({"id": 7, "prompt": "one", "completion": "two"}).id == "7"


def test_null_is_a_field_that_is_not_there() -> None:
    nulls = {"domain": None, "prompt": None, "chosen": None, "system": None}
    assert row({"messages": [Q, A]} | nulls).model_dump() == row({"messages": [Q, A]}).model_dump()


def test_text_that_only_begins_like_the_prompt_is_not_cut() -> None:
    pair = row({"prompt": "SELECT 1", "chosen": "SELECT 1;", "rejected": "SELECT 1\nFROM dual"})
    assert pair.answers == ["SELECT 1;", "SELECT 1\nFROM dual"]


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [Q, A], "tools": [{"name": "f"}]}, "unknown-shape", "has `tools`: calls of tools"),
    ({"messages": [Q, A], "images": ["a.png"]}, "unknown-shape", "has `images`: only text"),
    ({"prompt": [Q], "chosen": [A], "rejected": [BAD], "images": ["a.png"]}, "unknown-shape", "has `images`: only text"),
    ({"messages": [Q, CALL, {"role": "tool", "content": "1"}, A]}, "unknown-shape", "messages.1.tool_calls: calls of tools"),
    ({"messages": [Q, A, {"role": "tool", "content": "1"}, A]}, "unknown-shape", "messages.2.role: tool: calls of tools"),
    ({"conversations": [*shared(Q), {"from": "function_call", "value": "f"}]}, "unknown-shape", "conversations.1.from: "),
    ({"messages": [Q, A | {"weight": 0}]}, "unknown-shape", "messages.1.weight: every answer weighs 1"),
    ({"messages": [Q, A | {"reasoning_content": "so"}]}, "unknown-shape", "messages.1.reasoning_content: is nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]}, "unknown-shape",
     "messages.0.content.0: is a part of type image_url: only text"),
    ({"prompt": "one", "completion": "two", "label": True}, "unknown-shape", "has a `label`, as KTO's rows"),
    ({"prompt": [Q], "completion": [A], "label": 0}, "unknown-shape", "has a `label`, as KTO's rows"),
    ({"messages": [Q, A], "prompt": "one", "completion": "two"}, "unknown-shape",
     "could be messages {messages, system?} and prompt-completion {prompt, completion, input?, context?, system?}"),
    ({"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, BAD]}, "unknown-shape", "could be messages {messages, system?} and "),
    ({"text": "x"}, "unknown-shape", "has no known shape (found: text)"),
    ({}, "unknown-shape", "has no known shape (found: nothing)"),
    ({f"column {n}": 1 for n in range(99)}, "unknown-shape", "has no known shape (found: column 0, "),
    ({"messages": [SYSTEM, Q, A], "system": "Other."}, "role-order", "has a `system`, and another one as its first message"),
    ({"messages": [Q, A], "system": ["x"]}, "wrong-type", "system: is a list, not a text"),
    ({"conversations": [{"from": "narrator", "value": "x"}, *shared(A)]}, "wrong-type",
     'conversations.0.from: is "narrator", none of'),
    ({"conversations": [*shared(Q), {"from": "gpt", "value": " "}]}, "empty-field", "conversations.1.value: is empty"),
    ({"conversations": [*shared(Q), {"from": "gpt"}]}, "missing-field", "conversations.1.content: is missing"),
    ({"conversations": [*shared(Q), {"from": "gpt", "value": [{"type": "image"}]}]}, "unknown-shape",
     "conversations.1.value.0: is a part of type image"),
    ({"conversations": "hi"}, "wrong-type", "conversations: is a text, not a list"),
    ({"conversations": []}, "empty-field", "conversations: is empty"),
    ({"prompt": [Q], "completion": [assistant("")]}, "empty-field", "completion.0.content: is empty"),
    ({"messages": [Q, A], "system_prompt": 7}, "wrong-type", "system_prompt: is a number, not a text"),
    ({"conversations": shared(A, Q)}, "role-order", "roles must be"),
    ({"messages": "hi"}, "wrong-type", "messages: "),
    ({"messages": [Q, 7]}, "wrong-type", "messages.1: "),
    ({"prompt": 7, "completion": "two"}, "wrong-type", "prompt: is a number, neither a text nor messages"),
    ({"prompt": "one", "completion": " "}, "empty-field", "completion: is empty"),
    ({"instruction": "x", "input": ["y"], "output": "z"}, "wrong-type", "instruction and input: are not both texts"),
    ({"instruction": "x", "output": "z", "history": "y"}, "wrong-type", "history: is a text, not a list of pairs"),
    ({"instruction": "x", "output": "z", "history": [["y"]]}, "wrong-type", "history.0: is no pair"),
    ({"instruction": "x", "output": "z", "history": [["y", None]]}, "wrong-type", "history.0.1: is null, not a text"),
    ({"chosen": [Q, A], "rejected": [Q2, A2]}, "prompt-mismatch", "chosen and rejected differ from message 1 on"),
    ({"chosen": [Q, A, Q2, A2], "rejected": [Q, BAD, Q2, A]}, "prompt-mismatch", "chosen and rejected differ from message 2 on"),
    ({"chosen": [Q, A], "rejected": [Q, BAD, Q2, A]}, "prompt-mismatch", "chosen and rejected differ from message 2 on"),
    ({"chosen": [], "rejected": [Q, A]}, "prompt-mismatch", "chosen and rejected differ from message 1 on"),
    ({"chosen": dialogue(Q, A), "rejected": dialogue(Q2, A)}, "prompt-mismatch", "chosen and rejected differ from message 1"),
    ({"prompt": "one", "chosen": [Q, A], "rejected": [Q2, BAD]}, "prompt-mismatch", "rejected begins with another prompt"),
    ({"prompt": [Q2], "chosen": [Q, A], "rejected": [BAD]}, "prompt-mismatch", "chosen begins with another prompt"),
    ({"chosen": [Q, A], "rejected": [Q, A]}, "same-sides", "chosen and rejected are the same text"),
    ({"chosen": "two", "rejected": "five"}, "missing-field", "has no `prompt` (found: chosen, rejected)"),
    ({"chosen": [A], "rejected": [BAD]}, "missing-field", "has no `prompt` (found: chosen, rejected)"),
    ({"chosen": [A]}, "missing-field", "has no `prompt` (found: chosen)"),
    ({"chosen": 1, "rejected": 2}, "missing-field", "has no `prompt`"),
    ({"chosen": [Q, 7], "rejected": [Q, 8]}, "wrong-type", "chosen.1: is a number, not a message"),
    ({"question": "q", "choices": ["a", "b"]}, "missing-field", "has no `answer` (found: question, choices)"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "rule", "what"), REFUSED)
def test_what_cannot_be_said_in_the_projects_shapes_is_refused(values: dict[str, Any], rule: str, what: str) -> None:
    found = fault(values)
    assert found.rule == rule and found.what.startswith(what), found.what
    assert len(found.what) < 300


def test_unknown_shape_names_the_known_ones() -> None:
    remedy = fault({"text": "x"}).remedy
    for known in FORMATS:
        assert known.shape in remedy


def test_kind_decides_between_formats() -> None:
    both = {"messages": [Q, A], "prompt": "one", "chosen": [Q, A], "rejected": [Q, BAD]}
    pair = row(both, PreferencePair)
    assert isinstance(pair, PreferencePair) and (pair.asked, pair.answers) == (["one"], ["two", "five"])
    assert row(both, Conversation).answers == ["two"]


@pytest.mark.parametrize(
    ("values", "kind", "field"),
    [
        (ONE_TURN[7], Question, "key_points"),
        ({"question": "q", "answer": "a"}, MultipleChoice, "choices"),
        ({"text": "x"}, Conversation, "messages"),
    ],
)
def test_row_of_another_kind_than_wanted_says_the_field_it_misses(
    values: dict[str, Any], kind: type[Row], field: str
) -> None:
    found = fault(values, kind)
    assert (found.rule, found.what) == ("missing-field", f"has no `{field}` (found: {', '.join(values)})")
    assert f'"{field}"' in found.remedy


@pytest.mark.parametrize("content", SAME)
def test_conversation_among_pairs_and_pair_among_conversations_say_so(content: str) -> None:
    for values in SAME[content]:
        if {"conversations", "chosen"} <= values.keys():
            continue  # holds both, and the kind decides
        wanted, said = (PreferencePair, "is a conversation, and preference pairs are wanted")
        if "chosen" in values:
            wanted, said = (Conversation, "is a preference pair, and conversations are wanted")
        found = fault(values, wanted)
        assert (found.rule, found.what) == ("missing-field", said)
        assert "naming pairs in training_data.dpo" in found.remedy


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_null_in_a_field_of_a_known_format_is_an_empty_field_whatever_the_kind(known: Format) -> None:
    whole = next(v for v in [*ONE_TURN, *PAIR, *EVALUATION] if v.keys() >= {*known.fields})
    for field in known.fields:
        values = {name: whole[name] for name in known.fields} | {field: None, "system": None, "id": "r"}
        rest = {name for name in known.fields if name != field}
        told = not any({*other.fields} <= rest for other in FORMATS)  # else it may be the other, whole
        for kind in (None, known.becomes) if told else (known.becomes,):
            found = fault(values, kind)
            assert (found.rule, found.what) == ("empty-field", f"{field}: is empty")


def test_null_beside_whole_fields_of_another_format_is_no_fault() -> None:
    for rest in ({"response": None}, {"chosen": None, "rejected": None}, {"choices": None, "question": None}):
        assert row({"prompt": "one", "completion": "two"} | rest).answers == ["two"]
    for nulls in ({"prompt": "one", "chosen": None}, {"prompt": "one", "completion": None}):
        pair = {"chosen": [Q, A], "rejected": [Q, BAD]}
        assert row(pair | {"prompt": None}).answers == ["two", "five"]
        assert fault(nulls | {"rejected": None}).rule == "empty-field"


def test_instruction_that_is_null_before_an_input_is_the_input_alone() -> None:
    assert row({"instruction": None, "input": "one", "output": "two"}).asked == ["one"]
    assert fault({"instruction": None, "input": None, "output": "two"}).what == "instruction: is empty"


@pytest.mark.parametrize(
    ("values", "renamed"),
    [
        ({"Prompt": "x", " completion": "y"}, "rename `Prompt` to `prompt`, ` completion` to `completion`"),
        ({"Prompt": "x", "completion": "y"}, "rename `Prompt` to `prompt`"),
        ({"Messages": [Q, A], "System": "x"}, "rename `Messages` to `messages`"),
        ({"Prompt": "x", "text": "y"}, "rename `Prompt` to `prompt`; {messages, system?}; "),
    ],
)
def test_field_known_but_for_case_and_blanks_is_named_with_its_right_name(values: dict[str, Any], renamed: str) -> None:
    for kind in (None, Conversation):
        found = fault(values, kind)
        assert (found.rule, found.what) == ("unknown-shape", f"has no known shape (found: {', '.join(values)})")
        assert found.remedy == renamed or (renamed.endswith("; ") and found.remedy.startswith(renamed))


def test_message_of_any_odd_kind_is_a_fault_and_never_an_error() -> None:
    odd: list[Any] = [
        None,
        1,
        1.5,
        True,
        "x",
        "",
        [],
        {},
        [[]],
        [{}],
        [None],
        {"role": 1},
        {"from": []},
        {"from": {}},
        "Human:",
    ]
    odd += [[{"role": [], "content": []}], [{"content": [1]}], [{"role": "user", "content": {"a": 1}}], [[1, 2]]]
    for known in FORMATS:
        for field in (*known.fields, *known.optional, "id", "label", "tools"):
            for value in odd:
                good = {name: "x" for name in known.fields} | {field: value}
                for kind in (None, known.becomes):
                    try:
                        row(good, kind)
                    except RowFault:
                        continue


@pytest.mark.parametrize("about", ["input", "context"])
@pytest.mark.parametrize("asked,said", [("question", "answer"), ("instruction", "response"), ("prompt", "completion")])
def test_what_a_question_is_about_is_never_left_out(about: str, asked: str, said: str) -> None:
    kind, values = converted({asked: "Count them.", about: "CREATE TABLE t (a int);", said: "Done."})
    assert kind is Conversation
    assert values["messages"][0] == {"role": "user", "content": "Count them.\n\nCREATE TABLE t (a int);"}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "input": "one", "context": "another"},
        {"prompt": "q", "completion": "a", "system": "one", "system_prompt": "another"},
    ],
)
def test_two_texts_for_one_place_are_refused(row: dict[str, str]) -> None:
    with pytest.raises(RowFault, match=r"has (both|two)"):
        converted(row)


def test_a_field_without_a_name_is_no_context() -> None:
    _, values = converted({"question": "q", "answer": "a", "": "stray"})
    assert values["messages"][0]["content"] == "q"
