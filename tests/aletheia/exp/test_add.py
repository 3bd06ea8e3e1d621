import datetime as dt
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aletheia.exp import add as module
from aletheia.exp.add import add
from aletheia.exp.foreign import GROUPS, inner, number, plain, target
from pipeline import yamlio
from pipeline.errors import StageFailed, UserError
from pipeline.records.file import LINE, RecordFile
from pipeline.records.metrics import resolve
from pipeline.records.person import problems
from pipeline.workspace import Workspace

FOREIGN = Path(__file__).parent / "foreign"
LOGS = sorted(FOREIGN.iterdir())
ONE = "id: {}\nhypothesis: it works\nmetrics: {{f1: 0.9}}\nconclusion: it does\n"


def taken(place: Workspace, *files: Path) -> list[RecordFile]:
    """The records that adding these files makes, in order."""
    there = set(place.experiments.glob("EXP-*.yaml"))
    add(place, list(files), as_json=False)
    return [RecordFile(path) for path in sorted(set(place.experiments.glob("EXP-*.yaml")) - there)]


def written(place: Workspace, name: str, text: str) -> Path:
    path = place.root / name
    path.write_text(text, "utf-8")
    return path


def origin(file: RecordFile) -> dict[str, Any]:
    read = file.read()
    return read.facts.external["taken_in"] if read.facts else read.person["taken_in"]


def records(place: Workspace) -> list[str]:
    return sorted(path.name for path in place.experiments.glob("EXP-*"))


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("corporate.yaml", ["EXP-2024-03-15-002"]),
        ("journal.md", [None]),
        ("milestones.md", ["Milestone 1", "Milestone 2", "Milestone 3"]),
        ("planned.yaml", ["EXP-2024-XX-XX-001", "EXP-2024-XX-XX-002", "EXP-2024-XX-XX-003"]),
        ("training_log.md", ["20240131_142233_j123456", "20240202_091500_j123999", "20240210_220105_j124777"]),
    ],
)
def test_an_experiment_becomes_a_record_with_its_foreign_id_beside_a_real_one(
    place: Workspace, name: str, ids: list[str | None]
) -> None:
    files = taken(place, FOREIGN / name)
    assert [file.person().get("foreign_id") for file in files] == ids
    today = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")
    assert [file.person()["experiment_id"] for file in files] == [
        f"EXP-{today}-{n:03d}" for n in range(1, len(ids) + 1)
    ]
    assert [file.id for file in files] == [file.person()["experiment_id"] for file in files]


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.name)
def test_what_is_taken_in_is_a_record_without_a_mistake(place: Workspace, log: Path) -> None:
    for file in taken(place, log):
        read = file.read()
        assert (read.mistake, read.damage, read.edited, read.pending) == (None, None, None, False)
        assert problems(file.above()) == []


@pytest.mark.parametrize("log", [log for log in LOGS if log.suffix == ".yaml"], ids=lambda path: path.name)
def test_every_value_of_a_yaml_log_is_in_its_records(place: Workspace, log: Path) -> None:
    files = taken(place, log)
    held = Counter(plainly(leaf) for file in files for leaf in leaves(file.person()))
    told = " ".join(note for file in files for note in origin(file)["notes"])
    original = Counter(plainly(leaf) for leaf in leaves(yamlio.load(log.read_text("utf-8")).value))
    composed = {"latency_p95_ms", "<", "60.0"}  # one criterion: `latency_p95_ms < 60`
    for leaf, count in original.items():
        if held[leaf] >= count or f"`{leaf}`" in told or leaf in composed:
            continue
        ends = re.fullmatch(r"(.*?\d)\s*-\s*(\S+)", leaf)
        assert ends, f"{leaf} is lost"
        assert all(held[plainly(number(end))] for end in ends.groups()), f"{leaf} is lost"


@pytest.mark.parametrize("log", [log for log in LOGS if log.suffix == ".md"], ids=lambda path: path.name)
def test_every_word_of_a_markdown_log_is_in_its_records(place: Workspace, log: Path) -> None:
    """But for those of headings and columns that have a name of ours."""
    files = taken(place, log)
    held = {word for file in files for value in (file.person(), origin(file)["notes"]) for word in words(value)}
    for line in log.read_text("utf-8").splitlines():
        if re.fullmatch(r"[|\s:-]*|```\w*", line):
            continue
        heading = re.match(r"#+ (.*)", line)
        names = [heading[1]] if heading else line.strip("|").split("|") if line.startswith("|") else []
        known = {word for name in names if is_known(name) for word in words(name)}
        if pair := re.match(r"(?:- )?(?:\*\*)?(\w+):", line):
            known |= set(words(pair[1])) if is_known(pair[1]) else set()
        lost = set(words(re.sub(r"^\s*\d+\. ", "", line))) - held - known - {"✅", "x"}
        assert not lost, line


