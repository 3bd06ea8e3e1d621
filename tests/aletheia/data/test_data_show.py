"""`data show`: what it says of rows is what training would do with them."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aletheia.data.examples import Piece, Side, pieces
from aletheia.data.show import END
from pipeline.chat import Chat, Encoded
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair
from pipeline.data.split import split
from pipeline.gate.tokens import encode
from pipeline.model import Base
from pipeline.workspace import CHECKOUT, Workspace

if TYPE_CHECKING:
    from tests.conftest import Said, Trained

Aletheia = Callable[..., "Said"]
SMALL = ("--profile", "small")
EOT = "<|EOT|>"
HEADER = re.compile(r"^# .*: (\d+) tokens, (\d+) trained(?:, (\d+) past max_length \d+)?\n", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[([\d;]*)m")


def shown(said: "Said") -> list[tuple[int, int, str]]:
    """Of one row, which no totals follow: tokens, trained tokens and the marked text of each sequence."""
    assert (said.code, said.err) == (0, ""), said.err
    parts = HEADER.split(said.out)[1:]
    return [(int(a), int(b), text[:-1]) for a, b, text in zip(parts[::4], parts[1::4], parts[3::4], strict=True)]


def marked(text: str) -> list[str]:
    return re.findall("⟦(.*?)⟧", text, flags=re.DOTALL)


def unmarked(text: str) -> str:
    return re.sub(f"[⟦⟧⟪⟫{END}]", "", text)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(workspace: Workspace, name: str, *rows: dict[str, Any] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (workspace.root / name).write_text("\n".join(lines) + "\n", "utf-8")
    return name


def row(id: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "messages": [turn("user", "What is it?"), turn("assistant", answer)]} | more


TALK = [
    turn("system", "Be brief."),
    turn("user", "What is ⟨an index⟩?"),
    turn("assistant", "A sorted copy — of a column.\n\n```sql\nCREATE INDEX é ON t (你);\n```"),
    turn("user", "And then?"),
    turn("assistant", "Nothing 🙂."),
]


@pytest.fixture(scope="module")
def chat(base: Base) -> Chat:
    return base.chat()


# ── what is trained ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_marked_is_each_answer_and_its_one_end_and_nothing_else(
    aletheia: Aletheia, workspace: Workspace, base: Base
) -> None:
    path = write(workspace, "talk.jsonl", {"messages": TALK})
    [(tokens, trained, text)] = shown(aletheia(workspace, "data", "show", path, *SMALL, "--row", "talk.jsonl:1"))
    answers = [message["content"] for message in TALK if message["role"] == "assistant"]
    assert [part.removesuffix(EOT).strip() for part in marked(text)] == answers
    assert [part.count(EOT) for part in marked(text)] == [1, 1]
    assert text.count(END) == text.count(f"{EOT}⟧{END}") == 2
    tokenizer = base.tokenizer()
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole.startswith(unmarked(text))
    assert whole[len(unmarked(text)) :].strip() == ""  # nothing follows the last end-of-turn
    assert tokens == len(tokenizer(unmarked(text), add_special_tokens=False)["input_ids"])
    assert trained == sum(len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in marked(text))


def test_of_a_pair_both_sides_are_shown_after_one_prompt(aletheia: Aletheia, workspace: Workspace, base: Base) -> None:
    pair = read_rows(workspace, "data/dpo", PreferencePair)[0]
    sides = shown(aletheia(workspace, "data", "show", "data/dpo", *SMALL, "--row", pair.id))
    prompts = {text[: text.index("⟦")] for _, _, text in sides}
    assert len(prompts) == 1
    assert pair.prompt[-1].content.strip() in prompts.pop()
    assert [[part.removesuffix(EOT).strip() for part in marked(text)] for _, _, text in sides] == [
        [pair.chosen[0].content.strip()],
        [pair.rejected[0].content.strip()],
    ]


def test_what_is_marked_is_as_much_as_the_run_recorded(aletheia: Aletheia, trained: "Trained") -> None:
    rows = read_rows(trained.workspace, "data/sft", Conversation)
    train, _ = split(rows, trained.job().config.training_data.validation)
    said = [aletheia(trained.workspace, "data", "show", "data/sft", *SMALL, "--row", row.id) for row in train]
    facts = trained.record("sft").facts()
    assert facts is not None
    assert sum(shown(s)[0][1] for s in said) == facts.results["training"]["trained_tokens_an_epoch"]


def shipped(chat: Chat) -> Iterator[tuple[str, int, Encoded]]:
    """Id, assistant's turns and tokens of each sequence that the checkout's rows are trained as."""
    checkout = Workspace(CHECKOUT)
    for talk in read_rows(checkout, "data/sft", Conversation):
        yield talk.id, sum(m.role == "assistant" for m in talk.messages), chat.conversation(talk.messages)
    for pair in read_rows(checkout, "data/dpo", PreferencePair):
        yield from ((pair.id, 1, side) for side in chat.pair(pair))


def test_every_token_of_every_shipped_row_is_shown_as_its_mask_says(chat: Chat) -> None:
    for name, turns, encoded in shipped(chat):
        found = list(pieces(chat, Side("", encoded, 10_000)))
        flat = [(token, piece.state == "trained") for piece in found for token in piece.ids]
        assert flat == list(zip(encoded.ids, encoded.mask, strict=True)), name
        assert "".join(piece.text for piece in found) == chat.tokenizer.decode(encoded.ids), name
        ends = [piece for piece in found if piece.ends]
        assert [(p.ids, p.text) for p in ends] == [([chat.end_of_turn_id], EOT)] * turns, name
        assert [0, *accumulate(len(p.ids) for p in found)] == [*(p.start for p in found), len(encoded.ids)], name


def test_json_holds_ids_text_and_mask_token_by_token(aletheia: Aletheia, workspace: Workspace, chat: Chat) -> None:
    talk = {"id": "a", "domain": "db", "messages": TALK}
    said = aletheia(workspace, "data", "show", write(workspace, "talk.jsonl", talk), *SMALL, "--json")
    found = json.loads(said.out)
    encoded = chat.conversation(Conversation.model_validate(talk).messages)
    [sequence] = found["rows"][0]["sequences"]
    assert (sequence["ids"], sequence["mask"]) == (encoded.ids, encoded.mask)
    assert len(sequence["tokens"]) == len(encoded.ids)
    assert "".join(sequence["tokens"]) == chat.tokenizer.decode(encoded.ids)
    assert (found["base"], found["contract"]) == ("tiny", chat.contract.sha256)
    assert (found["rows"][0]["where"], found["rows"][0]["domain"]) == ("talk.jsonl:1", "db")
    assert said.out.isascii() and said.err == ""


def test_what_rows_were_encoded_with_is_said_first(aletheia: Aletheia, workspace: Workspace, chat: Chat) -> None:
    first = aletheia(workspace, "data", "show", "data/sft", *SMALL).out.splitlines()[0]
    assert first.startswith(
        f"# base and tokenizer tiny, chat contract {chat.contract.sha256[:12]}; in double brackets: trained"
    )


# ── whole characters ─────────────────────────────────────────────────────────────────────────────────────────────────


def found(chat: Chat, answer: str, max_length: int = 10_000) -> list[Piece]:
    [encoded] = encode(chat, Conversation.model_validate(row("a", answer)))
    return list(pieces(chat, Side("", encoded, max_length)))


def test_a_character_of_several_tokens_is_one_piece(chat: Chat) -> None:
    texts = {p.text: len(p.ids) for p in found(chat, "你好 🙂!")}
    assert texts["你"] > 1 and texts["🙂"] > 1 and texts["!"] == 1
    assert not any("\ufffd" in text for text in texts)


@pytest.mark.parametrize(
    "answer", ["\ufffd", "a\ufffd\ufffd b", "\ufffd" * 50 + "你🙂" * 3], ids=["one", "two", "many"]
)
def test_a_replacement_character_of_the_text_is_shown_as_it_is(chat: Chat, answer: str) -> None:
    pieces = found(chat, answer)
    assert "".join(p.text for p in pieces if p.state == "trained") == f"{answer}\n{EOT}"
    assert pieces[-1].ids == [chat.end_of_turn_id]
    assert max(len(p.ids) for p in pieces) < 12  # what is never whole does not wait for ever


def test_no_piece_reaches_over_an_end_of_turn_or_where_training_begins(chat: Chat) -> None:
    odd = chat.tokenizer("\ufffd", add_special_tokens=False)["input_ids"]
    for masks in ((True, True, True), (False, True, True), (False, False, True)):
        ids = [*odd, *odd, chat.end_of_turn_id]
        mask = [m for m, part in zip(masks, (odd, odd, ids[-1:]), strict=True) for _ in part]
        found = list(pieces(chat, Side("", Encoded(ids, mask), 99)))
        assert [(t, p.state == "trained") for p in found for t in p.ids] == list(zip(ids, mask, strict=True))
        assert (found[-1].ids, found[-1].text, found[-1].ends) == (ids[-1:], EOT, True)


def test_a_tokenizer_that_begins_texts_otherwise_than_it_goes_on_keeps_its_spaces() -> None:
    words = ["▁One", "▁two", "▁three", "<unk>", "</s>", "<s>"]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    assert [tokenizer.decode([n]) for n in (0, 1)] == ["One", "two"]  # by themselves they lose it
    encoded = Encoded([0, 1, 2, 1, 4], [False, True, True, True, True])
    chat = SimpleNamespace(tokenizer=tokenizer, end_of_turn_id=4)  # its template is no matter here
    texts = [p.text for p in pieces(chat, Side("", encoded, 99))]
    assert texts[:4] == ["One", " two", " three", " two"]


# ── max_length ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_cut_would_lose_is_marked_and_the_row_is_said_to_be_rejected(
    aletheia: Aletheia, workspace: Workspace, chat: Chat
) -> None:
    path = write(workspace, "long.jsonl", row("a", "word " * 60))
    [encoded] = encode(chat, Conversation.model_validate(row("a", "word " * 60)))
    limit = len(encoded.ids) - 20
    said = aletheia(workspace, "data", "show", path, *SMALL, "--row", "a", "--set", f"sft_config.max_length={limit}")
    assert HEADER.search(said.out)[3] == "20"  # type: ignore[index]
    lost = re.findall("⟪(.*?)⟫", said.out.partition("trained")[2].partition("\n")[2], flags=re.DOTALL)
    assert lost == [chat.tokenizer.decode(encoded.ids[limit:])]
    assert said.out.endswith(f"{EOT}⟫{END}\n")
    assert marked(said.out.partition("### Response:")[2]) == [
        chat.tokenizer.decode([t for t, m in zip(encoded.ids[:limit], encoded.mask, strict=False) if m])
    ]
    reasons = [line for line in said.out.splitlines() if line.startswith("# training rejects this row: ")]
    assert re.search("max_length is .*: 20 would be lost", reasons[0]) and "never end" in reasons[1]


def test_the_longer_side_of_a_pair_alone_is_marked(aletheia: Aletheia, workspace: Workspace, chat: Chat) -> None:
    pair = read_rows(workspace, "data/dpo", PreferencePair)[0]
    sizes = [len(side.ids) for side in chat.pair(pair)]
    limit = max(sizes) - 1
    said = aletheia(
        workspace, "data", "show", "data/dpo", *SMALL, "--row", pair.id, "--set", f"dpo_config.max_length={limit}"
    )
    past = [match[3] for match in HEADER.finditer(said.out)]
    assert past == ["1" if size > limit else None for size in sizes]
    assert said.out.count("training rejects this row") == 2 * 2  # too long, and without an end, at both sides


def test_a_character_that_the_cut_goes_through_is_lost_whole(chat: Chat) -> None:
    whole = next(p for p in found(chat, "x 你") if p.text == "你")
    cut = [p for p in found(chat, "x 你", whole.start + 1) if p.text == "你"]
    assert [p.state for p in cut] == ["past"]


def test_what_is_long_past_max_length_is_counted_and_not_printed(aletheia: Aletheia, workspace: Workspace) -> None:
    path = write(workspace, "long.jsonl", row("a", "word " * 3000))
    said = aletheia(workspace, "data", "show", path, *SMALL, "--row", "a", "--set", "sft_config.max_length=200")
    past = int(HEADER.search(said.out)[3])  # type: ignore[index]
    assert said.out.endswith(f"# {past - 1000:,} more tokens past max_length\n")


# ── which rows ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_is_found_by_its_id_or_its_place_and_said_where(aletheia: Aletheia, workspace: Workspace) -> None:
    row = read_rows(workspace, "data/sft", Conversation)[4]
    said = aletheia(workspace, "data", "show", "data/sft", *SMALL, "--row", row.id)
    assert said.out.splitlines()[1].startswith(f"# {row.where}  {row.id}  conversation: ")
    assert row.messages[-1].content.strip() in said.out
    assert aletheia(workspace, "data", "show", "data/sft", *SMALL, "--row", row.where).out == said.out


@pytest.mark.parametrize(
    ("asked", "count"), [((), 1), (("--rows", "3"), 3), (("--rows", "99"), 15), (("--totals",), 0)]
)
def test_as_many_rows_are_shown_as_asked_for_and_the_others_counted(
    aletheia: Aletheia, workspace: Workspace, asked: tuple[str, ...], count: int
) -> None:
    said = aletheia(workspace, "data", "show", "data/sft", *SMALL, *asked)
    assert len(HEADER.findall(said.out)) == count
    assert ("# others: --row ID" in said.out) == (0 < count < 15)
    assert (f"# {count} of 15 rows shown\n" in said.out) == (0 < count < 15)
    rows = read_rows(workspace, "data/sft", Conversation)[:count]
    assert re.findall("^# .*?  (.*)  conversation:", said.out, re.MULTILINE) == [r.id for r in rows]
    assert (
        len(json.loads(aletheia(workspace, "data", "show", "data/sft", *SMALL, *asked, "--json").out)["rows"]) == count
    )


def test_rows_that_are_broken_are_named_and_the_rest_is_shown(aletheia: Aletheia, workspace: Workspace) -> None:
    forged = row("forged", "x", messages=[turn("user", f"a {EOT} b"), turn("assistant", "fine")])
    path = write(workspace, "some.jsonl", "{", row("a", "fine"), row("b", " "), '{"text": 1}', row("c", "fine"), forged)
    said = aletheia(workspace, "data", "show", path, *SMALL, "--rows", "9")
    assert said.code == 0
    assert [line.split(": ")[0] for line in said.err.splitlines()] == [f"some.jsonl:{n}" for n in (1, 3, 4)]
    assert re.findall("^# .*?  (.*)  conversation:", said.out, re.MULTILINE) == ["a", "c", "forged"]
    assert "# broken, and not counted: 3 rows, the first at some.jsonl:1\n" in said.out
    assert "# training rejects 1 of 3 rows: special-token 1; special-token is not in the totals\n" in said.out
    assert f"# training rejects this row: its text holds the special token {EOT}\n" in said.out
    assert said.out.count(END) == 1 + 3  # the legend's, and one an answer: the forged one is the user's
    machine = json.loads(aletheia(workspace, "data", "show", path, *SMALL, "--json").out)
    assert [b["where"] for b in machine["broken"]] == [f"some.jsonl:{n}" for n in (1, 3, 4)]
    assert (machine["rows_broken"], machine["rows_rejected"], machine["rows_left_out"]) == (3, {"special-token": 1}, 2)


def test_after_twenty_broken_rows_a_note_says_that_there_are_more(aletheia: Aletheia, workspace: Workspace) -> None:
    path = write(workspace, "some.jsonl", *["{"] * 30, row("a", "fine"))
    said = aletheia(workspace, "data", "show", path, *SMALL)
    assert len(said.err.splitlines()) == 21 and said.err.splitlines()[-1].startswith("note: more rows are broken")
    assert "not counted: 30 rows" in said.out


def test_rows_of_evaluation_among_others_are_counted(aletheia: Aletheia, workspace: Workspace) -> None:
    said = aletheia(workspace, "data", "show", "data", *SMALL, "--totals")
    assert "# conversations: " in said.out and "# preference pairs: " in said.out
    assert re.search(r"^# for evaluation, and not trained on: \d+ rows$", said.out, re.MULTILINE)


# ── totals ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_totals_are_what_one_counts_by_hand(aletheia: Aletheia, workspace: Workspace, base: Base) -> None:
    tokenizer = base.tokenizer()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers = {"db": ["One.", "word " * 80 + "end."], "api": ["Two words."]}
    lengths: dict[str, list[int]] = {}
    rows, trained = [], 0
    for domain, texts in answers.items():
        for number, answer in enumerate(texts):
            one = row(f"{domain}-{number}", answer, domain=domain)
            rows.append(one)
            whole = tokenizer.apply_chat_template(one["messages"], tokenize=False)
            lengths.setdefault(domain, []).append(count(whole[: whole.rindex(EOT)] + EOT))
            trained += count(f"{answer}\n{EOT}")
    longest = max(lengths["db"])
    path = write(workspace, "some.jsonl", *rows)
    asked = ("data", "show", path, *SMALL, "--totals", "--set", f"sft_config.max_length={longest - 5}")
    totals = json.loads(aletheia(workspace, *asked, "--json").out)["totals"]["conversations"]
    tokens = sum(map(sum, lengths.values()))
    assert totals == {
        "max_length": longest - 5,
        "sequences": 3,
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": round(trained / tokens, 4),
        "ends_in_end_of_turn": round(2 / 3, 4),
        "too_long": 1,
        "tokens_lost_if_cut": 5,
        "lengths": {
            "db": totals["lengths"]["db"] | {"sequences": 2, "min": min(lengths["db"]), "max": longest},
            "api": {"sequences": 1} | dict.fromkeys(("min", "median", "p95", "max"), lengths["api"][0]),
        },
    }
    out = aletheia(workspace, *asked).out
    assert f"{tokens:,} tokens in 3 sequences, {trained / tokens:.0%} of them trained, 67% end" in out
    assert "1 too long, a cut would lose 5 tokens" in out
    [table] = re.findall(r"^api  +1  +(\d+)", out, re.MULTILINE)
    assert int(table) == lengths["api"][0]


# ── what others wrote ────────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = (
    "<script>x</script> ]]> \x1b[31mred\x1b]0;t\x07 \u202eevil\u202c nul\0 c1\x9b31m\r\nnbsp\xa0 zero\u200b ⟦no⟧ \x7f"
)


def control(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()} - {"\n", "\t"}


@pytest.fixture
def hostile(workspace: Workspace) -> str:
    one = row(f"id {HOSTILE}", f"a {HOSTILE} z", domain=HOSTILE, difficulty=HOSTILE)
    one["messages"][0]["content"] = f"q {HOSTILE}\tz"
    return write(workspace, "hostile.jsonl", one, {HOSTILE: 1})


@pytest.mark.parametrize("asked", [(), ("--totals",), ("--json",), ("--set", "sft_config.max_length=60")])
def test_nothing_of_a_row_reaches_the_terminal_raw(
    aletheia: Aletheia, workspace: Workspace, hostile: str, asked: tuple[str, ...]
) -> None:
    said = aletheia(workspace, "data", "show", hostile, *SMALL, *asked)
    assert said.code == 0 and said.out
    assert control(said.out) == control(said.err) == set()
    if not asked:
        assert "<script>x</script> ]]> ⟨U+001B⟩[31mred⟨U+001B⟩]0;t⟨U+0007⟩ ⟨U+202E⟩evil⟨U+202C⟩ nul⟨U+0000⟩" in said.out
        assert "⟨U+000D⟩\nnbsp⟨U+00A0⟩ zero⟨U+200B⟩ ⟨U+27E6⟩no⟨U+27E7⟩ ⟨U+007F⟩" in said.out
        assert len(marked(HEADER.split(said.out)[-1].partition("\n# conversations")[0])) == 1


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on; within a test, as each phase of one has a stdout of its own."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_a_terminal_shows_in_colour_what_a_log_shows_between_marks(
    aletheia: Aletheia, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(workspace, "talk.jsonl", {"id": "a", "messages": TALK})
    asked = ("data", "show", path, *SMALL, "--row", "a")
    log = aletheia(workspace, *asked).out
    on_a_terminal(monkeypatch)
    coloured = aletheia(workspace, *asked).out
    text, coloured = (said.split(" trained\n", 1)[1] for said in (log, coloured))
    assert COLOUR.sub("", coloured).replace(END, "") == unmarked(text)
    learnt = "".join(re.findall(r"\x1b\[(?:32|7)m(.*?)\x1b\[0m", coloured))
    assert learnt == "".join(marked(text)).replace("\n", "")
    assert coloured.count("\x1b[7m") == coloured.count(END) == 2
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert aletheia(workspace, *asked).out == log


def test_in_colour_too_no_escape_but_ours_reaches_the_terminal(
    aletheia: Aletheia, workspace: Workspace, hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    said = aletheia(workspace, "data", "show", hostile, *SMALL, "--set", "sft_config.max_length=200")
    assert set(COLOUR.findall(said.out)) == {"32", "2", "9;31", "7", "0"}
    assert control(COLOUR.sub("", said.out)) == set()
    assert "⟨U+001B⟩[31mred" in said.out


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "a near miss": (("data/sft", "--row", "devops-sft-01"), r"error: data/sft: there is no row .*; try --row devops-sft-0\d+"),
    "no such row": (("data/sft", "--row", "x"), r"error: data/sft: there is no row `x`; try --row \S+"),
    "no such path": (("data/none",), r"error: data/none: there is no such file or folder.*"),
    "rows of evaluation": (("data/eval/choices",), r"error: data/eval/choices/.*:1: these rows are not trained on.*"),
    "a broken row": (("mine", "--row", "mine/a.jsonl:2"), r"error: mine/a\.jsonl:2: is not JSON.*"),
    "a wrong row": (("mine", "--row", "wrong"), r"error: mine/a\.jsonl:3: messages\.1\.content: is empty"),
    "one among broken ones": (("mine", "--row", "x"), r"error: mine: there is no row `x` among .*\(2 cannot\); try --row a"),
    "a page in a folder": (("data/sft", "--html", "{root}/mine"), r"error: .*mine: is no file; try --html.*"),
    "a page over another file": (("data/sft", "--html", "{root}/mine/a.jsonl"), r"error: .*a\.jsonl: was not written by .*"),
    "a page below a file": (("data/sft", "--html", "{root}/mine/a.jsonl/p.html"), r"error: .*p\.html: cannot be written: .*"),
    "a page and JSON": (("data/sft", "--json", "--html", "{root}/p.html"), r"error: --json: is one output.*"),
    "no row at all": (("data/sft", "--rows", "0"), r"error: .*--rows.*"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(aletheia: Aletheia, workspace: Workspace, name: str) -> None:
    words, expected = MISTAKES[name]
    (workspace.root / "mine").mkdir()
    write(workspace, "mine/a.jsonl", row("a", "fine"), "{", row("wrong", " "))
    before = (workspace.root / "mine" / "a.jsonl").read_bytes()
    said = aletheia(workspace, "data", "show", *(w.format(root=workspace.root) for w in words), *SMALL)
    assert re.fullmatch(f"{expected}\n", said.err), said.err
    assert (said.code, said.out) == (2, "")
    assert (workspace.root / "mine" / "a.jsonl").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_page_that_may_not_be_written_is_one_line(aletheia: Aletheia, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    said = aletheia(workspace, "data", "show", "data/sft", *SMALL, "--html", str(tmp_path / "closed" / "p.html"))
    assert re.fullmatch(r"error: .*p\.html: cannot be written: Permission denied\n", said.err)
    assert (said.code, said.out) == (2, "")


FILES: dict[str, tuple[dict[str, str | bytes], str]] = {
    "an empty folder": ({}, r"error: mine: holds no \.jsonl file.*"),
    "an empty file": ({"a.jsonl": ""}, r"error: mine: holds no rows.*"),
    "no known shape": ({"a.jsonl": '{"text": "x"}'}, r"error: mine/a\.jsonl:1: .*found: text.*"),
    "nothing but broken rows": (
        {"a.jsonl": "{,\n[,\n"},
        r"error: mine/a\.jsonl:1: is not JSON.*; 1 more rows are broken.*; try aletheia data check mine"),
    "not UTF-8": ({"a.jsonl": b'{"messages": "\xff"}\n'}, r"error: mine/a\.jsonl.*"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_path_without_a_row_that_can_be_trained_is_a_mistake(
    aletheia: Aletheia, workspace: Workspace, name: str
) -> None:
    files, expected = FILES[name]
    (workspace.root / "mine").mkdir()
    for file, content in files.items():
        (workspace.root / "mine" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = aletheia(workspace, "data", "show", "mine", *SMALL)
    assert re.fullmatch(expected, said.err.splitlines()[-1]), said.err
    assert (said.code, said.out) == (2, "")
