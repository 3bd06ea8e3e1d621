"""A YAML (or JSON) log of another kind: one experiment, a list of them, or a mapping of their names."""

from typing import Any

import yaml

from aletheia.exp.foreign import Log, plain
from pipeline import yamlio
from pipeline.errors import UserError

WORDS = ("yes", "no", "on", "off")
LISTS = ("experiments", "planned_experiments", "runs", "milestones", "trials", "records", "plans")


def logs(text: str, shown: str) -> list[Log]:
    """Raises `UserError` with file, line and column for what is no plain, bounded YAML."""
    try:
        document = load(text.removeprefix("\ufeff"))
    except yamlio.YamlError as error:
        raise UserError(error.what, where=f"{shown}:{error.line}:{error.column}") from None
    value = document.value
    if isinstance(value, list):
        return _several(value, (), document)
    if not isinstance(value, dict):
        return []
    for key, experiments in value.items():
        if plain(str(key)) in LISTS and isinstance(experiments, dict | list):
            found = _several(experiments, (str(key),), document)
            if found:
                found[0].outside = {str(k): v for k, v in value.items() if k != key}
                return found
    named = value.items()
    if all(isinstance(child, dict) and str(key).upper().startswith("EXP-") for key, child in named):
        return _several(value, (), document)
    return [_log(value, 1)]


def load(text: str) -> yamlio.Document:
    """`yes: no` as its writer meant it: a key is a text, and so is yes, no, on or off. Raises `yamlio.YamlError`."""
    found: list[tuple[int, int]] = []
    places: list[int | None] = []  # for each open mapping how many keys and values it has had; None for a list
    try:
        for event in yaml.parse(text, yaml.CSafeLoader):
            if isinstance(event, yaml.CollectionEndEvent):
                places.pop()
                continue
            if not isinstance(event, yaml.NodeEvent):
                continue
            is_key = bool(places) and places[-1] is not None and places[-1] % 2 == 0
            if places and places[-1] is not None:
                places[-1] += 1
            if isinstance(event, yaml.CollectionStartEvent):
                places.append(0 if isinstance(event, yaml.MappingStartEvent) else None)
            elif isinstance(event, yaml.ScalarEvent) and not event.style and event.tag is None and event.end_mark:
                begin, end = event.end_mark.index - len(event.value), event.end_mark.index
                if (is_key and event.value != "<<") or event.value.lower() in WORDS:
                    found += [(begin, end)] if event.value and text[begin:end] == event.value else []
    except (yaml.YAMLError, ValueError):  # the reader below tells what and where
        return yamlio.load(text)
    pieces, last = [], 0
    for begin, end in found:
        pieces += [text[last:begin], "'", text[begin:end].replace("'", "''"), "'"]
        last = end
    return yamlio.load("".join([*pieces, text[last:]]))


def _several(values: Any, path: yamlio.KeyPath, document: yamlio.Document) -> list[Log]:
    """Nothing where one of them is no mapping: then it is something else that has such a name."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    found = []
    for key, value in items:
        if not isinstance(value, dict):
            return []
        place = (*path, str(key) if isinstance(values, dict) else key)
        found.append(_log(value, document.lines.get(place, 1), str(key) if isinstance(values, dict) else None))
    return found


def _log(values: dict[Any, Any], line: int, name: str | None = None) -> Log:
    return Log({str(key): value for key, value in values.items()}, line, yamlio.dump(values), name)
