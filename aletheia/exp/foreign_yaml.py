"""A YAML (or JSON) log of another kind: one experiment, a list of them, or a mapping of their names."""

from typing import Any

from aletheia.exp.foreign import Log, plain
from pipeline import yamlio
from pipeline.errors import UserError

LISTS = ("experiments", "planned_experiments", "runs", "milestones", "trials", "records", "plans")


def logs(text: str, shown: str) -> list[Log]:
    """Raises `UserError` with file, line and column for what is no plain, bounded YAML."""
    try:
        document = yamlio.load(text.removeprefix("\ufeff"))
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
