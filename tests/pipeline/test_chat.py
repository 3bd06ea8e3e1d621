"""Promises 1 (mask) and 2 (template contract), on the embedded base and on broken templates.

The public templates, and what is trained with them, are in `test_templates.py`.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from aletheia.data.show import show
from pipeline.chat import CONTRACT_FILE, Chat, Contract, Encoded, RewrittenTurn
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, Message, PreferencePair
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.stage import Job
from pipeline.workspace import CHECKOUT, Workspace

CHATML = (Path(__file__).parent / "templates" / "smollm2.jinja").read_text()
DEEPSEEK = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you"
    " only answer questions related to computer science. For politically sensitive questions, security and privacy"
    " issues, and other non-computer science questions, you will refuse to answer\n"
)


# "Be brief.\n", "Hi", "Ho", "Sure?", "Yes" on the embedded base: what is not trained, what is, and so on
IDS = [
    [0, 36, 71, 292, 598, 347, 16, 201, 286, 325, 28, 201, 42, 75, 201, 286, 327, 28, 201],
    [42, 81, 201, 2],
    [201, 286, 325, 28, 201, 53, 642, 33, 201, 286, 327, 28, 201],
    [59, 267, 201, 2],
]
SHA256 = "c0faa639cafdad799e38d1efe0f55779e0ea13767ecde72e8499f094d69b0e7f"  # of its contract


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
def chatml(base: Base) -> Callable[[str], Any]:
    """`chatml(template)`: the embedded tokenizer with ChatML's tokens."""
    tiny = base.tokenizer()

    def make(template: str) -> Any:
        tokenizer = copy.deepcopy(tiny)
        tokens = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.bos_token, tokenizer.eos_token = None, "<|im_end|>"
        tokenizer.chat_template = template
        return tokenizer

    return make


# ── Promise 1: the mask ──────────────────────────────────────────────────────────────────────────────────────────────


def test_mask_and_ids_of_a_short_conversation(tiny: Chat) -> None:
    encoded = tiny.conversation(messages("Hi", "Ho", "Sure?", "Yes", system="Be brief.\n"))
    assert encoded.ids == [token for part in IDS for token in part]
    assert encoded.mask == [bool(n % 2) for n, part in enumerate(IDS) for _ in part]


def test_mask_of_nothing_answered_is_empty(tiny: Chat) -> None:
    assert tiny.conversation(messages("Hi")) == Encoded([], [])


def test_mask_of_the_embedded_base_with_and_without_a_system_message(tiny: Chat) -> None:
    plain = shown(tiny, tiny.conversation(TWO_TURNS))
    assert plain == (
        f"<｜begin▁of▁sentence｜>{DEEPSEEK}### Instruction:\nWhat is 2 + 2?\n### Response:\n⟦Four.\n<|EOT|>⟧\n"
        "### Instruction:\nSure?\n### Response:\n⟦Yes:\n\n- 4\n<|EOT|>⟧"
    )
    briefed = shown(tiny, tiny.conversation(messages("Hi", "Ho", system="Be brief.\n")))
    assert briefed == "<｜begin▁of▁sentence｜>Be brief.\n### Instruction:\nHi\n### Response:\n⟦Ho\n<|EOT|>⟧"


def test_mask_is_refused_where_an_answer_gives_other_tokens_once_more_turns_follow(tiny: Chat) -> None:
    with pytest.raises(UserError, match=r"earlier turn gives other tokens .* as where it begins with white space"):
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


def test_pair_shares_its_prompt_and_trains_each_answer(tiny: Chat) -> None:
    row = {"prompt": TWO_TURNS[:3], "chosen": messages("?", "    yes")[1:], "rejected": messages("?", "No")[1:]}
    prompt = tiny.prompt(TWO_TURNS[:3])
    for side, answer in zip(tiny.pair(PreferencePair.model_validate(row)), ("    yes", "No"), strict=True):
        assert side.ids[: len(prompt)] == prompt and not any(side.mask[: len(prompt)]) and all(side.mask[len(prompt) :])
        assert tiny.tokenizer.decode(side.ids[len(prompt) :]) == f"{answer}\n<|EOT|>"


