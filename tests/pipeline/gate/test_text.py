"""Odd characters and refusals: each kind is found with its line, and text of any script or an honest answer is let be."""

import pytest

from pipeline.gate.text import odd, refusal

MOJIBAKE = [
    "cafÃ©", "SÃ£o", "voilÃ\xa0", "Ã\xa0 la carte", "Ã–sterreich", "GoÃ»t", "donâ€™t", "â€œhi", "â†’", "10Â km", "Â©", "Â\xa0x",
    "pÅ‚yta", "Å¡koda", "Î±Î²Î³", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "æ—¥æœ¬", "ðŸ˜€", "ï»¿a",
]  # fmt: skip
CHARACTERS = {
    "a\ufffd": "U+FFFD REPLACEMENT CHARACTER", "a\x00": "U+0000 control character", "\x1b[0m": "U+001B control character",
    "a\x7f": "U+007F control character", "é\x85": "U+0085 control character", "\ufeffa": "U+FEFF ZERO WIDTH NO-BREAK SPACE",
    "a\u202eb": "U+202E RIGHT-TO-LEFT OVERRIDE", "a\u2066b": "U+2066 LEFT-TO-RIGHT ISOLATE",
    "pass\u200bword": "U+200B ZERO WIDTH SPACE", "a\u200d b": "U+200D ZERO WIDTH JOINER", "a\u2060": "U+2060 WORD JOINER",
    "😀\u200d x": "U+200D ZERO WIDTH JOINER", "a\U000e0041": "U+E0041 TAG LATIN CAPITAL LETTER A",
}  # fmt: skip
FINE = [
    "\ttab\r\n", "«café»…", "MAÇÃ…", "“AMANHÔ", "NÃO, SÃO", "IRMÃ – sim", "CAFÉ…", "Spaß“", "10×–20×", "É — Å — Ä “Ö”",
    "Tiếng Việt: Ân Độ, Ã, CHÂN, Đà Nẵng", "Âge, ÂGE «Â»", "ação…", "Ð and Ñ: Ñandú", "voilà… «là»", "Łódź Åse",
    "±5 °C, 10 µs, ½, £5, §3", "→ ✓ █ ─ │ — …", "日本語 中文 한국어", "Привет — мир", "Ελληνικά «α»",
    "👨‍👩‍👧 ❤️‍🔥 🏳️‍🌈 👩🏽‍💻 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "می‌خواهم", "क्‍ष", "ภาษา\u200bไทย", "עברית \u200f(x)",
]  # fmt: skip


@pytest.mark.parametrize("text", MOJIBAKE, ids=ascii)
def test_text_read_in_the_wrong_encoding_is_found_with_its_line(text: str) -> None:
    found = odd(f"one\n{text}")
    assert found and found.startswith("mojibake `") and found.endswith("in line 2")


@pytest.mark.parametrize("text", [t for t in FINE if not t.isascii()], ids=ascii)
def test_what_can_be_read_wrongly_is_found_once_it_has_been(text: str) -> None:
    """Each of the texts that are fine, its bytes read as browsers read Windows-1252."""
    wrong = "".join(chr(b) if b in b"\x81\x8d\x8f\x90\x9d" else bytes([b]).decode("cp1252") for b in text.encode())
    assert odd(wrong)


@pytest.mark.parametrize(("text", "named"), CHARACTERS.items(), ids=lambda v: ascii(v))
def test_characters_that_no_text_needs_are_named_with_their_line(text: str, named: str) -> None:
    assert odd(f"one\ntwo\n{text}") == f"{named} in line 3"


@pytest.mark.parametrize("text", FINE, ids=ascii)
def test_text_of_any_script_is_let_be(text: str) -> None:
    assert odd(text) is None


REFUSALS = """\
I'm sorry, but I can't assist with that.
I’m sorry, but I can’t assist with that request.
Sorry, I can't help with that.
I'm sorry, but as an AI language model I cannot help with that.
I'm sorry, but as an AI language model, I cannot help with that.
I apologize, but as an AI I don't have access to your files.
As an AI language model, I don't have access to your system.
As a large language model trained by OpenAI, I can't browse.
I cannot provide instructions for that.
I'm unable to help with that.
I am not able to assist you with this request.
Unfortunately, I cannot provide that information.
I apologize, but I cannot fulfill this request.
I must decline.
I'm just an AI and do not have feelings.
I do not have personal opinions.
Thank you for your question, but I can't help with that.
It is against my programming to do so.
My guidelines do not allow this.
Great question! I'm sorry, but I cannot create malware.
As of my last knowledge update, PostgreSQL 15 is current.
I'm sorry, but that's not something I can help with.
I cannot answer that question.
I won't write that kind of content.
I'm not comfortable helping with that.
> **I'm sorry, I can't assist with that.**""".splitlines()
ANSWERS = """\
You cannot provide a default here.
I can't reproduce this on 16.2, but the plan suggests a lock.
Sorry, I can't reproduce this on 16.2.
I can't provide an exact figure without seeing the plan, but here is how to find it.
I can't tell from the plan alone.
I'm sorry for the outage you had; here is what to do.
As an AI engineer, you will meet this.
Sorry, as an AI platform this one is slow.
I'm an AI engineer at a bank.
I won't create a second index here: one is enough.
I can't help but notice the missing index.
The server says "I'm sorry, but I can't assist". Look at the log.
I cannot recommend this design: it loses writes.
I don't have a benchmark for that, so measure.
I can't share a lock between two sessions.
I can't answer this with one number: it depends.
I can't do that in one migration; do it in three.
Use `raise PermissionError("I cannot provide")`.
My training data is in /data. Use rsync.
I have to decline in favour of the first design.
I can help with that: add an index.""".splitlines()


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_found_and_quoted(text: str) -> None:
    found = refusal(f"{text} And more.")
    assert found and found.startswith("begins `")


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_that_says_what_it_cannot_know_is_no_refusal(text: str) -> None:
    assert refusal(text) is None


def test_a_refusal_further_down_is_only_spoken_of() -> None:
    assert refusal("Add an index. " * 15 + REFUSALS[0]) is None
