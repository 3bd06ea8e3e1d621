"""Reads a profile: YAML and `--set` into one typed configuration that knows where each value came from.

    profile = load_profile(workspace, "tiny", ["sft_config.learning_rate=1e-3"])
    profile.config.sft_config.learning_rate    # 0.001
    profile.origin("sft_config.learning_rate")  # "--set"

Every mistake is one line with file, line, key and the nearest key that exists.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline import yamlio
from pipeline.config import Profile as Config
from pipeline.errors import UserError
from pipeline.train import conflicts
from pipeline.workspace import Workspace

DEFAULT_PROFILE = "deepseek-coder-7b"


@dataclass(frozen=True)
class Profile:
    """A validated configuration and the origin of each value."""

    id: str  # the file's stem: what records call it and what stages of one profile share
    path: Path
    shown: str
    config: Config
    lines: dict[tuple[str | int, ...], int]
    overrides: dict[str, Any]

    def origin(self, key: str) -> str:
        """`--set`, `configs/tiny.yaml:12` or `default`."""
        if _overridden(key, self.overrides):
            return "--set"
        line = self.lines.get(tuple(key.split(".")))
        return f"{self.shown}:{line}" if line else "default"

    def error(self, key: str, what: str, remedy: str = "") -> UserError:
        """An error about one key's value, at the place where it was given."""
        origin = self.origin(key)
        return UserError(f"{key}: {what}", where=self.shown if origin == "default" else origin, remedy=remedy)


def load_profile(workspace: Workspace, name: str, assignments: list[str] | None = None) -> Profile:
    path = _find(workspace, name)
    shown = workspace.shown(path)
    try:
        document = yamlio.load(path.read_text("utf-8"))
    except yamlio.YamlError as error:
        raise UserError(error.what, where=f"{shown}:{error.line}:{error.column}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=shown) from None
    if not isinstance(document.value, dict):
        raise UserError(
            "a profile is a mapping of keys to values", where=f"{shown}:1", remedy="copying configs/tiny.yaml"
        )

    values = document.value
    overrides = dict(_parse_assignment(text) for text in assignments or [])
    for key, value in overrides.items():
        _assign(values, key, value)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error.errors()[0], shown, document.lines, overrides) from None
    profile = Profile(path.stem, path, shown, config, document.lines, overrides)
    conflicts.check_profile(profile)
    return profile


def settings(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every effective value below `section`: dotted key, value, description."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _as_written(value), field.description or ""


def _as_written(value: Any) -> Any:
    """As a profile would say it: of a judge, say, the keys that were given."""
    if isinstance(value, list):
        return [each.model_dump(exclude_unset=True) if isinstance(each, BaseModel) else each for each in value]
    return value


def _find(workspace: Workspace, name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        path = path if path.exists() else workspace.path(name)
    else:
        path = workspace.configs / f"{name}.yaml"
    if path.is_file():
        return path.resolve()
    known = sorted(p.stem for p in workspace.configs.glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"--profile {near[0]}" if near else f"one of: {', '.join(known) or 'none is there'}"
    raise UserError(f"no profile `{name}`", where=workspace.shown(path), remedy=remedy)


def _parse_assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"`{text}` is not KEY=VALUE", where="--set", remedy="--set sft_config.learning_rate=1e-4")
    try:
        return key.strip(), yamlio.load(value).value
    except yamlio.YamlError as error:
        raise UserError(f"{key}: the value is not YAML: {error.what}", where="--set") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{key}: `{section}` is a value, not a section", where="--set")
        values = inner
    values[last] = value


def _overridden(key: str, overrides: dict[str, Any]) -> bool:
    """Whether `--set` gave this key or a section that it is in."""
    return any(f"{key}.".startswith(f"{other}.") for other in overrides)


def _explain(
    error: ErrorDetails, shown: str, lines: dict[tuple[str | int, ...], int], overrides: dict[str, Any]
) -> UserError:
    path = _known_path(error["loc"])
    key = ".".join(map(str, path))
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    inside = path not in lines and any(other.startswith(f"{key}.") for other in overrides)
    where = "--set" if inside or _overridden(key, overrides) else f"{shown}:{line}" if line else shown
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(path[-1]), _keys(path[:-1]), n=1, cutoff=0.5)
        elsewhere = [other for other in _all_keys() if other.endswith(f".{path[-1]}")]
        remedy = (
            f"`{near[0]}`" if near else f"`{elsewhere[0]}`" if elsewhere else "`aletheia config explain` for all keys"
        )
        return UserError(f"{key}: there is no such key", where=where, remedy=remedy)
    if error["type"] == "missing":
        return UserError(f"{key}: is missing", where=where, remedy=f"a line `{key}: …`")
    return UserError(f"{key}: {_sentence(error)}", where=where)


def _sentence(error: ErrorDetails) -> str:
    given = error["input"]
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"is a section: it needs keys below it, not {given!r}"
    if error["type"] == "value_error":  # keys that do not go together: said whole by `pipeline.config`
        return error["msg"].removeprefix("Value error, ")
    if not error["msg"].startswith("Input should be "):
        return f"{error['msg']}, not {given!r}"
    what = error["msg"].removeprefix("Input should be ").removeprefix("a valid ").replace("equal to", "=")
    hint = " (write 2e-4 without quotes)" if isinstance(given, str) and "number" in what else ""
    return f"must be {what}, not {given!r}{hint}"


def _known_path(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """pydantic adds the names of union members to a location: only real keys and indices are ours."""
    model: Any = Config
    path: list[str | int] = []
    for part in loc:
        fields = getattr(model, "model_fields", None)
        if fields is None and isinstance(part, str):
            break
        path.append(part)
        model = fields[part].annotation if fields and part in fields else None
    return tuple(path)


def _keys(section: tuple[str | int, ...]) -> list[str]:
    model: Any = Config
    for name in section:
        model = model.model_fields[name].annotation
    return list(model.model_fields)


def _all_keys(model: Any = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def as_assignments(overrides: dict[str, Any]) -> list[str]:
    """Overrides as `--set` takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
