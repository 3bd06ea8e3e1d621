"""One page of results for an evaluation's record: `experiments/EXP-…/result.html`.

    write_page(record.file)

Self-contained: no script, no request, light or dark as the system is, and it prints. All of it comes from the record and
its lineage, so it can be written again at any time. What records say is text: the template escapes everything, and a
content security policy lets nothing be loaded or run. Its colours are the report's (`aletheia/report/page.css`).
"""

import functools
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.page import forest, words
from eval.page.result import cost_lines, read
from eval.page.spent import spent
from pipeline.errors import UserError
from pipeline.progress import printable
from pipeline.records.file import RecordFile, write_atomically
from pipeline.records.schema import Facts

HERE = Path(__file__).parent
NAME = "result.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
LONGEST = 500  # characters of one text


def write_page(file: RecordFile) -> Path:
    """Beside the record, in place of the one before. Raises `UserError` for a record that is no evaluation."""
    facts = file.facts()
    if facts is None or facts.stage != "eval":
        what = "a plan: nothing has run" if facts is None else f"a record of {facts.stage}, not of an evaluation"
        raise UserError(f"is {what}", where=file.id, remedy="a record that aletheia eval made")
    path = file.folder / NAME
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, page(file, facts).encode("utf-8", "replace"))
    return path


def page(file: RecordFile, facts: Facts) -> str:
    result = read(facts, spent(file, facts))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            policy=POLICY,
            css=Markup((HERE / "page.css").read_text("utf-8")),
            id=file.id,
            facts=facts,
            result=result,
            panels=forest.panels([*result.claims, *result.domains]),
            cost=cost_lines(result),
            data=[(name, of) for name, of in facts.data.items() if isinstance(of, dict) and "rows" in of],
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    told = {"change": words.change, "delta": words.delta, "bare": words.bare, "text": str}
    environment.filters |= {name: lambda value, tell=tell: _text(tell(value)) for name, tell in told.items()}
    return environment


def _text(value: str) -> str:
    """One line, without what would turn or hide it."""
    written = printable(value)
    return written if len(written) <= LONGEST else f"{written[:LONGEST]}…"
