"""`--fix`: mends what is safe, says what, keeps the file as it was, and touches nothing else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Check
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.gate.fix import fix
from pipeline.gate.text import tidy
from pipeline.workspace import Workspace


@pytest.fixture
def home(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def talk(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | more


def line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def mended(home: Workspace, content: bytes, check: Check | None = None) -> bytes:
    path = home.path("rows.jsonl")
    path.write_bytes(content)
    fix(home, sources(home, "rows.jsonl"), check or Check())
    return path.read_bytes()


ODD = b'{"messages":[{"role":"user","content":"why" } ,{"content":"so","role":"assistant"}],   "x":1e3}\r\n'


def test_white_space_around_answers_is_stripped_and_around_prompts_is_not(home: Workspace) -> None:
    found = mended(home, line(talk(" q ", "\n a \n")) + line(talk("r", "b")))
    assert found == line(talk(" q ", " a")) + line(talk("r", "b"))


def test_lines_that_need_nothing_stay_byte_for_byte(home: Workspace) -> None:
    rest = ODD + b"\n" + b"{broken\n" + b"[1]\n" + line(talk("r", "b"))[:-1]
    assert mended(home, line(talk("q", "a ")) + rest) == line(talk("q", "a")) + rest


def test_duplicates_are_dropped_but_the_first_across_files(home: Workspace) -> None:
    for name in ("a", "b"):
        home.path(f"{name}.jsonl").write_bytes(line(talk("q", "a", id=name)) + line(talk(name, name)))
    fix(home, [*sources(home, "a.jsonl"), *sources(home, "b.jsonl")], Check())
    assert home.path("a.jsonl").read_bytes() == line(talk("q", "a", id="a")) + line(talk("a", "a"))
    assert home.path("b.jsonl").read_bytes() == line(talk("b", "b"))


def test_byte_order_marks_are_taken_out(home: Workspace) -> None:
    content = (
        b"\xef\xbb\xbf"
        + line(talk("q", "a"))
        + line(talk("r\ufeff", "b"))
        + b'{"prompt": "p", "completion": "\\ufeffc"}\n'
    )
    assert mended(home, content) == (
        line(talk("q", "a")) + line(talk("r", "b")) + line({"prompt": "p", "completion": "c"})
    )


def test_the_file_as_it_was_is_kept_and_named(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    content = line(talk("q", "a ")) + line(talk("q", "a"))
    mended(home, content)
    [kept] = [path for path in home.root.iterdir() if path.name != "rows.jsonl"]
    assert kept.name.startswith(".") and kept.read_bytes() == content
    said = capsys.readouterr().err
    assert "1 duplicate rows taken out" in said and "1 rows with white space" in said and kept.name in said
    assert [s.shown for s in sources(home, ".")] == ["rows.jsonl"], "what is kept is not read as rows"


def test_nothing_to_mend_writes_nothing(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    path = home.path("rows.jsonl")
    path.write_bytes(ODD)
    before = path.stat()
    fix(home, sources(home, "rows.jsonl"), Check())
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(home.root.iterdir()) == [path] and capsys.readouterr().err == ""


def test_mending_twice_is_mending_once(home: Workspace) -> None:
    once = mended(home, line(talk("q", "a ")) + line(talk("q", "a")) + ODD)
    assert mended(home, once) == once


@pytest.mark.parametrize("rule", ["edge-whitespace", "duplicate"])
def test_rule_that_is_left_out_mends_nothing(home: Workspace, rule: str) -> None:
    content = {"edge-whitespace": line(talk("q", "a ")), "duplicate": line(talk("q", "a")) * 2}[rule]
    assert mended(home, content, Check(ignore=[rule])) == content


def test_files_that_are_not_plain_jsonl_are_said_to_be_left(
    home: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    home.path("rows.csv").write_text("prompt,completion\nq, a \n")
    fix(home, sources(home, "rows.csv"), Check())
    assert "rows.csv is not mended" in capsys.readouterr().err
    assert home.path("rows.csv").read_text() == "prompt,completion\nq, a \n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    a = 1\n    return a", "    a = 1\n    return a"),
        ("\n \r\n\t\n    a = 1\n\n\u3000\n", "    a = 1"),
        ("\u3000\u4e00\u4e2a", "\u3000\u4e00\u4e2a"),
        ("a\n\n b", "a\n\n b"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_tidying_leaves_the_indentation_of_the_first_line(text: str, expected: str) -> None:
    assert tidy(text) == expected == tidy(tidy(text))


@pytest.mark.parametrize("again", ["rows.jsonl", ".", "folder", "link.jsonl", "hard.jsonl"])
def test_a_file_that_is_named_twice_is_mended_once(home: Workspace, again: str) -> None:
    path, content = home.path("rows.jsonl"), line(talk("q", "a")) + line(talk("r", "b "))
    path.write_bytes(content)
    home.path("elsewhere").mkdir()
    home.path("elsewhere/more.jsonl").symlink_to(path)
    home.path("folder").symlink_to(home.path("elsewhere"))
    home.path("link.jsonl").symlink_to(path)
    home.path("hard.jsonl").hardlink_to(path)
    fix(home, [*sources(home, "rows.jsonl"), *sources(home, again)], Check())
    assert path.read_bytes() == line(talk("q", "a")) + line(talk("r", "b"))
    assert home.path("hard.jsonl").read_bytes() == content


_TURNS = b'"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a "}]'


@pytest.mark.parametrize(
    "faulty",
    [
        b'{"id": "1", "id": "2", ' + _TURNS + b"}\n",
        b'{"x": NaN, ' + _TURNS + b"}\n",
        b'{"x": "\\ud800", ' + _TURNS + b"}\n",
        b'{"x": "\\ud800", "y": "\\ufeff", ' + _TURNS + b"}\n",
        b'{"messages": [{"role": "user", "content": "\\uD800"}, {"role": "assistant", "content": "a "}]}\n',
        b'{"x": "\xe9", ' + _TURNS + b"}\n",
        b'{"tools": ["f"], ' + _TURNS + b"}\n",
        b'{"prompt": "q", "completion": ""}\r\n',
        b'{"prompt": "q", "completion": "\\ufeff"}\n',
        b'{"prompt": "q", "chosen": "a\xef\xbb\xbf", "rejected": "a"}\n',
        b'{"x": 1,\r ' + _TURNS + b"}\n",
        b"[" * 100_000 + b"\n",
        b'"text "\n',
    ],
)
def test_a_line_with_a_fault_stays_byte_for_byte(home: Workspace, faulty: bytes) -> None:
    content = line(talk("r", "b "))
    assert mended(home, faulty * 2 + content) == faulty * 2 + line(talk("r", "b"))
    assert mended(home, b"\xef\xbb\xbf" + faulty) == b"\xef\xbb\xbf" + faulty


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_of_another_encoding_is_said_to_be_left(
    home: Workspace, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (line(talk("q", "a ")) * 2).decode().encode(encoding)
    assert mended(home, content) == content
    assert "rows.jsonl is not mended: it is UTF-16 or another encoding" in capsys.readouterr().err


def test_a_byte_order_mark_that_is_only_spelled_is_no_mark(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    content = b'{"prompt":"what is \\\\ufeff?",   "completion":"\\\\uFEFF is a mark"}\n'
    assert json.loads(content)["prompt"] == "what is \\ufeff?"
    assert mended(home, content) == content and capsys.readouterr().err == ""


def test_rows_keep_their_format_keys_order_and_line_ends(home: Workspace) -> None:
    rows: list[dict[str, Any]] = [
        {"x": {"answer": " y "}, "output": "é ", "input": "", "instruction": "q", "id": 7},
        {"conversations": [{"from": "human", "value": " q "}, {"from": "bot", "value": "b\n"}], "output": None},
        {"rejected": "r ", "chosen": [{"role": "assistant", "content": "c "}], "prompt": "p "},
        {"prompt": [{"role": "user", "content": "u "}], "completion": [{"role": "assistant", "content": "c "}]},
        {"question": "q", "choices": ["a ", "b"], "answer": 0},
    ]
    content = b"".join(line(row)[:-1] + b"\r\n" for row in rows)[:-2]
    assert mended(home, content) == (
        content.replace("é ".encode(), "é".encode())
        .replace(b"b\\n", b"b")
        .replace(b'"r "', b'"r"')
        .replace(b'"c "', b'"c"')
    )


def test_dialogues_whose_answers_are_read_without_their_edges_need_nothing(home: Workspace) -> None:
    start = "\n\nHuman: q\n\nAssistant: "
    content = line({"chosen": f"{start}a ", "rejected": f"{start}b "})
    assert mended(home, content) == content


def test_a_duplicate_of_a_row_that_is_none_is_kept(home: Workspace) -> None:
    content = line(talk("q", "a", domain=1)) + line(talk("q", "a"))
    assert mended(home, content) == content


def test_of_a_link_the_target_is_mended_and_its_mode_kept(home: Workspace) -> None:
    home.path("real").mkdir()
    target, link = home.path("real/target.jsonl"), home.path("link.jsonl")
    target.write_bytes(line(talk("q", "a ")))
    target.chmod(0o640)
    link.symlink_to(target)
    fix(home, sources(home, "link.jsonl"), Check())
    assert link.is_symlink() and target.read_bytes() == line(talk("q", "a"))
    assert target.stat().st_mode & 0o7777 == 0o640
    assert [p.name for p in home.root.iterdir() if p.name.startswith(".")] == []


def test_a_file_that_is_read_only_is_as_it_was(home: Workspace) -> None:
    content, path = line(talk("q", "a ")), home.path("rows.jsonl")
    path.write_bytes(content)
    path.chmod(0o444)
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be mended, and is as it was: .*read-only"):
        fix(home, sources(home, "rows.jsonl"), Check())
    assert [p.name for p in home.root.iterdir()] == ["rows.jsonl"] and path.read_bytes() == content


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_on_the_way_loses_nothing(
    home: Workspace, monkeypatch: pytest.MonkeyPatch, call: str, fault: BaseException
) -> None:
    def failing(*_: object) -> None:
        raise fault

    monkeypatch.setattr(os, call, failing)
    content = line(talk("q", "a "))
    with pytest.raises((UserError, KeyboardInterrupt), match="No space" if isinstance(fault, OSError) else None):
        mended(home, content)
    assert [p.name for p in home.root.iterdir()] == ["rows.jsonl"] and home.path("rows.jsonl").read_bytes() == content


def test_an_interrupt_after_the_file_is_replaced_keeps_the_old_one(
    home: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def late(old: Path, new: Path) -> None:
        replace(old, new)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", late)
    content = line(talk("q", "a "))
    with pytest.raises(KeyboardInterrupt):
        mended(home, content)
    assert sorted(p.read_bytes() for p in home.root.iterdir()) == sorted([content, line(talk("q", "a"))])


def test_what_stands_before_the_first_fault_is_copied_whole(home: Workspace) -> None:
    rest = b"".join(line(talk(str(n), "é" * 500)) for n in range(3_000))  # more than a chunk
    assert mended(home, rest + line(talk("q", "a ")) + rest[:99]) == rest + line(talk("q", "a")) + rest[:99]


def test_an_id_is_no_text(home: Workspace) -> None:
    found = mended(home, line(talk("q\ufeff", "a", id="\ufeff1")))
    assert found == line(talk("q", "a", id="\ufeff1"))
