"""Sources: the same rows out of every kind of file, each with its line, and a fault for whatever cannot be read."""

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.raw import Raw
from pipeline.data.rows import place
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.workspace import Workspace

ROWS: list[dict[str, Any]] = [
    {"id": "a", "messages": [{"role": "user", "content": "one\ntwo, \"three\" é 你 \u2028 🙂"}], "domain": "d"},
    {"id": "b", "messages": [{"role": "user", "content": "[x]"}, {"role": "assistant", "content": "{y}"}]},
    {"id": "c", "messages": [{"role": "user", "content": "z"}], "domain": "1"},
]  # fmt: skip


def lines(rows: list[Any]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def table(delimiter: str) -> Callable[[list[dict[str, Any]]], str]:
    def written(rows: list[dict[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["id", "domain", "messages"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(row | {"messages": json.dumps(row["messages"], indent=1)} for row in rows)
        return text.getvalue()

    return written


WRITTEN: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {
    "lines": ("rows.jsonl", lines),
    "ndjson": ("rows.ndjson", lines),
    "upper case": ("ROWS.JSONL", lines),
    "list": ("rows.json", json.dumps),
    "indented list": ("rows.json", lambda rows: json.dumps(rows, indent=2)),
    "list under a name": ("rows.json", lambda rows: json.dumps({"version": 1.5, "data": rows, "more": {"a": [1]}})),
    "objects one after another": ("rows.json", lambda rows: " ".join(json.dumps(r, indent=1) for r in rows)),
    "csv": ("rows.csv", table(",")),
    "tsv": ("rows.tsv", table("\t")),
}


def write(home: Workspace, name: str, content: str | bytes) -> None:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path = home.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def source(home: Workspace, name: str) -> Source:
    [found] = sources(home, name)
    return found


def read(home: Workspace, name: str, content: str | bytes) -> list[Raw]:
    write(home, name, content)
    return list(source(home, name).raws())


def values(raws: list[Raw]) -> list[Any]:
    """Of each row; a table's field that is null is as one that is not there."""
    assert not [raw.fault for raw in raws if raw.fault]
    return [{field: value for field, value in (raw.values or {}).items() if value is not None} for raw in raws]


def places(raws: list[Raw]) -> list[str]:
    return [place("", raw.line, raw.item) for raw in raws]


def faults(raws: list[Raw]) -> list[tuple[int, str, str]]:
    """Line, rule and reason of each; a row has either a fault or values."""
    assert all((raw.values is None) == (raw.fault is not None) for raw in raws)
    return [(raw.line, raw.fault.rule, raw.fault.what) for raw in raws if raw.fault]


def found(raws: list[Raw]) -> list[int]:
    return [raw.line for raw in raws if raw.values is not None]


# ── The same rows out of everything ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_every_kind_of_file_gives_the_same_rows_with_rising_lines(home: Workspace, kind: str, packed: str) -> None:
    name, written = WRITTEN[kind]
    raws = read(home, name + packed, written(ROWS))
    assert values(raws) == ROWS
    assert found(raws) == sorted(found(raws)) and found(raws)[0] >= 1


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_other_line_ends_and_a_byte_order_mark_change_neither_rows_nor_lines(
    home: Workspace, kind: str, end: str
) -> None:
    name, written = WRITTEN[kind]
    text = written(ROWS).replace("\r\n", "\n")
    plain = read(home, name, text)
    assert read(home, name, b"\xef\xbb\xbf" + text.replace("\n", end).encode()) == plain


@pytest.mark.parametrize("kind", WRITTEN)
def test_file_without_rows_gives_none(home: Workspace, kind: str) -> None:
    name, written = WRITTEN[kind]
    for content in ("", " \n\n", written([]) if kind != "list under a name" else ""):
        assert read(home, name, content) == [] == read(home, f"{name}.gz", content)


def test_a_row_stands_at_the_line_where_it_begins(home: Workspace) -> None:
    assert found(read(home, "a.jsonl", '\n{"a": 1}\n\n{"a": 2}')) == [2, 4]
    assert found(read(home, "a.json", '\n[\n\n{"a":\n1\n}\n,\n{"a": 2}, {"a": 3}]')) == [4, 8, 8]
    assert found(read(home, "a.json", '{"n": 1,\n"rows":\n[\n{"a": 1},\n{}]}')) == [4, 5]
    assert found(read(home, "a.json", '{"a":\n1}\n\n{"a": 2}')) == [1, 4]
    assert found(read(home, "a.csv", 'a,b\n"1\n2\n3",x\n\n4,y\n')) == [2, 6]


def test_rows_that_share_a_line_have_places_of_their_own(home: Workspace) -> None:
    assert places(read(home, "a.json", '[{"a": 1}, 2, {"a": 3},\n{"a": 4}, {"a": 5}]')) == [
        ":1",
        ":1#2",
        ":1#3",
        ":2",
        ":2#5",
    ]
    assert places(read(home, "a.json", '{"a": 1} {"a": 2}\n{"a": 3}')) == [":1", ":1#2", ":2"]
    assert places(read(home, "a.json", '{"rows": [{"a": 1},\n{"a": 2}], "prompt": "x"}')) == [":1", ":2", ":1#3"]
    for kind, (name, written) in WRITTEN.items():
        found = places(read(home, name, written(ROWS * 3)))
        assert len(set(found)) == len(found), kind
        assert kind == "list" or not any("#" in place for place in found) or "one" in kind or "name" in kind


@pytest.mark.parametrize("size", [1, 4095, 65_535, 65_536, 70_000, 200_000])
def test_rows_longer_than_what_is_read_at_a_time_stay_whole(home: Workspace, size: int) -> None:
    rows = [{"id": str(n), "messages": [{"role": "user", "content": 'é\n"\\' * size}]} for n in range(3)]
    for kind, (name, written) in WRITTEN.items():
        assert values(read(home, name, written(rows))) == rows, kind


def test_rows_cut_anywhere_by_what_is_read_at_a_time_stay_whole(
    home: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": [], "n": [-12.5e-7, True, None, "\\u00e9\u00e9\n\t"]}, {"n": 1234567, "s": {}}]
    for characters in range(1, 40):
        monkeypatch.setattr("pipeline.data.json_rows.CHUNK", characters)
        for text in (json.dumps(rows), json.dumps({"v": 12345, "data": rows}), "\n".join(map(json.dumps, rows))):
            assert values(read(home, "a.json", text)) == rows, (characters, text)


@pytest.mark.parametrize("kind", ["lines", "list", "list under a name", "objects one after another", "csv"])
def test_memory_does_not_grow_with_the_file(home: Workspace, kind: str) -> None:
    name, written = WRITTEN[kind]
    rows = [{"id": str(n), "messages": [{"role": "user", "content": "x" * 2000}]} for n in range(12_000)]
    write(home, name, written(rows))
    tracemalloc.start()
    try:
        assert sum(raw.values is not None for raw in source(home, name).raws()) == len(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source(home, name).size > 24e6 > 3 * peak


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_was_read_ends_at_the_size_whenever_it_is_read(home: Workspace, kind: str) -> None:
    name, written = WRITTEN[kind]
    for packed in ("", ".gz"):
        write(home, name + packed, written(ROWS))
        rows = source(home, name + packed)
        for _ in range(2):
            assert list(rows.raws()) and rows.bytes_read == rows.size == home.path(name + packed).stat().st_size


# ── Faults of a row ──────────────────────────────────────────────────────────────────────────────────────────────────

BROKEN = [
    ("{", "broken-json", "is not JSON: "),
    ("{'a': 1}", "broken-json", "is not JSON: "),
    ('{"a": 1}{"a": 2}', "broken-json", "is not JSON: Extra data"),
    ("[" * 100_000, "broken-json", "is nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "broken-json", "is not JSON: Exceeds the limit"),
]
ODD = [
    ('{"a": 1, "b": 2, "a": 3}', "broken-json", "has the key `a` twice"),
    ('{"m": [{"role": "user", "role": "user"}]}', "broken-json", "has the key `role` twice"),
    ('{"a": NaN}', "broken-json", "is not JSON: it holds NaN"),
    ('{"a": -Infinity}', "broken-json", "is not JSON: it holds -Infinity"),
    ('{"a": 1e999}', "broken-json", "holds a number that is too large: 1e999"),
    ("[1]", "wrong-type", "is a list, not an object"),
    ('"text"', "wrong-type", "is a text, not an object"),
    ("null", "wrong-type", "is null, not an object"),
    ("17", "wrong-type", "is a number, not an object"),
]


@pytest.mark.parametrize(("line", "rule", "what"), BROKEN + ODD)
def test_line_that_is_no_row_is_a_fault_and_the_next_is_read(home: Workspace, line: str, rule: str, what: str) -> None:
    raws = read(home, "a.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    [(at, found_rule, said)] = faults(raws)
    assert (at, found_rule) == (2, rule) and said.startswith(what)
    assert found(raws) == [1, 3]


@pytest.mark.parametrize(("line", "rule", "what"), ODD)
def test_object_of_a_document_that_is_no_row_is_a_fault_and_the_next_is_read(
    home: Workspace, line: str, rule: str, what: str
) -> None:
    for content in (f'[{{"a": 1}},\n{line},\n{{"a": 2}}]', f'{{"data": [{{"a": 1}},\n{line},\n{{"a": 2}}]}}'):
        raws = read(home, "a.json", content)
        assert faults(raws) == [(2, rule, what)]
        assert found(raws) == [1, 3]


def test_byte_that_is_no_utf8_costs_its_own_row_alone(home: Workspace) -> None:
    for name, content in {
        "a.jsonl": b'{"a": 1}\n{"a": "\xe9"}\n{"a": 2}',
        "a.json": b'[{"a": 1},\n{"a": "\xe9"},\n{"a": 2}]',
        "a.csv": b"a,b\n\xe9,1\n2,3\n",
    }.items():
        raws = read(home, name, content)
        [(at, rule, what)] = faults(raws)
        assert (at, rule) == (2, "encoding") and what.startswith("is not UTF-8"), name
        assert len(found(raws)) == len(raws) - 1
    assert "(byte 8)" in faults(read(home, "a.jsonl", b'{"a": "\xe9"}'))[0][2]
    assert "(byte 10)" in faults(read(home, "a.jsonl", '{"a": "é你'.encode()[:-1] + b'"}'))[0][2]


def test_row_of_a_table_with_more_or_fewer_cells_than_the_header_is_a_fault(home: Workspace) -> None:
    raws = read(home, "a.csv", 'a,b\n1,2\n"x\ny"\n1,2,3\n3,4\n')
    assert faults(raws) == [
        (3, "broken-json", "has 1 cell, and the header 2"),
        (5, "broken-json", "has 3 cells, and the header 2"),
    ]
    assert found(raws) == [2, 6]


def test_empty_cell_is_a_field_that_is_null(home: Workspace) -> None:
    [raw] = read(home, "a.csv", "prompt,completion,choices\nx,,\n")
    assert raw.values == {"prompt": "x", "completion": None, "choices": None}


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_table_with_another_delimiter_is_read_with_it_and_says_so_once(
    home: Workspace, capsys: pytest.CaptureFixture[str], delimiter: str
) -> None:
    content = '\nprompt;completion\n"a;b";"c, d"\n'.replace(";", delimiter)
    for _ in range(2):
        raws = read(home, "a.csv", content)
        assert values(raws) == [{"prompt": f"a{delimiter}b", "completion": "c, d"}] and found(raws) == [3]
    named = {";": "semicolons", "\t": "tabs"}[delimiter]
    assert capsys.readouterr().err == f"a.csv: its cells stand between {named}, not commas, and it is read so\n"
    assert values(read(home, "a.tsv", "prompt,completion\na,b\n")) == [{"prompt": "a", "completion": "b"}]


def test_usual_delimiter_stays_where_the_header_is_known(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert values(read(home, "a.csv", "prompt,a;b;c;d\nx,y\n")) == [{"prompt": "x", "a;b;c;d": "y"}]
    assert values(read(home, "b.csv", "messages\n1\n")) == [{"messages": "1"}]
    assert capsys.readouterr().err == ""


def test_table_without_a_header_is_one_fault(home: Workspace) -> None:
    for first in ("What is two and two?,4", f"{'word ' * 20},x"):
        [(line, rule, what)] = faults(read(home, "a.csv", f"{first}\nWhat else?,5\n"))
        assert (line, rule) == (1, "broken-file") and "has no header row? Its first row says `" in what
    assert found(read(home, "a.csv", f"prompt,{'note ' * 20}\nx,y\n")) == [2]


def test_windows_1252_is_named_where_it_can_be_told(home: Workspace) -> None:
    said = "looks like Windows-1252: save it as UTF-8"
    for name, content in {
        "a.jsonl": b'{"a": "caf\xe9 \x93x\x94"}',
        "a.json": b'[{"a": "caf\xe9"}]',
        "a.csv": b"a,b\ncaf\xe9,1\n",
        "b.csv": b"caf\xe9,b\n1,1\n",
    }.items():
        [(_, _, what)] = faults(read(home, name, content))
        assert what.endswith(said), name
    for other in ("Привет".encode("cp1251"), b"\xe9 \xc3\xa9", b"\x81"):
        [(_, rule, what)] = faults(read(home, "a.jsonl", b'{"a": "' + other + b'"}'))
        assert rule == "encoding" and said not in what


def test_quote_inside_a_cell_is_a_fault_of_that_row(home: Workspace) -> None:
    raws = read(home, "a.csv", 'a,b\n"say "hi" now",2\n3,4\n')
    [(line, rule, what)] = faults(raws)
    assert (line, rule) == (2, "broken-json") and what.startswith("is not CSV: ")
    assert found(raws) == [3]


def test_cell_that_is_a_list_is_read_as_one_only_where_a_field_wants_it(home: Workspace) -> None:
    text = io.StringIO()
    message = [{"role": "user", "content": "x"}]
    cells = {"prompt": "[1, 2] is a list?", "chosen": json.dumps(message), "choices": '["a", "b"]', "answer": "1",
             "completion": "{} is empty", "rejected": "[1, 2]", "note": '["kept"]', "empty": ""}  # fmt: skip
    writer = csv.writer(text)
    writer.writerows([cells.keys(), cells.values()])
    assert values(read(home, "a.csv", text.getvalue())) == [
        {k: v for k, v in cells.items() if v} | {"chosen": message, "choices": ["a", "b"], "answer": 1}
    ]
    text = io.StringIO()
    csv.writer(text).writerows([["messages"], ['[{"role": "user", "role": "user"}]']])
    assert faults(read(home, "a.csv", text.getvalue())) == [(2, "broken-json", "has the key `role` twice")]


def test_column_without_a_name_is_kept_under_its_number(home: Workspace) -> None:
    assert values(read(home, "a.csv", ",question\n0,x\n")) == [{"column_1": "0", "question": "x"}]


# ── Files that cannot be read to their end ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_one_fault(home: Workspace, kind: str, encoding: str) -> None:
    name, written = WRITTEN[kind]
    for packed in ("", ".gz"):
        [(line, rule, what)] = faults(read(home, name + packed, written(ROWS).encode(encoding)))
        assert (line, rule) == (1, "broken-file") and "not UTF-8" in what


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["lines", "list", "csv"])
def test_truncated_gzip_gives_its_rows_and_then_the_fault(home: Workspace, kind: str, share: float) -> None:
    name, written = WRITTEN[kind]
    rows = [{"id": str(n), "messages": [{"role": "user", "content": os.urandom(300).hex()}]} for n in range(2000)]
    write(home, f"{name}.gz", written(rows))
    path = home.path(f"{name}.gz")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    raws = list(source(home, f"{name}.gz").raws())
    [(line, rule, what)] = faults(raws)
    assert raws[-1].fault and rule == "broken-file" and "ends too early" in what
    assert values(raws[:-1]) == rows[: len(raws) - 1] and len(raws) > 1
    assert line == raws[-2].line + 1


def test_damaged_gzip_is_a_fault_and_so_is_a_name_that_promises_one(home: Workspace) -> None:
    write(home, "a.jsonl.gz", lines(ROWS * 1000))
    path = home.path("a.jsonl.gz")
    packed = path.read_bytes()
    for content in (packed[:200] + b"\0" * 50 + packed[250:], packed[:-8] + b"12345678", packed + b"more"):
        path.write_bytes(content)
        raws = list(source(home, "a.jsonl.gz").raws())
        (_, rule, what) = faults(raws)[-1]
        assert raws[-1].fault and rule == "broken-file" and "the gzip file is damaged" in what
    path.write_bytes(lines(ROWS).encode())
    assert faults(list(source(home, "a.jsonl.gz").raws())) == [(1, "broken-file", "is not gzip")]


def test_gzip_without_its_name_is_read_all_the_same(home: Workspace) -> None:
    assert values(read(home, "a.jsonl", gzip.compress(lines(ROWS).encode()))) == ROWS


@pytest.mark.parametrize(
    ("content", "line", "rows"),
    [
        ('[{"a": 1},\n{"a": 2', 2, 1),
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', 2, 1),
        ('[{"a": 1},\n{"a": "x\ny"}]', 2, 1),
        ('[{"a": 1}\n{"a": 2}]', 2, 1),
        ('[{"a": 1}\n', 2, 1),
        ('[{"a": 1}]\n{"a": 2}', 2, 1),
        ('[{"a": 1}]\n]', 2, 1),
        ('{"data": [{"a": 1}]\n', 2, 1),
        ('{"data": [{"a": 1}],\n2: 3}', 2, 1),
        ('{"a": 1}\n{"a": "\\q"}\n{"a": 1}', 2, 1),
        ("hello", 1, 0),
        ("[" * 100_000, 1, 0),
    ],
)
def test_broken_document_gives_its_rows_and_then_the_fault(home: Workspace, content: str, line: int, rows: int) -> None:
    raws = read(home, "a.json", content)
    [(at, rule, what)] = faults(raws)
    assert (at, rule) == (line, "broken-file") and what.startswith("cannot be read from here on: ")
    assert len(found(raws)) == rows and raws[-1].fault


def test_error_early_in_a_long_document_is_found_without_reading_it_whole(home: Workspace) -> None:
    write(home, "a.json", '[{"a": 1},\n{"a": x},' + '{"a": "text"},' * 500_000 + "{}]")
    rows = source(home, "a.json")
    assert faults(list(rows.raws()))[0][:2] == (2, "broken-file")
    assert rows.bytes_read < rows.size / 2


def test_document_of_two_lists_is_not_half_read_in_silence(home: Workspace) -> None:
    raws = read(home, "a.json", '{"train": [{"a": 1}],\n"test": [{"a": 2}]}')
    assert found(raws) == [1]
    [(line, rule, what)] = faults(raws)
    assert (line, rule) == (2, "broken-file") and "two lists of rows, `train` and `test`, of which the first" in what
    assert raws[-1].fault and raws[-1].fault.remedy == "write each list to a file of its own"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps(ROWS), "is one JSON array"),
        (json.dumps(ROWS * 300, indent=2), "is one JSON array"),
        ("[" + ",\n".join(map(json.dumps, ROWS)) + "]\n", "is one JSON array"),
        (json.dumps(ROWS[0], indent=1), "holds objects of several lines each"),
        ("\n".join(json.dumps(row, indent=4) for row in ROWS), "holds objects of several lines each"),
        (json.dumps({"data": ROWS * 300}, indent=4), "holds objects of several lines each"),
    ],
)
def test_document_named_jsonl_is_one_fault_and_read_under_its_right_name(
    home: Workspace, content: str, what: str
) -> None:
    for name in ("a.jsonl", "a.ndjson.gz"):
        raws = read(home, name, f"\n{content}")
        assert faults(raws) == [(2, "broken-file", f"{what}, not an object a line")]
        assert raws[0].fault and raws[0].fault.remedy == "name it .json"
    assert not faults(read(home, "a.json", content))


@pytest.mark.parametrize(
    "first", ["{", '{"a"', '{"a":', '{"a": "x', '[{"a": 1}]', "[", '[{"a"', "[1]", '"x"', '{"a": 1}}', "[" * 100_000]
)
def test_first_line_that_is_broken_costs_itself_alone(home: Workspace, first: str) -> None:
    raws = read(home, "a.jsonl", f'{first}\n{{"a": 1}}\n\n{{"a": 2}}\n')
    assert [line for line, _, _ in faults(raws)] == [1] and found(raws) == [2, 4]


def test_single_row_with_messages_is_a_row_and_not_a_list_of_them(home: Workspace) -> None:
    row = {"id": "a", "messages": [{"role": "user", "content": "x"}], "sources": [{"url": "y"}]}
    assert values(read(home, "a.json", json.dumps(row, indent=1))) == [row]
    raws = read(home, "a.json", json.dumps({"sources": [{"url": "y"}]} | row))
    assert faults(raws)[-1][1:] == (
        "wrong-type",
        "holds a list of objects, `sources`, beside fields of a row: messages",
    )


def test_key_that_stands_twice_in_the_first_object_is_a_fault_too(home: Workspace) -> None:
    assert faults(read(home, "a.json", '{"a": 1, "a": 2} {"a": 1}')) == [(1, "broken-json", "has the key `a` twice")]
    assert faults(read(home, "a.json", '{"rows": [{"a": 1}], "rows": 2}')) == [
        (1, "broken-json", "has the key `rows` twice")
    ]


def test_quote_that_is_never_closed_ends_a_table(home: Workspace) -> None:
    raws = read(home, "a.csv", 'a,b\n1,2\n"3,4\n5,6\n')
    assert found(raws) == [2]
    assert faults(raws) == [(3, "broken-file", "is not read from here on: a quote is never closed")]


@pytest.mark.parametrize(("header", "said"), [(b"a,a", "the column `a` twice"), (b"\xe9,b", "its header is not UTF-8")])
def test_table_with_a_header_that_cannot_be_used_is_not_read(home: Workspace, header: bytes, said: str) -> None:
    [(line, rule, what)] = faults(read(home, "a.csv", header + b"\n1,2\n"))
    assert (line, rule) == (1, "broken-file") and said in what


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that opens and cannot be read")
def test_disk_that_fails_is_a_fault(home: Workspace) -> None:
    home.path("a.jsonl").symlink_to("/proc/self/mem")
    assert faults(list(source(home, "a.jsonl").raws())) == [
        (1, "broken-file", "cannot be read from here on: Input/output error")
    ]


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parquet(home: Workspace, rows: Any) -> list[Raw]:
    import pyarrow
    import pyarrow.parquet

    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, home.path("a.parquet"))
    return list(source(home, "a.parquet").raws())


def test_parquet_gives_the_same_rows_without_the_nulls_it_fills_in(home: Workspace) -> None:
    many = [row | {"id": f"{row['id']}{n}"} for n in range(300) for row in ROWS]
    raws = parquet(home, many)
    assert values(raws) == many and found(raws) == list(range(1, 901))
    uneven: list[dict[str, Any]] = [
        {"m": [{"role": "user"}, {"role": "tool", "name": "x"}], "s": {"a": 1}, "q": None},
        {"s": {"b": [None, 1.5]}, "q": 0.5},
    ]
    raws = parquet(home, uneven)
    del uneven[0]["q"]
    assert values(raws) == uneven
    assert parquet(home, []) == []


def test_parquet_is_read_a_piece_at_a_time_whatever_its_row_groups(home: Workspace) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"x": os.urandom(1000).hex()} for _ in range(10_000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, home.path("a.parquet"), compression="none", use_dictionary=False)
    del table
    before = pyarrow.total_allocated_bytes()
    read = source(home, "a.parquet")
    raws = read.raws()
    for _ in range(500):
        next(raws)
    assert pyarrow.total_allocated_bytes() - before < read.size / 3


def test_parquet_holds_what_json_can_say_or_a_fault(home: Workspace) -> None:
    import datetime
    import decimal

    moment = datetime.datetime(2026, 11, 20, 10, 30)
    midnight = datetime.datetime(2026, 11, 20, tzinfo=datetime.UTC)
    row = {"d": moment.date(), "t": moment, "z": midnight, "n": decimal.Decimal("1.50"), "f": float("nan"), "b": True}
    assert values(parquet(home, [row])) == [
        {"d": "2026-11-20", "t": "2026-11-20T10:30:00", "z": midnight.isoformat(), "n": "1.50", "b": True}
    ]
    assert faults(parquet(home, [{"x": b"\x89PNG"}])) == [(1, "wrong-type", "x: is bytes, not text")]
    assert faults(parquet(home, [{"x": float("inf")}])) == [(1, "wrong-type", "x: is infinite")]


def test_parquet_with_a_text_that_is_no_utf8_loses_that_row_alone(home: Workspace) -> None:
    import pyarrow

    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    raws = parquet(home, pyarrow.table({"x": texts}))
    assert faults(raws) == [(2, "encoding", "is not UTF-8")] and found(raws) == [1, 3]


def test_damaged_parquet_is_a_fault(home: Workspace) -> None:
    rows = [{"x": os.urandom(100).hex()} for _ in range(5000)]
    parquet(home, rows)
    whole = home.path("a.parquet").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:2000] + b"\xff" * 2000 + whole[4000:]):
        home.path("a.parquet").write_bytes(content)
        raws = list(source(home, "a.parquet").raws())
        assert [rule for _, rule, _ in faults(raws)] == ["broken-file"] and raws[-1].fault
        assert [raw.values for raw in raws[:-1]] == rows[: len(raws) - 1]


# ── Folders and names ────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_is_read_with_its_subfolders_in_the_order_of_names(home: Workspace) -> None:
    names = ["b.json", "a.csv.gz", "a.jsonl", "deep/a.tsv", "deep/er/z.NDJSON", "c.parquet"]
    passed_over = ["README.md", ".DS_Store", ".git/x.jsonl", "card.yaml", "dataset_info.json", "LICENSE"]
    for name in [*names, *passed_over]:
        write(home, f"rows/{name}", "")
    assert [s.shown for s in sources(home, "rows")] == [f"rows/{name}" for name in sorted(names)]


def test_file_that_could_have_been_meant_is_said_once(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "b.txt", "c.txt", "d.zip", "README.md", ".hidden.txt", "deep/rows.arrow"):
        write(home, f"rows/{name}", "")
    for name in ("rows", "rows/", str(home.path("rows")), "rows/../rows"):
        assert len(sources(home, name)) == 1
        write(home, "rows/e.another", "")
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and said.startswith("rows: ")
        and "4 files of another kind passed over: .arrow, .txt, .zip;" in said
    )


def test_nothing_is_said_of_a_folder_where_all_is_plain(home: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "README.md", "NOTICE", "plot.png"):
        write(home, f"rows/{name}", "")
    sources(home, "rows")
    assert capsys.readouterr().err == ""


def test_links_to_folders_are_followed_and_a_circle_ends(home: Workspace) -> None:
    write(home, "other/a.jsonl", "")
    write(home, "rows/b.jsonl", "")
    home.path("rows/linked").symlink_to(home.path("other"))
    home.path("rows/round").symlink_to(home.path("rows"))
    assert [s.shown for s in sources(home, "rows")] == ["rows/b.jsonl", "rows/linked/a.jsonl"]


def test_link_to_nowhere_is_said_and_never_passed_over(home: Workspace) -> None:
    write(home, "rows/a.jsonl", "")
    home.path("rows/b.jsonl").symlink_to("gone.jsonl")
    for name in ("rows", "rows/b.jsonl"):
        with pytest.raises(UserError, match=r"^rows/b.jsonl: is a link to gone.jsonl, which is not there$"):
            sources(home, name)


@pytest.mark.parametrize("name", ["a.txt", "a.zip", "a", "a.jsonl.bz2"])
def test_file_of_an_unknown_kind_names_the_known_ones(home: Workspace, name: str) -> None:
    write(home, name, "")
    with pytest.raises(
        UserError, match=f"^{name}: is no kind of file that rows are read from .*; try .jsonl, .*parquet"
    ):
        sources(home, name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read_is_said(home: Workspace) -> None:
    for name in ("a.jsonl", "a.parquet"):
        write(home, name, "")
        home.path(name).chmod(0)
        with pytest.raises(UserError, match=f"^{name}: cannot be read: Permission denied"):
            list(source(home, name).raws())


def test_file_that_is_gone_when_it_is_opened_is_said(home: Workspace) -> None:
    for name in ("a.jsonl", "a.parquet"):
        write(home, name, "")
        gone = source(home, name)
        home.path(name).unlink()
        with pytest.raises(UserError, match=f"^{name}: cannot be read: No such file"):
            list(gone.raws())


# ── Hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:o/n", ("o/n", None, None, None)),
        ("hub:o/n.a-b_c#test", ("o/n.a-b_c", None, None, "test")),
        ("hub:o/n@v1.0", ("o/n", "v1.0", None, None)),
        ("hub:o/n/config", ("o/n", None, "config", None)),
        ("hub:o/n@abc/config#train[:10%]", ("o/n", "abc", "config", "train[:10%]")),
        ("hub:o/n@refs/convert/parquet/config", ("o/n", "refs/convert/parquet", "config", None)),
    ],
)
def test_name_of_a_hub_is_taken_apart(home: Workspace, name: str, parts: tuple[Any, ...]) -> None:
    named = source(home, name)
    assert named.hub and (named.hub.target, named.hub.revision, named.hub.config, named.hub.split) == parts
    assert (named.shown, str(named.path), named.size) == (name, name, 0)


