"""Tokens into text while they arrive: the parts are the whole, and none says what may yet change."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving.engine import TokenScore
from serving.front.text import HALF, AnswerText, Detokenizer, Vocabulary, echoed

TEXTS = [
    "def f(x):\n    return x  # naïve 你好 🙂🙃👩‍💻 — done é",
    " leading and  double  spaces, don't . join , these",
    "e\u0301 combining, \u2028 a line, \x00 a NUL, \u200b nothing",
    "你",
    "",
]
KNOWN = ["the", " the", " then", "you", " you", "é", " 你", "n't", " ,", "  ", "END", " E"]


def byte_level() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shaper = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [shaper.pre_tokenize_str(text)[0][0] for text in KNOWN]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*alphabet, *pieces]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece() -> Any:
    """Llama 2's decoder: a space before each word but the first, and bytes for what is no piece."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [text.replace(" ", "▁") for text in KNOWN]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,#()':"]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module", params=[byte_level, sentencepiece], ids=lambda kind: kind.__name__)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(request.param())


@pytest.fixture(scope="module")
def byte_tokens() -> Vocabulary:
    return Vocabulary(byte_level())


def tokens_of(vocabulary: Vocabulary, text: str) -> list[int]:
    """Known pieces here and there, single bytes between, as a model might say it."""
    tokenizer, rest, found = vocabulary.tokenizer, text, []
    drawn = random.Random(text)
    of_bytes = {vocabulary.bytes_of(t): t for t in range(vocabulary.size) if t not in vocabulary.special}
    whole = {piece: of_bytes[piece.encode()] for piece in KNOWN if piece.encode() in of_bytes}
    while rest:
        piece = next((p for p in sorted(whole, key=len, reverse=True) if rest.startswith(p)), None)
        if piece and drawn.random() < 0.8:
            found.append(whole[piece])
            rest = rest[len(piece) :]
        else:
            found += [of_bytes[bytes([byte])] for byte in rest[0].encode()]
            rest = rest[1:]
    assert tokenizer is not None
    return found


def parts_of(vocabulary: Vocabulary, tokens: list[int], before: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(vocabulary, before or [])
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_are_the_text_and_none_holds_half_a_character(vocabulary: Vocabulary, text: str) -> None:
    tokens = tokens_of(vocabulary, text)
    parts = parts_of(vocabulary, tokens)
    assert "".join(parts) == vocabulary.decode(tokens)
    assert vocabulary.decode(tokens) in (text, text.removeprefix(" "))
    assert not any(HALF in part for part in parts)
    assert sum(bool(part) for part in parts) >= len(text) // 3, "told as it comes, not at the end"


def test_any_tokens_are_told_as_they_are_decoded_together(byte_tokens: Vocabulary) -> None:
    drawn = random.Random(1)
    ordinary = [token for token in range(byte_tokens.size) if token not in byte_tokens.special]
    high = [token for token in ordinary if byte_tokens.bytes_of(token)[0] >= 0x80]
    for of in (ordinary, high):
        for _ in range(200):
            tokens = drawn.choices(of, k=drawn.randrange(40))
            assert "".join(parts_of(byte_tokens, tokens)) == byte_tokens.decode(tokens), tokens


def test_noise_does_not_hold_the_text_back(byte_tokens: Vocabulary) -> None:
    lone = next(token for token in range(256) if byte_tokens.bytes_of(token) == b"\xf0")
    parts = parts_of(byte_tokens, [lone] * 100)
    assert "".join(parts) == HALF * 100
    assert len("".join(parts[:50])) > 40


def test_the_work_does_not_grow_with_the_length(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = vocabulary.decode

    def counting(tokens: Any) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return decode(tokens)

    tokens = tokens_of(vocabulary, TEXTS[0] * 20)
    monkeypatch.setattr(vocabulary, "decode", counting)
    parts_of(vocabulary, tokens)
    assert 0 < decoded < 20 * len(tokens)


def test_a_special_token_is_no_text_and_disturbs_none(vocabulary: Vocabulary) -> None:
    [end] = vocabulary.special
    tokens = tokens_of(vocabulary, "the é then 你")
    among = [t for token in tokens for t in (token, end)]
    assert "".join(parts_of(vocabulary, among)) == vocabulary.decode(tokens)


def test_a_completion_keeps_the_space_after_its_prompt(vocabulary: Vocabulary) -> None:
    before, tokens = tokens_of(vocabulary, "the"), tokens_of(vocabulary, " then you")
    assert "".join(parts_of(vocabulary, tokens, before)) == " then you"


def test_a_tokens_bytes_are_its_own_also_where_they_are_no_character(vocabulary: Vocabulary) -> None:
    for text in ("a", "é", "🙂", " ", "\n"):
        of_bytes = b"".join(vocabulary.bytes_of(token) for token in tokens_of(vocabulary, text))
        assert of_bytes == text.encode()
    [first, *_] = tokens_of(vocabulary, "🙂")
    assert (vocabulary.name(first), vocabulary.name(first, "bytes:")) == ("\\xf0", "bytes:\\xf0")
    assert [vocabulary.name(token) for token in vocabulary.special] == ["<eos>"]


def test_an_added_token_is_text(byte_tokens: Vocabulary) -> None:
    tool = byte_tokens.tokenizer.convert_tokens_to_ids("<tool>")
    assert "".join(parts_of(byte_tokens, [tool, tool])) == "<tool><tool>"
    assert byte_tokens.bytes_of(tool) == b"<tool>"


# ── stop strings ─────────────────────────────────────────────────────────────────────────────────────────────────────


def said(
    vocabulary: Vocabulary, text: str, stops: list[str], begin: int = 0
) -> tuple[list[str], list[tuple[str, int]], int]:
    """What is told after each token, the tokens that were told with their places, and how many were taken."""
    answer, told, tokens = AnswerText(vocabulary, stops, begin=begin), [], []
    for token in tokens_of(vocabulary, text):
        answer.push(token, TokenScore(-1.0))
        if answer.stopped:
            break
        part, ready = answer.take()
        told.append(part)
        tokens += ready
    answer.close()
    part, ready = answer.take()
    return [*told, part], [(vocabulary.name(t.id), t.start) for t in tokens + ready], answer.count


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN", ["END"], "one EN"),
        ("EEND", ["END"], "E"),
        ("END", ["END"], ""),
        ("abcabd", ["abd"], "abc"),
        ("a b c", ["c", "b"], "a "),
        ("xababac", ["ababac"], "x"),
        ("é 你 n", ["你"], "é "),
        ("nothing", [], "nothing"),
        ("aaaa", ["a"], ""),
    ],
)
def test_the_text_ends_before_the_first_stop_string(
    byte_tokens: Vocabulary, text: str, stops: list[str], expected: str
) -> None:
    parts, tokens, _ = said(byte_tokens, text, stops)
    assert "".join(parts) == expected
    assert [start for _, start in tokens] == sorted(start for _, start in tokens)
    assert all(start < len(expected) for _, start in tokens)
    assert text.isascii() <= "".join(name for name, _ in tokens).startswith(expected)