def is_known(name: str) -> bool:
    name = name.strip().strip("`")
    inside = any(inner(key, name) != name for key in ("metrics", "plots", "journal"))
    return bool(inside or target(name) or plain(name) in GROUPS or plain(name) in {"split", "parameter"})


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from leaves(child)
    elif value is not None:
        yield value


def plainly(value: Any) -> str:
    return repr(float(value)) if isinstance(value, int | float) else " ".join(str(value).split())


def words(value: Any) -> Iterator[str]:
    """Of texts, keys and values alike; a number by its value."""
    if isinstance(value, dict):
        yield from (word for pair in value.items() for part in pair for word in words(part))
    elif isinstance(value, list):
        yield from (word for item in value for word in words(item))
    elif isinstance(value, str):
        for word in re.findall(r"[^\s,;:*`|\[\](){}<>=≤#!']+", value):
            word = word.strip('.-−"?')
            found = number(word)
            if word:
                yield plainly(word if found is None else found)
    elif value is not None:
        yield plainly(value)


def test_placeholders_become_null_and_are_named(place: Workspace) -> None:
    first, second, third = taken(place, FOREIGN / "planned.yaml")
    assert first.person()["date"] is None
    assert first.person()["conditions"][1]["curation_time"] is None
    assert "test_conditions.2.curation_time: `TBD` became null" in origin(first)["notes"]
    assert second.person()["experimenter"] is None
    assert "assignee: `<fill in>` became null" in origin(second)["notes"]
    assert "expected_outcome: `???` became null" in origin(second)["notes"]
    assert third.person()["learnings"]["domain"] is None
    assert {"date: `YYYY-MM-DD` became null", "hypothesis: `TODO` became null"} <= set(origin(third)["notes"])


def test_ranges_become_two_numbers(place: Workspace) -> None:
    first, second, third = taken(place, FOREIGN / "planned.yaml")
    assert first.person()["conditions"][0]["samples"] == [100, 500]
    assert second.person()["variables"]["count"] == [100, 500]
    assert third.person()["hyperparameters"]["learning_rate"] == [1e-5, 1e-4]
    assert first.person()["compute"]["estimated_time"] == "6-8 GPU hours"


def test_a_plan_has_no_line_and_what_has_run_has_one(place: Workspace) -> None:
    for file in taken(place, FOREIGN / "planned.yaml"):
        assert LINE not in file.path.read_text("utf-8")
        assert file.facts() is None
    for file in taken(place, FOREIGN / "milestones.md"):
        assert LINE in file.path.read_text("utf-8")


def test_how_it_ended_is_told_below_the_line(place: Workspace) -> None:
    for file, status in zip(taken(place, FOREIGN / "training_log.md"), ("complete", "failed", "complete"), strict=True):
        facts = file.facts()
        assert facts is not None
        assert (facts.status, facts.stage) == (status, "imported")
        assert [change.status for change in facts.history] == [status]
        assert (facts.history[0].note or "").startswith("taken in from training_log.md")
        assert (facts.failure is None) == (status == "complete")
    assert [file.facts().profile for file in map(RecordFile, sorted(place.experiments.glob("*.yaml")))] == [  # type: ignore[union-attr]
        "deepseek-coder-1.3b",
        "external",
        "external",
    ]


def test_its_figures_can_be_computed_with(place: Workspace) -> None:
    (corporate,) = taken(place, FOREIGN / "corporate.yaml")
    first, second, _ = taken(place, FOREIGN / "milestones.md")
    results = [file.facts().results for file in (corporate, first, second)]  # type: ignore[union-attr]
    f1 = resolve(results[0], "macro_f1")
    assert f1 is not None
    assert (f1.value, f1.ci_low, f1.ci_high, f1.n) == (0.8712, 0.8604, 0.8815, 4821)
    assert resolve(results[0], "recall.billing.ci_low") is None
    assert resolve(results[0], "calibration_error") is None  # `< 0.02` is a bound
    assert results[0]["metrics"]["calibration_error"] == {"text": "< 0.02"}
    about = results[1]["metrics"]["max_gradient_difference_w1"]
    assert about == {"value": 3e-8, "text": "~3e-8"}
    loss = resolve(results[2], "validation_loss_tiny_shakespeare")
    assert loss is not None
    assert (loss.value, loss.ci_low, loss.ci_high) == (1.4873, 1.4811, 1.4935)


