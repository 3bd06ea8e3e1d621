"""The report as one HTML page, self-contained: no request leaves it.

Records are what others wrote: the template escapes everything, data stands in JSON islands that no browser runs, and a
content security policy lets only the page's own three scripts run, named by their hashes, and nothing be loaded.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from aletheia.exp.reading import flat, plain
from aletheia.report import MARK, figures, notes
from aletheia.report.curves import charts, read_log
from aletheia.report.lineage import HEIGHT, WIDTH, picture
from aletheia.report.project import FULL, Entry, Project, text, texts
from aletheia.report.samples import read_samples
from aletheia.report.trends import trends
from pipeline import yamlio
from pipeline.progress import duration, track

HERE = Path(__file__).parent
LONGEST = 20_000  # characters of one text
LONGEST_LIST = 300  # items of one list
SHORT = 60  # characters of what stands in a cell of a grid
# Keys of the person's half by where they stand in a section; what is in neither is told as a note.
ASKED = (
    "description",
    "objective",
    "hypothesis",
    "expected_results",
    "success_criteria",
    "milestone",
    "methodology",
    "variables",
    "conditions",
)
ELSEWHERE = {"experiment_id", "date", "profile", "stages", "status", "overrides", "tags", "visualizations"}
COMPARED = ("configuration", "data", "environment", "code")
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

    writer = _Writer(project, folder)
    scripts = {"theme": _source("theme.js"), "plotly": get_plotlyjs(), "page": _source("page.js")}
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "prose": writer.prose,
        "clip": clip,
        "island": island,
        "yaml": lambda value: clip(yamlio.dump(value)),
        "number": lambda metric: figures.value(metric),
        "interval": lambda metric: figures.interval(metric),
        "duration": duration,
        "when": lambda moment: moment[:16].replace("T", " "),
        "label": lambda key: str(key).replace("_", " ").capitalize(),
        "texts": texts,
    }
    environment.tests["brief"] = _is_brief
    found = trends(project)
    template = environment.get_template("page.html.j2")
    return template.render(
        mark=Markup(MARK),
        policy=_policy(scripts.values()),
        css=Markup(_source("page.css")),
        scripts={name: Markup(script) for name, script in scripts.items()},
        project=project,
        full=FULL,
        short=SHORT,
        longest_list=LONGEST_LIST,
        glyphs=GLYPHS,
        attention=[entry for entry in project.entries if entry.problems],
        totals=totals(project),
        trends=found,
        trend_data={
            "profiles": list(dict.fromkeys(entry.profile for entry in reversed(project.entries))),
            "trends": {
                f"{t.stage}/{t.figure}": {"figure": t.figure, "points": t.points()} for t in chain(*found.values())
            },
        },
        figure_names=list(dict.fromkeys(t.figure for t in chain(*found.values()))),
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
        compared={entry.id: writer.compared(entry) for entry in project.whole if entry.facts},
        sections=writer.sections(),
    )


class _Writer:
    """What the template asks of a record."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project, self.folder = project, folder
        self.linked = {entry.id for entry in project.whole}

    def sections(self) -> Iterator[dict[str, Any]]:
        grouped = [entry for entry, _ in self.project.grouped() if entry.whole]
        for entry in track(grouped, "writes the page", "record"):
            yield self.section(entry)

    def section(self, entry: Entry) -> dict[str, Any]:
        facts, person = entry.facts, entry.person
        log = read_log(entry.file.folder / "log.jsonl") if facts else None
        drawn = list(charts(log)) if log else []
        return {
            "entry": entry,
            "facts": facts,
            "file": self.project.link(entry.file.path, self.folder),
            "path": self.project.workspace.shown(entry.file.path),
            "asked": [(key, person[key]) for key in ASKED if filled(person.get(key))],
            "noted": [(k, v) for k, v in person.items() if k not in ELSEWHERE and k not in ASKED and filled(v)],
            "overrides": dict(flat(facts.overrides if facts else person.get("overrides"))),
            "key_facts": sorted(_key_facts(entry), key=lambda fact: len(fact[1]) > SHORT),
            "children": [child.id for child in self.project.entries if child.parent == entry.id][::-1],
            "rows": figures.rows(facts.results) if facts else [],
            "strip": strip,
            "charts": drawn,
            "log_notes": (log.notes if log else []) + _not_drawn(log.not_drawn if log else []),
            "samples": read_samples(entry.file.folder / "answers.jsonl"),
            "pictures": [
                (path, purpose, self.project.picture(entry, path, self.folder))
                for path, purpose in notes.pictures(entry)
            ],
        }

    def compared(self, entry: Entry) -> dict[str, Any]:
        facts = entry.facts
        assert facts is not None
        parts = {part: dict(flat(getattr(facts, part))) for part in COMPARED}
        return {
            "stage": entry.stage,
            "profile": entry.profile,
            "started": entry.started,
            "parts": {part: {k: _brief(v) for k, v in values.items()} for part, values in parts.items()},
            "metrics": {name: [m.value, m.ci_low, m.ci_high, m.n] for name, m in entry.metrics.items()},
        }

    def prose(self, value: Any) -> Markup:
        """Escaped; an address becomes a link, a record's id leads to its section."""
        written, parts, at = clip(text(value)), [], 0
        for match in _LINK.finditer(written):
            parts.append(escape(written[at : match.start()]))
            at = match.end()
            if match["url"]:
                link = Markup('<a href="{0}" rel="noopener noreferrer nofollow">{0}</a>')
                parts.append(link.format(match["url"]))
            elif match["id"] in self.linked:
                parts.append(Markup('<a href="#{0}">{0}</a>').format(match["id"]))
            else:
                parts.append(escape(match["id"]))
        return Markup("").join([*parts, escape(written[at:])])


