import datetime as dt
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.records import criteria
from pipeline.records.file import LINE, RecordFile
from pipeline.records.person import KEYS, Person, Problem, json_schema, parse, problems
from pipeline.records.schema import Artifact, Facts, Failure, Input, Lineage, StatusChange, Verdict, Visualization
from pipeline.workspace import Workspace

LOGS = sorted((Path(__file__).parent / "logs").glob("*.yaml"))
EXAMPLE = """\
# Yours. The pipeline never touches what stands above the line.
experiment_id: EXP-2026-11-20-002
date: 2026-11-20
profile: deepseek-coder-7b
stages: [sft]                      # several: a pipeline experiment
description: SFT on the expanded set
hypothesis: More data lowers held-out loss.
success_criteria:
  - eval_loss < 1.20
  - {criterion: "eval_loss.delta.ci_high < 0", role: primary, min_n: 50}
overrides: {sft_config.lora_rank: 32}
observations: []
conclusion:
next_steps: []
"""
MISTAKES = [  # line, the place in it, key, what
    ("experiment_id: EXP-2024-XX-XX-002", 1, "experiment_id", "`EXP-2024-XX-XX-002`, not EXP-YYYY-MM-DD-###"),
    ("date: TBD", 1, "date", "`TBD`, not a date"),
    ("date: 20240131", 1, "date", "`20240131`, not a date"),
    ("profile: 7", 1, "profile", "`7`, not a text"),
    ("stages: sft", 1, "stages", "`sft`, not a list"),
    ("stages: [sft, tran]", 15, "stages[2]", "`tran`, not one of data, sft, dpo, merge, export, serve, eval"),
    ("success_criteria: a < 1", 1, "success_criteria", "not a list"),
    ("success_criteria: [a < 1, 5]", 27, "success_criteria[2]", "`5`, not a text or a mapping"),
    ("success_criteria: [{criterion: b < 2, rol: primary}]", 39, "success_criteria[1].rol", "there is no such key"),
    (
        "success_criteria: [{criterion: b < 2, role: main}]",
        39,
        "success_criteria[1].role",
        "not one of primary, guardrail",
    ),
    ("success_criteria: [{role: guardrail}]", 20, "success_criteria[1]", "`criterion` is missing"),
    ("overrides: [a]", 1, "overrides", "is a list, not a mapping"),
    ("next_steps: try it", 1, "next_steps", "`try it`, not a list"),
    ("next_steps: [{done: true}]", 14, "next_steps[1]", "`step` is missing"),
    ("from: EXP-1", 1, "from", "`EXP-1`, not EXP-YYYY-MM-DD-### or base"),
    ("tags: [2024]", 8, "tags[1]", "`2024`, not a text"),
    ("splits: half", 1, "splits", "`half`, not a mapping"),
    ("metrics: 7", 1, "metrics", "`7`, not a list or a mapping"),
    ("plots: [{purpose: shows it}]", 9, "plots[1]", "`path` is missing"),
    ("epochs: {best: 3, history: 4}", 19, "epochs.history", "`4`, not a list or a mapping"),
]


def halves(path: Path) -> tuple[str, str]:
    above, _, below = path.read_text("utf-8").partition(LINE)
    return above, below


def as_an_editor_sees_it(value: Any) -> Any:
    """YAML's dates are texts to an editor."""
    if isinstance(value, dict):
        return {str(key): as_an_editor_sees_it(child) for key, child in value.items()}
    if isinstance(value, list):
        return [as_an_editor_sees_it(item) for item in value]
    return str(value) if isinstance(value, dt.date) else value


def complaints(above: str, below: str = "") -> list[str]:
    both = (yamlio.load(below).value or {}) | (yamlio.load(above).value or {})
    validator = jsonschema.Draft202012Validator(json_schema())
    return [error.message for error in validator.iter_errors(as_an_editor_sees_it(both))]


def log(name: str) -> dict[str, Any]:
    return yamlio.load(halves(next(path for path in LOGS if path.stem == name))[0]).value


