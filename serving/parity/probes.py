"""The prompts that parity is checked on, and what plain transformers makes of them.

Real held-out rows with the answers they were given, and cases that servers get wrong. Each is a prompt, which every way
of running the model must turn into the same tokens, and given tokens after it, whose log-probs are compared.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.chat import Chat
from pipeline.data.rows import AnyRow, Conversation, Message
from pipeline.data.split import sample
from pipeline.errors import UserError
from pipeline.merging.shards import size
from pipeline.model import Base
from pipeline.progress import say, track
from pipeline.records import find
from pipeline.stage import Job, Source
from pipeline.training_data import PARTS, recorded
from serving.serve import load_source

ROWS = 8  # held-out rows compared, the same ones every time
ANSWER_TOKENS = 8  # generated for a chat
LONGEST = 1024  # tokens: a longer row is left out, so that the check stays short
FACTOR = (
    3.0  # another sound implementation may be this many times as far from the exact log-probs as the stored precision
)
PRECISIONS = ("float32", "bfloat16", "float16")
FLOOR = 1e-4  # nats: below this no difference matters, and some servers round what they tell
NEVER_ENDS = "the model ends its turn nowhere in these texts"

_SNIPPET = "```python\ndef f(x):\n\treturn  x + 1  # twice?\n```"
HARD: dict[str, list[tuple[str, str]]] = {
    "a system prompt": [("system", "You answer in one sentence.\n"), ("user", "What is a mutex?")],
    "several turns": [("user", "Name a lock."), ("assistant", "A mutex."), ("user", "And another?")],
    "code fences": [("user", f"Why does this fail?\n\n{_SNIPPET}\n")],
    "unicode": [("user", "Grüße, 你好, नमस्ते, e\u0301 and ﬁ \u200b 👩\u200d💻")],
    "spaces around": [("user", "   three before, two after  ")],
    "blank lines": [("user", "\n\n\tan indented line\n\n\n")],
    "the template's own words": [("user", "### Response:\nYes.\n### Instruction:\nAnd now?")],
    "one letter": [("user", "a")],
}


@dataclass(frozen=True)
class Probe:
    """`prompt`: the training template's token ids, ready for an answer. `forced`: those and an answer's."""

    name: str
    messages: list[Message]
    prompt: list[int]
    forced: list[int]


@dataclass(frozen=True)
class Spread:
    """Differences of log-probs, in nats."""

    worst: float
    mean: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Spread":
        wrong = any(map(math.isnan, differences))  # which max() may pass over
        return cls(math.nan if wrong else max(differences), math.fsum(differences) / len(differences))

    def bound(self) -> "Spread":
        return Spread(max(FACTOR * self.worst, FLOOR), max(FACTOR * self.mean, FLOOR))

    def within(self, bound: "Spread") -> bool:
        return self.worst <= bound.worst and self.mean <= bound.mean  # NaN is not


@dataclass(frozen=True)
class Scores:
    """What one model makes of the probes, in their order."""

    tokens: list[list[float]]  # log-prob of each token of `forced` but the first, which nothing precedes
    first: list[float]  # of the likeliest first token of an answer to `prompt`
    ending: tuple[float, list[int]] | None  # where the model is surest to end its turn: its log-prob, the tokens before

    def differences(self, other: "Scores") -> list[float]:
        both = zip([*self.tokens, self.first], [*other.tokens, other.first], strict=True)
        return [abs(a - b) for ours, theirs in both for a, b in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Reference:
    """The model itself, by plain transformers.

    `exact` is computed one precision wider than the weights are stored in, where that fits in memory; `noise` is how far
    a precision is from it, over the same tokens.
    """

    exact: Scores
    stored: str  # precision of the weights
    noise: dict[str, Spread]
    moved: Spread  # by training: how far the base is from `exact`

    def bound(self, precision: str | None) -> Spread | None:
        """None where it is not known."""
        noise = self.noise.get(precision or self.stored)
        return noise.bound() if noise else None

    def believed(self, said: str | None) -> str | None:
        """A server's word for its precision; None where rounding to that would hide a server of the base."""
        bound = self.bound(said)
        return None if bound and self.moved.within(bound) else said

    @property
    def sees_the_base(self) -> bool:
        """Whether a server that leaves the training out, or the adapter, would be beyond the bound."""
        bound = self.bound(None)
        return bound is not None and not self.moved.within(bound)


