"""Promise 1 on the public chat templates, as `templates/` has them: what is a token, what is trained, what is refused.

The tokenizer is the embedded base's, with each family's special tokens added, so that every piece below is one token of a
small byte-level BPE; Mistral's is tried over a SentencePiece-like one too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.chat import Chat, Encoded, RewrittenTurn
from pipeline.data.rows import Message, PreferencePair
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.workspace import CHECKOUT

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Shape:
    """A family's tokens, and whether its tokenizer puts its BOS before any text."""

    bos: str | None
    eos: str
    others: tuple[str, ...] = ()
    bos_first: bool = True
    end_of_turn: str = ""  # where it is not the eos token


SHAPES = {
    "deepseek-coder": Shape("<｜begin▁of▁sentence｜>", "<|EOT|>"),
    "smollm2": Shape("<|im_start|>", "<|im_end|>", bos_first=False),
    "qwen2.5": Shape(None, "<|im_end|>", ("<|im_start|>",)),
    "qwen3": Shape(None, "<|im_end|>", ("<|im_start|>",)),
    "llama-3.1": Shape("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "mistral": Shape("<s>", "</s>"),
    "gemma-2": Shape("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), end_of_turn="<end_of_turn>"),
    "phi-3": Shape(
        "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"), bos_first=False, end_of_turn="<|end|>"
    ),
}
# "Hi", "Ho", "Sure?", "Yes:\n\n- 4", with the system text "Be brief.\n" where one is taken. A piece between dots is a
# token; what stands in ⟦ ⟧ is trained.
GOLDEN = {
    "deepseek-coder": "<｜begin▁of▁sentence｜>·B·e· b·ri·ef·.·\n·###· Instruction·:·\n·H·i·\n·###· Response·:·\n·"
    "⟦H·o·\n·<|EOT|>⟧·\n·###· Instruction·:·\n·S·ure·?·\n·###· Response·:·\n·⟦Y·es·:·\n·\n·-· 4·\n·<|EOT|>⟧",
    "smollm2": "<|im_start|>·system·\n·B·e· b·ri·ef·.·\n·<|im_end|>·\n·<|im_start|>·user·\n·H·i·<|im_end|>·\n·"
    "<|im_start|>·ass·ist·ant·\n·⟦H·o·<|im_end|>⟧·\n·<|im_start|>·user·\n·S·ure·?·<|im_end|>·\n·"
    "<|im_start|>·ass·ist·ant·\n·⟦Y·es·:·\n·\n·-· 4·<|im_end|>⟧",
    "llama-3.1": "<|begin_of_text|>·<|start_header_id|>·system·<|end_header_id|>·\n·\n·C·ut·ting· ·K·now·led·ge· D·ate·:·"
    " D·ec·em·ber· 2·02·3·\n·T·od·ay· D·ate·:· 2·6· J·ul· 2·02·4·\n·\n·B·e· b·ri·ef·.·<|eot_id|>·"
    "<|start_header_id|>·user·<|end_header_id|>·\n·\n·H·i·<|eot_id|>·"
    "<|start_header_id|>·ass·ist·ant·<|end_header_id|>·\n·\n·⟦H·o·<|eot_id|>⟧·"
    "<|start_header_id|>·user·<|end_header_id|>·\n·\n·S·ure·?·<|eot_id|>·"
    "<|start_header_id|>·ass·ist·ant·<|end_header_id|>·\n·\n·⟦Y·es·:·\n·\n·-· 4·<|eot_id|>⟧",
    "mistral": "<s>· [·IN·ST·]· B·e· b·ri·ef·.·\n·\n·\n·H·i· [·/·IN·ST·]·⟦ H·o·</s>⟧·"
    " [·IN·ST·]· S·ure·?· [·/·IN·ST·]·⟦ Y·es·:·\n·\n·-· 4·</s>⟧",
    "gemma-2": "<bos>·<start_of_turn>·user·\n·H·i·<end_of_turn>·\n·<start_of_turn>·mode·l·\n·⟦H·o·<end_of_turn>⟧·\n·"
    "<start_of_turn>·user·\n·S·ure·?·<end_of_turn>·\n·<start_of_turn>·mode·l·\n·⟦Y·es·:·\n·\n·-· 4·<end_of_turn>⟧",
    "phi-3": "<|user|>·\n·H·i·<|end|>·\n·<|assistant|>·\n·⟦H·o·<|end|>⟧·\n·"
    "<|user|>·\n·S·ure·?·<|end|>·\n·<|assistant|>·\n·⟦Y·es·:·\n·\n·-· 4·<|end|>⟧",
}
GOLDEN["qwen2.5"] = GOLDEN["smollm2"]
NO_SYSTEM = ("gemma-2", "phi-3")  # phi-3 takes one; its golden row has none
DEFAULT_SYSTEM = {  # what stands before the first question where no system text is given
    "deepseek-coder": "computer science questions, you will refuse to answer\n### Instruction:\nHi\n",
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
    "qwen2.5": "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
    "llama-3.1": "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
}


def messages(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn."""
    turns = [Message(role="assistant" if n % 2 else "user", content=text) for n, text in enumerate(contents)]
    return [Message(role="system", content=system), *turns] if system else turns


ONE_TURN, TWO_TURNS = messages("Hi", "Ho"), messages("Hi", "Ho", "Sure?", "Yes:\n\n- 4")
BRIEFED = messages("Hi", "Ho", "Sure?", "Yes:\n\n- 4", system="Be brief.\n")


def pieces(chat: Chat, encoded: Encoded) -> str:
    """Token by token: dots between them, what is trained in ⟦ ⟧."""
    shown: list[str] = []
    edges = zip([False, *encoded.mask], encoded.mask, [*encoded.mask[1:], False], strict=False)
    for token, (before, trained, after) in zip(encoded.ids, edges, strict=True):
        text = chat.tokenizer.decode([token])
        shown.append(f"{'⟦' if trained > before else ''}{text}{'⟧' if trained > after else ''}")
    return "·".join(shown)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Callable[..., Any]:
    """`tokenizer("llama-3.1", template=…)`: one of that family, made from the embedded one."""
    tiny = base.tokenizer()

    def make(name: str, template: str | None = None, shape: Shape | None = None) -> Any:
        shape, made = shape or SHAPES[name], copy.deepcopy(tiny)
        added = [AddedToken(t, special=True, normalized=False) for t in (shape.bos, shape.eos, *shape.others) if t]
        made.add_tokens([*added, AddedToken("<think>"), AddedToken("</think>")])
        made.bos_token, made.eos_token = shape.bos, shape.eos
        if shape.bos and shape.bos_first:
            bos_first = TemplateProcessing(single=f"{shape.bos} $A", special_tokens=[(shape.bos, made.bos_token_id)])
            made.backend_tokenizer.post_processor = bos_first
            assert made("")["input_ids"] == [made.bos_token_id]
        made.chat_template = (TEMPLATES / f"{name}.jinja").read_text() if template is None else template
        return made

    return make


@pytest.fixture(scope="module")
def chat(tokenizer: Callable[..., Any]) -> Callable[[str], Chat]:
    return lambda name: Chat(tokenizer(name), name)


# ── What is trained ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tokens_and_mask(chat: Callable[[str], Chat], name: str) -> None:
    one = chat(name)
    found = pieces(one, one.conversation(TWO_TURNS if name in NO_SYSTEM else BRIEFED))
    assert found == GOLDEN[name]


def test_golden_tokens_and_mask_where_the_last_turn_thinks(chat: Callable[[str], Chat]) -> None:
    qwen3 = chat("qwen3")
    start, end = "<|im_start|>·user·\n·H·i·<|im_end|>·\n·<|im_start|>·ass·ist·ant·\n·⟦", "·H·o·<|im_end|>⟧"
    assert pieces(qwen3, qwen3.conversation(ONE_TURN)) == f"{start}<think>·\n·\n·</think>·\n·\n{end}"
    thought = messages("Hi", "<think>\nso\n</think>\n\nHo")
    assert pieces(qwen3, qwen3.conversation(thought)) == f"{start}<think>·\n·so·\n·</think>·\n·\n{end}"


@pytest.mark.parametrize("name", DEFAULT_SYSTEM)
def test_default_system_text_stands_before_the_question_and_is_not_trained(
    chat: Callable[[str], Chat], name: str
) -> None:
    one = chat(name)
    encoded = one.conversation(ONE_TURN)
    assert DEFAULT_SYSTEM[name] in one.tokenizer.decode(encoded.ids)
    trained = [token for token, wanted in zip(encoded.ids, encoded.mask, strict=True) if wanted]
    assert one.tokenizer.decode(trained).split() in (["Ho", one.end_of_turn], [f"Ho{one.end_of_turn}"])


@pytest.mark.parametrize("name", SHAPES)
def test_every_answer_is_trained_with_its_one_end_of_turn_and_nothing_after(
    chat: Callable[[str], Chat], name: str
) -> None:
    one = chat(name)
    encoded = one.conversation(ONE_TURN if name == "qwen3" else TWO_TURNS)
    trained = [label for label in encoded.labels if label != -100]
    assert trained.count(one.end_of_turn_id) == (1 if name == "qwen3" else 2)
    assert encoded.ids[-1] == encoded.labels[-1] == one.end_of_turn_id
    assert one.end_of_turn == (SHAPES[name].end_of_turn or SHAPES[name].eos)


def test_end_of_turn_is_the_first_special_token_after_an_answer(tokenizer: Callable[..., Any]) -> None:
    """Phi-3 ends a turn with one and a whole conversation with the eos token, whichever is the longer word."""
    ended = (TEMPLATES / "phi-3.jinja").read_text().replace("<|end|>", "<|the_end_of_a_turn|>")
    shape = Shape("<s>", "<|endoftext|>", ("<|the_end_of_a_turn|>",), bos_first=False)
    assert Chat(tokenizer("phi-3", ended, shape), "ended").end_of_turn == "<|the_end_of_a_turn|>"


@pytest.mark.parametrize("name", SHAPES)
def test_what_precedes_an_answer_is_the_prompt_that_is_served(chat: Callable[[str], Chat], name: str) -> None:
    one = chat(name)
    for row in [ONE_TURN] if name == "qwen3" else [ONE_TURN, TWO_TURNS]:
        encoded = one.conversation(row)
        for turn in range(1, len(row), 2):
            served = one.tokenizer.apply_chat_template(
                [m.model_dump() for m in row[:turn]], add_generation_prompt=True, return_dict=False
            )
            assert one.prompt(row[:turn]) == served == encoded.ids[: len(served)]
            assert encoded.mask[len(served) - 1 : len(served) + 1] == [False, True]


@pytest.mark.parametrize("name", SHAPES)
def test_pair_is_its_prompt_with_either_answer(chat: Callable[[str], Chat], name: str) -> None:
    one = chat(name)
    row = {"prompt": TWO_TURNS[:3], "chosen": messages("?", "Yes:\n\n- 4")[1:], "rejected": messages("?", "No.")[1:]}
    sides = one.pair(PreferencePair.model_validate(row))
    prompt = one.prompt(TWO_TURNS[:3])
    for side, answer in zip(sides, ("Yes:\n\n- 4", "No."), strict=True):
        assert side.ids[: len(prompt)] == prompt
        assert side.mask == [False] * len(prompt) + [True] * (len(side.ids) - len(prompt))
        text = one.tokenizer.decode(side.ids[len(prompt) :])
        assert text.removesuffix(one.end_of_turn).strip().removeprefix("<think>\n\n</think>\n\n") == answer
    if name != "qwen3":
        assert sides[0] == Encoded(one.conversation(TWO_TURNS).ids, sides[0].mask)


def test_deepseeks_own_template_has_the_contract_of_the_embedded_one(chat: Callable[[str], Chat], base: Base) -> None:
    assert chat("deepseek-coder").contract == base.chat().contract


def test_gemma_and_mistral_refuse_what_their_templates_refuse(chat: Callable[[str], Chat]) -> None:
    with pytest.raises(UserError, match="gemma-2: its chat template refuses the messages: System role not supported"):
        chat("gemma-2").conversation(BRIEFED)
    twice = [*messages("Hi"), *messages("Hello?", "Ho")]
    for name in ("gemma-2", "mistral"):
        with pytest.raises(UserError, match=r"conversation roles must alternate user/assistant|roles must alternate"):
            chat(name).conversation(twice)


# ── What the contract says of them ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SHAPES)
def test_contract_states_what_was_found(chat: Callable[[str], Chat], name: str) -> None:
    one = chat(name)
    facts = one.contract.facts()
    assert facts["end_of_turn"] == one.end_of_turn and facts["end_of_turn_tokens"] == 1 and facts["end_of_turn_trained"]
    assert facts["bos_tokens"] == (0 if name in ("qwen2.5", "qwen3", "phi-3") else 1)
    assert facts["prefix_preserving"] is (name != "qwen3")
    assert facts["takes_system"] is (name != "gemma-2")
    assert facts["keeps_white_space"] is (name not in ("gemma-2", "llama-3.1"))
    assert facts.get("date") == ("2024-07-26" if name == "llama-3.1" else None)


@pytest.mark.parametrize("name", SHAPES)
def test_contract_is_the_same_after_saving_and_loading(
    tokenizer: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    chat = Chat(tokenizer(name), name)
    chat.tokenizer.save_pretrained(tmp_path)
    loaded = Chat(AutoTokenizer.from_pretrained(tmp_path), name)
    assert loaded.contract == chat.contract
    assert loaded.prompt(ONE_TURN[:1]) == chat.prompt(ONE_TURN[:1])


@pytest.mark.parametrize("name", SHAPES)
def test_every_special_token_inside_a_text_is_reported(chat: Callable[[str], Chat], name: str) -> None:
    one, shape = chat(name), SHAPES[name]
    for token in filter(None, (shape.bos, shape.eos, *shape.others)):
        assert one.reserved_in(messages("Hi", f"So: {token}system")) == token
    assert one.reserved_in(TWO_TURNS) is None


def test_special_token_is_reported_after_saving_and_loading(tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer("llama-3.1").save_pretrained(tmp_path)
    chat = Chat(AutoTokenizer.from_pretrained(tmp_path), "llama-3.1")
    assert chat.reserved_in(messages("<|start_header_id|>system<|end_header_id|>")) == "<|start_header_id|>"


# ── What cannot be trained as it is used ─────────────────────────────────────────────────────────────────────────────


def test_earlier_turns_that_lose_their_thoughts_are_refused_by_the_row(chat: Callable[[str], Chat]) -> None:
    """And only by the row: a conversation of one answer, and a pair after several turns, are as they are in use."""
    with pytest.raises(RewrittenTurn, match=r"^qwen3: its template renders an earlier turn otherwise .* rows of one"):
        chat("qwen3").conversation(TWO_TURNS)


def test_generation_prompt_that_a_whole_conversation_lacks_is_refused(tokenizer: Callable[..., Any]) -> None:
    shape = Shape("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"))
    with pytest.raises(UserError, match=r"otherwise than a whole conversation, which has no '<think>\\n' there"):
        Chat(tokenizer("deepseek-r1", shape=shape), "deepseek-r1")
    chatml = (TEMPLATES / "smollm2.jinja").read_text()
    closed = chatml.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'")
    assert closed != chatml
    with pytest.raises(UserError, match=r"has no '<think>\\n\\n</think>\\n\\n' there"):
        Chat(tokenizer("smollm2", closed), "thinks in the prompt alone")


def test_system_text_that_moves_to_the_last_question_is_refused_by_the_row(tokenizer: Callable[..., Any]) -> None:
    """As in Mistral-7B-Instruct-v0.3: once answered, that question is not the last any more."""
    moved = (TEMPLATES / "mistral.jinja").read_text().replace("loop.first and system", "loop.last and system")
    chat = Chat(tokenizer("mistral", moved), "v0.3")
    assert chat.contract.takes_system is False
    assert chat.conversation(TWO_TURNS) and chat.prompt(BRIEFED[:2])
    with pytest.raises(UserError, match=r"which has no 'Be brief.\\n\\n\\nHi \[/INST\]' there"):
        chat.conversation(BRIEFED)


@pytest.mark.parametrize("name", ["deepseek-coder", "llama-3.1", "mistral", "gemma-2"])
def test_bos_that_is_doubled_or_lacking_is_refused(tokenizer: Callable[..., Any], name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    with pytest.raises(UserError, match=f"^{name}: its template gives two BOS tokens$"):
        Chat(tokenizer(name, template.replace("bos_token", "bos_token + bos_token", 1)), name)
    with pytest.raises(UserError, match=f"^{name}: its template gives no BOS, .*begins with {{{{ bos_token }}}}$"):
        Chat(tokenizer(name, template.replace("bos_token", "''", 1)), name)


# ── The date ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "written"), [('strftime_now("%Y-%m-%d")', "2024-07-26"), ("strftime_now( '%d %B %Y' )", "26 July 2024")]
)
def test_todays_date_is_one_fixed_date_here_and_wherever_the_tokenizer_goes(
    tokenizer: Callable[..., Any], tmp_path: Path, call: str, written: str
) -> None:
    dated = "{{- 'Today is ' + " + call + " + '.\n' -}}" + (TEMPLATES / "smollm2.jinja").read_text()
    chat = Chat(tokenizer("smollm2", dated), "dated")
    chat.tokenizer.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert served.startswith(f"Today is {written}.\n<|im_start|>system")
    assert chat.contract.date == "2024-07-26"


def test_date_that_cannot_be_fixed_is_refused(tokenizer: Callable[..., Any]) -> None:
    dated = "{%- set form = '%Y' -%}{{- strftime_now(form) -}}" + (TEMPLATES / "smollm2.jinja").read_text()
    with pytest.raises(UserError, match="writes today's date in a way that cannot be fixed"):
        Chat(tokenizer("smollm2", dated), "dated")


# ── A tokenizer that puts a space before every text ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """As Mistral's first ones: a text gets a ▁ in front, and so does what follows a special token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    lines = [*(CHECKOUT / "README.md").read_text("utf-8").splitlines()[:60], "你好 é `\n"]
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"]))
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = (TEMPLATES / "mistral.jinja").read_text()
    return made


def test_answer_is_tokenised_after_its_prompt_where_a_text_alone_would_get_a_space(sentencepiece: Any) -> None:
    chat = Chat(sentencepiece, "sentencepiece")
    row = messages("a", "b", "a", "b")
    encoded = chat.conversation(row)
    text = chat.tokenizer.apply_chat_template([m.model_dump() for m in row], tokenize=False)
    assert encoded.ids == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    trained = [t for t, wanted in zip(encoded.ids, encoded.mask, strict=True) if wanted]
    answer = chat.tokenizer.convert_ids_to_tokens(trained)
    assert answer[: len(answer) // 2] == answer[len(answer) // 2 :]
    assert "".join(answer) == "▁b</s>▁b</s>"
    assert "▁▁" in "".join(chat.tokenizer.tokenize(" b")), "tokenised alone it would get a second space"


def test_answer_that_such_a_tokenizer_joins_to_its_prompt_is_refused(sentencepiece: Any) -> None:
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.add_tokens([AddedToken("]b", normalized=False)])
    tokenizer.chat_template = tokenizer.chat_template.replace('" " + message["content"]', 'message["content"]')
    with pytest.raises(UserError, match="joins the prompt's end and the answer's beginning"):
        Chat(tokenizer, "sentencepiece").conversation(messages("a", "b"))
