"""`--fix`: mends what is safe, says what, keeps the file as it was, and touches nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Check
from pipeline.data.source import sources
from pipeline.gate.fix import fix
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
    found = mended(home, line(talk(" q ", "\na \n")) + line(talk("r", "b")))
    assert found == line(talk(" q ", "a")) + line(talk("r", "b"))


def test_lines_that_need_nothing_stay_byte_for_byte(home: Workspace) -> None:
    rest = ODD + b"\n" + b"{broken\n" + b"[1]\n" + line(talk("r", "b"))[:-1]
    assert mended(home, line(talk("q", " a")) + rest) == line(talk("q", "a")) + rest


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
    content = line(talk("q", " a")) + line(talk("q", "a"))
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
    once = mended(home, line(talk("q", " a")) + line(talk("q", "a")) + ODD)
    assert mended(home, once) == once


@pytest.mark.parametrize("rule", ["edge-whitespace", "duplicate"])
def test_rule_that_is_left_out_mends_nothing(home: Workspace, rule: str) -> None:
    content = {"edge-whitespace": line(talk("q", " a")), "duplicate": line(talk("q", "a")) * 2}[rule]
    assert mended(home, content, Check(ignore=[rule])) == content


def test_files_that_are_not_plain_jsonl_are_said_to_be_left(
    home: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    home.path("rows.csv").write_text("prompt,completion\nq, a \n")
    fix(home, sources(home, "rows.csv"), Check())
    assert "rows.csv is not mended" in capsys.readouterr().err
    assert home.path("rows.csv").read_text() == "prompt,completion\nq, a \n"


def test_a_disk_that_is_full_loses_nothing(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    content = line(talk("q", " a"))
    with pytest.raises(OSError, match="No space"):
        mended(home, content)
    assert [p.name for p in home.root.iterdir()] == ["rows.jsonl"] and home.path("rows.jsonl").read_bytes() == content