def clip(value: str) -> str:
    """A text that no page should hold ends with how much more there is."""
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]}… ({len(value) - LONGEST:,} more characters in the record)"


def filled(value: Any) -> bool:
    return value not in (None, "", [], {})


def island(value: Any) -> Markup:
    """JSON that HTML cannot take for anything else, without what JSON does not have (NaN)."""
    data = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return Markup(data)


def strip(row: figures.Row) -> dict[str, float] | None:
    """A change's interval beside 0, as shares of the strip's width; None where there is no interval."""
    change = row.change
    if change is None or change.ci_low is None or change.ci_high is None:
        return None
    begin, end = min(0.0, change.ci_low), max(0.0, change.ci_high)
    if not end > begin:
        return None
    places = {"zero": 0.0, "low": change.ci_low, "high": change.ci_high, "value": change.value}
    return {name: round(4 + 92 * (at - begin) / (end - begin), 2) for name, at in places.items()}


def totals(project: Project) -> dict[str, Any]:
    """Time and cost of all; what a pipeline experiment ran is in its own figures already."""
    tops = [entry for entry in project.entries if entry.parent not in project.by_id]
    cost: dict[str, float] = {}
    for entry in tops:
        if entry.cost:
            amount, currency = entry.cost
            cost[currency] = cost.get(currency, 0) + amount
    return {"seconds": sum(entry.seconds or 0 for entry in tops), "cost": cost}


def _key_facts(entry: Entry) -> Iterator[tuple[str, str]]:
    """What one wants to know first of how it ran."""
    if entry.facts is None:
        return
    facts = entry.facts
    resources, code, environment = facts.resources, facts.code, facts.environment
    yield "Started", f"{entry.started} UTC"
    if entry.seconds is not None:
        yield "Time", duration(entry.seconds)
    if resources.get("gpu_hours"):
        yield "GPU hours", text(resources["gpu_hours"])
    for label, key in (("Peak memory", "peak_memory_gb"), ("Peak GPU memory", "gpu_peak_memory_gb")):
        if resources.get(key):
            yield label, f"{resources[key]} GB"
    energy = resources.get("energy")
    if isinstance(energy, dict):
        yield "Energy", f"{energy.get('kwh')} kWh, {energy.get('co2_kg')} kg CO₂"
        yield "Energy from", text(energy.get("how"))
    if entry.cost:
        yield "Cost", f"{entry.cost[0]:.3g} {entry.cost[1]}"
    base = facts.lineage.base
    if base:
        yield "Base model", f"{base.get('name')} {text(base.get('sha256'))[:12]}".rstrip()
    if code.get("commit"):
        yield "Code", f"{text(code['commit'])[:12]}{' with changes, kept as a patch' if code.get('dirty') else ''}"
    if code.get("command"):
        yield "Command", text(code["command"])
    machine = environment.get("gpus") or environment.get("cpu")
    if machine:
        yield "Machine", f"{', '.join(texts(machine))} on {environment.get('host')}"


def _is_brief(value: Any) -> bool:
    """A mapping that reads well in one line."""
    if not isinstance(value, dict) or not value:
        return False
    scalar = not any(isinstance(child, dict | list) for child in value.values())
    return scalar and sum(len(f"{key}: {child}") for key, child in value.items()) < 2 * SHORT


def _not_drawn(keys: list[str]) -> list[str]:
    return [f"also in the log, not drawn: {', '.join(keys)}"] if keys else []


def _brief(value: Any) -> Any:
    """For the comparison: a value in a cell."""
    shown = json.dumps(plain(value), ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
    return f"{shown[:300]}…" if isinstance(shown, str) and len(shown) > 300 else shown


def _source(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def _policy(scripts: Any) -> str:
    """No script but these, nothing loaded from anywhere."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