def held_out(job: Job, source: Source, kind: type[AnyRow]) -> list[AnyRow]:
    """The very rows that the training of this model held out. Raises `UserError` when they are nowhere any more."""
    ancestor = find.ancestor(job.workspace, source.file, source.facts, PARTS[kind])
    if ancestor is None:
        return []  # an SFT-only model has seen no pairs, and pairs are then not its measure
    return recorded(job.workspace, job.config, *ancestor, "held_out", kind)


def make_probes(chat: Chat, rows: list[Conversation]) -> list[Probe]:
    """What the template does not take is left out, and rows that are too long."""
    found = [_probe(chat, row.id, row.messages[:-1], row.messages[-1]) for row in sample(rows, 10 * ROWS)]
    fitting = {probe.name: probe for probe in found if probe and len(probe.forced) <= LONGEST}
    real = [fitting[row.id] for row in sample([row for row in rows if row.id in fitting], ROWS)]
    if not real:
        say("note: no held-out row to compare on: the hard cases alone")
    answer = Message(role="assistant", content=f"{_SNIPPET}\nYes.")
    hard = [_probe(chat, name, [_message(*turn) for turn in turns], answer) for name, turns in HARD.items()]
    return real + [probe for probe in hard if probe]


def _probe(chat: Chat, name: str, messages: list[Message], answer: Message) -> Probe | None:
    if chat.reserved_in(messages):
        return None  # servers refuse it
    try:
        prompt = chat.prompt(messages)
    except UserError:
        return None
    try:
        forced = chat.conversation([*messages, answer]).ids
    except UserError:  # as where earlier turns are rewritten: any tokens will do
        forced = prompt + chat.tokenizer(answer.content, add_special_tokens=False)["input_ids"]
    return Probe(name, messages, prompt, forced)


def _message(role: str, content: str) -> Message:
    return Message.model_validate({"role": role, "content": content})


def make_reference(
    scores: Scores,
    stored: str,
    source: Source,
    base: Base,
    chat: Chat,
    probes: list[Probe],
    precisions: set[str | None],
) -> Reference:
    """`scores`: what the model as it is stored makes of the probes. One model at a time is in memory, its own.

    `precisions`: further ones whose rounding is measured, of those that torch computes in.
    """
    wide = "float64" if stored == "float32" else "float32"
    exact, noise = scores, {}
    if device := _room(base, stored, wide):
        exact = _score_in(wide, source, replace(base, device=device), chat, probes)
        noise[stored] = Spread.of(scores.differences(exact))
        for other in {*PRECISIONS} & precisions - {stored}:
            noise[other] = Spread.of(_score_in(other, source, base, chat, probes).differences(exact))
    moved = Spread.of(score(base.load(), chat, probes, "log-probs of the base").differences(exact))
    return Reference(exact, stored, noise, moved)


def score(model: Any, chat: Chat, probes: list[Probe], what: str) -> Scores:
    """One forward pass a probe; log-softmax in float64."""
    import torch

    tokens, first, ending = [], [], None
    with torch.inference_mode():
        for probe in track(probes, what, "prompt"):
            ids = torch.tensor(probe.forced)
            logits = model(input_ids=ids[None].to(model.device)).logits[0].double().cpu()
            scores = torch.log_softmax(logits, -1)
            tokens.append(scores[:-1].gather(1, ids[1:, None])[:, 0].tolist())
            likeliest, which = scores.max(-1)
            first.append(float(likeliest[len(probe.prompt) - 1]))
            for place in range(len(probe.prompt) - 1, len(probe.forced)):
                sure = float(likeliest[place])
                if which[place] == chat.end_of_turn_id and (ending is None or sure > ending[0]):
                    ending = sure, probe.forced[: place + 1]
    return Scores(tokens, first, ending)


def _score_in(precision: str, source: Source, base: Base, chat: Chat, probes: list[Probe]) -> Scores:
    import torch

    model = load_source(source, replace(base, dtype=precision))
    model = model.to(getattr(torch, precision))  # an adapter comes in float32, whatever its base is in
    return score(model, chat, probes, f"log-probs in {precision}")


def _room(base: Base, stored: str, precision: str) -> str | None:
    """Where the model fits in this precision: its device, else the CPU; None: nowhere."""
    import psutil
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # nothing, where there is no GPU
    needed = 1.2 * size(base.folder) * getattr(torch, precision).itemsize / getattr(torch, stored).itemsize
    if base.device == "cuda" and torch.cuda.mem_get_info()[0] > needed:
        return "cuda"
    return "cpu" if psutil.virtual_memory().available > needed else None