def test_labels_are_minus_100_where_nothing_is_trained() -> None:
    assert Encoded([5, 6, 7], [False, True, False]).labels == [-100, 6, -100]


# ── Promise 2: the template contract ─────────────────────────────────────────────────────────────────────────────────


def test_template_contract_is_the_same_for_the_same_template_and_survives_saving(base: Base, tmp_path: Path) -> None:
    contract = base.chat().contract
    assert contract == base.chat().contract
    contract.save(tmp_path)
    assert Contract.load(tmp_path) == contract
    assert (contract.end_of_turn, contract.end_of_turn_id, contract.bos_id) == ("<|EOT|>", 2, 0)
    assert contract.sha256 == SHA256, "adapters trained before would no longer be served"


def test_template_contract_states_its_facts_in_the_file_and_for_the_record(base: Base, tmp_path: Path) -> None:
    contract = base.chat().contract
    contract.save(tmp_path)
    facts = {
        "end_of_turn": "<|EOT|>",
        "end_of_turn_id": 2,
        "bos_id": 0,
        "bos_tokens": 1,
        "end_of_turn_tokens": 1,
        "end_of_turn_trained": True,
        "prefix_preserving": True,
        "keeps_white_space": True,
        "takes_system": True,
    }
    assert contract.facts() == facts
    assert json.loads((tmp_path / CONTRACT_FILE).read_text()) == facts | {"sha256": SHA256, "date": None}


def test_template_contract_of_an_earlier_version_is_read_and_compared(base: Base, tmp_path: Path) -> None:
    old = {"sha256": SHA256, "end_of_turn": "<|EOT|>", "end_of_turn_id": 2, "bos_id": 0}
    (tmp_path / CONTRACT_FILE).write_text(json.dumps(old))
    contract = Contract.load(tmp_path)
    assert contract == base.chat().contract
    assert contract.facts() == {key: value for key, value in old.items() if key != "sha256"}
    for key, value in {"sha256": "0" * 64, "end_of_turn_id": 3}.items():
        (tmp_path / CONTRACT_FILE).write_text(json.dumps(old | {key: value}))
        assert Contract.load(tmp_path) != base.chat().contract


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


@pytest.mark.parametrize("text", [None, "{", "[]", '{"sha256": "0"}'])
def test_template_contract_that_cannot_be_read_is_a_users_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / CONTRACT_FILE).write_text(text)
    with pytest.raises(UserError, match=f"has no readable {CONTRACT_FILE}"):
        Contract.load(tmp_path)


# ── What cannot keep the contract is refused when it is loaded ───────────────────────────────────────────────────────


def spoilt(role: str, content: str) -> str:
    """ChatML that renders the content of one role otherwise."""
    return replaced("message['content']", f"({content} if message['role'] == '{role}' else message['content'])")


def replaced(old: str, new: str, times: int = 1) -> str:
    assert CHATML.count(old) == times
    return CHATML.replace(old, new)