@pytest.mark.parametrize("name", ["hub:", "hub:a b", "hub:#train", "hub:@v1", "hub:o/n#"])
def test_name_that_is_none_says_how_one_is_written(home: Workspace, name: str) -> None:
    with pytest.raises(UserError, match=r"is no name of a data set; try hub:OWNER/NAME\[@REVISION\]"):
        sources(home, name)


@pytest.mark.parametrize("name", ["hub:foo", "hub:foo#train", "hub:foo@main"])
def test_hubs_name_without_an_owner_is_refused_before_anything_is_asked(home: Workspace, name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: names no owner of the data set; try hub:OWNER/NAME"):
        sources(home, name)


def test_folder_read_through_the_hubs_library_gives_the_same_rows(
    home: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"date": "2026-11-20"} for row in ROWS]
    write(home, "set/train.jsonl", lines(rows))
    write(home, "set/test.jsonl", lines(rows[:1]))
    for name, expected in (("hub:./set", rows), ("hub:./set#test", rows[:1]), (f"hub:{home.root}/set#train", rows)):
        raws = list(source(home, name).raws())
        assert values(raws) == expected and found(raws) == list(range(1, len(expected) + 1))
    notes = [line for line in capsys.readouterr().err.splitlines() if "the split" in line]
    assert notes == ["hub:./set: the split `train` is read (there are also: test)"]