def test_its_own_criteria_are_judged_on_its_own_figures(place: Workspace) -> None:
    (file,) = taken(place, FOREIGN / "corporate.yaml")
    facts = file.facts()
    assert facts is not None
    assert facts.verdict is not None
    assert [(one.criterion, one.finding) for one in facts.verdict.judged] == [
        ("macro_f1 >= 0.85", "supported"),
        ("latency_p95_ms < 60", "supported"),
        ("recall.billing >= 0.8", "supported"),
    ]
    assert file.person()["notes"]["success_criteria"] == ["Support leads agree with the routing in a blind test"]


def test_where_it_came_from_is_kept(place: Workspace) -> None:
    _, second, _ = taken(place, FOREIGN / "milestones.md")
    kept = origin(second)
    assert (kept["file"], kept["line"], kept["foreign_id"]) == ("milestones.md", 58, "Milestone 2")
    assert kept["notes"][-1] == "kept under notes: `Status`, `What puzzled me`"
    assert second.person()["notes"]["What puzzled me"].startswith("Why does the loss plateau")
    assert "```python\nprobs = " in second.person()["notes"]["What puzzled me"]


def test_the_same_file_is_not_taken_in_twice(place: Workspace) -> None:
    first = taken(place, FOREIGN / "planned.yaml")
    before = records(place)
    with pytest.raises(UserError, match=rf"was taken in already, as {first[0].id}, {first[1].id}, {first[2].id}$"):
        taken(place, FOREIGN / "planned.yaml")
    assert records(place) == before


def test_of_a_log_that_has_grown_only_the_new_is_taken_in(place: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOREIGN / "milestones.md").read_text("utf-8")
    log = written(place, "log.md", text)
    taken(place, log)
    log.write_text(f"{text}\n## Milestone 4: Sampling\n\n### Objective\n\nTop-p.\n", "utf-8")
    capsys.readouterr()
    (new,) = taken(place, log)
    assert new.person()["foreign_id"] == "Milestone 4"
    assert capsys.readouterr().err.count("is there already, as EXP-") == 3


def test_one_bad_file_among_several_and_nothing_is_written(place: Workspace) -> None:
    good, bad = written(place, "a.yaml", ONE.format("A")), written(place, "b.yaml", "hypothesis: [\n")
    with pytest.raises(UserError, match=re.escape("b.yaml:2:1: did not find expected node content")):
        add(place, [good, bad], as_json=False)
    assert records(place) == []


def test_the_same_experiment_twice_in_one_call_is_refused(place: Workspace) -> None:
    log = written(place, "a.yaml", ONE.format("A"))
    with pytest.raises(UserError, match=r"a\.yaml: was taken in already, as .*a\.yaml:1$"):
        add(place, [log, log], as_json=False)
    assert records(place) == []


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("x.md", "# A page\n\nWith words, and no experiment.\n", "nothing in it reads as an experiment; try headings"),
        ("x.yaml", "name: tiny\nbase_model: tiny\nseed: 1\n", "nothing in it reads as an experiment"),
        ("x.yaml", "- 1\n- 2\n", "nothing in it reads as an experiment"),
        ("x.yaml", "", "nothing in it reads as an experiment"),
        ("x.yaml", "a: &a [x,x]\nb: [" + "*a," * 11 + "]", "nested too deeply or too many aliases"),
        ("x.yaml", "hypothesis: " + "[" * 50, "nested too deeply"),
        ("x.yaml", "hypothesis: x\nodd: " + "[" * 39 + "]" * 39, "cannot be kept as a record: nested too deeply"),
        ("x.yaml", "hypothesis: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("x.yaml", f"hypothesis: x\n{LINE}\nstatus: complete\n", "is a record already"),
        ("x.txt", "hypothesis: x", "is neither YAML nor Markdown"),
    ],
)
def test_what_cannot_be_taken_in_is_told_and_nothing_written(place: Workspace, name: str, text: str, what: str) -> None:
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        add(place, [written(place, name, text)], as_json=False)
    assert "\n" not in str(caught.value)
    assert records(place) == []


def test_bytes_that_are_no_text_and_files_that_are_none(place: Workspace) -> None:
    (place.root / "x.md").write_bytes(b"## Experiment 1\n\xff\n")
    with pytest.raises(UserError, match=re.escape("x.md:2: is no UTF-8 text")):
        add(place, [place.root / "x.md"], as_json=False)
    (place.root / "x.md").write_bytes(b"a" * (yamlio.MAX_BYTES + 1))
    with pytest.raises(UserError, match="is larger than 8 MiB"):
        add(place, [place.root / "x.md"], as_json=False)
    with pytest.raises(UserError, match="there is no such file"):
        add(place, [place.root / "nowhere.md"], as_json=False)
    (place.root / "folder.yaml").mkdir()
    with pytest.raises(UserError, match="there is no such file"):
        add(place, [place.root / "folder.yaml"], as_json=False)


