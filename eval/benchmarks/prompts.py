"""The chat template in benchmarks: applied as in training, and what was really sent is looked at.

A prompt begins with as many BOS tokens as training's did: one, or none where the template has none. lm-eval tokenises text
that the template has already begun with a BOS, and depending on tokenizer and settings puts another before it; and cuts a
prompt that is too long on its left. Either way the model would be asked what it was never trained on, so it stops.
"""

import hashlib
from collections.abc import Callable, Sequence

from pipeline.chat import Chat
from pipeline.errors import StageFailed

Turns = list[dict[str, str]]


def renderer(chat: Chat) -> Callable[..., str]:
    """lm-eval's `apply_chat_template`: turns into text, with the answer's beginning where a task gives one."""
    takes_system = chat.contract.takes_system is not False

    def render(turns: Turns, add_generation_prompt: bool = True) -> str:
        text: str = chat.tokenizer.apply_chat_template(
            turns if takes_system else _without_system(turns),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    return render


def _without_system(turns: Turns) -> Turns:
    """A task's description before the first question, where the template has no place for it."""
    if not turns or turns[0]["role"] != "system":
        return turns
    system, first, *rest = turns
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]


def check_start(ids: Sequence[int], chat: Chat) -> None:
    """Raises `StageFailed` where a sequence does not begin as training's did."""
    bos, wanted = chat.bos_id, chat.contract.bos_tokens
    if bos is None or wanted is None:
        return
    found = next((place for place, token in enumerate(ids) if token != bos), len(ids))
    if found > wanted:
        raise StageFailed(
            f"a benchmark's prompt begins with {found} BOS tokens, and training's with {wanted}",
            remedy="a template, or a task, that does not write its own",
        )
    if found < wanted:
        raise StageFailed(
            "a benchmark's prompt does not begin with the BOS token: it was cut, as it is longer than the model takes",
            remedy="eval_config.tasks without it, or fewer examples in it",
        )


def template_hash(chat: Chat) -> str:
    return sha256(str(chat.tokenizer.chat_template))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
