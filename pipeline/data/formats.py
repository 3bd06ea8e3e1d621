"""The shapes that rows come in, and one conversion each to the project's own four (`pipeline.data.rows`).

    kind, values = converted({"instruction": "…", "output": "…"})     # Conversation, {"messages": […]}

A row's format is told by its fields. What a conversion does not use is carried over as it is; a field that is null is as one
that is not there, unless only the names of all fields tell the format: the field is empty then. What cannot be said in the
project's shapes is refused and never left out: tools and calls of them, images and sound, a message's weight other than 1,
KTO's labels. Of a message, `name` and `id` are left out, and so is any other field that holds nothing. A `developer` is a
system; a `system` or `system_prompt` beside the messages goes first; parts of a text are joined by a line end; an Alpaca
`input` or a Dolly `context`, whatever the format, follows the question after a blank line.

Whatever the format, every assistant's turn of a conversation is trained, also one of a `history` or a `prompt`.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from pipeline.data.messages import (
    ABOUT,
    EMPTY,
    SYSTEM,
    Values,
    is_dialogue,
    message_of,
    messages_of,
    prompt_of,
    role_of,
    side_of,
    with_system,
)
from pipeline.data.raw import called
from pipeline.data.rows import KINDS, NAMES, Conversation, MultipleChoice, PreferencePair, Question, Row, RowFault

_UNSUPPORTED = {  # fields that change what a row means, and why such a row is refused
    "tools": "calls of tools are not trained",
    "functions": "calls of tools are not trained",
    "chat_template_kwargs": "the chat template takes messages alone",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is trained"),
}
_SINGULAR: dict[type[Row], str] = {Conversation: "a conversation", PreferencePair: "a preference pair"}
_OTHER: dict[type[Row], type[Row]] = {
    Conversation: PreferencePair,
    PreferencePair: Conversation,
}  # kind of training row


@dataclass(frozen=True, slots=True)
class Format:
    """One shape that rows come in."""

    name: str
    fields: tuple[str, ...]  # what it is told by
    becomes: type[Row]
    convert: Callable[[Values], Values]  # gives the text fields of the kind it becomes
    optional: tuple[str, ...] = ()  # what it uses too, where it is there

    @property
    def shape(self) -> str:
        """`{instruction, output, input?}`."""
        return "{" + ", ".join([*self.fields, *(f"{field}?" for field in self.optional)]) + "}"


def converted(values: Values, kind: type[Row] | None = None) -> tuple[type[Row], Values]:
    """What kind of row some values are, and the values in the project's own shape. Raises `RowFault`.

    With a `kind` only formats that become that are known. What misses a field of its kind is given back as it is, and
    `validated` says which.
    """
    names = values.keys()  # of fields that are null, too
    if None in values.values():
        values = {field: value for field, value in values.items() if value is not None}
    known = _known(values.keys(), kind)
    if len(known) > 1:
        shapes = " and ".join(f"{f.name} {f.shape}" for f in known)
        raise RowFault("unknown-shape", f"could be {shapes}", "to take the fields of one of them out")
    if known:
        row = _converted(values, known[0])
        if "prompt" in row or known[0].becomes is not PreferencePair or len(names) == len(values):
            return known[0].becomes, row
    if kind:
        _check_kind(values.keys(), kind)
    known = sorted(_known(names, kind), key=lambda f: len(set(f.fields) - values.keys()))
    if known:
        return known[0].becomes, _converted(_filled(values, known[0]), known[0])
    if kind:
        _check_kind(names, kind)
    _check_names(names, kind)
    kind = kind or next((own for field, own in KINDS.items() if field in names), None)
    if not kind:
        raise RowFault("unknown-shape", f"has no known shape (found: {_listed(names)})", _SHAPES)
    return kind, values


def _known(names: Set[str], kind: type[Row] | None) -> list[Format]:
    """What has all its fields: {question, choices, answer} is no {question, answer}."""
    known = [f for needs, f in _BY_FIELDS if needs <= names and kind in (None, f.becomes)]
    if len(known) > 1:
        known = [f for f in known if not any(set(f.fields) < set(other.fields) for other in known)]
    return known


def _filled(values: Values, known: Format) -> Values:
    """An instruction may be empty where an input follows it; any other field may not."""
    for field in known.fields:
        if field not in values:
            if field != "instruction" or not any(values.get(about) for about in ABOUT):
                raise RowFault("empty-field", f"{field}: is empty")
            values = values | {field: ""}
    return values


def _check_kind(names: Set[str], kind: type[Row]) -> None:
    """Raises `RowFault` where a conversation stands among pairs, or the other way round."""
    other = _OTHER.get(kind)
    if other is Conversation and not names.isdisjoint(("chosen", "rejected")):
        return  # half a pair
    if other and _known(names, other):
        what = f"is {_SINGULAR[other]}, and {NAMES[kind]} are wanted"
        raise RowFault(
            "missing-field", what, "naming pairs in training_data.dpo and conversations in training_data.sft"
        )


def _check_names(names: Set[str], kind: type[Row] | None) -> None:
    """Raises `RowFault` where fields are known by their names but for case and blanks."""
    near = {name: own for name in names if (own := name.strip().lower()) in FIELDS and own not in names}
    known = _known({near.get(name, name) for name in names}, kind)
    if near and (known or FIELDS.isdisjoint(names)):
        used = known[0].fields if known else near.values()
        renamed = ", ".join(f"`{name}` to `{own}`" for name, own in near.items() if own in used)
        what = f"has no known shape (found: {_listed(names)})"
        raise RowFault("unknown-shape", what, f"rename {renamed}{'' if known else f'; {_SHAPES}'}")


def _converted(values: Values, known: Format) -> Values:
    for field in _UNSUPPORTED.keys() & values.keys():
        if values[field] not in EMPTY:
            raise RowFault("unknown-shape", f"has `{field}`: {_UNSUPPORTED[field]}", "to leave such rows out")
    used = {*known.fields, *known.optional, *_UNSUPPORTED, *(SYSTEM if "system" in known.optional else ())}
    texts = known.convert(values)
    row = {field: value for field, value in values.items() if field not in used or field in texts} | texts
    if type(row.get("id")) is int:
        row["id"] = str(row["id"])
    return row


def _listed(fields: Set[str]) -> str:
    """Names of fields, some of them: a row may be a table of thousands."""
    names = [field[:40] for field in fields]
    return ", ".join(names[:12] + ["…"] * (len(names) > 12)) or "nothing"


# ── Conversations ────────────────────────────────────────────────────────────────────────────────────────────────────


def _conversation(field: str) -> Callable[[Values], Values]:
    def convert(values: Values) -> Values:
        messages = values[field]
        if not isinstance(messages, list):
            raise RowFault("wrong-type", f"{field}: is {called(messages)}, not a list of messages")
        if not messages:
            raise RowFault("empty-field", f"{field}: is empty")
        return {"messages": with_system(values, messages_of(messages, field))}

    return convert


def _turn(asked: str, answer: str) -> Callable[[Values], Values]:
    """A question and its answer, each a text or messages."""

    def convert(values: Values) -> Values:
        if str(values.get("label")).lower() in ("true", "false", "0", "1"):
            raise RowFault("unknown-shape", "has a `label`, as KTO's rows: whether to learn it or not is not trained")
        prompt = prompt_of(values, asked)
        return {"messages": with_system(values, [*_history(values), *prompt, *side_of(values[answer], answer)])}

    return convert


def _history(values: Values) -> list[Any]:
    """Alpaca's: pairs of what was asked and answered before."""
    messages: list[Any] = []
    history = values.get("history") or []
    if not isinstance(history, list):
        raise RowFault("wrong-type", f"history: is {called(history)}, not a list of pairs")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("wrong-type", f"history.{number}: is no pair of an instruction and its output")
        messages += [
            message_of(pair[0], "user", f"history.{number}.0"),
            message_of(pair[1], "assistant", f"history.{number}.1"),
        ]
    return messages


