"""Messages from what a row holds: texts, dialogues, and lists of messages under any of the known names.

    messages_of([{"from": "human", "value": "…"}], "conversations")     # [{"role": "user", "content": "…"}]

Each has a role and a content afterwards. What is no message raises `RowFault`, with the field as it stands in the row.
"""

import json
import re
from typing import Any

from pipeline.data.raw import called
from pipeline.data.rows import RowFault

Values = dict[str, Any]
ABOUT = ("input", "context")  # what a question is about
SYSTEM = ("system", "system_prompt")  # the second is OpenOrca's
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_FROM = _ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_OF_TOOLS = ("tool", "function", "function_call", "tool_call", "observation", "ipython")
_REFUSED = {
    "weight": "every answer weighs 1",
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), "calls of tools are not trained"),
}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # Anthropic's HH


def prompt_of(values: Values, field: str) -> list[Any]:
    """What is asked: messages, or a text with what it is about."""
    value, given = values[field], [name for name in ABOUT if values.get(name)]
    if not given:
        return _asked(value, field)
    if len(given) > 1:
        raise RowFault("unknown-shape", f"has both {' and '.join(f'`{name}`' for name in given)}", "one of them")
    about = values[given[0]]
    if not isinstance(value, str) or not isinstance(about, str):
        raise RowFault("wrong-type", f"{field} and {given[0]}: are not both texts")
    return [message_of("\n\n".join(text for text in (value, about) if text.strip()), "user", field)]


def _asked(value: Any, field: str) -> list[Any]:
    if is_dialogue(value):
        messages = _dialogue(value, field)
        return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
    return [message_of(value, "user", field)] if isinstance(value, str) else _listed_messages(value, field)


def side_of(value: Any, field: str) -> list[Any]:
    """An answer, or a conversation that ends in one."""
    if is_dialogue(value):
        return _dialogue(value, field)
    return [message_of(value, "assistant", field)] if isinstance(value, str) else _listed_messages(value, field)


def message_of(value: Any, role: str, field: str) -> dict[str, str]:
    """One of a text."""
    if not isinstance(value, str):
        raise RowFault("wrong-type", f"{field}: is {called(value)}, not a text")
    if not value.strip():
        raise RowFault("empty-field", f"{field}: is empty")
    return {"role": role, "content": value}


def is_dialogue(value: Any) -> bool:
    """Whether it is a text in Anthropic's form."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _dialogue(text: str, field: str) -> list[Any]:
    """`\\n\\nHuman: … \\n\\nAssistant: …` as messages, without the space around them."""
    _, *pieces = _SPEAKER.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": speakers[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _listed_messages(value: Any, field: str) -> list[Any]:
    if not isinstance(value, dict | list):
        raise RowFault("wrong-type", f"{field}: is {called(value)}, neither a text nor messages")
    return messages_of([value] if isinstance(value, dict) else value, field)


def messages_of(value: list[Any], field: str) -> list[Any]:
    """A list of messages, each with a role and a content alone."""
    if all(_is_plain(message) for message in value):
        return value
    return [_normalised(message, f"{field}.{number}") for number, message in enumerate(value)]


def _is_plain(message: Any) -> bool:
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ("user", "assistant", "system")
        and type(content := message.get("content")) is str
        and content != ""
        and not content.isspace()
    )


def _normalised(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowFault("wrong-type", f"{where}: is {called(message)}, not a message")
    shown = {"role": "role", "content": "content"}
    if message.get("role") is None and "from" in message:  # ShareGPT's names
        names = {"from": "role", "value": "content"}
        shown |= {names[key]: key for key in names.keys() & message.keys()}
        message = {names.get(key, key): value for key, value in message.items() if key != "role"}
        message["role"] = _FROM.get(str(message["role"]), message["role"])
    result: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role":
            if value in _OF_TOOLS:
                raise RowFault("unknown-shape", f"{where}.{shown[key]}: {value}: calls of tools are not trained")
            result[key] = _ROLES.get(str(value), value)
        elif key == "content":
            result[key] = _joined(value, f"{where}.{shown[key]}") if isinstance(value, list) else value
        elif key not in ("name", "id") and value not in EMPTY and not (key == "weight" and value == 1):
            raise RowFault(
                "unknown-shape", f"{where}.{key}: {_REFUSED.get(key, 'is nothing that a message is trained with')}"
            )
    for key, name in shown.items():
        if key not in result:
            raise RowFault("missing-field", f"{where}.{name}: is missing")
    if result["role"] not in ("system", "user", "assistant"):
        what = f"is {json.dumps(result['role'], ensure_ascii=False)[:40]}, none of system, user and assistant"
        raise RowFault("wrong-type", f"{where}.{shown['role']}: {what}")
    message_of(result["content"], "", f"{where}.{shown['content']}")
    return result


def _joined(parts: list[Any], where: str) -> str:
    """OpenAI's parts of a content."""
    texts: list[str] = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else called(part)
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise RowFault("unknown-shape", f"{where}.{number}: is a part of type {kind}: only text is trained")
        texts.append(text)
    return "\n".join(texts)


def with_system(values: Values, messages: list[Any]) -> list[Any]:
    """A system prompt that stands in a field of its own goes first."""
    given = [field for field in SYSTEM if values.get(field)]
    if not given:
        return messages
    field = given[0]
    if len({str(values[name]) for name in given}) > 1:
        raise RowFault("role-order", "has two system prompts, `system` and `system_prompt`", "one of them")
    first = message_of(values[field], "system", field)
    if messages and role_of(messages[0]) == "system":
        if messages[0] == first:
            return messages
        raise RowFault("role-order", f"has a `{field}`, and another one as its first message")
    return [first, *messages]


def role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
