"""The rows of the pages' tables: settings, figures and changes, each with its interval."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from aletheia.exp.figures import excludes_0
from aletheia.exp.reading import flat, interval, number
from pipeline.records.metrics import Metric, metrics
from pipeline.records.schema import Facts

SECTIONS = {
    "sft": "sft_config",
    "dpo": "dpo_config",
    "merge": "merge_config",
    "serve": "serve_config",
    "eval": "eval_config",
}
GENERAL = ("base_model", "revision", "device", "precision", "quantization", "seed")


class Change(NamedTuple):
    """A row of the table of changes; `said` is what the interval of the difference lets one say."""

    figure: str
    before: str
    after: str
    difference: str
    interval: str
    n: str
    said: str

    @property
    def is_shown(self) -> bool:
        return self.said in ("rose", "fell")

    def text(self) -> str:
        rows = f", n = {self.n}" if self.n else ""
        return f"{self.figure}: {self.said} ({' '.join(filter(None, (self.difference, self.interval)))}{rows})"


def settings(facts: Facts) -> Iterator[tuple[str, str]]:
    """What its stage's configuration and data were; of the rest of the configuration only what bears on every stage."""
    base = facts.lineage.base or {}
    if base:
        revision = base.get("revision")
        yield "base", f"{base.get('name')} at {revision}" if revision else f"{base.get('name')}, a local model"
    general = {key: facts.configuration[key] for key in GENERAL if key in facts.configuration}
    for key, value in [*flat(general), *flat(facts.configuration.get(SECTIONS.get(facts.stage, "")))]:
        yield key, one_line(value)
    domains: dict[str, list[str]] = {}
    for key, value in flat(facts.data):
        part, found, domain = key.partition(".domains.")
        if found:
            domains.setdefault(part, []).append(f"{domain} {one_line(value)}")
        else:
            yield f"data: {key}", one_line(value)
    for part, counts in domains.items():
        yield f"data: {part}.domains", ", ".join(counts)
    for key, value in facts.overrides.items():
        yield f"set by hand: {key}", one_line(value)


def changes(results: dict[str, Any]) -> Iterator[Change]:
    found = metrics(results)
    for path, after in found.items():
        before, delta = found.get(f"{path}.before"), found.get(f"{path}.delta")
        if before and delta:
            ends = (number(before.value), number(after.value), number(delta.value, "+"))
            yield Change(path, *ends, interval(delta, "+"), _n(delta), _said(delta))


def values(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Figure, value, its interval, n; of a change both ends."""
    for path, metric in metrics(results).items():
        if not path.endswith(".delta"):
            yield path, number(metric.value), interval(metric), _n(metric)


def one_line(value: Any) -> str:
    """Any value in one line, whole."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(one_line, value))
    return "" if value is None else " ".join(str(value).split())


def _said(delta: Metric) -> str:
    if delta.ci_low is None or delta.ci_high is None:
        return "no interval: shows nothing"
    if not excludes_0(delta):
        return "no difference shown"
    return "rose" if delta.value > 0 else "fell"


def _n(metric: Metric) -> str:
    return "" if metric.n is None else str(metric.n)