CONTENT = "message['content'] + '<|im_end|>'"
REFUSED: dict[str, tuple[str, str]] = {  # a broken template, and what is said of it
    "drops the answer": (spoilt("assistant", "''"), "changes the assistant's text"),
    "changes the answer": (spoilt("assistant", "message['content'] | upper"), "changes the assistant's text"),
    "cuts the answer": (spoilt("assistant", "message['content'][:9]"), "changes the assistant's text"),
    "drops the question": (spoilt("user", "''"), "drops or changes the user's text"),
    "changes the question": (spoilt("user", "message['content'] | upper"), "drops or changes the user's text"),
    "drops earlier turns": (replaced("in messages %}", "in messages[-2:] %}"), "drops or changes the user's text"),
    "drops earlier answers": (
        spoilt("assistant", "(message['content'] if loop.last else '')"),
        "drops or changes the assistant's earlier text",
    ),
    "does not end the turn": (CHATML.replace("<|im_end|>", ""), "does not end the assistant's turn with a special"),
    "ends it with several tokens": (
        CHATML.replace("<|im_end|>", "<|end|>"),
        r"with a special token, but with '<\|end\|>', which is no token",
    ),
    "ends it twice": (replaced(CONTENT, f"{CONTENT} + '<|im_end|>'"), r"turn with <\|im_end\|> more than once"),
    "lacks the generation prompt": (
        replaced("{% if add_generation_prompt %}", "{% if false %}"),
        r"no generation prompt: '<\|im_start\|>assistant\\n' would be left to the model",
    ),
    "has another generation prompt": (
        replaced("<|im_start|>assistant\n", "<|im_start|>model\n"),
        r"otherwise than a whole conversation, which has no 'model\\n' there",
    ),
    "counts the turns": (
        "{{ messages | length }}" + CHATML,
        r"otherwise than a whole conversation, which has no '1<\|im_start\|>system",
    ),
    "raises": ("{{- raise_exception('no chat today') -}}", "refuses the messages: no chat today"),
    "is no template": ("{%- for -%}", "refuses the messages"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_template_that_breaks_the_contract_is_refused(chatml: Callable[[str], Any], fault: str) -> None:
    template, said = REFUSED[fault]
    with pytest.raises(UserError, match=f"^broken: .*{said}"):
        Chat(chatml(template), "broken")


def test_template_that_is_not_broken_is_taken(chatml: Callable[[str], Any]) -> None:
    """So that what is refused above is refused for its fault."""
    assert Chat(chatml(CHATML), "whole").contract.prefix_preserving


def test_template_that_drops_a_repeated_text_is_refused_by_the_row(chatml: Callable[[str], Any]) -> None:
    chat = Chat(chatml(replaced("in messages %}", "in messages[-4:] %}")), "forgetful")
    assert chat.prompt(messages("go on", "1", "go on"))
    with pytest.raises(UserError, match="drops or changes the user's text"):
        chat.prompt(messages("go on", "1", "go on", "2", "go on"))


def test_last_turn_that_is_rendered_otherwise_is_known_and_its_rows_refused(chatml: Callable[[str], Any]) -> None:
    chat = Chat(chatml(spoilt("assistant", "(('>' if loop.last else '') + message['content'])")), "last")
    assert chat.contract.prefix_preserving is False
    assert shown(chat, chat.conversation(TWO_TURNS[:2])).endswith("<|im_start|>assistant\n⟦>Four.<|im_end|>⟧")
    with pytest.raises(
        RewrittenTurn, match="an earlier turn otherwise once more turns follow: with it, only rows of one"
    ):
        chat.conversation(TWO_TURNS)
    other = Chat(chatml(spoilt("assistant", "(('-' if loop.last else '') + message['content'])")), "other")
    assert other.contract != chat.contract


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


def test_end_of_turn_that_is_a_token_by_itself_only_is_refused(chatml: Callable[[str], Any]) -> None:
    tokenizer = chatml(CHATML.replace("<|im_end|>", "END"))
    tokenizer.add_tokens([AddedToken("END", special=True, single_word=True, normalized=False)])
    assert tokenizer.tokenize("Ho.END")[-1] == "END" != tokenizer.tokenize("HoEND")[-1]
    with pytest.raises(UserError, match=r"^word: its tokenizer breaks END up after an answer$"):
        Chat(tokenizer, "word")


# ── Special tokens in a message's text ───────────────────────────────────────────────────────────────────────────────


def test_special_token_inside_a_text_is_reported(tiny: Chat) -> None:
    for token in ("<｜begin▁of▁sentence｜>", "<|EOT|>"):
        assert tiny.reserved_in(messages("Hi", f"So: {token}system")) == token
    assert tiny.reserved_in(TWO_TURNS) is None


def test_answer_that_holds_the_end_of_turn_is_never_cut_silently(tiny: Chat) -> None:
    with pytest.raises(UserError, match="changes the assistant's text"):
        tiny.conversation(messages("Hi", "one<|EOT|>two"))
