"""The person's half of a record, typed: the keys that every record has, and those that working logs hold besides.

    parse(text, "experiments/EXP-….yaml")    # → Person, or the first mistake as a `UserError`
    problems(text)                            # every mistake and every likely one, for a linter
    json_schema()                             # both halves for an editor: `aletheia exp schema`

What the program acts on (id, date, stages, criteria, overrides, next steps, `from`, tags) is checked strictly. Where people
write freely any shape will do, and a key that is not here is theirs and allowed. No key has the name of one of the program's, so
that both halves together are one YAML document.
"""

import datetime as dt
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.records import ids
from pipeline.records.schema import SCHEMA_VERSION, Criterion, Facts

StageName = Literal["data", "sft", "dpo", "merge", "export", "serve", "eval"]
STAGES: tuple[StageName, ...] = get_args(StageName)
RECORD_ID = ids.ID.pattern
INSTEAD = {  # a key of the program's that a person may want, and theirs for it
    "artifacts": "artifact_uris",
    "code": "code_version",
    "configuration": "hyperparameters",
    "data": "splits",
    "environment": "set_up",
    "failure": "issues",
    "lineage": "parent, related or from",
    "resources": "compute",
    "results": "metrics",
    "stage": "stages",
    "verdict": "conclusion",
}


def _as_date(value: Any) -> dt.date:
    """A datetime is a date. Numbers are none: `20261120` would be taken for seconds."""
    if isinstance(value, str):
        return dt.datetime.fromisoformat(value) if len(value) > 10 else dt.date.fromisoformat(value)
    if isinstance(value, dt.date):
        return value
    raise ValueError("not a date")


_DATE_SCHEMA = {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}([Tt ].*)?$"}
_VALUE_SCHEMA = {"type": ["string", "number", "boolean", "null"]}
Date = Annotated[dt.date | dt.datetime, BeforeValidator(_as_date), WithJsonSchema(_DATE_SCHEMA)]
Value = Annotated[
    str | int | float | bool | dt.datetime | dt.date | None, WithJsonSchema(_VALUE_SCHEMA)
]  # `~3e-8`, `< 1e-5` and 0.93 alike
Amount = Value | list[Value] | dict[str, Any]  # 100, "about 100", [100, 500], {train: 80, valid: 20}
Prose = Any  # a text, a list of points, or either below headings of one's own