def test_only_what_may_begin_a_stop_string_is_held_back(byte_tokens: Vocabulary) -> None:
    parts, _, _ = said(byte_tokens, "ab-a-ab!", ["ab!"])
    assert parts == ["", "", "ab-", "", "a-", "", "", ""]


def test_tokens_are_told_with_the_text_they_begin_in(byte_tokens: Vocabulary) -> None:
    answer = AnswerText(byte_tokens, ["b!"], begin=10)
    told = []
    for token in tokens_of(byte_tokens, "a🙂b?"):
        answer.push(token)
        part, tokens = answer.take()
        told.append((part, [t.start for t in tokens]))
    assert told == [("a", [10]), ("", []), ("", []), ("", []), ("🙂", [11] * 4), ("", []), ("b?", [12, 13])]


def test_a_special_token_can_be_a_stop(vocabulary: Vocabulary) -> None:
    [end] = vocabulary.special
    answer = AnswerText(vocabulary, ["never", "<eos>"])
    for token in [*tokens_of(vocabulary, "the you"), end]:
        assert not answer.stopped
        answer.push(token)
    assert answer.stopped
    answer.close()
    text, tokens = answer.take()
    assert text == "the you"
    assert end not in [t.id for t in tokens]


# ── echo ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_echoed_prompts_tokens_lie_where_its_text_has_them(vocabulary: Vocabulary) -> None:
    tokens = tokens_of(vocabulary, "the é 你 you")
    text = vocabulary.decode(tokens)
    found = echoed(vocabulary, tokens, text, [None] * len(tokens))
    for token in found:
        name = vocabulary.name(token.id)
        if "\\x" not in name:
            assert text[token.start :].startswith(name.strip() if token.start == 0 else name)


def test_what_an_echoed_text_does_not_show_was_at_its_beginning(vocabulary: Vocabulary) -> None:
    [begin] = vocabulary.special
    tokens = [begin, *tokens_of(vocabulary, "the")]
    starts = [token.start for token in echoed(vocabulary, tokens, "the", [None] * len(tokens))]
    assert starts[:2] == [0, 0]
    assert starts == sorted(starts)