def test_the_five_kinds_of_log_are_all_here() -> None:
    assert [path.stem for path in LOGS] == ["corporate", "journal", "milestones", "planned", "training_log"]


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_each_kind_of_log_stands_as_a_record(path: Path, place: Workspace) -> None:
    above, below = halves(path)
    assert problems(above) == []
    parse(above, "x")
    file = RecordFile(place.experiments / f"{yamlio.load(above).value['experiment_id']}.yaml")
    file.path.write_bytes(path.read_bytes())
    read = file.read()
    assert (read.mistake, read.damage, read.edited) == (None, None, None)
    assert (read.facts is None) == (not below)


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_what_a_log_says_is_held_without_loss(path: Path) -> None:
    written = yamlio.load(halves(path)[0]).value
    held = parse(halves(path)[0], "x").model_dump(by_alias=True, exclude_unset=True)
    as_text = [json.dumps(half, sort_keys=True, default=repr) for half in (held, written)]
    assert as_text[0] == as_text[1]  # 1 is not 1.0, and no text a date


def test_a_text_for_a_number_stays_a_text() -> None:
    rows = log("milestones")["metrics"]
    assert [row["value"] for row in rows] == ["~3e-8", 2.1e-9, "< 1e-5", 2.0723, 2.1156, "1.9 ms"]
    assert rows[3]["target"] == "≤ 2.10"


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_an_editor_finds_nothing_wrong_in_a_log(path: Path) -> None:
    assert complaints(*halves(path)) == []


def test_an_editor_finds_nothing_wrong_in_a_record_that_has_run(place: Workspace) -> None:
    file = RecordFile(place.experiments / "EXP-2026-11-20-002.yaml")
    file.path.write_text(EXAMPLE, "utf-8")
    change = StatusChange(status="running", at="2026-11-20T10:00:00Z", host="here", pid=1, started=1.5)
    verdict = criteria.judge(Verdict(frozen_at=change.at, criteria=criteria.read(["loss < 1"])), {"loss": 0.5})
    lineage = Lineage(
        parent="EXP-2026-11-20-001", inputs=[Input(id="EXP-2026-11-19-001", stage="sft", path="x", sha256="0")]
    )
    file.write(
        Facts(
            status="failed",
            stage="sft",
            profile="tiny",
            history=[change],
            lineage=lineage,
            results={"loss": 0.5},
            verdict=verdict,
            visualizations=[Visualization(path="plots/loss.png", purpose="where it rises")],
            artifacts=[Artifact(path="x", sha256="0", bytes=3)],
            failure=Failure(kind="StageFailed", message="loss is not finite", step=3, rows=["a"]),
        )
    )
    above, below = halves(file.path)
    assert problems(above) == []
    assert complaints(above) == []
    assert complaints(above, below) == []
    assert complaints(above, below.replace("status: failed", "status: lost"))
    assert complaints(above, below.replace("\nstage: sft\n", "\n"))


def test_the_schema_is_one_of_draft_2020_12_with_a_name() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:aletheia:record:1"
    assert schema["title"]


def test_every_key_of_both_halves_is_explained() -> None:
    schema = json_schema()
    below = {field.alias or name for name, field in Facts.model_fields.items()}
    assert schema["properties"].keys() == KEYS.keys() | below
    unexplained = [key for key, value in schema["properties"].items() if not value.get("description")]
    inside = [
        f"{name}.{key}"
        for name, part in schema["$defs"].items()
        if name in {model.__name__ for model in Person.__mro__[1].__subclasses__()}
        for key, value in part["properties"].items()
        if not value.get("description")
    ]
    assert (unexplained, inside) == ([], [])


def test_every_example_fits_its_own_key() -> None:
    schema = json_schema()
    for key, value in schema["properties"].items():
        for example in value.get("examples") or []:
            jsonschema.Draft202012Validator(schema).validate({key: example})
            Person.model_validate({key: example})


def test_no_name_stands_in_both_halves() -> None:
    assert not KEYS.keys() & {field.alias or name for name, field in Facts.model_fields.items()}


