"""Every rule of the gate: code, name, severity, what it finds and what to do. The one table of them.

An error rejects its row: the row is not trained, and stands in `rejects.jsonl` with file, line, rule and reason. A
warning is said, and the row is kept. A profile turns rules off or changes their severity by code, name or the start of a
code: `training_data.check.ignore: [D206, near-duplicate]`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config import Check
from pipeline.errors import UserError

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Rule:
    code: str
    name: str
    severity: Severity
    finds: str
    remedy: str
    fixable: bool = False  # by `--fix`


_FIT = "a larger max_length, or shorter rows"
RULES = (
    # ── reading
    Rule("D101", "encoding", "error", "bytes that are not UTF-8, or half a character", "save the file as UTF-8"),
    Rule("D102", "broken-json", "error", "a line that is no JSON object, or no row of its CSV", "mend the line"),
    Rule("D103", "broken-file", "error", "a file that cannot be read to its end", "make the file anew"),
    Rule("D104", "unknown-shape", "error", "a row of no known format", "rename its fields to one of the known formats"),
    Rule("D105", "missing-field", "error", "a row without a field that its kind needs", "add the field"),
    Rule("D106", "wrong-type", "error", "a field of another type than its kind has", "change its type"),
    Rule("D107", "empty-field", "error", "a text that is empty or only white space", "fill it, or drop the row"),
    Rule("D108", "role-order", "error", "roles that do not go user, assistant in turn", "order the messages"),
    Rule("D109", "id-twice", "error", "an id that another row has", "ids that name one row each"),
    # ── text
    Rule("D201", "special-token", "error", "a special token of the model inside a text", "take it out"),
    Rule(
        "D202", "odd-characters", "warning", "mojibake, replacement or control characters", "read the source as UTF-8"
    ),
    Rule("D203", "completion-length", "warning", "an answer shorter or longer than the band", "look at it"),
    Rule("D204", "refusal", "warning", "an answer that refuses", "drop it, unless refusing is what you teach"),
    Rule("D205", "secret", "error", "a key, token or password", "revoke it, then take it out"),
    Rule("D206", "personal-data", "warning", "an e-mail address, phone, card or account number", "take it out"),
    Rule("D207", "code-syntax", "warning", "a code block that does not parse in its language", "mend the code"),
    Rule("D208", "code-fence", "warning", "a code block that is never closed", "close it"),
    Rule("D209", "code-fails", "error", "a row marked `run` whose Python fails (with --run)", "mend the code"),
    Rule(
        "D210", "edge-whitespace", "warning", "an answer that begins or ends in white space", "strip it", fixable=True
    ),
    # ── tokens: with a profile
    Rule("D301", "too-long", "error", "a row of more tokens than max_length", _FIT),
    Rule("D302", "no-end-of-turn", "error", "a row that, cut at max_length, would never end", _FIT),
    Rule(
        "D303",
        "nothing-trained",
        "error",
        "a row whose prompt alone fills max_length",
        "a larger max_length, or a shorter prompt",
    ),
    Rule(
        "D304",
        "template",
        "error",
        "messages that the chat template refuses or changes",
        "leave out what it does not take",
    ),
    # ── the set
    Rule("D401", "duplicate", "error", "a row whose text stands in the set already", "drop it", fixable=True),
    Rule("D402", "near-duplicate", "warning", "a row nearly the same as an earlier one", "keep the better one"),
    Rule("D403", "leak", "error", "words of an evaluation's prompt or answer in a training row", "drop the row"),
    Rule("D404", "near-leak", "error", "a training row nearly the same as one of an evaluation", "drop the row"),
    Rule("D405", "unbalanced-domains", "warning", "a domain with far fewer rows than its share", "more rows of it"),
    # ── preference pairs
    Rule("D501", "same-sides", "error", "chosen and rejected that are the same", "drop the pair"),
    Rule("D502", "same-when-cut", "error", "chosen and rejected that are the same up to max_length", _FIT),
    Rule("D503", "prompt-mismatch", "error", "chosen and rejected that answer different prompts", "pair them anew"),
    Rule("D504", "refusal-chosen", "error", "a chosen answer that refuses", "swap or drop the pair"),
    Rule("D505", "swapped", "error", "a pair that another has the other way round", "keep the right one of the two"),
    Rule("D506", "length-bias", "warning", "length alone tells which side is chosen", "pairs of like lengths"),
)
BY_NAME = {rule.name: rule for rule in RULES}
ALWAYS = frozenset(rule.name for rule in RULES if rule.code.startswith(("D1", "D3"))) | {
    "same-sides",
    "prompt-mismatch",
}
OF_THE_SET = ("unbalanced-domains", "length-bias")  # reject no row: as errors they stop the stage


def selected(check: Check, where: str = "training_data.check") -> dict[str, Rule]:
    """The rules in effect, by name, as a profile has them. Raises `UserError` for a rule there is not."""
    ignored = _named(check.ignore, f"{where}.ignore")
    found = {name: rule for name, rule in BY_NAME.items() if name not in ignored}
    for name in _named(check.errors, f"{where}.errors", ALWAYS) & set(found):
        found[name] = replace(found[name], severity="error")
    for name in _named(check.warnings, f"{where}.warnings") & set(found):
        found[name] = replace(found[name], severity="warning")
    return found


def _named(words: Iterable[str], where: str, allowed: frozenset[str] = frozenset()) -> set[str]:
    """The rules that words stand for. One that always holds is named only where `allowed`."""
    names: set[str] = set()
    for word in words:
        by_start = {rule.name for rule in RULES if word[:1] == "D" and rule.code.startswith(word)}
        found = {word} & set(BY_NAME) or by_start
        if not found:
            near = difflib.get_close_matches(word, [*BY_NAME, *(rule.code for rule in RULES)], 1)
            raise UserError(
                f"there is no rule `{word}`", where=where, remedy=near[0] if near else "aletheia data check --rules"
            )
        if found <= ALWAYS - allowed:
            raise UserError(f"`{word}` cannot be left out: a row that breaks it cannot be trained", where=where)
        names |= found - (ALWAYS - allowed)
    return names
