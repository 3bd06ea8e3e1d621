"""The report as one HTML page, self-contained: no request leaves it.

Records are what others wrote: the template escapes everything, data stands in JSON islands that no browser runs, and a
content security policy lets only the page's own three scripts run, named by their hashes, and nothing be loaded.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from aletheia.exp.reading import plain
from aletheia.report import MARK, figures, notes
from aletheia.report.lineage import HEIGHT, WIDTH, picture
from aletheia.report.project import Project, text
from aletheia.report.section import SHORT, compared, sections
from aletheia.report.trends import trends
from pipeline import yamlio
from pipeline.progress import duration

HERE = Path(__file__).parent
LONGEST = 20_000  # characters of one text
LONGEST_LIST = 300  # items of one list
INDEX_ROWS = 200  # of the index, until one asks for all
GLYPHS = {
    "complete": "●",
    "supported": "✓",
    "running": "▸",
    "planned": "○",
    "cancelled": "◌",
    "not evaluable": "?",
    "failed": "✕",
    "refuted": "✕",
    "dead": "†",
    "inconclusive": "~",
    "unreadable": "!",
}
_LINK = re.compile(r"(?P<url>https?://[^\s<>\"'`]*[^\s<>\"'`.,;:!?)\]}])|(?P<id>\bEXP-\d{4}-\d{2}-\d{2}-\d{3,}\b)")


def page(project: Project, folder: Path) -> str:
    """`folder`: where the page will stand, from which it links to the records' files."""
    from plotly.offline import get_plotlyjs

    scripts = {"theme": _source("theme.js"), "plotly": get_plotlyjs(), "page": _source("page.js")}
    found = trends(project)
    every_trend = list(chain(*found.values()))
    return (
        _environment(project)
        .get_template("page.html.j2")
        .render(
            mark=Markup(MARK),
            policy=policy(scripts.values(), images="data: blob:"),
            css=Markup(_source("page.css")),
            scripts={name: Markup(script) for name, script in scripts.items()},
            project=project,
            index_rows=INDEX_ROWS,
            short=SHORT,
            longest_list=LONGEST_LIST,
            glyphs=GLYPHS,
            attention=[entry for entry in project.entries if entry.problems],
            totals=totals(project),
            trends=found,
            trend_data={
                "profiles": list(dict.fromkeys(entry.profile for entry in reversed(project.entries))),
                "trends": {trend.key: {"figure": trend.figure, "points": trend.points()} for trend in every_trend},
            },
            figure_names=list(dict.fromkeys(trend.figure for trend in every_trend)),
            picture=picture(project),
            box=(WIDTH, HEIGHT),
            judged=[entry for entry in project.entries if entry.facts and entry.facts.verdict],
            findings=dict(Counter(entry.finding for entry in project.entries if entry.finding).most_common()),
            learnings=notes.learnings(project),
            observations=notes.notes(project, "observations"),
            conclusions=notes.conclusions(project),
            journal=notes.journal(project),
            steps=notes.next_steps(project),
            issues=notes.notes(project, "issues"),
            compared={entry.id: compared(entry, entry.facts) for entry in project.whole if entry.facts},
            sections=sections(project, folder),
        )
    )


def island(value: Any) -> Markup:
    """JSON that HTML cannot take for anything else, without what JSON does not have (NaN)."""
    data = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return Markup(data)


def prose(value: Any, linked: set[str]) -> Markup:
    """Escaped; an address becomes a link, the id of a record in `linked` leads to its section."""
    written, parts, at = clip(text(value)), [], 0
    for match in _LINK.finditer(written):
        parts.append(escape(written[at : match.start()]))
        at = match.end()
        if match["url"]:
            link = Markup('<a href="{0}" rel="noopener noreferrer nofollow">{0}</a>')
            parts.append(link.format(match["url"]))
        elif match["id"] in linked:
            parts.append(Markup('<a href="#{0}">{0}</a>').format(match["id"]))
        else:
            parts.append(escape(match["id"]))
    return Markup("").join([*parts, escape(written[at:])])


def clip(value: str) -> str:
    """A text that no page should hold ends with how much more there is."""
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]}… ({len(value) - LONGEST:,} more characters in the record)"


def totals(project: Project) -> dict[str, Any]:
    """Time, and cost by currency, of all; what a pipeline experiment ran is in its own figures already."""
    tops = [entry for entry in project.entries if entry.parent not in project.by_id]
    cost: Counter[str] = Counter()
    for amount, currency in (entry.cost for entry in tops if entry.cost):
        cost[currency] += amount  # type: ignore[assignment]
    return {"seconds": sum(entry.seconds or 0 for entry in tops), "cost": cost}


def policy(scripts: Iterable[str], images: str = "data:") -> str:
    """A content security policy: no script but these, nothing loaded from anywhere; `images`: made by the page itself."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src {images}; "
        "base-uri 'none'; form-action 'none'"
    )


def _environment(project: Project) -> Environment:
    linked = {entry.id for entry in project.whole}
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "prose": lambda value: prose(value, linked),
        "clip": clip,
        "island": island,
        "yaml": lambda value: clip(yamlio.dump(value)),
        "number": figures.value,
        "interval": figures.interval,
        "duration": duration,
        "when": lambda moment: moment[:16].replace("T", " "),
        "label": lambda key: str(key).replace("_", " ").capitalize(),
    }
    environment.tests["brief"] = _is_brief
    return environment


def _is_brief(value: Any) -> bool:
    """A mapping that reads well in one line."""
    if not isinstance(value, dict) or not value:
        return False
    scalar = not any(isinstance(child, dict | list) for child in value.values())
    return scalar and sum(len(f"{key}: {child}") for key, child in value.items()) < 2 * SHORT


def _source(name: str) -> str:
    return (HERE / name).read_text("utf-8")
