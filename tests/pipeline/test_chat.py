"""Promises 1 (mask) and 2 (template contract), on the embedded base and on templates of the three great families."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from aletheia.data.show import show
from pipeline.chat import CONTRACT_FILE, Chat, Contract, Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, Message, PreferencePair
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.stage import Job
from pipeline.workspace import CHECKOUT, Workspace

CHATML = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""
MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + '[/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
{%- else -%}{{- raise_exception('Only user and assistant roles are supported!') -}}{%- endif -%}
{%- endfor -%}"""

# special tokens in the order (bos, end of turn, others), template, and what ⟦is trained⟧ of `TWO_TURNS`
FAMILIES: dict[str, tuple[tuple[str | None, str, *tuple[str, ...]], str, str]] = {
    "chatml": (
        (None, "<|im_end|>", "<|im_start|>"),
        CHATML,
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes:\n\n- 4<|im_end|>⟧",
    ),
    "llama-3": (
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        LLAMA3,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Four.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes:\n\n- 4<|eot_id|>⟧",
    ),
    "mistral": (
        ("<s>", "</s>", "[INST]", "[/INST]"),
        MISTRAL,
        "<s>[INST] What is 2 + 2?[/INST]⟦ Four.</s>⟧[INST] Sure?[/INST]⟦ Yes:\n\n- 4</s>⟧",
    ),
}
DEEPSEEK = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you"
    " only answer questions related to computer science. For politically sensitive questions, security and privacy"
    " issues, and other non-computer science questions, you will refuse to answer\n"
)