@pytest.mark.parametrize(("line", "column", "key", "what"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_told_with_line_column_key_and_a_remedy(line: str, column: int, key: str, what: str) -> None:
    (problem,) = problems(f"# mine\n\ndescription: x\n{line}\n")
    assert (problem.line, problem.column, problem.key, problem.severity) == (4, column, key, "error")
    assert what in problem.what
    assert problem.remedy.startswith(f"`{key.partition('[')[0].partition('.')[0]}: ")
    with pytest.raises(UserError) as caught:
        parse(f"# mine\n\ndescription: x\n{line}\n", "experiments/x.yaml")
    assert str(caught.value) == f"experiments/x.yaml:4:{column}: {key}: {problem.what}; try {problem.remedy}"


@pytest.mark.parametrize("line", [mistake[0] for mistake in MISTAKES])
def test_an_editor_sees_the_same_mistakes(line: str) -> None:
    assert complaints(line)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    text = "".join(f"{line}\n" for line, *_ in MISTAKES[::4])
    assert [problem.line for problem in problems(text)] == list(range(1, 6))


def test_no_yaml_is_told_with_its_place() -> None:
    assert problems("a: 1\nb: [1, 2\n") == [Problem(3, 1, "", "did not find expected ',' or ']'", "")]
    with pytest.raises(UserError, match=re.escape("x.yaml:2:1: the key `a` stands twice")):
        parse("a: 1\na: 2\n", "x.yaml")
    (problem,) = problems("- a\n- b\n")
    assert problem.what == "a record is a mapping of keys to values"


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "\ufeff", "---\n"])
def test_an_empty_half_is_no_mistake(text: str) -> None:
    assert problems(text) == []
    assert parse(text, "x").model_dump(exclude_unset=True) == {}


def test_places_are_right_after_a_byte_order_mark_and_with_crlf() -> None:
    text = "\ufeffdescription: x\r\n# é😀\r\ntags: [a, 2]\r\n"
    (problem,) = problems(text)
    assert (problem.line, problem.column, problem.key) == (3, 11, "tags[2]")


def test_a_key_of_ones_own_is_allowed() -> None:
    assert problems("weather: rain\nmoon: {phase: 3}\n") == []
    assert parse("weather: rain\n", "x").model_dump(exclude_unset=True) == {"weather": "rain"}


@pytest.mark.parametrize(
    ("key", "meant"),
    [("hypotesis", "hypothesis"), ("next-step", "next_steps"), ("Conclusion", "conclusion"), ("tag", "tags")],
)
def test_a_key_that_is_nearly_ours_is_doubted(key: str, meant: str) -> None:
    (problem,) = problems(f"a: 1\n{key}: x\n")
    assert (problem.line, problem.severity, problem.remedy) == (2, "warning", f"`{meant}`")
    parse(f"{key}: x\n", "x")  # and yet no error


def test_a_key_of_the_programs_is_told_its_place() -> None:
    found = problems("results: {f1: 0.9}\nseal: abc\n")
    assert [(problem.key, problem.severity, problem.remedy) for problem in found] == [
        ("results", "warning", "`metrics`"),
        ("seal", "warning", "deleting it here"),
    ]
    assert problems("status: planned\n") == []
    assert problems("status: complete\n")[0].severity == "warning"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("hypothesis: fix #12", "`#12` is a comment"),
        ("hypothesis: #12 is fixed", "`#12 is fixed` is a comment"),
        ("observations: [it works, see #3\n  ]", "`#3` is a comment"),
        ("time: 12:30:00", "read as the number 45000, in base 60"),
        ("commit: 0123456", "read as the number 42798, in base 8"),
    ],
)
def test_what_yaml_reads_otherwise_than_meant_is_doubted(line: str, what: str) -> None:
    (problem,) = problems(f"{line}\n")
    assert what in problem.what
    assert problem.severity == "warning"
    parse(f"{line}\n", "x")


def test_a_step_may_be_ticked_and_a_record_built_upon() -> None:
    person = parse("from: base\nnext_steps: [one, {step: two, done: true, promoted_to: EXP-2026-01-01-001}]\n", "x")
    assert person.from_ == "base"
    assert person.next_steps is not None
    assert person.next_steps[0] == "one"
    assert getattr(person.next_steps[1], "done", None) is True


def test_mangled_records_never_crash_the_check() -> None:
    draw = random.Random(3)
    originals = [halves(path)[0] for path in LOGS]
    for _ in range(300):
        text = draw.choice(originals)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(text))
            text = (
                text[:at]
                + draw.choice(["", ":", " #", "- ", "[", "}", "&a ", "*a", "!!set ", "\n", "\t", "0x", "😀", "1: "])
                + text[at + draw.randint(0, 9) :]
            )
        for problem in problems(text):
            assert problem.line >= 1
            assert problem.column >= 1
            assert "\n" not in problem.what
