"""How benchmarks are asked: the template of training, one BOS, and what was really sent is looked at."""

from typing import TYPE_CHECKING, Any

import pytest

from eval.benchmarks import harness, preflight, prompts
from pipeline.chat import Chat
from pipeline.data.rows import Message
from pipeline.errors import StageFailed
from pipeline.tasks import find_tasks

if TYPE_CHECKING:
    from tests.conftest import Trained

QUESTION = "What is an index?"


def test_a_question_is_rendered_as_training_would(chat: Chat) -> None:
    text = prompts.renderer(chat)([{"role": "user", "content": QUESTION}])
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == chat.prompt([Message(role="user", content=QUESTION)])
    prompts.check_start(ids, chat)


def test_an_answer_that_is_begun_stays_open(chat: Chat) -> None:
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is"}]
    text = prompts.renderer(chat)(turns, add_generation_prompt=False)
    assert text.endswith("It is") and chat.end_of_turn not in text


def test_a_description_stands_before_the_question_where_the_template_has_no_place_for_it(chat: Chat) -> None:
    from copy import copy
    from dataclasses import replace

    without = copy(chat)
    without.contract = replace(chat.contract, takes_system=False)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    asked = prompts.renderer(without)([{"role": "user", "content": f"Be brief.\n\n{QUESTION}"}])
    assert prompts.renderer(without)(turns) == asked != prompts.renderer(chat)(turns)


@pytest.mark.parametrize(
    ("start", "what"),
    [([0, 0], "begins with 2 BOS tokens, and training's with 1"), ([], "does not begin with the BOS token")],
    ids=["doubled", "cut"],
)
def test_a_sequence_that_begins_otherwise_is_refused(chat: Chat, start: list[int], what: str) -> None:
    assert chat.bos_id is not None and chat.contract.bos_tokens == 1
    with pytest.raises(StageFailed, match=what):
        prompts.check_start([*(chat.bos_id for _ in start), 100, 101], chat)


@pytest.mark.parametrize("task", ["aletheia_choices", "aletheia_questions"])
def test_a_doubled_bos_in_what_is_sent_stops_the_run(
    trained: "Trained", model: Any, chat: Chat, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a tokenizer puts one before text that the template has already begun with one."""
    found = preflight.check(find_tasks(trained.workspace.path("data/eval"), [task]), run_code=False)
    chosen = harness.choose(found.ready, 1, 42)
    template = chat.tokenizer.chat_template
    monkeypatch.setattr(chat.tokenizer, "chat_template", "{{ bos_token }}" + template)
    with pytest.raises(StageFailed, match="begins with 2 BOS tokens"):
        harness.run(harness.in_process(model, chat, 2), chat, found.ready, chosen, "test")


def test_a_prompt_that_is_cut_stops_the_run(trained: "Trained", model: Any, chat: Chat) -> None:
    found = preflight.check(find_tasks(trained.workspace.path("data/eval"), ["aletheia_choices"]), run_code=False)
    lm = harness.in_process(model, chat, 2)
    lm._max_length = 20
    with pytest.raises(StageFailed, match="it was cut"):
        harness.run(lm, chat, found.ready, harness.choose(found.ready, 1, 42), "test")