class Part(BaseModel):
    """Keys of one's own are allowed, and kept."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


def _key(description: str, *examples: Any, **options: Any) -> Any:
    return Field(default=None, description=description, examples=list(examples) or None, **options)


class NextStep(Part):
    """A step that can be ticked. `aletheia exp promote` turns it into a plan."""

    step: str = Field(description="What to do.")
    done: bool = Field(False, description="Whether it was done, or became a plan.")
    promoted_to: str | None = _key("The record that it became.", "EXP-2026-11-21-004")


class Variable(Part):
    """One thing that is varied on purpose."""

    name: str = Field(description="Its name.", examples=["lora_rank"])
    values: Amount = _key("What it takes: a list, or a range as [lo, hi].", [8, 16, 32])
    baseline: Value = _key("What it is otherwise.")
    why: Prose = _key("Why it is varied.")


class Condition(Part):
    """One arm of a planned experiment."""

    name: Value = _key("What it is called.")
    samples: Amount = _key("Rows or samples in it; a range as [lo, hi].", [100, 500])
    criteria: Prose = _key("What a sample must be to stand in it.")
    curation_time: Amount = _key("How long collecting it takes.", "2 to 3 days")
    branches: Prose = _key("Ways of doing it that are compared.")


class Tracking(Part):
    """Where a tracker keeps the run."""

    platform: Value = _key("The tracker.", "mlflow")
    project: Value = _key("Its project or experiment there.")
    run_links: list[Any] | dict[str, Any] | str | None = _key("The run's addresses.", {"wandb": "https://wandb.ai/…"})


class Splits(Part):
    """How the data were divided."""

    train: Amount = _key("Rows trained on.", 1600)
    validation: Amount = _key("Rows held out while training.", 200)
    test: Amount = _key("Rows kept for the end.", 200)
    strategy: Value = _key("How rows were assigned.", "stratified by domain")
    seed: Value = _key("Seed of the split.", 42)


class Search(Part):
    """A hyperparameter search."""

    space: Prose = _key("What was searched; ranges as [lo, hi].", {"learning_rate": [1e-5, 1e-3]})
    method: Value = _key("How.", "TPE, Optuna 3.5")
    trials: Amount = _key("How many.", 40)
    budget: Amount = _key("What it was allowed to use.", "24 GPU hours")
    best: Prose = _key("What it found.")


class MetricRow(Part):
    """A row of a metrics table."""

    name: Value = _key("The metric.", "eval_loss")
    value: Amount = _key("A number, or a text where that is what one has: `~3e-8`, `< 1e-5`.", 0.912, "~3e-8")
    target: Value = _key("What was aimed at.", "< 1e-5")
    unit: Value = _key("Its unit.", "nats/token")
    ci_low: Value = _key("Lower end of the 95 % interval.")
    ci_high: Value = _key("Upper end of the 95 % interval.")
    n: Value = _key("Rows behind it.")
    status: Value = _key("Whether it met the target, in words.", "pass")
    passed: bool | None = _key("Whether it met the target.")
    notes: Prose = _key("Remarks.")


class Epochs(Part):
    """Epochs worth naming, and all of them."""

    best: Prose = _key("The best epoch, for train and valid.", {"valid": {"epoch": 6, "loss": 1.31}})
    latest: Prose = _key("The last epoch, for train and valid.", {"train": {"epoch": 9, "loss": 0.82}})
    history: list[Any] | dict[str, Any] | None = _key("A row an epoch.", [{"epoch": 1, "train_loss": 1.9}])


class Baseline(Part):
    """Something it is compared with."""

    name: Value = _key("What it is.", "base model")
    delta: Amount = _key("This experiment's figure less the baseline's.", 0.031)
    latency: Amount = _key("How long an answer takes; say the unit.", "41 ms")


class Picture(Part):
    """A plot and what it is for."""

    path: str = Field(description="The file.", examples=["plots/loss.png"])
    purpose: str | None = _key("What one looks at it for.", "shows where over-fitting begins")


class Stored(Part):
    """Something kept elsewhere."""

    name: Value = _key("What it is.", "best checkpoint")
    uri: str = Field(description="Where it is.", examples=["s3://models/ranker/0.4.2/"])


class CodeVersion(Part):
    """The code that ran, where the program did not see it."""

    repository: Value = _key("Where it is.")
    commit: Value = _key("Its commit.", "9f1c2ab")
    tag: Value = _key("Its tag.", "v0.4.2")
    branch: Value = _key("Its branch.")
    version: Value = _key("Its version.")


class Compute(Part):
    """What it used, where the program did not measure it."""

    gpu_hours: Amount = _key("Hours of one GPU.", 18.5)
    co2_kg: Amount = _key("Kilograms of CO2.", 2.1)
    cost: Amount = _key("Money, with its currency.", "37.00 EUR")


class Analysis(Part):
    """What one makes of it."""

    worked: Prose = _key("What worked.")
    did_not_work: Prose = _key("What did not.")
    unexpected: Prose = _key("What nobody expected.")


class Learnings(Part):
    """What the next experiment should know."""

    training: Prose = _key("About training.")
    infrastructure: Prose = _key("About machines and tools.")
    domain: Prose = _key("About the subject.")


class JournalEntry(Part):
    """A day's entry. Sections of one's own are keys of one's own."""

    date: Value = _key("The day.", "2026-11-20")
    learned: Prose = _key("What I learned.")
    difficult: Prose = _key("What was difficult.")
    do_differently: Prose = _key("What I would do differently.")
    connections: Prose = _key("What it connects to.")
    open_questions: Prose = _key("What I do not know yet.")


class Deployment(Part):
    """Whether it may go to its users."""

    ready: Value = _key("true, false, or on what it depends.", False)
    blockers: Prose = _key("What stands in the way.")
    action_items: Prose = _key("Who does what by when.")


