"""The fenced code blocks of an answer: which there are, and whether each parses in its language.

    found, unclosed = blocks(answer)
    what = fault(found[0], about=row_text)

A block that parses may still be wrong; one whose language has no checker here, that is larger than `MOST_CHARACTERS` (of
TOML and SQL, than theirs) or stands in an answer larger than `MOST_MARKDOWN`, nested deeper than its parser can follow, a
transcript (`>>> `, `$ `) or a template (`{{ … }}`) is not checked at all. Python is checked against the version that runs
this, and SQL with sqlglot, which takes more than a database does.
"""

import ast
import contextlib
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 200_000  # a larger block is not checked
MOST_MARKDOWN = 150_000  # an answer that is longer is searched for no fences
MOST_TOML = 20_000  # tomllib's time grows with the square of a key's parts
MOST_SQL = 30_000  # in all dialects that are tried: sqlglot takes about a second for it, two where it fails
YAML_DEPTH = 200  # libyaml's does, too
BASH_SECONDS = 10
RUN_SECONDS = 10

_NAME = re.compile(r"[\w+#-]*")
_PLACEHOLDER = re.compile(r"<[A-Za-z][\w.-]*(?: [\w.-]+){0,3}>")  # `kubectl logs <pod name>`: a manual's, not a mistake
_MAGIC = re.compile(r"^([ \t]*)[%!]\w.*$", re.MULTILINE)  # IPython's: %timeit, !pip
_TEMPLATE = re.compile(r"(?<!\$)\{\{|\{%")  # Helm's, Jinja's; ${{ … }} of a GitHub workflow stands in plain YAML
_BASH_LINE = re.compile(r"line (\d+): (.*)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: `line` (from 1) is its opening fence's in the answer."""

    language: str  # lower case; empty where the fence names none
    text: str
    line: int


# ── Which there are ──────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(text: str) -> tuple[list[Block], int | None]:
    """All fenced blocks as CommonMark has them, in lists and quotes too, and the line of the first that is never closed
    (the block then reaches to the end of what it stands in)."""
    if len(text) > MOST_MARKDOWN or ("```" not in text and "~~~" not in text):
        return [], None
    found: list[Block] = []
    unclosed: int | None = None
    for token in _markdown().parse(text):
        if token.type != "fence":
            continue
        first, after = token.map
        found.append(Block(_language(token.info), token.content, first + 1))
        lines = token.content.count("\n") + (not token.content.endswith("\n") and token.content != "")
        if unclosed is None and after - first - 1 == lines:  # where it is closed, the closing fence counts, too
            unclosed = first + 1
    return found, unclosed


@functools.cache
def _markdown() -> Any:
    """Blocks alone: what stands inside a paragraph costs most of the time and holds no fence."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser


def _language(info: str) -> str:
    words = info.split()
    match = _NAME.match(words[0].lower()) if words else None
    return match[0] if match else ""


# ── Whether they parse ───────────────────────────────────────────────────────────────────────────────────────────────


def fault(block: Block, about: str) -> str | None:
    """Why a block does not parse, with the line inside it (from 1); None where it does, or nothing here can tell.

    `about` is the row's text: it tells which SQL is meant.
    """
    check = _CHECKS.get(block.language)
    if check is None or len(block.text) > MOST_CHARACTERS:
        return None
    try:
        return check(block.text, f"{block.language}\n{about}")
    except Exception:  # too deep for the parser, half a character, a fault of its own: nothing is known of the block
        return None


def _python(text: str, _: str) -> str | None:
    source = textwrap.dedent(text)
    if source.lstrip().startswith(">>>"):
        return None
    problem = _python_problem(source)
    if problem and _MAGIC.search(source) and _python_problem(_MAGIC.sub(r"\1pass", source)) is None:
        return None
    return problem


def _python_problem(source: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: "\d"
            ast.parse(source)
    except SyntaxError as error:
        return _said(error.lineno, f"Python {sys.version_info.major}.{sys.version_info.minor}", error.msg)
    return None


def _json(text: str, _: str) -> str | None:
    try:
        json.loads(text, parse_int=str)  # an integer of any length
    except json.JSONDecodeError as error:
        return _said(error.lineno, "JSON", error.msg)
    return None


def _json_lines(text: str, _: str) -> str | None:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                json.loads(line, parse_int=str)
        except json.JSONDecodeError as error:
            return _said(number, "JSON", error.msg)
    return None


def _yaml(text: str, _: str) -> str | None:
    """Events alone, of every document: nothing is built, so tags may be any and aliases cannot explode."""
    import yaml

    anchors: set[str] = set()
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.DocumentStartEvent):
                anchors.clear()
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in anchors:
                    mark = event.start_mark
                    return _said(mark.line + 1 if mark else None, "YAML", f"undefined alias {event.anchor}")
            elif isinstance(event, yaml.NodeEvent) and event.anchor:
                anchors.add(event.anchor)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > YAML_DEPTH:
                return None
    except yaml.YAMLError as error:
        if _TEMPLATE.search(text):
            return None
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        return _said(mark.line + 1 if mark else None, "YAML", what)
    return None


def _toml(text: str, _: str) -> str | None:
    if len(text) > MOST_TOML:
        return None
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).partition(" (at ")
        line = re.search(r"line (\d+)", place)
        return _said(int(line[1]) if line else text.count("\n") + 1, "TOML", what)
    return None


def _shell(text: str, _: str) -> str | None:
    if text.lstrip().startswith("$ "):
        return None
    problem = _shell_problem(text, ())
    # `-n` runs no `shopt -s extglob`, on which it depends how `!(*.log)` reads
    return problem and _shell_problem(_PLACEHOLDER.sub("x", text), ("-O", "extglob")) and problem


def _shell_problem(text: str, options: tuple[str, ...]) -> str | None:
    bash = _bash()
    if bash is None:
        return None
    try:
        done = subprocess.run(
            [bash, "--norc", "-n", *options],
            input=text.encode(),
            capture_output=True,
            timeout=BASH_SECONDS,
            env={"LC_ALL": "C"},  # and no BASH_ENV, which would be run
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = _BASH_LINE.search(done.stderr.decode("utf-8", "replace"))
    if done.returncode < 0 or found is None:  # killed: nothing is known
        return None
    line, what = int(found[1]), found[2]
    return _said(
        min(line, text.rstrip("\n").count("\n") + 1), "shell", re.sub("^(?:syntax error:?|warning:) ", "", what)
    )


@functools.cache
def _bash() -> str | None:
    return shutil.which("bash")


# ── SQL ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_DIALECTS = {  # sqlglot's name: what a text calls it
    "postgres": r"postgres\w*|psql|pgsql|plpgsql|pg_\w+|pgbouncer|timescale\w*|cockroach\w*",
    "mysql": r"mysql|mariadb|innodb|percona|vitess",
    "sqlite": r"sqlite3?",
    "tsql": r"t-?sql|(?:ms|azure )?sql ?server|mssql|azure sql",
    "oracle": r"oracle|pl/?sql",
    "clickhouse": r"clickhouse",
    "bigquery": r"bigquery",
    "snowflake": r"snowflake",
    "duckdb": r"duckdb",
    "redshift": r"redshift",
    "spark": r"spark|databricks|delta lake",
    "trino": r"trino|presto|athena",
    "hive": r"hive|hiveql",
}
_NAMED = re.compile("|".join(rf"(?P<{name}>\b(?:{words})\b)" for name, words in _DIALECTS.items()), re.IGNORECASE)
_PROMPT = re.compile(r"\s*(?:\w+[=-][#>]|mysql>|sqlite>|SQL>|MariaDB \[)")
_CLIENT = re.compile(r"^[ \t]*(?:\\\w.*|\.[a-z]+\b.*|GO|/)$|\\(?:G|g\w*|watch\b.*|crosstabview)[ \t]*$", re.MULTILINE)
_DELIMITER = re.compile(r"^[ \t]*delimiter\b", re.IGNORECASE | re.MULTILINE)
_DRIVER = re.compile(r"%\(\w+\)s|%s\b")  # Python's drivers'; sqlglot knows the other placeholders
_VARIABLE = re.compile(r""":(['"])\w+\1""")  # psql's :'name'
# Valid, and more than sqlglot 30 knows: a statement that begins or goes on so is not judged by it.
_OTHER_COMMANDS = re.compile(
    r"(?:ABORT|ANALYZE|ATTACH|BEGIN|BINLOG|CHANGE|CHECKPOINT|CLOSE|CLUSTER|COMMIT|COPY|DEALLOCATE|DECLARE|DETACH|"
    r"DISCARD|DO|ELSE|ELSIF|END|EXCEPTION|EXCHANGE|EXEC|EXECUTE|FETCH|FLUSH|FOR|GO|GRANT|HANDLER|IF|IMPORT|"
    r"INSTALL|KILL|LISTEN|LOAD|LOCK|LOOP|MOVE|NOTIFY|OPTIMIZE|PREPARE|PRINT|PURGE|RAISE|RAISERROR|REASSIGN|"
    r"REFRESH|REINDEX|RELEASE|RESET|RETURN|REVOKE|ROLLBACK|SAVEPOINT|SECURITY|SHOW|START|STOP|SYSTEM|THROW|"
    r"UNINSTALL|UNLISTEN|UNLOCK|VACUUM|WHEN|WHILE|XA)\b",
    re.IGNORECASE,
)
_OTHER_CLAUSES = re.compile(
    r"""\bwithout\s+overlaps | \)\s*virtual\b | \bvirtual\s+table\b | \bcreate\s+operator\b | <[#~+%]> | <<[%-]>>
    | \bat\s+local\b | \bcurrent\s+of\b | \bjson_table\b | \busing\s*\([^)]{0,200}\)\s*as\b | \busing\s*[<>]
    | \b(?:range|list)\s+columns\b | \b(?:drop|truncate|coalesce|rebuild|import|discard)\s+partition\b
    | \binto\s+(?:out|dump)file\b | \bas\s*\([^)]{0,200}\)\s*persisted\b""",
    re.IGNORECASE | re.VERBOSE,
)
_BEFORE = re.compile(r"(?:\s|--[^\n]*|/\*(?s:.*?)\*/)*")  # comments


def _sql(text: str, about: str) -> str | None:
    """A fault only where no SQL that the text names takes it; where it names none, no SQL at all.

    Where `MOST_SQL` does not let all be tried, none is told. A transcript is not checked, nor is a script that changes its
    delimiter to write statements inside statements.
    """
    if len(text) > MOST_SQL or _PROMPT.match(text) or _DELIMITER.search(text):
        return None
    source = _CLIENT.sub(";", text)
    mended = _VARIABLE.sub("'x'", _PLACEHOLDER.sub("x", _DRIVER.sub("?", source)))
    named = list(dict.fromkeys(str(match.lastgroup) for match in _NAMED.finditer(about)))
    first: str | None = None
    for tried, dialect in enumerate(named or ("", *_DIALECTS)):
        if tried and (tried + 1) * len(text) > MOST_SQL:
            return None
        problem = _sql_problem(source, dialect)
        if problem and mended != source:
            problem = _sql_problem(mended, dialect) and problem
        if problem is None:
            return None
        first = first or problem
    return first


def _sql_problem(source: str, dialect: str) -> str | None:
    import sqlglot
    from sqlglot.errors import ErrorLevel, ParseError, TokenError

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it says of each statement that it has no model of it
    shown = f"SQL ({dialect})" if dialect else "SQL"
    parse = functools.partial(sqlglot.parse, dialect=dialect or None, error_level=ErrorLevel.RAISE)
    try:
        parse(source)
        return None
    except TokenError as error:
        what = str(error.__cause__ or error)  # Missing ' from 1:8
        line = re.search(r"(\d+):\d+", what)
        return _said(int(line[1]) if line else None, shown, what)
    except ParseError:
        statements = list(_statements(source, sqlglot.tokenize(source, dialect=dialect or None)))
    for line_before, statement in statements:
        begins = _BEFORE.match(statement)
        if (begins and _OTHER_COMMANDS.match(statement, begins.end())) or _OTHER_CLAUSES.search(statement):
            continue
        try:
            parse(statement)
        except ParseError as error:
            told: dict[str, Any] = error.errors[0] if error.errors else {}
            what = str(told.get("description"))
            what = what.lower() if what.startswith("Expecting") else "unexpected"  # the rest is of sqlglot's classes
            return _said(line_before + (told.get("line") or 1), shown, f"{what} near `{told.get('highlight') or '?'}`")
    return None


def _statements(source: str, tokens: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """Each with the lines before it, split as sqlglot itself does."""
    from sqlglot.tokens import TokenType

    start = 0
    for token in tokens:
        if token.token_type == TokenType.SEMICOLON:
            yield source.count("\n", 0, start), source[start : token.start]
            start = token.end + 1
    yield source.count("\n", 0, start), source[start:]


def _said(line: int | None, language: str, what: str) -> str:
    place = f"line {line} is" if line else "is"
    return f"{place} no {language}: {' '.join(what.split())[:160]}"


_CHECKS: dict[str, Callable[[str, str], str | None]] = (
    dict.fromkeys(("python", "py", "python3"), _python)
    | {"json": _json, "toml": _toml}
    | dict.fromkeys(("jsonl", "ndjson"), _json_lines)
    | dict.fromkeys(("yaml", "yml"), _yaml)
    | dict.fromkeys(("bash", "sh", "shell"), _shell)
    | dict.fromkeys(("sql", "postgresql", "postgres", "pgsql", "mysql", "sqlite", "tsql"), _sql)
)


# ── Whether it runs ──────────────────────────────────────────────────────────────────────────────────────────────────

_RUNNER = """
import json, sys, types
texts, main = json.load(sys.stdin), types.ModuleType("__main__")
sys.modules["__main__"] = main
for number, text in enumerate(texts, 1):
    try:
        exec(compile(text, f"<block {number}>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
"""


def run(texts: Sequence[str]) -> str | None:
    """Runs Python texts one after another in one fresh process; None when all end well, else the error's last line.

    This is no sandbox: the code can read, write and send whatever this user can. It gets an empty folder, an empty
    environment, no standard input and `RUN_SECONDS`, after which it and its children (those that did not leave its process
    group) are killed: against accidents, not against malice. It is therefore done only for rows marked `run`, when asked.
    A text sees the names of those before it.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,  # a file: a child that holds a pipe open would keep us waiting
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(list(texts)).encode(), timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return f"did not end within {RUN_SECONDS} s"
        finally:
            _kill(process)
        if process.returncode == 0:
            return None
        if process.returncode < 0:
            return f"was ended by signal {-process.returncode}"
        said.seek(max(0, said.seek(0, os.SEEK_END) - 10_000))
        lines = said.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"ended with {process.returncode}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
