"""`data check` and `data show`: what they say of rows is what training would do with them."""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.data.split import split
from pipeline.model import Base
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from tests.conftest import Said, Trained

SMALL = ("--profile", "small")
EOT = "<|EOT|>"


def shown(said: "Said") -> list[tuple[int, int, str]]:
    """Tokens, trained tokens and the marked text of each sequence."""
    assert (said.code, said.err) == (0, ""), said.err
    parts = re.split(r"^# .*: (\d+) tokens, (\d+) trained\n", said.out, flags=re.MULTILINE)[1:]
    return [(int(a), int(b), text[:-1]) for a, b, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)]


def marked(text: str) -> list[str]:
    return re.findall("⟦(.*?)⟧", text, flags=re.DOTALL)


def unmarked(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [
    turn("system", "Be brief."),
    turn("user", "What is ⟨an index⟩?"),
    turn("assistant", "A sorted copy — of a column.\n\n```sql\nCREATE INDEX é ON t (你);\n```"),
    turn("user", "And then?"),
    turn("assistant", "Nothing 🙂."),
]


def test_what_is_marked_is_each_answer_and_its_one_end_and_nothing_else(
    aletheia: "Callable[..., Said]", workspace: Workspace, base: Base
) -> None:
    (workspace.root / "talk.jsonl").write_text(json.dumps({"messages": TALK}), "utf-8")
    [(tokens, trained, text)] = shown(aletheia(workspace, "data", "show", "talk.jsonl", *SMALL))
    answers = [message["content"] for message in TALK if message["role"] == "assistant"]
    assert [part.removesuffix(EOT).strip() for part in marked(text)] == answers
    assert [part.count(EOT) for part in marked(text)] == [1, 1]
    tokenizer = base.tokenizer()
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole.startswith(unmarked(text))
    assert whole[len(unmarked(text)) :].strip() == ""  # nothing follows the last end-of-turn
    assert tokens == len(tokenizer(unmarked(text), add_special_tokens=False)["input_ids"])
    assert trained == sum(len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in marked(text))


def test_of_a_pair_both_sides_are_shown_after_one_prompt(
    aletheia: "Callable[..., Said]", workspace: Workspace, base: Base
) -> None:
    pair = read_rows(workspace, "data/dpo", PreferencePair)[0]
    sides = shown(aletheia(workspace, "data", "show", "data/dpo", *SMALL))
    prompts = {text[: text.index("⟦")] for _, _, text in sides}
    assert len(prompts) == 1
    assert pair.prompt[-1].content.strip() in prompts.pop()
    assert [[part.removesuffix(EOT).strip() for part in marked(text)] for _, _, text in sides] == [
        [pair.chosen[0].content.strip()],
        [pair.rejected[0].content.strip()],
    ]


def test_what_is_marked_is_as_much_as_the_run_recorded(aletheia: "Callable[..., Said]", trained: "Trained") -> None:
    rows = read_rows(trained.workspace, "data/sft", Conversation)
    train, _ = split(rows, trained.job().config.training_data.validation)
    said = [aletheia(trained.workspace, "data", "show", "data/sft", *SMALL, "--row", row.id) for row in train]
    facts = trained.record("sft").facts()
    assert facts is not None
    assert sum(shown(s)[0][1] for s in said) == facts.results["training"]["trained_tokens_an_epoch"]


def test_a_row_is_found_by_its_id_and_said_where(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    row = read_rows(workspace, "data/sft", Conversation)[4]
    said = aletheia(workspace, "data", "show", "data/sft", *SMALL, "--row", row.id)
    assert said.out.startswith(f"# {row.where}  {row.id}  conversation: ")
    assert row.messages[-1].content.strip() in said.out


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_says_what_is_there(aletheia: "Callable[..., Said]", workspace: Workspace) -> None:
    found = json.loads(aletheia(workspace, "data", "check", "data", "--json").out)
    kinds = {(entry["path"].split("/")[1], entry["path"].split("/")[-2], entry["kind"]) for entry in found}
    assert kinds == {
        ("sft", "sft", "Conversation"),
        ("dpo", "dpo", "PreferencePair"),
        ("eval", "questions", "Question"),
        ("eval", "choices", "MultipleChoice"),
    }
    assert [entry["rows"] for entry in found if entry["kind"] == "Conversation"] == [3] * 5
    said = aletheia(workspace, "data", "check", "data/sft/devops.jsonl")
    assert said.out.splitlines()[1].split() == ["data/sft/devops.jsonl", "Conversation", "3", "devops", "3"]


ROW: dict[str, Any] = {"id": "a", "messages": [turn("user", "x"), turn("assistant", "y")]}
FAULTS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "an empty folder": ({}, r"error: mine: holds no \.jsonl file.*"),
    "an empty file": ({"a.jsonl": ""}, r"error: mine/a\.jsonl: .*nothing.*"),
    "not JSON": ({"a.jsonl": json.dumps(ROW) + "\n{"}, r"error: mine/a\.jsonl:2: is not JSON.*"),
    "nested too deeply": ({"a.jsonl": "[" * 100_000 + "\n" + json.dumps(ROW)}, r"error: mine/a\.jsonl:1: .*"),
    "no known shape": ({"a.jsonl": '{"text": "x"}'}, r"error: mine/a\.jsonl: .*found: text.*"),
    "a wrong role": (
        {"a.jsonl": json.dumps(ROW | {"messages": ROW["messages"][:1]})}, r"error: mine/a\.jsonl:1: messages.*"),
    "one id in two files": (
        {"a.jsonl": json.dumps(ROW), "b.jsonl": json.dumps(ROW)}, r"error: mine/b\.jsonl:1: the id `a` stands at mine/a.*"),
    "not UTF-8": ({"a.jsonl": b'{"messages": "\xff"}\n'}, r"error: mine/a\.jsonl.*"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("words", [("check", "mine"), ("show", "mine", *SMALL)], ids=["check", "show"])
def test_what_training_would_refuse_is_refused_here_in_one_line(
    aletheia: "Callable[..., Said]", workspace: Workspace, words: tuple[str, ...], name: str
) -> None:
    files, expected = FAULTS[name]
    (workspace.root / "mine").mkdir()
    for file, content in files.items():
        (workspace.root / "mine" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = aletheia(workspace, "data", *words)
    assert re.fullmatch(f"{expected}\n", said.err), said.err
    assert (said.code, said.out) == (2, "")