def test_a_secret_never_reaches_a_record(place: Workspace) -> None:
    secret = "sk-abcdefghij0123456789"
    text = f"hypothesis: x\napi_key: {secret}\nobservations: [with {secret}]\nset_up: {{wandb_api_key: qwertz123456}}\n"
    markdown = f"## Experiment 1\n\n### Hypothesis\n\nx\n\n### Odd\n\nexport OPENAI_API_KEY={secret}\n"
    for file in taken(place, written(place, "a.yaml", text), written(place, "b.md", markdown)):
        content = file.path.read_text("utf-8")
        assert secret not in content
        assert "qwertz" not in content
        assert "a secret was taken out" in str(origin(file)["notes"])


def test_a_full_disk_leaves_no_half_of_a_log(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Full(RecordFile):
        def write(self, facts: Any) -> None:
            calls.append(self.id)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            super().write(facts)

    monkeypatch.setattr(module, "RecordFile", Full)
    with pytest.raises(StageFailed, match="nothing was taken in: No space left on device"):
        add(place, [FOREIGN / "training_log.md"], as_json=False)
    assert len(calls) == 3
    assert records(place) == []


def test_paths_go_to_stdout_and_what_was_not_placed_to_stderr(place: Workspace, aletheia: Callable[..., Any]) -> None:
    said = aletheia(place, "exp", "add", str(FOREIGN / "training_log.md"))
    assert said.code == 0
    paths = said.out.splitlines()
    assert [(place.root / path).is_file() for path in paths] == [True] * 3
    assert said.err.splitlines()[0].split() == ["record", "from", "foreign", "id", "status", "placed"]
    assert "note: kept under notes: `Status`, `Cluster gossip`" in said.err
    again = aletheia(place, "exp", "add", str(FOREIGN / "training_log.md"))
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith("error: ")
    assert again.err.count("\n") == 1


def test_json_is_the_data_alone(place: Workspace, aletheia: Callable[..., Any]) -> None:
    said = aletheia(place, "exp", "add", "--json", str(FOREIGN / "corporate.yaml"))
    (data,) = json.loads(said.out)
    assert data["foreign_id"] == "EXP-2024-03-15-002"
    assert data["status"] == "complete"
    assert "confusion_matrix" in data["placed"]
    assert data["unplaced"] == ["experiment_info.status", "success_criteria", "approval_chain"]
    assert (place.root / data["path"]).is_file()


def test_mangled_logs_are_taken_in_or_refused_in_one_line(place: Workspace) -> None:
    draw = random.Random(11)
    bits = ["", "#", "## Experiment 9: x\n", "|", "```yaml\n", "- [x] ", "[", "}", ": ", "&a ", "*a", "!!set {a}", "\n", "\t",
            "\r\n", "1: ", "> ", "    ", "\x00", "\u2028", "1e999", "9" * 5000, "<!--", "**"]  # fmt: skip
    taken_in = refused = 0
    for turn in range(100):
        log = draw.choice(LOGS)
        text = log.read_text("utf-8")
        for _ in range(draw.randint(1, 5)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(bits) + text[at + draw.choice([0, 1, 5, 60]) :]
        own = Workspace(place.root / str(turn))
        own.experiments.mkdir(parents=True)
        path = own.root / f"log{log.suffix}"
        path.write_text(text, "utf-8", newline="")
        try:
            for file in taken(own, path):
                read = file.read()
                assert (read.mistake, read.damage) == (None, None)
                taken_in += 1
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert taken_in > 50
    assert refused > 10


def test_what_could_not_be_placed_is_named_and_kept(place: Workspace) -> None:
    text = (
        "## Experiment 1: ranks (2024-03-01)\n\nbest epoch: 3\nsample count: 100-500\n\n### Results\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 | 3 |\n\n```yaml\na: [\n```\n\nConclusion: it fell\n"
    )
    (file,) = taken(place, written(place, "log.md", text))
    person = file.person()
    assert (person["date"], person["conclusion"]) == (dt.date(2024, 3, 1), "it fell")
    assert (person["epochs"], person["splits"]) == ({"best": 3}, {"samples": [100, 500]})
    assert person["metrics"] == [{"a": 1, "b": 2}]
    assert list(person["notes"].values()) == [[3], "```yaml\na: [\n```"]
    (note,) = origin(file)["notes"]
    assert note.startswith("kept under notes: `cells beyond the columns at line 10`, `yaml block at line 12 (")