class Person(Part):
    """The keys above the line. All are optional."""

    experiment_id: str | None = _key(
        "The record's id, which is also its file's name.", "EXP-2026-11-21-003", pattern=RECORD_ID
    )
    date: Date | None = _key("The day, YYYY-MM-DD.", "2026-11-21")
    title: Value = _key("A short name.")
    profile: str | None = _key("The profile in configs/ that it runs.", "tiny")
    stages: list[StageName] | None = _key("What it runs, in this order.", ["sft", "dpo", "merge", "eval"])
    from_: str | None = _key(
        "The record to build on; `base`: none.",
        "EXP-2026-11-20-007",
        alias="from",
        pattern=f"{RECORD_ID}|^base$",
    )
    description: Prose = _key("What it is, in a line.")
    milestone: Value = _key("The milestone it belongs to.")
    objective: Prose = _key("What it is for.")
    hypothesis: Prose = _key("What you expect, and why.", "More data lowers held-out loss.")
    success_criteria: list[str | Criterion] | None = _key(
        "METRIC OP NUMBER, frozen when the run starts.",
        ["eval_loss < 1.20", {"criterion": "eval_loss.delta.ci_high < 0", "role": "primary", "min_n": 50}],
    )
    expected_results: Prose = _key("What should come out, in words or figures.")
    overrides: dict[str, Any] | None = _key("Over the profile's values, by dotted key.", {"sft_config.lora_rank": 32})
    variables: list[str | Variable] | dict[str, Any] | str | None = _key(
        "What is varied.", [{"name": "lora_rank", "values": [8, 16, 32]}]
    )
    conditions: list[str | Condition] | dict[str, Any] | str | None = _key(
        "The arms that are compared.", [{"name": "small", "samples": [100, 500]}]
    )
    methodology: Prose = _key("How it is done.")
    parent: Value = _key("The experiment it belongs to or follows.")
    related: list[Any] | str | None = _key("Experiments to read beside it.", ["EXP-2026-11-20-003"])
    tags: list[str] | None = _key("Words to find it by.", ["lora", "ablation"])
    experimenter: Prose = _key("Who does it.")
    tracking: Tracking | str | None = _key(
        "Where a tracker keeps it.", {"platform": "mlflow", "run_links": ["https://…"]}
    )
    set_up: Prose = _key("Model, hardware, software: what it runs on.", {"gpu": "1 × A100 80 GB", "cuda": "12.4"})
    seeds: Amount = _key("Seeds.", [1, 2, 3])
    splits: Splits | None = _key("How the data were divided.", {"train": 1600, "validation": 200, "seed": 42})
    preprocessing: list[Any] | dict[str, Any] | str | None = _key("Its steps, in order.", ["lower-case", "deduplicate"])
    hyperparameters: dict[str, Any] | list[Any] | None = _key("What it was configured with.", {"learning_rate": 2e-4})
    marks: Prose = _key("Marks on the configuration.", ["bf16", "flash-attention"])
    search: Search | str | None = _key("How hyperparameters were searched for.", {"method": "random", "trials": 40})
    ablations: Prose = _key("What is left out or changed one at a time, done or planned.")
    metrics: list[str | MetricRow] | dict[str, Any] | None = _key(
        "Figures, by name or as the rows of a table.", {"f1": 0.87}, [{"name": "f1", "value": 0.87, "target": 0.85}]
    )
    epochs: Epochs | None = _key(
        "Best and latest epoch, and a row for each.", {"best": {"valid": {"epoch": 6, "loss": 1.31}}}
    )
    confusion_matrix: dict[str, Any] | list[Any] | None = _key(
        "Counts, a row for each true class.", {"labels": ["no", "yes"], "counts": [[90, 4], [7, 99]]}
    )
    per_group: list[Any] | dict[str, Any] | None = _key("Figures for each group.", {"de": {"f1": 0.84}})
    baselines: list[str | Baseline] | dict[str, Any] | None = _key(
        "What it is compared with.", [{"name": "base model", "delta": 0.031, "latency": "41 ms"}]
    )
    feature_importance: list[Any] | dict[str, Any] | None = _key("How much each feature matters.", {"title": 0.41})
    plots: list[str | Picture] | None = _key(
        "Plots, each with what it is for. The pipeline lists its own below the line.",
        [{"path": "plots/loss.png", "purpose": "shows where over-fitting begins"}],
    )
    artifact_uris: list[str | Stored] | dict[str, Any] | None = _key(
        "What is kept elsewhere.", [{"name": "checkpoint", "uri": "s3://models/…"}]
    )
    code_version: CodeVersion | Value = _key("The code, where the program did not see it run.", {"commit": "9f1c2ab"})
    compute: Compute | str | None = _key(
        "What it used, where the program did not measure it.", {"gpu_hours": 18.5, "co2_kg": 2.1}
    )
    observations: Prose = _key("What was seen.", ["Loss spikes at step 140, on the longest rows."])
    analysis: Analysis | list[Any] | str | None = _key(
        "What one makes of it.", {"worked": ["…"], "did_not_work": ["…"], "unexpected": ["…"]}
    )
    issues: Prose = _key("What went wrong or is in the way.")
    insights: Prose = _key("What one understands now.")
    conclusion: Prose = _key("What came of it; pass or fail.", {"outcome": "pass", "because": "all criteria hold"})
    next_steps: list[str | NextStep] | None = _key(
        "What to do next, numbered from 1 for `aletheia exp promote`.", ["Try rank 64", {"step": "…", "done": True}]
    )
    learnings: Learnings | list[Any] | str | None = _key(
        "What the next experiment should know.", {"training": ["…"], "domain": ["…"]}
    )
    journal: list[str | JournalEntry] | str | None = _key(
        "Dated entries.", [{"date": "2026-11-20", "learned": ["…"], "open_questions": ["…"]}]
    )
    deployment: Deployment | bool | str | None = _key(
        "Whether it may go to its users.", {"ready": False, "blockers": ["…"]}
    )
    reviewer_notes: Prose = _key("What reviewers say.")
    human_feedback: Prose = _key("What people who tried it say.")
    template_version: Value = _key("Version of the template that it was written on.")
    foreign_id: Value = _key("What another log calls it.", "20240131_142233_j123456")
    taken_in: dict[str, Any] | None = _key("The log that a plan was taken in from.", {"file": "plans.yaml"})
    notes: Prose = _key("Anything else.")


