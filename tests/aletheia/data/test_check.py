"""`aletheia data check`: what a person meets. The rules themselves are tested with the gate."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.gate.rules import RULES
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said

Aletheia = Callable[..., "Said"]
Command = Callable[..., "subprocess.Popen[str]"]


def talk(n: int, answer: str = "") -> dict[str, Any]:
    said = answer or f"It is number {n}, and {'so on, ' * (n % 7)}nothing else of {n * 7919}."
    return {"messages": [{"role": "user", "content": f"What is {n * n}?"}, {"role": "assistant", "content": said}]}


BAD = [
    json.dumps(talk(1)),
    json.dumps(talk(2, "Mail joe.bloggs77@gmail.com, or ring +44 20 7946 0958.")),
    '{"messages": [',
    json.dumps(talk(4, " ")),
    json.dumps(talk(1)),
    json.dumps({"text": "x"}),
]


@pytest.fixture
def bad(workspace: Workspace) -> Workspace:
    (workspace.root / "mine").mkdir()
    (workspace.root / "mine" / "rows.jsonl").write_text("\n".join(BAD) + "\n")
    return workspace


@pytest.fixture
def many(workspace: Workspace) -> Workspace:
    """With 4,000 rows, none of them right: their findings are more than a pipe holds."""
    (workspace.root / "many.jsonl").write_text("{\n" * 4000)
    return workspace


def test_findings_say_file_line_rule_and_reason_and_the_code_is_one(aletheia: Aletheia, bad: Workspace) -> None:
    said = aletheia(bad, "data", "check", "mine")
    places = re.findall(r"^mine/rows\.jsonl:(\d+): (D\d+) (error|warning): \S", said.out, re.MULTILINE)
    assert sorted(places) == [
        ("2", "D206", "warning"), ("3", "D102", "error"), ("4", "D107", "error"), ("5", "D401", "error"),
        ("6", "D104", "error"),
    ]  # fmt: skip
    assert said.code == 1 and said.err == ""
    assert said.out.splitlines()[-1].startswith("6 rows, 4 rejected (66.7%), 1 warning; tokens not counted")


def test_clean_rows_pass_with_code_nought(aletheia: Aletheia, workspace: Workspace) -> None:
    said = aletheia(workspace, "data", "check", "data")
    assert (said.code, said.err) == (0, "")
    assert re.search(r"^\d+ rows, 0 rejected, 0 warnings", said.out.splitlines()[-1])
    assert all(kind in said.out for kind in ("conversations", "preference pairs", "open questions", "multiple choice"))


def test_json_is_the_data_alone(aletheia: Aletheia, bad: Workspace) -> None:
    said = aletheia(bad, "data", "check", "mine", "--json")
    found = json.loads(said.out)
    assert (found["rows"], found["rejected"], said.code) == (6, 4, 1)
    assert {(f["file"], f["line"], f["rule"]) for f in found["findings"]} >= {("mine/rows.jsonl", 3, "D102")}
    assert found["files"] == [
        {"path": "mine/rows.jsonl", "kinds": {"conversations": 2}, "rows": 6, "rejected": 4, "domains": {"unknown": 2}}
    ]


def test_rejects_go_to_the_file_that_is_named(aletheia: Aletheia, bad: Workspace, tmp_path: Path) -> None:
    aletheia(bad, "data", "check", "mine", "--rejects", str(tmp_path / "rejects.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["name"]) for r in lines] == [
        ("mine/rows.jsonl", 3, "broken-json"), ("mine/rows.jsonl", 4, "empty-field"),
        ("mine/rows.jsonl", 6, "unknown-shape"), ("mine/rows.jsonl", 5, "duplicate"),
    ]  # fmt: skip
    assert all(r["reason"] for r in lines)


def test_many_findings_of_a_rule_are_cut_short_aloud(aletheia: Aletheia, workspace: Workspace) -> None:
    (workspace.root / "many.jsonl").write_text("{\n" * 25)
    said = aletheia(workspace, "data", "check", "many.jsonl")
    assert said.out.count("D102 error") == 10 and "15 findings are not shown; --all" in said.err
    assert aletheia(workspace, "data", "check", "many.jsonl", "--all").out.count("D102 error") == 25


def test_with_a_profile_tokens_are_counted_and_its_rules_hold(aletheia: Aletheia, workspace: Workspace) -> None:
    profile = workspace.configs / "small.yaml"
    profile.write_text(profile.read_text().replace("training_data:", "training_data:\n  check: {ignore: [D206]}", 1))
    (workspace.root / "long.jsonl").write_text(json.dumps(talk(1, "word " * 3000)) + "\n" + BAD[1] + "\n")
    said = aletheia(workspace, "data", "check", "long.jsonl", "--profile", "small")
    assert re.search(r"long\.jsonl:1: D301 error: [\d,]+ tokens, max_length is 2048", said.out)
    assert "D206" not in said.out and "conversations: " in said.out and "tokens not counted" not in said.out


def test_without_a_path_the_profiles_data_are_checked(aletheia: Aletheia, workspace: Workspace) -> None:
    found = json.loads(aletheia(workspace, "data", "check", "--profile", "small", "--json").out)
    assert {f["path"].split("/")[1] for f in found["files"]} == {"sft", "dpo", "eval"}
    assert found["tokens"]["conversations"]["ends_in_end_of_turn"] == 1.0


def test_of_the_evaluation_what_is_there_is_checked(aletheia: Aletheia, workspace: Workspace) -> None:
    for part in ("choices", "tasks"):
        shutil.rmtree(workspace.root / "data/eval" / part)
    found = json.loads(aletheia(workspace, "data", "check", "--profile", "small", "--json").out)
    assert {"/".join(f["path"].split("/")[:3]) for f in found["files"] if "eval" in f["path"]} == {
        "data/eval/questions"
    }
    shutil.rmtree(workspace.root / "data/eval")
    said = aletheia(workspace, "data", "check", "--profile", "small")
    assert said.code == 2 and said.err.startswith("error: training_data.eval: data/eval: there is no such folder")


def test_a_training_row_that_stands_in_the_evaluation_is_found_across_folders(
    aletheia: Aletheia, workspace: Workspace
) -> None:
    line = next((workspace.root / "data/eval/questions").glob("*.jsonl")).read_text("utf-8").splitlines()[0]
    question = json.loads(line)
    row = talk(1, question["reference"])
    row["messages"][0]["content"] = question["prompt"]
    (workspace.root / "leaky.jsonl").write_text(json.dumps(row))
    for words in (["leaky.jsonl", "data/eval"], ["leaky.jsonl", "--against", "data/eval/questions"]):
        said = aletheia(workspace, "data", "check", *words)
        assert said.code == 1 and re.search(r"leaky\.jsonl:1: D40[34] error: .*data/eval/questions/", said.out), (
            said.out
        )
    assert aletheia(workspace, "data", "check", "leaky.jsonl").code == 0


def test_rules_are_listed(aletheia: Aletheia, workspace: Workspace) -> None:
    said = aletheia(workspace, "data", "check", "--rules")
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == [rule.code for rule in RULES]
    assert len(json.loads(aletheia(workspace, "data", "check", "--rules", "--json").out)) == len(RULES)


def test_fix_mends_and_then_checks_what_is_left(aletheia: Aletheia, bad: Workspace) -> None:
    said = aletheia(bad, "data", "check", "mine", "--fix")
    assert "fixed mine/rows.jsonl: 1 duplicate rows taken out" in said.err
    assert "D401" not in said.out and said.out.splitlines()[-1].startswith("5 rows, 3 rejected")


def test_a_terminal_is_given_nothing_to_obey(aletheia: Aletheia, workspace: Workspace) -> None:
    (workspace.root / "evil.jsonl").write_text(json.dumps({"\x1b[2J\u202eevil": 1}))
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", aletheia(workspace, "data", "check", "evil.jsonl").out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: data check: names nothing to check; try a path, or --profile NAME"),
        (["nowhere"], "error: nowhere: there is no such file or folder; try "),
        (
            ["data/sft", "--ignore", "near-dup"],
            "error: training_data.check.ignore: there is no rule `near-dup`; try near-dup",
        ),
        (["data/sft", "--ignore", "D102"], "error: training_data.check.ignore: `D102` cannot be left out"),
        (["data/sft", "--set", "seed=1"], "error: --set: needs a profile to change; try --profile NAME"),
        (["data/sft", "--profile", "smal"], "error: configs/smal.yaml: no profile `smal`; try --profile small"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(
    aletheia: Aletheia, workspace: Workspace, words: list[str], said: str
) -> None:
    found = aletheia(workspace, "data", "check", *words)
    assert (found.code, found.out) == (2, "") and found.err.startswith(said) and found.err.count("\n") == 1


def test_rows_on_one_line_are_each_told_apart(aletheia: Aletheia, workspace: Workspace) -> None:
    rows = [talk(n, " " if n > 7 else "") for n in range(10)]
    (workspace.root / "dump.json").write_text(json.dumps(rows))
    said = aletheia(workspace, "data", "check", "dump.json", "--rejects", str(workspace.root / "out.jsonl"))
    assert said.out.splitlines()[-1].startswith("10 rows, 2 rejected (20.0%)")
    assert [line.split(": ")[0] for line in said.out.splitlines()[:2]] == ["dump.json:1#9", "dump.json:1#10"]
    rejects = [json.loads(line) for line in (workspace.root / "out.jsonl").read_text().splitlines()]
    assert [(r["line"], r["item"]) for r in rejects] == [(1, 9), (1, 10)]


def test_rejects_go_into_what_is_no_file_and_it_stays(aletheia: Aletheia, bad: Workspace) -> None:
    pipe, link, linked = (bad.root / name for name in ("pipe", "link", "linked"))
    os.mkfifo(pipe)
    link.symlink_to(linked)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert aletheia(bad, "data", "check", "mine", "--rejects", str(pipe)).code == 1
        written = os.read(reader, 1 << 16).decode()
    finally:
        os.close(reader)
    assert pipe.is_fifo() and len(written.splitlines()) == 4
    assert aletheia(bad, "data", "check", "mine", "--rejects", str(link)).code == 1
    assert link.is_symlink() and linked.read_text() == written
    assert sorted(path.name for path in bad.root.iterdir() if path.name.startswith(".writing")) == []


def test_a_reader_that_goes_away_is_not_taken_for_the_rejects(command: Command, many: Workspace) -> None:
    process = command("data", "check", "many.jsonl", "--all", "--rejects", str(many.root / "rejects.jsonl"))
    process.stdout.close()
    assert process.wait(60) != 0 and "--rejects" not in process.stderr.read()
    assert not [path.name for path in many.root.iterdir() if path.name.startswith((".writing", "rejects"))]


def test_ctrl_c_is_one_line(command: Command, many: Workspace) -> None:
    pipe = many.root / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = command("data", "check", "many.jsonl", "--rejects", str(pipe))
    try:
        assert select.select([reader], [], [], 60)[0], "it writes"  # more than a pipe holds: it cannot end
        process.send_signal(signal.SIGINT)
        os.set_blocking(reader, True)
        while os.read(reader, 1 << 16):
            pass
    finally:
        os.close(reader)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "error: interrupted\n")


@pytest.mark.parametrize("target", ["mine/rows.jsonl", "./mine/../mine/rows.jsonl", "mine", "nowhere/x.jsonl"])
def test_rejects_are_not_written_over_what_is_checked(aletheia: Aletheia, bad: Workspace, target: str) -> None:
    before = (bad.root / "mine/rows.jsonl").read_bytes()
    said = aletheia(bad, "data", "check", "mine", "--rejects", str(bad.root / target))
    assert said.code == 2 and said.err.startswith("error: --rejects ") and said.err.count("\n") == 1
    assert (bad.root / "mine/rows.jsonl").read_bytes() == before
    assert [p.name for p in (bad.root / "mine").iterdir()] == ["rows.jsonl"]


def test_a_file_named_twice_is_read_once(aletheia: Aletheia, bad: Workspace) -> None:
    said = aletheia(bad, "data", "check", "mine", "mine/rows.jsonl", "--fix")
    assert said.out.splitlines()[-1].startswith("5 rows, 3 rejected")


def test_with_a_profile_it_says_whether_training_would_stop(aletheia: Aletheia, workspace: Workspace) -> None:
    path = workspace.root / "data/sft/devops.jsonl"
    path.write_text(path.read_text() + "{}\n")
    out = aletheia(workspace, "data", "check", "--profile", "small").out
    assert "data/sft: 1 of 16 rejected (6.2%, the limit is 5%): training would stop" in out
    assert "data/dpo: 0 of 15 rejected (0.0%, the limit is 5%): training would go on without them" in out
    said = aletheia(workspace, "sft", "--profile", "small", "--dry-run")
    assert "1 of 16 rejected: more than max_reject_share allows, it would stop" in said.err


def test_a_rule_about_the_set_that_is_an_error_fails_the_check(aletheia: Aletheia, workspace: Workspace) -> None:
    rows = [talk(n) | {"domain": "b" if n == 3 else f"a{n % 2}"} for n in range(30)]
    (workspace.root / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert aletheia(workspace, "data", "check", "uneven.jsonl").code == 0
    profile = workspace.configs / "small.yaml"
    profile.write_text(profile.read_text().replace("training_data:", "training_data:\n  check: {errors: [D405]}", 1))
    said = aletheia(workspace, "data", "check", "uneven.jsonl", "--profile", "small")
    assert said.code == 1 and "30 rows, 0 rejected" in said.out
    stage = aletheia(workspace, "sft", "--profile", "small", "--set", "training_data.sft=uneven.jsonl", "--dry-run")
    assert stage.code == 2 and "error: the set: D405 unbalanced-domains: b has 1 rows" in stage.err