def test_hub_says_which_splits_there_are(home: Workspace) -> None:
    write(home, "set/test.jsonl", lines(ROWS))
    write(home, "set/validation.jsonl", lines(ROWS))
    for name in ("hub:./set", "hub:./set#train"):
        with pytest.raises(UserError, match=r"has no split `train` \(there are: (validation|test), .*; try hub:./set#"):
            list(source(home, name).raws())


def test_hub_that_breaks_off_gives_its_rows_and_then_the_fault(home: Workspace) -> None:
    write(home, "set/train-0.jsonl", lines([{"x": "a"}, {"x": "b"}]))
    write(home, "set/train-1.jsonl", '{"x": "c"}\n{"x"')
    raws = list(source(home, "hub:./set").raws())
    assert found(raws) == [1, 2]
    [(line, rule, what)] = faults(raws)
    assert (line, rule) == (3, "broken-file") and what.startswith("cannot be read from row 3 on: ")


def test_hub_out_of_reach_is_one_line_with_a_remedy(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        list(source(home, "hub:owner/name").raws())
    assert str(error.value).startswith("hub:owner/name: cannot be loaded: ") and "\n" not in str(error.value)
    assert "network" in error.value.remedy
    with pytest.raises(UserError, match=r"^hub:./none: cannot be loaded: .*; try hub:OWNER/NAME"):
        list(source(home, "hub:./none").raws())


def test_line_that_is_too_long_is_one_fault_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.json_rows.LONGEST", 100)
    lines = [json.dumps({"prompt": "q", "completion": "a" * n}) for n in (10, 1000, 20, 60, 80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    [source] = sources(Workspace(tmp_path), "rows.jsonl")
    found = [(raw.line, raw.fault.what if raw.fault else "") for raw in source.raws()]
    assert [line for line, _ in found] == [1, 2, 3, 4, 5]
    assert [bool(what) for _, what in found] == [False, True, False, False, True]


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    assert [s.shown for s in sources(Workspace(tmp_path), ".")] == ["a.jsonl"]
