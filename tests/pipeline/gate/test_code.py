"""Code blocks: found as CommonMark has them, a fault in each language told with its line, and what is right let be."""

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.gate.code import Block, blocks, fault, run
from pipeline.workspace import CHECKOUT

# ── Which there are ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_fence_is_found_with_language_text_and_line() -> None:
    text = (
        "Text\n\n```Python title=x\na = 1\n```\n~~~sql\nSELECT '```';\n~~~\n\n````\n```\n````\n\n"
        "1. Item\n\n   ```yaml\n   a:\n     b: 1\n   ```\n\n> ```bash,ignore\n> ls\n> ```\n"
    )
    assert blocks(text) == (
        [
            Block("python", "a = 1\n", 3),
            Block("sql", "SELECT '```';\n", 6),
            Block("", "```\n", 10),
            Block("yaml", "a:\n  b: 1\n", 16),
            Block("bash", "ls\n", 21),
        ],
        None,
    )


@pytest.mark.parametrize("text", ["", "no code", "`inline` and ``two``", "    ```\n    indented code\n"])
def test_text_without_a_fence_has_no_blocks(text: str) -> None:
    assert blocks(text) == ([], None)


@pytest.mark.parametrize(
    "text",
    ["a\n\n```py\nx", "a\n\n```py\nx\n", "a\n\n```py\n", "a\n\n```", "a\n\n````\n```\n", "a\n\n- ```\n  x\u2028y\n\nb"],
)
def test_a_fence_that_is_never_closed_is_named_by_its_line(text: str) -> None:
    assert blocks(text)[1] == 3


@pytest.mark.parametrize("text", ["```\n```", "```\n\n```\n", "```\nx\u2028\n```", "```\nx\x0c\n```", "~~~\n```\n~~~"])
def test_a_closed_fence_is_closed_whatever_it_holds(text: str) -> None:
    found, unclosed = blocks(text)
    assert len(found) == 1 and unclosed is None


# ── Whether they parse ───────────────────────────────────────────────────────────────────────────────────────────────

BROKEN = [  # language, text, the line at fault
    ("python", "a = 1\nif a\n    b = 2\n", 2),
    ("py", "print 'x'", 1),
    ("json", '{\n  "a": 1,\n}', 3),
    ("json", '{"a": ...}', 1),
    ("jsonl", '{"a": "x\u2028y"}\n\n{', 3),
    ("yaml", "a: 1\nb: c: d", 2),
    ("yml", "a:\n\tb: 1", 2),
    ("yaml", "a: &x 1\n---\nb: *x", 3),
    ("yaml", "a: ${{ github.ref }}\n  b: 2", 2),
    ("toml", "a = 1\na = 2\n", 2),
    ("bash", "ls\nif true; then\n  ls\n", 3),
    ("sh", "for i in 1 2; do; ls; done", 1),
    ("shell", "echo 'a", 1),
    ("bash", "cat <<EOF\nx\n", 2),
    ("bash", "kubectl logs <pod> |\n", 1),
    ("sql", "SELEC 1", 1),
    ("sql", "SELECT 1;\n\nSELECT count(* FROM t;", 3),
    ("sql", "SELECT * FROM t WHERE a = AND b = 1", 1),
    ("sql", "CREATE TABLE t (\n  id int,\n  name text", 3),
    ("sql", "SELECT 'a", 1),
    ("sql", "INSERT INTO t (a, b VALUES (%s, %s)", 1),
]
FINE = [
    ("python", "    a = 1\n    await b\n"),  # a fragment, indented
    ("python", "r = '\\d'"),  # a SyntaxWarning
    ("python", ">>> 1 +\n oh"),
    ("python", "%timeit f(x)\n!pip install y\nx = f(1)\n"),
    ("json", '[1, 2.5, "x"]'),
    ("json", "9" * 5000),
    ("jsonl", '{"a": 1}\n{"b": 2}\n'),
    ("yaml", "a: !Ref b\nc: !vault |\n  x\n---\nd: &e 1\nf: *e\n"),
    ("yaml", "{{- if .Values.a }}\na: {{ .Values.b }}\n{{- end }}"),
    ("toml", '[a]\nb = "c"\n'),
    ("bash", 'for f in *.log; do\n  gzip "$f" && rm <(x)\ndone'),
    ("bash", "shopt -s extglob\nrm !(*.log)"),
    ("bash", "kubectl logs <pod name>"),
    ("bash", "$ ls\n(a listing)"),
    ("sql", "SELECT * FROM t WHERE a = $1 AND b = :b AND c = ? AND d = %s AND e IN (%(e)s) LIMIT %s"),
    ("sql", "COMMIT PREPARED 'x'; VACUUM (ANALYZE) t; LISTEN x; NOTIFY x, 'y';"),
    ("sql", "\\timing on\nSELECT :'name' \\gx\nSELECT * FROM <table>;"),
    ("sql", "postgres=# SELECT (\n"),
    ("sql", "DELIMITER //\nCREATE PROCEDURE p() BEGIN SELECT 1; END //"),
    ("go", "func {"),
    ("xml", "<a>"),
    ("console", "$ if"),
    ("", "(("),
]