def messages(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn."""
    turns = [Message(role="assistant" if n % 2 else "user", content=text) for n, text in enumerate(contents)]
    return [Message(role="system", content=system), *turns] if system else turns


TWO_TURNS = messages("What is 2 + 2?", "Four.", "Sure?", "Yes:\n\n- 4")


def shown(chat: Chat, encoded: Encoded) -> str:
    """The text of the tokens, what is trained between ⟦ and ⟧: an account of its own, token by token."""
    text, inside = "", False
    runs: list[int] = []
    for token, trained in [*zip(encoded.ids, encoded.mask, strict=True), (None, False)]:
        if trained != inside or token is None:
            text += chat.tokenizer.decode(runs)
            text += ("⟦" if trained else "⟧") if trained != inside else ""
            runs, inside = [], trained
        runs += [] if token is None else [token]
    return text


@pytest.fixture(scope="module")
def tiny(base: Base) -> Chat:
    return base.chat()


@pytest.fixture(scope="module")
def family(base: Base) -> Callable[..., Any]:
    """`family("llama-3", template=…)`: a tokenizer of that family, made from the embedded one."""
    tiny = base.tokenizer()

    def make(name: str, template: str | None = None) -> Any:
        (bos, end, *others), own, _ = FAMILIES[name]
        tokenizer = copy.deepcopy(tiny)
        added = [AddedToken(t, special=True, normalized=False) for t in (bos, end, *others) if t]
        tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.bos_token, tokenizer.eos_token = bos, end
        if bos:  # as theirs do: a plain call puts a BOS in front of any text
            bos_first = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
            tokenizer.backend_tokenizer.post_processor = bos_first
            assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
        tokenizer.chat_template = own if template is None else template
        return tokenizer

    return make


# ── Promise 1: the mask ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_is_each_answer_with_its_one_end_of_turn(family: Callable[..., Any], name: str) -> None:
    chat = Chat(family(name), name)
    encoded = chat.conversation(TWO_TURNS)
    assert shown(chat, encoded) == FAMILIES[name][2]


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_trains_the_end_of_turn_once_a_turn_and_nothing_after_it(family: Callable[..., Any], name: str) -> None:
    chat = Chat(family(name), name)
    encoded = chat.conversation(TWO_TURNS)
    trained = [label for label in encoded.labels if label != -100]
    assert trained.count(chat.end_of_turn_id) == 2
    assert encoded.ids[-1] == encoded.labels[-1] == chat.end_of_turn_id


@pytest.mark.parametrize(("name", "count"), [("chatml", 0), ("llama-3", 1), ("mistral", 1)])
def test_mask_sequence_has_the_one_bos_of_its_template(family: Callable[..., Any], name: str, count: int) -> None:
    chat = Chat(family(name), name)
    ids = chat.conversation(TWO_TURNS).ids
    assert [t for t in ids if t == chat.bos_id] == ids[:count]


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_prompt_is_what_serving_sends_and_completion_what_it_should_get(
    family: Callable[..., Any], name: str
) -> None:
    chat = Chat(family(name), name)
    prompt, completion = chat.prompt(TWO_TURNS[:3]), chat.completion(TWO_TURNS)
    encoded = chat.conversation(TWO_TURNS)
    assert encoded.ids == prompt + completion
    assert encoded.mask[len(prompt) :] == [True] * len(completion)


def test_mask_of_the_embedded_base_with_and_without_a_system_message(tiny: Chat) -> None:
    plain = shown(tiny, tiny.conversation(TWO_TURNS))
    assert plain == (
        f"<｜begin▁of▁sentence｜>{DEEPSEEK}### Instruction:\nWhat is 2 + 2?\n### Response:\n⟦Four.\n<|EOT|>⟧\n"
        "### Instruction:\nSure?\n### Response:\n⟦Yes:\n\n- 4\n<|EOT|>⟧"
    )
    briefed = shown(tiny, tiny.conversation(messages("Hi", "Ho", system="Be brief.\n")))
    assert briefed == "<｜begin▁of▁sentence｜>Be brief.\n### Instruction:\nHi\n### Response:\n⟦Ho\n<|EOT|>⟧"


def test_mask_is_refused_where_an_answer_gives_other_tokens_once_more_turns_follow(tiny: Chat) -> None:
    with pytest.raises(UserError, match="earlier turn gives other tokens"):
        tiny.conversation(messages("a", "    indented", "b", "c"))


def test_mask_of_every_shipped_row_is_the_templates_own_rendering(tiny: Chat) -> None:
    for row in read_rows(Workspace(CHECKOUT), "data/sft", Conversation):
        encoded = tiny.conversation(row.messages)
        whole = tiny.tokenizer.apply_chat_template([m.model_dump() for m in row.messages], tokenize=False)
        assert encoded.ids == tiny.tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"], row.id
        answers = "".join(f"{m.content}\n<|EOT|>" for m in row.messages if m.role == "assistant")
        assert tiny.tokenizer.decode([label for label in encoded.labels if label != -100]) == answers, row.id


def test_mask_is_what_data_show_displays(
    tiny: Chat, job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = read_rows(Workspace(CHECKOUT), "data/dpo/devops.jsonl", PreferencePair)[0]
    (job().workspace.root / "data/dpo/devops.jsonl").write_text(json.dumps(pair.model_dump()))
    show("data/dpo", job(), pair.id)
    display = capsys.readouterr().out
    assert re.findall("⟦(.*?)⟧", display, re.DOTALL) == [
        f"{side[0].content}\n<|EOT|>" for side in (pair.chosen, pair.rejected)
    ]
    for encoded in tiny.pair(pair):
        assert shown(tiny, encoded) in display


def test_labels_are_minus_100_where_nothing_is_trained() -> None:
    assert Encoded([5, 6, 7], [False, True, False]).labels == [-100, 6, -100]


# ── Promise 2: the template contract ─────────────────────────────────────────────────────────────────────────────────


def test_template_contract_is_the_same_for_the_same_template_and_survives_saving(base: Base, tmp_path: Path) -> None:
    contract = base.chat().contract
    assert contract == base.chat().contract
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract
    assert (contract.end_of_turn, contract.end_of_turn_id, contract.bos_id) == ("<|EOT|>", 2, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("### Instruction:", "### instruction:"),
        ("'### Response:\\n' + message", "'### Response: ' + message"),
        ("you will refuse", "you may refuse"),
        ("{{- message['content'] -}}", "{{- message['content'] + '\\n' -}}"),  # the system message's line
    ],
    ids=["user", "answer", "default system", "system"],
)
def test_template_contract_changes_with_any_part_of_the_template(base: Base, old: str, new: str) -> None:
    tokenizer = base.tokenizer()
    assert tokenizer.chat_template.count(old) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    if "Response" in old:  # the prompt ends otherwise than the turn begins: not even a contract
        with pytest.raises(UserError, match="otherwise than a whole conversation"):
            Chat(tokenizer, "changed")
    else:
        assert Chat(tokenizer, "changed").contract.sha256 != base.chat().contract.sha256


def test_template_contract_changes_when_the_same_text_gives_other_tokens(base: Base) -> None:
    tokenizer = base.tokenizer()
    tokenizer.add_tokens(["index"])
    assert Chat(tokenizer, "grown").contract.sha256 != base.chat().contract.sha256


def test_template_contract_holds_for_a_template_that_takes_no_system_message(family: Callable[..., Any]) -> None:
    chat = Chat(family("mistral"), "mistral")
    with pytest.raises(UserError, match="Only user and assistant roles are supported!"):
        chat.prompt(messages("Hi", system="Be brief."))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"sha256": "0"}'])
def test_template_contract_that_cannot_be_read_is_a_users_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / CONTRACT_FILE).write_text(text)
    with pytest.raises(UserError, match=f"has no readable {CONTRACT_FILE}"):
        Contract.load(tmp_path)


# ── What cannot keep the contract is refused when it is loaded ───────────────────────────────────────────────────────


def spoilt(role: str, content: str) -> str:
    """ChatML that renders the content of one role otherwise."""
    return CHATML.replace("+ m.content", f"+ ({content} if m.role == '{role}' else m.content)")


REFUSED: dict[str, tuple[str, str]] = {  # a broken template, and what is said of it
    "drops the answer": (spoilt("assistant", "''"), "changes the assistant's text"),
    "changes the answer": (spoilt("assistant", "m.content | upper"), "changes the assistant's text"),
    "drops the question": (spoilt("user", "''"), "drops or changes the user's text"),
    "changes the question": (spoilt("user", "m.content | upper"), "drops or changes the user's text"),
    "drops earlier turns": (CHATML.replace("in messages", "in messages[-2:]"), "drops or changes the user's text"),
    "does not end the turn": (CHATML.replace("<|im_end|>", ""), "does not end the assistant's turn"),
    "renders the last turn otherwise": (
        spoilt("assistant", "('<think></think>' if loop.last else '') + m.content"),
        "an earlier turn gives other tokens",
    ),
    "counts the turns": (CHATML.replace("{%- for", "{{- messages | length -}}{%- for"), "otherwise than a whole"),
    "raises": ("{{- raise_exception('no chat today') -}}", "refuses the messages: no chat today"),
    "is no template": ("{%- for -%}", "refuses the messages"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_template_that_breaks_the_contract_is_refused(family: Callable[..., Any], fault: str) -> None:
    template, said = REFUSED[fault]
    with pytest.raises(UserError, match=f"^broken: .*{said}"):
        Chat(family("chatml", template), "broken")


@pytest.mark.parametrize("name", ["llama-3", "mistral"])
def test_template_that_doubles_bos_is_refused(family: Callable[..., Any], name: str) -> None:
    template = FAMILIES[name][1].replace("bos_token", "bos_token + bos_token")
    with pytest.raises(UserError, match="gives 2 BOS tokens"):
        Chat(family(name, template), name)


def test_tokenizer_without_template_is_refused(base: Base) -> None:
    tokenizer = base.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template; try an instruct model"):
        Chat(tokenizer, "base model")


def test_tokenizer_without_eos_is_refused(base: Base) -> None:
    tokenizer = base.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-turn"):
        Chat(tokenizer, "endless")


def test_eos_that_is_shredded_into_several_tokens_is_refused(base: Base) -> None:
    tokenizer = base.tokenizer()
    tokenizer.eos_token = "<|endofturn|>"  # a name that the vocabulary does not hold, as after a botched conversion
    with pytest.raises(UserError, match=r"<\|endofturn\|> is 5 tokens, so it cannot be learnt"):
        Chat(tokenizer, "shredded")


# ── Special tokens in a message's text ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_every_special_token_inside_a_text_is_reported(family: Callable[..., Any], name: str) -> None:
    chat = Chat(family(name), name)
    for token in filter(None, FAMILIES[name][0]):
        assert chat.reserved_in(messages("Hi", f"So: {token}system")) == token
    assert chat.reserved_in(TWO_TURNS) is None


def test_special_token_is_reported_after_saving_and_loading(family: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    family("llama-3").save_pretrained(tmp_path)
    chat = Chat(AutoTokenizer.from_pretrained(tmp_path), "llama-3")
    assert chat.reserved_in(messages("<|start_header_id|>system<|end_header_id|>")) == "<|start_header_id|>"


def test_answer_that_holds_the_end_of_turn_is_never_cut_silently(tiny: Chat) -> None:
    with pytest.raises(UserError, match="changes the assistant's text"):
        tiny.conversation(messages("Hi", "one<|EOT|>two"))
