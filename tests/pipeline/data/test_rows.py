"""Rows at the door: what is read, what is refused with file and line, and what a hash counts."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, MultipleChoice, PreferencePair, Question, Row, describe, row_hash
from pipeline.errors import UserError
from pipeline.workspace import Workspace

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
Read = Callable[..., list[Any]]
ROWS: dict[type[Row], dict[str, Any]] = {
    Conversation: {"messages": [USER, ASSISTANT]},
    PreferencePair: {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
    Question: {"prompt": "q", "key_points": ["k"]},
    MultipleChoice: {"question": "q", "choices": ["a", "b"], "answer": 1},
}


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ROWS)
def test_only_the_text_fields_are_required_and_unknown_ones_are_kept(read: Read, kind: type[Row]) -> None:
    (row,) = read(json.dumps(ROWS[kind] | {"source": "wiki"}), kind=kind)
    assert (row.id, row.where, row.domain) == ("rows.jsonl:1", "rows.jsonl:1", "unknown")
    assert row.source == "wiki"


@pytest.mark.parametrize("kind", ROWS)
def test_missing_text_field_is_named_with_file_line_and_the_shape_wanted(read: Read, kind: type[Row]) -> None:
    for field in ROWS[kind]:
        values = {k: v for k, v in ROWS[kind].items() if k != field} | {"text": "?"}
        with pytest.raises(UserError) as error:
            read(json.dumps(ROWS[kind]), json.dumps(values), kind=kind)
        assert str(error.value).startswith(f"rows.jsonl:2: has no `{field}` (found: ")
        assert "text)" in str(error.value) and f'"{field}"' in error.value.remedy


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON: "),
        ("[1]", "is a list, not an object"),
        ("[" * 100_000, "is nested too deeply"),
        (b'{"messages": "\xff"}', "is not UTF-8 (byte 15)"),
        ('{"messages": []}', "messages: is empty"),
        ('{"messages": "hi"}', "messages: "),
    ],
)
def test_line_that_is_no_row_is_refused_with_file_and_line(read: Read, line: str | bytes, said: str) -> None:
    good = json.dumps(ROWS[Conversation])
    with pytest.raises(UserError) as error:
        read(good, "", line, good)
    assert str(error.value).startswith("rows.jsonl:3: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER, USER], "roles must be"),
        ([ASSISTANT, USER], "roles must be"),
        ([USER, ASSISTANT, USER], "the last message must be the assistant's"),
        ([{"role": "system", "content": "s"}, ASSISTANT], "roles must be"),
        ([USER, {"role": "system", "content": "s"}, ASSISTANT], "roles must be"),
        ([{"role": "human", "content": "q"}, ASSISTANT], "messages.0.role"),
        ([USER, {"role": "assistant", "content": " \n"}], "messages.1.content: is empty"),
        ([USER, {"role": "assistant", "content": None}], "messages.1.content"),
        ([USER, {"role": "assistant", "content": "a\ud800"}], "messages.1.content"),
        ([USER, ASSISTANT | {"weight": 0}], "messages.1.weight"),
    ],
)
def test_conversation_that_cannot_be_trained_is_refused(read: Read, messages: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^rows.jsonl:1: .*{said}"):
        read(json.dumps({"messages": messages}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": [{"role": "assistant", "content": " a\n"}]}, "chosen and rejected are the same text"),
        ({"prompt": [USER, ASSISTANT]}, "roles must be"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "roles must be"),
        ({"rejected": [USER]}, "chosen and rejected must be the assistant's"),
        ({"chosen": [ASSISTANT, ASSISTANT]}, "chosen: "),
        ({"prompt": []}, "prompt: "),
    ],
)
def test_pair_that_cannot_be_trained_is_refused(read: Read, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^rows.jsonl:1: {said}"):
        read(json.dumps(ROWS[PreferencePair] | change), kind=PreferencePair)


@pytest.mark.parametrize("answer", [2, -1, "1", True])
def test_answer_that_is_no_choice_is_refused(read: Read, answer: Any) -> None:
    with pytest.raises(UserError, match=r"^rows.jsonl:1: answer"):
        read(json.dumps(ROWS[MultipleChoice] | {"answer": answer}), kind=MultipleChoice)


def test_byte_order_mark_crlf_and_blank_lines_are_read(read: Read) -> None:
    row = json.dumps(ROWS[Conversation]).encode()
    rows = read(b"\xef\xbb\xbf" + row + b"\r", b"\r", row, b"")
    assert [r.where for r in rows] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_line_separators_inside_a_text_do_not_end_the_row(read: Read) -> None:
    text = "a\u2028b\u0085c\x0bd"
    values = {"messages": [USER, {"role": "assistant", "content": text}]}
    (row,) = read(json.dumps(values, ensure_ascii=False))
    assert row.messages[1].content == text


def test_id_that_stands_twice_is_refused_with_both_places(read: Read) -> None:
    row = json.dumps(ROWS[Conversation] | {"id": "x"})
    with pytest.raises(UserError, match=r"^rows.jsonl:2: the id `x` stands at rows.jsonl:1 too$"):
        read(row, row)


def test_folder_is_read_whole_in_the_order_of_names(home: Workspace) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        path = home.path(f"rows/{name}")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(ROWS[Conversation]))
    home.path("rows/README.md").write_text("not rows")
    assert [r.where for r in read_rows(home, "rows", Conversation)] == [
        "rows/a.jsonl:1", "rows/b.jsonl:1", "rows/deep/c.jsonl:1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("empty.jsonl", "empty.jsonl: holds no rows"),
        ("folder", r"folder: holds no .jsonl file or other rows \(found: .txt\); try .jsonl, "),
    ],
)
def test_nothing_to_read_says_what_is_there(home: Workspace, name: str, said: str) -> None:
    home.path("empty.jsonl").write_text("\n")
    home.path("folder").mkdir()
    home.path("folder/rows.txt").write_text("a,b")
    with pytest.raises(UserError, match=f"^{said}"):
        read_rows(home, name, Conversation)


# ── Hash and split ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_description_depends_on_content_not_on_order_or_place(read: Read) -> None:
    one, two = (json.dumps({"messages": [USER, {"role": "assistant", "content": c}]}) for c in "ab")
    first = describe(read(one, two))
    assert first == describe(read("", two, one))
    assert first["rows"] == 2 and first["domains"] == {"unknown": 2}
    assert first["sha256"] != describe(read(one, two.replace('"b"', '"c"')))["sha256"]


def test_hash_counts_every_field_of_a_row() -> None:
    row = Conversation.model_validate(ROWS[Conversation] | {"id": "x"})
    hashes = {row_hash(row.model_copy(update=u)) for u in ({}, {"id": "y"}, {"domain": "y"}, {"difficulty": "y"})}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("extra", "said"),
    [('"\\ud800"', "half of a character"), ("[" * 300 + "]" * 300, "nested too deeply")],
)
def test_field_that_could_not_be_written_again_is_refused(read: Read, extra: str, said: str) -> None:
    line = json.dumps(ROWS[Conversation])[:-1] + f', "note": {extra}}}'
    with pytest.raises(UserError, match=f"^rows.jsonl:1: .*{said}"):
        read(line)
