"""What is odd about a text's characters, and whether an answer refuses.

    odd(text)         # "mojibake `Ã©` in line 3"
    refusal(answer)   # "begins `I'm sorry, but I can't assist`"

Both look for what is surely wrong and let the rest be: text of any script is fine, and so is an answer that says what
it cannot know. Refusals are known in English only.
"""

import bisect
import re
import unicodedata
from collections.abc import Callable

REFUSAL_CHARACTERS = 200  # of an answer's beginning: a refusal that is only quoted stands further down

# ── Characters ───────────────────────────────────────────────────────────────────────────────────────────────────────

# UTF-8 read as Windows-1252: what its bytes 80 to BF become (five of them stay control characters)
_PLAIN = "\x80-\x84\x86-\x90\x98-\x9a\x9c-\x9f€‚ƒ„†‡ˆ‰Š‹ŒŽ˜™š›œžŸ¡-ª¬-º¼-¿"
_SPOKEN = "…‘’“”•–—»«\xa0"  # that also follow a word's last letter: MAÇÃ…, «CAFÉ»
_NEXT = f"[{_PLAIN}{_SPOKEN}]"
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
_CHARACTERS = _CONTROLS + r"\x80-\x9f\u200b-\u200d\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufffd\U000e0000-\U000e007f"
_ODD = re.compile(
    rf"""(?P<mojibake>
        Ã(?: [{_PLAIN}] | (?<=[a-z]Ã)[{_SPOKEN}] | [{_SPOKEN}](?=[a-z]) | (?<!\w.)\xa0 )
      | Â(?: [\xa0¡-ª¬-º¼-¿] | (?<=[a-z0-9.,;:!?)]Â)(?=[ \n]|\Z) )
      | [ÄÅÎÏÐÑ](?: (?<=[a-z].){_NEXT} | {_NEXT}[ÄÅÎÏÐÑ]{_NEXT} | [{_PLAIN}](?=[a-z]) )
      | â(?: € | {_NEXT}{{2}} )
      | [ã-é]{_NEXT}{{2}}[ã-é]{_NEXT}{{2}}
      | ðŸ | ï»¿
    )
    | [{_CHARACTERS}]""",
    re.VERBOSE,
)
_ASCII_CONTROL = re.compile(f"[{_CONTROLS}]")
_SUSPECT = re.compile(f"[ÂÃÄÅÎÏÐÑâã-éðï{_CHARACTERS}]")
_JOINING = r"[\u0600-\u08ff\u0900-\u109f\u1780-\u18af\u1a00-\u1c7f\ua800-\uabff\ufb50-\ufefc]"  # Arabic to Thai, Khmer
_PICTURE = r"[©®\u203c-\u3299\U0001f000-\U0001faff]"
# In place: a joiner between pictures, a joiner or break in a script that writes with them, a flag's spelling
_IN_PLACE = re.compile(
    rf"""(?<={_PICTURE}|[\ufe0f\u20e3])\u200d(?={_PICTURE})
      | (?<={_JOINING})[\u200b-\u200d]
      | [\u200b-\u200d](?={_JOINING})
      | \U0001f3f4[\U000e0020-\U000e007e]+\U000e007f""",
    re.VERBOSE,
)


def odd(text: str) -> str | None:
    """The first character or pair that says the text was read wrongly or hides something, and its line (from 1).

    U+FFFD; UTF-8 read as Windows-1252; control characters but tab and line ends; a byte order mark; the bidirectional
    controls that make code read otherwise than it runs (CVE-2021-42574); invisible characters where no script or
    emoji needs them.
    """
    if text.isascii():
        control = _ASCII_CONTROL.search(text)
        return control and _named(text, control.start())
    if not _SUSPECT.search(text):
        return None
    in_place: set[int] | None = None
    for found in _ODD.finditer(text):
        if found["mojibake"]:
            return f"mojibake `{found[0].strip()}` in line {line_at(text, found.start())}"
        if in_place is None:
            in_place = {i for match in _IN_PLACE.finditer(text) for i in range(match.start(), match.end())}
        if found.start() not in in_place:
            return _named(text, found.start())
    return None


def _named(text: str, at: int) -> str:
    code = ord(text[at])
    name = unicodedata.name(text[at], "control character" if code < 0xA0 else "invisible character")
    return f"U+{code:04X} {name} in line {line_at(text, at)}"


def line_at(text: str, at: int) -> int:
    """The line, from 1, of a place in a text."""
    return text.count("\n", 0, at) + 1