@pytest.mark.parametrize(("language", "text", "line"), BROKEN)
def test_a_block_that_does_not_parse_is_told_with_its_line(language: str, text: str, line: int) -> None:
    found = fault(Block(language, text, 1), "")
    assert found and found.startswith(f"line {line} is no ") and "\n" not in found


@pytest.mark.parametrize(("language", "text"), FINE)
def test_what_parses_or_has_no_checker_is_let_be(
    language: str, text: str, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    assert fault(Block(language, text, 1), "") is None
    assert not recwarn.list and not caplog.records


@pytest.mark.parametrize(
    ("text", "about", "fine"),
    [
        ("ALTER TABLE t ADD INDEX i (a), ALGORITHM=INPLACE", "in InnoDB", True),
        ("ALTER TABLE t ADD INDEX i (a), ALGORITHM=INPLACE", "in PostgreSQL 18", False),
        ("ALTER TABLE t ADD INDEX i (a), ALGORITHM=INPLACE", "from MySQL to PostgreSQL", True),
        ("ALTER TABLE t ADD INDEX i (a), ALGORITHM=INPLACE", "in some database", True),
        ("SELECT a @> '{1}' FROM t", "PostgreSQL", True),
        ("SELECT * FROM t FINAL PREWHERE a = 1", "ClickHouse", True),
        ("SELECT * FROM t FINAL PREWHERE a = 1", "with psql", False),
    ],
)
def test_the_row_tells_which_sql_is_meant(text: str, about: str, fine: bool) -> None:
    assert (fault(Block("sql", text, 1), about) is None) == fine


@pytest.mark.parametrize(
    "statement",
    """\
ALTER TABLE m DETACH PARTITION m_2026 CONCURRENTLY
CREATE INDEX i ON t USING brin (ts) WITH (pages_per_range = 32)
CREATE POLICY p ON t USING (tenant = current_setting('app.tenant')::uuid)
CREATE TABLE b (room int, during tstzrange, EXCLUDE USING gist (room WITH =, during WITH &&))
CREATE TABLE t (a int, g int GENERATED ALWAYS AS (a * 2) VIRTUAL)
SELECT a <#> b, a <+> b FROM t ORDER BY e <=> '[1,2]' LIMIT 5
SELECT now() AT TIME ZONE 'UTC' AT LOCAL
UPDATE t SET a = 1 WHERE CURRENT OF cur
DO $$ BEGIN RAISE NOTICE '%', 1; END $$
MERGE INTO t USING s ON t.id = s.id WHEN MATCHED THEN UPDATE SET v = s.v RETURNING merge_action(), t.*""".splitlines(),
)
def test_valid_postgresql_is_no_fault_where_sqlglot_does_not_know_it(statement: str) -> None:
    assert fault(Block("sql", statement, 1), "PostgreSQL") is None


@pytest.mark.parametrize("language", ["python", "json", "jsonl", "yaml", "toml", "bash", "sql"])
@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, "(" * 5_000, "-" * 100_000 + "1", "\0", "\ud800 (", "a: " * 20_000, "$(" * 20_000, "'" * 30_001, "x" * 300_000,
     "a: &a [x]\nb: &b [*a, *a]\n" + "c: [*b, *b]\n" * 500, "SELECT " + "(" * 3_000, '{"a":' * 20_000],
    ids=lambda text: ascii(text[:9]),
)  # fmt: skip
def test_hostile_blocks_raise_nothing(language: str, text: str) -> None:
    found = fault(Block(language, text, 1), "")
    assert found is None or len(found) < 300