# ── Preference pairs ─────────────────────────────────────────────────────────────────────────────────────────────────


def _pair(asked: str) -> Callable[[Values], Values]:
    def convert(values: Values) -> Values:
        prompt = with_system(values, prompt_of(values, asked))
        sides = {side: _after(prompt, side_of(values[side], side), side) for side in ("chosen", "rejected")}
        return {"prompt": prompt} | sides

    return convert


def _after(prompt: list[Any], side: list[Any], name: str) -> list[Any]:
    """What a side says after the prompt, which it may repeat, with or without its system message."""
    if len(side) < 2 or role_of(side[0]) == "assistant":
        return side
    bare = prompt[1:] if role_of(prompt[0] if prompt else None) == "system" else prompt
    for repeated in (prompt, bare):
        if side[: len(repeated)] == repeated:
            return side[len(repeated) :]
    raise RowFault("prompt-mismatch", f"{name} begins with another prompt than the row's own")


def _implicit_pair(values: Values) -> Values:
    """The prompt is what both sides begin with. Without one the row is given back as it is: it misses its prompt."""
    given = {side: values[side] for side in ("chosen", "rejected")}
    if not all(isinstance(value, list) or is_dialogue(value) for value in given.values()):
        return given
    chosen, rejected = (side_of(value, side) for side, value in given.items())
    if len(chosen) == len(rejected) == 1:
        return given
    most = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(most) if chosen[n] != rejected[n]), max(most, 0))
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if len(chosen) != 1 or len(rejected) != 1 or not prompt:
        raise RowFault(
            "prompt-mismatch", f"chosen and rejected differ from message {shared + 1} on, before the last of both"
        )
    return {"prompt": with_system(values, prompt), "chosen": chosen, "rejected": rejected}


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────