def lines_of(text: str) -> Callable[[int], int]:
    """`line_at` for many places of one text: its line ends are looked for once, when the first is asked for."""
    ends: list[int] = []

    def line(at: int) -> int:
        if not ends:
            ends.extend(match.start() for match in re.finditer("\n", text))
            ends.append(len(text))
        return bisect.bisect_left(ends, at) + 1

    return line


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_SENTENCE = re.compile(r"\A|[.!?][\"')*]?\s+|\n\s*")  # its beginning
_SORRY = (
    r"(?:(?:i'm|i am|we're) (?:really |very |so |truly )?sorry|(?:my )?apologies|i (?:sincerely )?apologi[sz]e|sorry)"
)
_ABLE = (
    r"i ?(?:can ?not|can't|won't|will not|must decline to|(?:am|'m) (?:unable|not able|not allowed|not permitted) to)"
    r"(?: \w+ly)?"
)
_HELP = "(?:help(?! but)|assist|comply|fulfil+|engage|participate|provide|offer|support|answer|discuss|generate)"
_WORK = "(?:create|write|produce|give|complete|continue|respond|process|advise|encourage|condone)"
_THAT = "(?:that|this|such|your|these|those)(?: (?:kind|type|sort) of)?"
_THING = "(?:request|content|question|topic|information|material|task|query|subject|conversation|prompt)s?"
_MACHINE = "(?:ai|artificial intelligence|(?:large )?language model)"
_REFUSAL = re.compile(
    r"(?:unfortunately,? |however,? |i understand[^.!?\n]{0,80} but |thank you[^.!?\n]{0,60} but )?(?:"
    + "|".join(
        (
            rf"{_SORRY}[,.]? (?:but |however,? )?(?:as an? {_MACHINE}[^.!?\n]{{0,60}},? )?{_ABLE} (?:{_HELP}|{_WORK}|do)\b",
            rf"{_SORRY}[,.]? (?:but )?(?:that's|that is|this is) (?:not something i|beyond my|against my|outside my)\b",
            rf"{_ABLE} (?:help|assist)(?: you)? (?:with|in|there|further)\b",
            rf"{_ABLE} (?:comply|engage in|participate|provide|fulfil+)\b",
            rf"{_ABLE} (?:{_HELP}|{_WORK}) (?:to |with |on )?{_THAT} (?:\w+ )?{_THING}\b",
            rf"{_ABLE} (?:help|assist|do that)\s*[.!]",
            r"i (?:must|have to|respectfully) (?:respectfully |politely )?decline\b(?! in)",
            r"i(?:'m| am| do not feel| don't feel) (?:not |un)comfortable (?:helping|assisting|providing|discussing)\b",
            r"(?:it|that) (?:is|goes|would be) against my (?:\w+ )?(?:programming|guidelines|polic|principles|training)",
            r"my (?:programming|guidelines) (?:do not|does not|don't|doesn't|prevents?|prohibits?|forbids?)\b",
            rf"i(?:'m| am) not (?:programmed|designed|trained) to (?:{_HELP}|{_WORK})\b",
            rf"(?:{_SORRY}[,.]? (?:but |however,? )?)?as an? (?:\w+ )?{_MACHINE}"
            r"(?: (?:language )?(?:model|assistant|chatbot|system))?"
            r"(?: (?:developed|created|trained|made) by \w+)?,? (?:i|my)\b",
            rf"i(?:'m| am) (?:just |only |merely |simply )?an? {_MACHINE}(?: (?:language )?(?:model|assistant|chatbot))?"
            r"(?:[,.;]| (?:and|so|without|that|created|developed|trained|made|designed)\b)",
            r"(?:as of|since) my (?:last |latest )?(?:knowledge|training) (?:update|data|cut-?off)\b",
            r"i (?:do not|don't) have (?:personal )?(?:opinions|feelings|emotions|beliefs|consciousness)\b",
        )
    )
    + ")",
    re.IGNORECASE,
)
# `I cannot provide a number without the plan`: what it takes is named
_CONDITION = re.compile(r"[^.!?\n]{0,120}\b(?:without|until|unless|before|from here)\b", re.IGNORECASE)


def refusal(text: str) -> str | None:
    """The words with which an answer, at its beginning, refuses or speaks as an AI; in English only."""
    beginning = text[: REFUSAL_CHARACTERS + 150].lstrip('\n >*"“').replace("’", "'")
    for start in _SENTENCE.finditer(beginning, 0, REFUSAL_CHARACTERS):
        found = _REFUSAL.match(beginning, start.end())
        if found and not _CONDITION.match(beginning, found.end()):
            return f"begins `{found[0][:80]}`"
    return None


def tidy(text: str) -> str:
    """Without the white space at its end and the blank lines before its first line, which keeps its indentation: code."""
    text = text.rstrip()
    indent = len(text) - len(text.lstrip())
    return text[max(text.rfind("\n", 0, indent), text.rfind("\r", 0, indent)) + 1 :]
