from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aletheia.exp.plan import plan, promote
from pipeline.errors import UserError
from pipeline.records.file import RecordFile
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

ID = "EXP-2026-01-01-001"
FACTS = Facts(status="complete", stage="sft", profile="small")
WriteRecord = Callable[..., RecordFile]


def planned(workspace: Workspace, stages: str, *assignments: str, **options: Any) -> RecordFile:
    defaults: dict[str, Any] = {"source": None, "hypothesis": None, "criterion": [], "description": None, "tags": []}
    path = plan(workspace, stages.split(), options.pop("profile", "small"), assignments, **defaults | options)
    return RecordFile(path)


def records(workspace: Workspace) -> list[Path]:
    return sorted(workspace.experiments.glob("EXP-*"))


def test_a_plan_says_what_was_asked_and_has_no_line(workspace: Workspace, aletheia: Callable[..., Any]) -> None:
    said = aletheia(
        workspace,
        *("exp", "plan", "sft", "dpo", "merge", "eval", "--profile", "small"),
        *("--set", "sft_config.epochs=1.0", "--set", "sft_config.lora_rank=8"),
        *("--hypothesis", "More: is it # better?", "--criterion", "eval.eval_loss.delta.ci_high < 0"),
        *("--criterion", "sft.eval_loss < 5", "--description", "rank 8", "--tag", "lora", "--tag", "small"),
    )
    assert said.code == 0
    (path,) = records(workspace)
    assert said.out == f"experiments/{path.name}\n"
    assert f"make run EXP={path.stem}" in said.err
    file = RecordFile(path)
    assert file.facts() is None
    assert not file.folder.exists()
    person = file.person()
    assert person.pop("date").isoformat() == path.stem[4:14]
    assert person == {
        "experiment_id": path.stem,
        "profile": "small",
        "stages": ["sft", "dpo", "merge", "eval"],
        "description": "rank 8",
        "hypothesis": "More: is it # better?",
        "success_criteria": ["eval.eval_loss.delta.ci_high < 0", "sft.eval_loss < 5"],
        "overrides": {"sft_config.epochs": 1.0, "sft_config.lora_rank": 8},
        "observations": [],
        "conclusion": None,
        "next_steps": [],
        "tags": ["lora", "small"],
    }