@pytest.mark.parametrize(
    ("language", "text"),
    [("toml", "a." * 60_000 + "a=1"), ("toml", "a = 1\n" * 5_000), ("sql", "a," * 2_000), ("yaml", "- &a a\n" * 9_000),
     ("json", "[" * 100_000), ("python", "(" * 100_000), ("python", "x='" + "a" * 1_000_000), ("sh", "cat <<A\n" * 9_000)],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_a_long_hostile_block_is_done_with(language: str, text: str) -> None:
    assert len(fault(Block(language, text, 1), "") or "") < 300


@pytest.mark.parametrize(
    "text", ["* a\n" * 250_000, "[a]: b\n" * 5_000, ">" * 50_000, "- " * 50_000, "- ```\n" * 3_000, "`" * 100_000]
)
def test_a_long_hostile_answer_is_done_with(text: str) -> None:
    assert len(blocks(f"{text}\n```")[0]) <= 3_001


def test_faulty_sql_is_told_only_where_all_its_dialects_were_tried() -> None:
    text = "SELECT a FROM WHERE;\n" * 200
    assert fault(Block("sql", text, 1), "PostgreSQL") and fault(Block("sql", text, 1), "") is None


def test_the_shipped_rows_parse() -> None:
    broken = []
    for path in sorted((CHECKOUT / "data").rglob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            texts = [m["content"] for k in ("messages", "chosen", "rejected") for m in row.get(k, [])]
            for text in [*texts, row.get("reference") or ""]:
                found, unclosed = blocks(text)
                assert unclosed is None, row["id"]
                broken += [(row["id"], told) for block in found if (told := fault(block, line))]
    assert broken == []


# ── Whether they run ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_texts_run_one_after_another_in_one_process() -> None:
    assert run(["import os\nx = os.getpid()", "assert x == os.getpid()\nprint(x)"]) is None
    assert run([]) is None


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["x = 1", "1 / 0"], "ZeroDivisionError: division by zero"),
        (["def f(:"], "SyntaxError: invalid syntax"),
        (["import sys; sys.exit()", "raise ValueError('é')"], "ValueError: é"),
        (["import sys; sys.exit(3)"], "ended with 3"),
        (["import os; os.kill(os.getpid(), 9)"], "was ended by signal 9"),
        (["json"], "NameError: name 'json' is not defined"),
    ],
)
def test_the_last_line_of_the_error_is_given(texts: list[str], said: str) -> None:
    assert run(texts) == said


def test_code_runs_in_an_empty_folder_and_environment_without_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    here = Path.cwd()
    checks = f"import os, sys\nassert os.listdir() == [] and os.getcwd() != {str(here)!r}\nassert 'A_SECRET' not in os.environ"
    assert run([checks, "assert sys.stdin.read() == ''", "open('left', 'w')"]) is None
    assert not (here / "left").exists()


def test_what_does_not_end_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.gate.code.RUN_SECONDS", 2)
    pid = tmp_path / "pid"
    starts = (
        f"import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nopen({str(pid)!r}, 'w').write(str(child.pid))"
    )
    assert run([starts, "while True: pass"]) == "did not end within 2 s"
    assert _is_gone(int(pid.read_text()))
    assert run([starts]) is None
    assert _is_gone(int(pid.read_text()))


def _is_gone(pid: int) -> bool:
    for _ in range(200):  # a killed process is a zombie until whoever adopted it looks
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False