_SYS = ("system",)
_TEXT = (*ABOUT, *_SYS)
FORMATS = (
    Format("messages", ("messages",), Conversation, _conversation("messages"), _SYS),
    Format("ShareGPT", ("conversations",), Conversation, _conversation("conversations"), _SYS),
    Format("prompt-completion", ("prompt", "completion"), Conversation, _turn("prompt", "completion"), _TEXT),
    Format("prompt-response", ("prompt", "response"), Conversation, _turn("prompt", "response"), _TEXT),
    Format("Alpaca", ("instruction", "output"), Conversation, _turn("instruction", "output"), (*_TEXT, "history")),
    Format("Dolly", ("instruction", "response"), Conversation, _turn("instruction", "response"), _TEXT),
    Format("question-answer", ("question", "answer"), Conversation, _turn("question", "answer"), _TEXT),
    Format("question-response", ("question", "response"), Conversation, _turn("question", "response"), _TEXT),
    Format("query-response", ("query", "response"), Conversation, _turn("query", "response"), _TEXT),
    Format("preference pair", ("prompt", "chosen", "rejected"), PreferencePair, _pair("prompt"), _TEXT),
    Format("implicit pair, or Anthropic HH", ("chosen", "rejected"), PreferencePair, _implicit_pair, _SYS),
    Format("Orca pair", ("question", "chosen", "rejected"), PreferencePair, _pair("question"), _TEXT),
    Format("Alpaca pair", ("instruction", "chosen", "rejected"), PreferencePair, _pair("instruction"), _TEXT),
    Format("ShareGPT pair", ("conversations", "chosen", "rejected"), PreferencePair, _pair("conversations"), _SYS),
    Format("open question", ("prompt", "key_points"), Question, lambda v: {k: v[k] for k in ("prompt", "key_points")}),
    Format(
        "multiple choice",
        ("question", "choices", "answer"),
        MultipleChoice,
        lambda v: {k: v[k] for k in ("question", "choices", "answer")},
    ),
)
FIELDS = frozenset(field for known in FORMATS for field in (*known.fields, *known.optional))
_SHAPES = "; ".join(known.shape for known in FORMATS)
_BY_FIELDS = [(frozenset(known.fields), known) for known in FORMATS]