KEYS = {field.alias or name: field for name, field in Person.model_fields.items()}


@dataclass(frozen=True)
class Problem:
    """Something in the person's half. `line` and `column` count from 1; `key` is dotted; a warning may be meant."""

    line: int
    column: int
    key: str
    what: str
    remedy: str
    severity: Literal["error", "warning"] = "error"


def parse(text: str, where: str) -> Person:
    """Raises `UserError` with `where:line:column` for the first mistake. Warnings are for `problems`."""
    mistakes = [problem for problem in problems(text) if problem.severity == "error"]
    if mistakes:
        first = mistakes[0]
        what = f"{first.key}: {first.what}" if first.key else first.what
        raise UserError(what, where=f"{where}:{first.line}:{first.column}", remedy=first.remedy)
    return Person.model_validate(yamlio.load(text.removeprefix("\ufeff")).value or {})


def problems(text: str) -> list[Problem]:
    """All of them in the order of the file; of a text that is no YAML, the first place where it is not."""
    text = text.removeprefix("\ufeff")
    try:
        document = yamlio.load(text)
    except yamlio.YamlError as error:
        return [Problem(error.line, error.column, "", error.what, "")]
    if document.value is None:
        return []
    if not isinstance(document.value, dict):
        return [Problem(1, 1, "", "a record is a mapping of keys to values", "`description: …`")]
    found = [*_wrong(document), *_doubtful_keys(document)]
    found += [Problem(s.line, s.column, _dotted(s.path), s.what, s.remedy, "warning") for s in yamlio.surprises(text)]
    return sorted(found, key=lambda problem: (problem.line, problem.column))


def _wrong(document: yamlio.Document) -> Iterator[Problem]:
    """What does not fit the types. Of a value that may be one of several things, the closest fit is explained."""
    try:
        Person.model_validate(document.value)
        return
    except ValidationError as error:
        errors = error.errors()
    by_path: dict[yamlio.KeyPath, list[ErrorDetails]] = {}
    for one in errors:
        by_path.setdefault(_place(one["loc"], document.value), []).append(one)
    for path, alternatives in by_path.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in by_path):
            continue  # one of the alternatives got further
        what = _explained(alternatives)
        yield Problem(*_stands(document, path), _dotted(path), what, _remedy(path))


def _doubtful_keys(document: yamlio.Document) -> Iterator[Problem]:
    for key in document.value:
        if key in KEYS or not isinstance(key, str):
            continue
        place = _stands(document, (key,))
        near = difflib.get_close_matches(key.lower().replace("-", "_").replace(" ", "_"), KEYS, 1, cutoff=0.8)
        if key in Facts.model_fields:
            if key == "status" and document.value[key] == "planned":  # true of what nothing has run
                continue
            remedy = f"`{INSTEAD[key]}`" if key in INSTEAD else "deleting it here"
            yield Problem(*place, key, "is the pipeline's, which writes it below the line", remedy, "warning")
        elif near:
            yield Problem(*place, key, "no key of this name is known; it is kept as it is", f"`{near[0]}`", "warning")


