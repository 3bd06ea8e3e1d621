"""Plain transformers: the reference that the others are compared with, and how it compares with the training template."""

from typing import Any

from pipeline.chat import Chat
from pipeline.model import Base
from pipeline.progress import say
from pipeline.stage import Job, Source
from serving.endpoint import as_json
from serving.parity.compared import Compared
from serving.parity.probes import ANSWER_TOKENS, NEVER_ENDS, Probe, Reference, Scores, make_reference, score
from serving.serve import load_source

PLAIN = "transformers, plain"


def compare_plain(
    job: Job, source: Source, base: Base, chat: Chat, probes: list[Probe], precisions: set[str | None]
) -> tuple[Reference, Compared]:
    """What others are compared with, and how plain transformers compares with the training template."""
    model = load_source(source, base)
    found, scores = compare_template(model, source, base, chat, probes)
    stored = str(model.dtype).removeprefix("torch.")
    del model
    reference = make_reference(scores, stored, source, base, chat, probes, precisions)
    found.bound = reference.bound(None)
    found.judge(scores.differences(reference.exact), stored)
    say(
        f"training moved these log-probs by {reference.moved.mean:.2g} nats on average: "
        + ("a server of the base would be seen" if reference.sees_the_base else "TOO LITTLE to tell from the base")
    )
    return reference, found


def compare_template(
    model: Any, source: Source, base: Base, chat: Chat, probes: list[Probe]
) -> tuple[Compared, Scores]:
    """transformers' own way from messages to tokens and to the end of an answer; log-probs are the model's own."""
    from transformers import AutoTokenizer

    found = Compared(PLAIN)
    tokenizer = AutoTokenizer.from_pretrained(source.output, trust_remote_code=base.trust_remote_code)  # anew
    for probe in probes:
        turns = as_json(probe.messages)
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        found.saw_ids(chat, probe, ids)
    scores = score(model, chat, probes, "log-probs as stored")
    _stop(found, model, chat, scores)
    return found, scores


def _stop(found: Compared, model: Any, chat: Chat, scores: Scores) -> None:
    """`generate()`, as what lies beside the model configures it."""
    import torch

    if scores.ending is None:
        return found.lacks("stop", NEVER_ENDS)
    prompt = torch.tensor([scores.ending[1]], device=model.device)
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        pad_token_id=chat.tokenizer.pad_token_id,
    )[0, prompt.shape[1] :].tolist()
    return found.saw("stop", answer == [chat.end_of_turn_id], f"generate() goes on after {chat.end_of_turn}")
