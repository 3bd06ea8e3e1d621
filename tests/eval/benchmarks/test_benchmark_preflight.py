"""Before a run: which tasks can, why the others cannot, and nothing of the others is touched."""

import sys
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import preflight
from eval.sandbox import sandbox
from pipeline import stock_tasks
from pipeline.tasks import find_tasks
from pipeline.workspace import CHECKOUT, Workspace

FOLDER = CHECKOUT / "data" / "eval"
OWN = ["aletheia_choices", "aletheia_questions"]


def left_out(*names: str, run_code: bool = False, online: bool | None = False) -> dict[str, str]:
    found = preflight.check(find_tasks(FOLDER, [*OWN[:1], *names]), run_code, online)
    assert [each.name for each in found.ready] == OWN[:1], "the run goes on with those that can"
    return found.left_out


def test_own_tasks_need_neither_lm_evals_index_nor_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_tasks, "_index", None)
    monkeypatch.setattr(preflight, "why_offline", None)
    found = preflight.check(find_tasks(FOLDER, OWN), run_code=False)
    assert [(each.name, each.items, each.runs_code) for each in found.ready] == [
        ("aletheia_choices", 155, False), ("aletheia_questions", 145, False),
    ]  # fmt: skip
    assert not found.left_out


def test_data_that_is_not_here_is_named_with_the_command_that_gets_it(empty_cache: None) -> None:
    found = left_out("hellaswag", "ai2_arc")
    assert (
        found["hellaswag"].startswith("its data is not on this machine")
        and "aletheia eval prefetch" in found["hellaswag"]
    )
    assert found["ai2_arc"].startswith("arc_challenge: its data is not on this machine")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have the data."""
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("helaswag", "there is no such task; did you mean hellaswag?"),
        ("aletheia_choice", "there is no such task; did you mean aletheia_choices?"),
        ("qqqqqqqqqqqq", "there is no such task"),
        ("openllm", "a group that sets its tasks' options: name the tasks that it lists"),
        (
            "humaneval_instruct",
            "it runs code that the model wrote: eval_config.run_code=true allows that, in the sandbox",
        ),
        ("cruxeval_input", "it runs code outside the sandbox, in a way of its own"),
    ],
)
def test_what_cannot_run_says_why(name: str, why: str) -> None:
    assert left_out(name) == {name: why}


def test_code_that_would_run_by_itself_is_refused_even_where_code_may_run() -> None:
    assert left_out("cruxeval_input", run_code=True) == {
        "cruxeval_input": "it runs code outside the sandbox, in a way of its own"
    }
    assert not any("cruxeval" in name for name in sys.modules), "nor is it imported"


def test_without_a_sandbox_no_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "Landlock is missing")
    [why] = left_out("aletheia_code", run_code=True).values()
    assert why.endswith("there is no sandbox here: Landlock is missing")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: broken.jsonl}}", "its data cannot be had ("),
        (
            "dataset_path: json\ntest_split: gone\ndataset_kwargs: {data_files: {test: good.jsonl}}",
            "its data cannot be had (",
        ),
    ],
    ids=["no JSON", "no such split"],
)
def test_an_own_task_whose_data_cannot_be_read_is_left_out_in_one_line(
    workspace: Workspace, text: str, why: str
) -> None:
    folder = workspace.path("data/eval")
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "good.jsonl").write_text('{"a": "b"}\n')
    (folder / "tasks" / "mine.yaml").write_text(
        f"task: mine\n{text}\noutput_type: generate_until\ndoc_to_text: a\ndoc_to_target: a\n"
    )
    found = preflight.check(find_tasks(folder, ["mine"]), run_code=False)
    assert found.left_out["mine"].startswith(why) and "\n" not in found.left_out["mine"]


@pytest.mark.parametrize(
    ("metric", "why"),
    [("pass_at_1", "eval_config.run_code=true allows that"), ("code_eval", "it runs code outside the sandbox")],
)
def test_an_own_task_that_does_not_say_that_it_runs_code_is_known_by_its_metric(
    workspace: Workspace, metric: str, why: str
) -> None:
    folder = workspace.path("data/eval")
    (folder / "tasks" / "mine.yaml").write_text(f"task: mine\nmetric_list: [{{metric: {metric}}}]\n")
    assert why in preflight.check(find_tasks(folder, ["mine"]), run_code=False).left_out["mine"]


def test_the_table_shows_every_task_and_what_becomes_of_it() -> None:
    found = preflight.check(find_tasks(FOLDER, ["aletheia_choices", "aletheia_code", "helaswag"]), False, online=False)
    assert found.lines() == [
        "aletheia_choices  155  runs",
        "aletheia_code       –  left out: it runs code that the model wrote: "
        "eval_config.run_code=true allows that, in the sandbox",
        "helaswag            –  left out: there is no such task; did you mean hellaswag?",
    ]


@pytest.mark.parametrize("setting", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "no network"])
def test_a_machine_without_a_hub_is_known_as_one(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", setting == "HF_HUB_OFFLINE")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", setting == "HF_DATASETS_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said: Any = stock_tasks.why_offline()
    assert (
        said == "http://127.0.0.1:9 cannot be reached (ConnectError)" if setting == "no network" else "is set" in said
    )


@pytest.mark.parametrize("address", ["http://[hub", "hub.local", "http://hub:port"])
def test_an_address_that_is_none_is_no_hub(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert str(stock_tasks.why_offline()).startswith(f"{address} cannot be reached (")


def test_offline_is_a_setting_of_that_moment_alone() -> None:
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with stock_tasks.hub(online=False):
        assert config.HF_HUB_OFFLINE and constants.HF_HUB_OFFLINE
    assert before == (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