def _place(loc: tuple[int | str, ...], value: Any) -> yamlio.KeyPath:
    """Where in the document: pydantic also names the alternative that it tried, and keys that are not there."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(value, dict) and part in value:
            value = value[part]
            path.append(str(part))
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
            path.append(part)
    return tuple(path)


def _stands(document: yamlio.Document, path: yamlio.KeyPath) -> tuple[int, int]:
    """Line and column of the key, or of the nearest one around it."""
    for length in range(len(path), 0, -1):
        if path[:length] in document.lines:
            return document.lines[path[:length]], document.columns[path[:length]]
    return 1, 1


def _explained(alternatives: list[ErrorDetails]) -> str:
    given = alternatives[0]["input"]
    for error in alternatives:
        if error["type"] == "missing":
            return f"`{error['loc'][-1]}` is missing"
        if error["type"] == "extra_forbidden":
            return "there is no such key"
        if error["type"] == "invalid_key":
            return "is no text, and a key must be"
    expected = list(dict.fromkeys(filter(None, map(_expected, alternatives))))
    shown = " ".join(str(given).split())
    kind = "a mapping" if isinstance(given, dict) else "a list" if isinstance(given, list) else None
    is_what = kind or f"`{shown[:40]}{'…' if len(shown) > 40 else ''}`"
    return f"is {is_what}, not {' or '.join(expected)}" if expected else f"does not fit: {alternatives[0]['msg']}"


def _expected(error: ErrorDetails) -> str | None:
    kind = error["type"]
    if kind == "literal_error":
        return f"one of {error['ctx']['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    if kind == "string_pattern_mismatch":
        return "EXP-YYYY-MM-DD-###" + (" or base" if error["loc"] == ("from",) else "")
    if error["loc"][:1] == ("date",):
        return "a date"
    words = {"string": "a text", "list": "a list", "dict": "a mapping", "model": "a mapping", "bool": "true or false"}
    words |= {"int": "a whole number", "float": "a number", "date": "a date", "datetime": "a date"}
    return words.get(kind.partition("_")[0])


def _remedy(path: yamlio.KeyPath) -> str:
    """The key's example, which an editor shows too."""
    field = KEYS.get(str(path[0])) if path else None
    if field is None or not field.examples:
        return ""
    example = field.examples[0]
    return f"`{path[0]}: {example if isinstance(example, str) else json.dumps(example, ensure_ascii=False)}`"


def _dotted(path: yamlio.KeyPath) -> str:
    """`success_criteria[2].role`; places in a list count from 1."""
    return "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


PROGRAM = {
    "schema_version": "Version of this schema.",
    "status": "planned, running, complete, failed or cancelled.",
    "stage": "What ran: a stage, `pipeline` for several, `imported` for a log that was kept elsewhere.",
    "profile_used": "The profile that ran.",
    "history": "Every change of status, with host and process.",
    "lineage": "What it was built on, by hash, and the pipeline experiment it is part of.",
    "overrides_used": "What was set over the profile's values.",
    "configuration": "Every effective value.",
    "data": "The rows: snapshot hash and counts.",
    "results": "The figures, with their intervals.",
    "verdict": "What became of the success criteria, as they stood when it started.",
    "visualizations": "The plots beside the record, each with its purpose.",
    "artifacts": "The files it made, by hash.",
    "failure": "What failed, at which step, on which rows.",
    "code": "Command, commit and patch.",
    "environment": "Machine, Python, libraries and lock file.",
    "resources": "Time, memory, energy, CO2 and cost.",
    "external": "Where it was exported to, or the log it was taken in from.",
    "seal": "SHA-256 of what the pipeline wrote below the line.",
}


def json_schema() -> dict[str, Any]:
    """Both halves as the one mapping that an editor sees, draft 2020-12.

    The two share no key, so that a record is one YAML document.
    """
    person, facts = Person.model_json_schema(), Facts.model_json_schema()
    program = {
        key: value | {"description": PROGRAM[key], "readOnly": True} for key, value in facts["properties"].items()
    }
    untitled = _without_titles(
        {
            "properties": program | person["properties"],
            "$defs": facts.get("$defs", {}) | person.get("$defs", {}),
        }
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:aletheia:record:{SCHEMA_VERSION}",
        "title": "Aletheia experiment record",
        "description": "Above the line the person's keys, below it the pipeline's.",
        "type": "object",
        **untitled,
        "dependentRequired": {"schema_version": facts["required"]},
        "additionalProperties": {"description": "A key of your own: kept and shown, never checked."},
    }


def _without_titles(schema: Any) -> Any:
    """pydantic names every property after itself, which says nothing."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "title" or isinstance(value, dict)}
    return {key: value if key == "examples" else _without_titles(value) for key, value in kept.items()}