@pytest.mark.parametrize(
    ("stages", "assignments", "options", "told"),
    [
        ("sft fly", [], {}, "exp plan: there is no stage `fly`; try data, sft, dpo, merge, export, serve, eval"),
        ("dpo sft", [], {}, "exp plan: dpo, sft is not the order they run in; try sft, dpo"),
        ("sft sft", [], {}, "exp plan: the stage `sft` stands twice"),
        ("", [], {}, "exp plan: no stage is named"),
        ("sft", [], {"profile": "smal"}, "configs/smal.yaml: no profile `smal`; try --profile small"),
        ("sft", ["sft_config.lora_rnk=8"], {}, "--set: sft_config.lora_rnk: there is no such key; try `lora_rank`"),
        ("sft", ["sft_config.epochs"], {}, "--set: `sft_config.epochs` is not KEY=VALUE"),
        ("sft", ["sft_config.epochs=many"], {}, "--set: sft_config.epochs: must be number"),
        ("sft", [], {"criterion": ["eval_loss is low"]}, "--criterion: `eval_loss is low` is no criterion"),
        ("sft dpo", [], {"criterion": ["eval_loss < 5"]}, "names none of the stages; try `dpo.eval_loss < 5`"),
        ("sft eval", [], {"criterion": ["eval_loss < 5"]}, "names none of the stages; try `eval.eval_loss < 5`"),
        ("sft", [], {"criterion": ["sft.eval_loss < 5"]}, "the only one needs no name; try `eval_loss < 5`"),
        ("dpo", [], {"source": "EXP-2026-01-01-009"}, "there is no record `EXP-2026-01-01-009`"),
        ("dpo", [], {"source": "EXP-2026-01-01-002"}, "EXP-2026-01-01-002 is a merge record; dpo takes sft"),
        ("sft", [], {"source": ID}, f"--from: no stage of sft would take {ID}; try leaving it out"),
        ("sft dpo", [], {"source": ID}, f"--from: no stage of sft, dpo would take {ID}"),
        ("merge", [], {"source": "base"}, "there is no record `base`"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_leaves_no_plan(
    workspace: Workspace,
    write_record: WriteRecord,
    stages: str,
    assignments: list[str],
    options: dict[str, Any],
    told: str,
) -> None:
    workspace.experiments.mkdir()
    write_record(workspace, ID)
    write_record(workspace, "EXP-2026-01-01-002", {"stage": "merge"})
    before = records(workspace)
    with pytest.raises(UserError) as error:
        planned(workspace, stages, *assignments, **options)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert records(workspace) == before


@pytest.mark.parametrize("name", [ID, f"experiments/{ID}.yaml", "base"])
def test_from_is_a_record_by_id_or_file_or_the_base(workspace: Workspace, write_record: WriteRecord, name: str) -> None:
    workspace.experiments.mkdir()
    write_record(workspace, ID)
    assert planned(workspace, "dpo merge", source=name).person()["from"] == ("base" if name == "base" else ID)


def test_a_section_given_as_one_is_kept_key_by_key(workspace: Workspace) -> None:
    """In a plan `sft_config: {lora_rank: 8}` lays one key over the profile's section, and never empties it."""
    file = planned(workspace, "sft", "sft_config={lora_rank: 8, epochs: 1.0}")
    assert file.person()["overrides"] == {"sft_config.lora_rank": 8, "sft_config.epochs": 1.0}


def test_a_profile_that_is_a_file_is_found_again(workspace: Workspace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mine.yaml"
    elsewhere.write_text((workspace.configs / "small.yaml").read_text())
    assert planned(workspace, "sft", profile=str(elsewhere)).person()["profile"] == str(elsewhere)
    assert planned(workspace, "sft", profile=str(workspace.configs / "small.yaml")).person()["profile"] == "small"


HEAD = "# my notes\nprofile: small   # tiny's cousin\nstages: [ sft,dpo ]\noverrides: {sft_config.epochs: 1.0}\n"
TAIL = "# the end 🚀\nnotes:   'a\tb'\ntags: [ 'a' ,\t'b' ]\n"
STEPS = {
    "scalar": ("next_steps:\n  - Try rank 64\n  - Rest\n", '{step: "Try rank 64", done: true, promoted_to: %s}'),
    "scalar with a comment": (
        "next_steps:\n  # first\n  - Try rank 64   # because\n  # then\n  - Rest\n",
        '{step: "Try rank 64", done: true, promoted_to: %s}',
    ),
    "quoted": (
        "next_steps:\n- 'Try \"rank\": 64, it''s #1'\n- Rest\n",
        '{step: "Try \\"rank\\": 64, it\'s #1", done: true, promoted_to: %s}',
    ),
    "escapes": (
        'next_steps:\n- "a\\tb\\u2028c\\x07\\x85 🚀"\n- Rest\n',
        '{step: "a\\tb\\u2028c\\u0007\\u0085 🚀", done: true, promoted_to: %s}',
    ),
    "over two lines": (
        "next_steps:\n  - Try\n    rank 64\n  - Rest\n",
        '{step: "Try rank 64", done: true, promoted_to: %s}',
    ),
    "flow": ("next_steps: [ Try rank 64 , 'Rest' ]\n", '{step: "Try rank 64", done: true, promoted_to: %s}'),
    "anchored": (
        "next_steps:\n  - &first Try rank 64\n  - Rest\n",
        '{step: "Try rank 64", done: true, promoted_to: %s}',
    ),
}
WRITTEN = {
    "scalar": "Try rank 64",
    "scalar with a comment": "Try rank 64",
    "quoted": "'Try \"rank\": 64, it''s #1'",
    "escapes": '"a\\tb\\u2028c\\x07\\x85 🚀"',
    "over two lines": "Try\n    rank 64",
    "flow": "Try rank 64",
    "anchored": "&first Try rank 64",
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_a_step_that_is_a_text_is_ticked_in_its_place_and_nothing_else_changes(
    place: Workspace, write_record: WriteRecord, kind: str, ends: str, mark: bytes
) -> None:
    steps, ticked = STEPS[kind]
    text = (HEAD + steps + TAIL).replace("\n", ends)
    file = write_record(place, ID, None)
    file.path.write_bytes(mark + text.encode())
    file.write(FACTS)
    before = file.path.read_bytes()
    step = file.person()["next_steps"][0].strip()
    path = promote(place, ID, 1)
    old, new = (WRITTEN[kind].replace("\n", ends), ticked % path.stem)
    assert before.count(old.encode()) == 1
    assert file.path.read_bytes() == before.replace(old.encode(), new.encode())
    assert file.person()["next_steps"] == [{"step": step, "done": True, "promoted_to": path.stem}, "Rest"]
    assert file.read().edited is None
    person = RecordFile(path).person()
    assert (person["description"], person["related"]) == (step, [ID])
    assert (person["profile"], person["stages"]) == ("small", ["sft", "dpo"])
    assert person["overrides"] == {"sft_config.epochs": 1.0}


BLOCKS = {
    "literal": "next_steps:\n  - |  # why not\n    Try\n     rank 64\n\n  - Rest\n",
    "folded": "next_steps:\n  - >-\n    Try\n    rank 64\n\n\n  # a remark\n  - Rest\n",
    "mapping": "next_steps:\n  - step: Try rank 64  # so\n    owner: me\n  - Rest\n",
    "mapping that is not done": "next_steps:\n  -   step: Try rank 64\n      done: no   # not yet\n  - Rest\n",
    "mapping with empty keys": "next_steps:\n  - step: Try rank 64\n    done:\n    promoted_to:  # nothing\n  - Rest\n",
    "flow mapping": "next_steps: [{step: Try rank 64, done: false }, Rest]\n",
    "flow mapping over lines": "next_steps:\n  - {step: Try rank 64,\n     owner: me}  # so\n  - Rest\n",
    "mapping whose text is a block": "next_steps:\n  - owner: me\n    step: |\n      Try\n      rank 64\n  - Rest\n",
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_step_of_several_lines_or_keys_is_ticked_and_keeps_its_comments(
    place: Workspace, write_record: WriteRecord, kind: str, ends: str
) -> None:
    text = (HEAD + BLOCKS[kind] + TAIL).replace("\n", ends)
    file = write_record(place, ID, None)
    file.path.write_bytes(text.encode())
    file.write(FACTS)
    before, then = file.path.read_bytes(), file.person()
    path = promote(place, ID, 1)
    after, now = file.path.read_bytes(), file.person()
    step = then["next_steps"].pop(0)
    step = step if isinstance(step, dict) else {"step": step.strip()}
    assert now["next_steps"].pop(0) == step | {"done": True, "promoted_to": path.stem}
    assert now == then
    head, tail = ((part.replace("\n", ends)).encode() for part in (HEAD, TAIL))
    assert after.startswith(head)
    assert after.partition(tail)[2] == before.partition(tail)[2]
    assert (b"\n" in after.replace(b"\r\n", b"")) == (ends == "\n")  # one kind of line ends
    for comment in [word.split("\n")[0] for word in BLOCKS[kind].split("#")[1:]]:
        assert f"#{comment}".encode() in after


def test_the_second_step_is_ticked_and_a_third_later(place: Workspace, write_record: WriteRecord) -> None:
    write_record(place, ID, person="next_steps:\n  - same\n  - same\n  - {step: same}\n")
    second, third = promote(place, ID, 2).stem, promote(place, ID, 3).stem
    assert RecordFile(place.experiments / f"{ID}.yaml").person()["next_steps"] == [
        "same",
        {"step": "same", "done": True, "promoted_to": second},
        {"step": "same", "done": True, "promoted_to": third},
    ]
    assert third != second


@pytest.mark.parametrize(
    ("person", "number", "told"),
    [
        ("next_steps: [a, b]\n", 3, "has 2 next steps, not 3"),
        ("next_steps:\n", 1, "has 0 next steps, not 1"),
        ("next_steps: many\n", 1, "has 0 next steps, not 1"),
        ("# nothing\n", 1, "has 0 next steps, not 1"),
        ("next_steps: [5]\n", 1, "next step 1 is no text"),
        ("next_steps: ['  ']\n", 1, "next step 1 is no text"),
        ("next_steps: [[a]]\n", 1, "next step 1 is no text"),
        ("next_steps: [{done: true}]\n", 1, "next step 1 is no text"),
        (f"next_steps: [{{step: a, promoted_to: {ID}}}]\n", 1, f"next step 1 was promoted to {ID}"),
        (
            "hypothesis: &h Try\nnext_steps: [*h]\n",
            1,
            "next step 1 cannot be ticked as it is written; try `- step: Try`",
        ),
        ("x: &x {next_steps: [Try]}\n<<: *x\n", 1, "cannot be ticked"),
        ("next_steps: [step: Try]\n", 1, "cannot be ticked"),  # a mapping without braces
        ("next_steps: [\n", 1, ":2:1: "),
    ],
)
def test_what_cannot_be_promoted_stays_as_it_is(
    place: Workspace, write_record: WriteRecord, person: str, number: int, told: str
) -> None:
    file = write_record(place, ID, None, person)
    with pytest.raises(UserError) as error:
        promote(place, ID, number)
    assert told in str(error.value)
    assert file.path.read_text() == person
    assert records(place) == [file.path]


def test_there_is_no_promoting_from_a_record_that_is_not_there(place: Workspace, write_record: WriteRecord) -> None:
    write_record(place, ID)
    with pytest.raises(UserError, match=f"there is no record `EXP-2026-01-01-0011`; try {ID}"):
        promote(place, "EXP-2026-01-01-0011", 1)


def test_a_step_that_an_editor_moves_in_between_is_not_mistaken(
    place: Workspace, write_record: WriteRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_record(place, ID, None, "next_steps: [first, second]\n")
    moved = "next_steps: [new, first, second]\n"
    rewrite = RecordFile.rewrite_above

    def saved_first(self: RecordFile, change: Callable[[str], str]) -> None:
        file.path.write_text(moved)
        rewrite(self, change)

    monkeypatch.setattr(RecordFile, "rewrite_above", saved_first)
    with pytest.raises(UserError, match="next step 1 was just changed; try again"):
        promote(place, ID, 1)
    assert (file.path.read_text(), records(place)) == (moved, [file.path])


def test_an_edit_below_the_line_is_put_right_before_a_step_is_ticked(
    place: Workspace, write_record: WriteRecord
) -> None:
    file = write_record(place, ID, person="next_steps: [first]\n")
    whole = file.path.read_bytes()
    file.path.write_bytes(whole.replace(b"status: complete", b"status: failed"))
    path = promote(place, ID, 1)
    ticked = f'[{{step: "first", done: true, promoted_to: {path.stem}}}]'.encode()
    assert file.path.read_bytes() == whole.replace(b"[first]", ticked, 1)
    assert list(file.folder.glob("edited-below-*.yaml"))
