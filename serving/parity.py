"""Parity: the same prompts through the training template, plain transformers and each backend must come to the same.

    aletheia check parity --profile tiny
    aletheia check parity --profile tiny --endpoint http://127.0.0.1:8000/v1

Of each way to run the model four things are asked. Token ids: of a chat, as `/tokenize` and the usage of its answer tell
them. One BOS. Stop: where the model ends its turn the answer ends, empty; and no answer holds a special token.
Log-probs: of given tokens (echo), and of the first token of a chat's answer, which a chat rendered otherwise than it is
tokenised gives away.

Log-probs are compared with plain transformers one precision wider than the weights are stored in. How far the stored
precision itself is from that, at worst and on average over the same tokens, is what rounding does; another
implementation may be `probes.FACTOR` times as far (docs/parity.md). What an endpoint cannot be asked is "not compared",
never passed. Does not check: what is drawn at a temperature, speed (`aletheia eval latency`), the merge (its receipt does).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat
from pipeline.data.rows import Conversation
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.progress import say, track
from pipeline.stage import Job, Source
from serving.backends import BACKENDS
from serving.endpoint import Endpoint, Lacks, as_json, own_server
from serving.probes import Probe, Reference, Scores, Spread, held_out, make_probes, make_reference, score
from serving.serve import load_source, model_name, servable

PLAIN = "transformers, plain"
ANSWER_TOKENS = 8  # generated for a chat
NEVER_ENDS = "the model ends its turn nowhere in these texts"

REMEDIES = {
    "token ids": "the chat template that lies beside the model, as `aletheia serve` uses it",
    "BOS": "a server that adds nothing to what the chat template gives",
    "stop": "a generation_config.json beside the model whose eos_token_id is the end-of-turn",
    "log-probs": "serving this very model, its adapter applied, or --dtype where it computes in another precision",
}
WORDS = {True: "equal", False: "DIFFERS", None: "not compared"}


@dataclass
class Compared:
    """One way to run the model, by check: token ids, BOS, stop, log-probs."""

    backend: str
    bound: Spread | None = None  # of log-probs
    spread: Spread | None = None
    held: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)  # the first of each check
    not_compared: dict[str, str] = field(default_factory=dict)  # why

    def saw(self, check: str, ok: bool, what: str) -> None:
        if ok:
            self.held.add(check)
        else:
            self.problems.setdefault(check, what)

    def lacks(self, check: str, why: object) -> None:
        self.not_compared.setdefault(check, str(why))

    def judge(self, differences: Sequence[float], precision: str) -> None:
        """Of all log-probs. What is told of them may be too little to pass, and enough to fail."""
        if not differences:
            return
        spread, bound = Spread.of(differences), self.bound
        self.spread = spread
        if bound is None:
            self.lacks("log-probs", f"nothing tells here what rounding to {precision} does to this model")
        else:
            what = (
                f"log-probs differ by {spread.worst:.2g} nats at worst, {spread.mean:.2g} on average; "
                f"rounding in {precision} allows {bound.worst:.2g} and {bound.mean:.2g}"
            )
            self.saw("log-probs", spread.within(bound), what)

    def __getitem__(self, check: str) -> bool | None:
        """Whether every observation held; None where one could not be made."""
        if check in self.problems:
            return False
        return None if check in self.not_compared or check not in self.held else True

    @property
    def verdict(self) -> str:
        found = {self[check] for check in REMEDIES}
        if False in found:
            return "DIFFERS"
        return "equal" if found == {True} else "equal where compared" if True in found else "not compared"

    @property
    def problem(self) -> tuple[str, str] | None:
        """What is wrong and what to do, of the first check that failed: the later ones follow from it."""
        return next(((self.problems[check], REMEDIES[check]) for check in REMEDIES if check in self.problems), None)

    def as_record(self) -> dict[str, Any]:
        """Its few figures; differences in nats."""
        spreads = {"log_prob_difference": self.spread, "log_prob_bound": self.bound if self.spread else None}
        return {
            "backend": self.backend,
            "verdict": self.verdict,
            **{check.lower().replace(" ", "_").replace("-", "_"): WORDS[self[check]] for check in REMEDIES},
            **{name: {k: float(f"{v:.3g}") for k, v in vars(s).items()} for name, s in spreads.items() if s},
            **({"problems": self.problems} if self.problems else {}),
            **({"not_compared": self.not_compared} if self.not_compared else {}),
        }


def check_parity(
    job: Job, backends: Sequence[str] = (), endpoint: str | None = None, precision: str | None = None
) -> tuple[list[Compared], dict[str, str]]:
    """Every way to run the job's model, plain transformers first; and the backends left out, with the reason.

    `backends`: none named means all that can be started here. With an `endpoint`, already running, that alone is
    compared. Raises `UserError` when a backend that was named cannot be started.
    """
    known = [name for name in BACKENDS if name != "auto"]
    if unknown := next((name for name in backends if name not in known), None):
        raise UserError(f"there is no backend `{unknown}`", where="--backend", remedy=" or ".join(known))
    source, base, chat = servable(job)
    server = Endpoint(endpoint, names(job, source)) if endpoint else None
    probes = make_probes(chat, _rows(job, source))
    asked = [] if server else backends or known
    computes_in = {name: precision or _precision(job, name) for name in asked}
    reference, plain = compare_plain(job, source, base, chat, probes, {*computes_in.values(), precision})
    found, left_out = [plain], {}
    if server:
        found.append(compare(server, server.root, chat, probes, reference, precision))
    for name, its_precision in computes_in.items():
        with ExitStack() as stack:
            try:
                address = stack.enter_context(own_server(job, source.file.id, name))
            except UserError as error:
                if backends:
                    raise
                left_out[name] = str(error)
                continue
            found.append(compare(Endpoint(address, names(job, source)), name, chat, probes, reference, its_precision))
    return found, left_out


def _rows(job: Job, source: Source) -> list[Conversation]:
    try:
        return held_out(job, source, Conversation)
    except UserError as error:
        say(f"note: {error}")
        return []


def _precision(job: Job, backend: str) -> str | None:
    """In which a backend computes, where it is not that of the weights: llama.cpp serves the first format exported."""
    first = job.config.export_config.formats[0]
    return {"f16": "float16"}.get(first, first) if backend == "llamacpp" else None


def names(job: Job, source: Source) -> tuple[str, ...]:
    """That a server may have given the model."""
    return model_name(job, source), source.file.id


# ── plain transformers ───────────────────────────────────────────────────────────────────────────────────────────────


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
        _compare_ids(found, chat, probe, ids)
    scores = score(model, chat, probes, "log-probs as stored")
    _plain_stop(found, model, chat, scores)
    return found, scores


def _plain_stop(found: Compared, model: Any, chat: Chat, scores: Scores) -> None:
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


# ── a server ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def compare(
    endpoint: Endpoint, name: str, chat: Chat, probes: list[Probe], reference: Reference, precision: str | None
) -> Compared:
    """What the server makes of the probes. Raises `StageFailed` when it fails, `UserError` when it is gone."""
    found = Compared(name, reference.bound(precision))
    differences: list[float] = []
    exact = zip(reference.exact.first, reference.exact.tokens, strict=True)
    for probe, (first, tokens) in zip(track(probes, f"{name}: parity", "prompt"), exact, strict=True):
        _served_ids(found, endpoint, chat, probe)
        differences += _chat(found, endpoint, chat, probe, first)
        differences += _forced(found, endpoint, probe, tokens)
    _served_stop(found, endpoint, reference.exact)
    found.judge(differences, precision or reference.stored)
    return found


def _compare_ids(found: Compared, chat: Chat, probe: Probe, served: list[int]) -> None:
    trained = probe.prompt
    same = zip(served, trained, strict=False)
    apart = next((i for i, (a, b) in enumerate(same) if a != b), min(len(served), len(trained)))
    there, here = (repr(chat.tokenizer.decode(ids[apart : apart + 1])) for ids in (served, trained))
    what = f"`{probe.name}` is {len(served)} tokens, in training it was {len(trained)}; "
    found.saw("token ids", served == trained, f"{what}token {apart} is {there}, not {here}")
    if chat.bos_id is not None:
        count, expected = served.count(chat.bos_id), trained.count(chat.bos_id)
        found.saw("BOS", count == expected, f"`{probe.name}` has {count} BOS tokens, in training it had {expected}")
    else:
        found.saw("BOS", True, "")  # there is none to lose or double


def _served_ids(found: Compared, endpoint: Endpoint, chat: Chat, probe: Probe) -> None:
    try:
        served = endpoint.post("/tokenize", messages=as_json(probe.messages)).get("tokens")
        if not served:
            raise Lacks("takes no messages")
    except Lacks as why:
        for check in ("token ids", "BOS"):
            found.lacks(check, f"/tokenize: {why}")
    else:
        _compare_ids(found, chat, probe, served)


def _chat(found: Compared, endpoint: Endpoint, chat: Chat, probe: Probe, first: float) -> Iterator[float]:
    """A short greedy answer; yields how far the log-prob of its first token is off, where the server tells it."""
    asked: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
    try:
        try:
            answer = endpoint.chat(probe.messages, **asked, logprobs=True)
        except Lacks:
            answer = endpoint.chat(probe.messages, **asked)
    except Lacks as why:
        return found.lacks("stop", f"/v1/chat/completions: {why}")
    choice, count = answer["choices"][0], (answer.get("usage") or {}).get("prompt_tokens", len(probe.prompt))
    if count != len(probe.prompt):
        what = f"a chat of `{probe.name}` is answered from {count} tokens, in training it was {len(probe.prompt)}"
        found.saw("token ids", False, what)
    if special := chat.reserved(choice["message"]["content"] or ""):
        found.saw("stop", False, f"the answer to `{probe.name}` holds {special}")
    if told := (choice.get("logprobs") or {}).get("content"):
        yield abs(told[0]["logprob"] - first)


def _forced(found: Compared, endpoint: Endpoint, probe: Probe, exact: list[float]) -> list[float]:
    """Differences of the log-probs of given tokens, asked for as lm-eval does; what is told last is a generated one's."""
    asked: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    try:
        answer = endpoint.post("/v1/completions", prompt=probe.forced, **asked)
        told = ((answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or [])[1 : len(probe.forced)]
        if len(told) < len(exact) or None in told:
            raise Lacks("echo tells no log-prob of every token")
    except Lacks as why:
        found.lacks("log-probs", f"/v1/completions: {why}")
        return []
    if (answer.get("usage") or {}).get("prompt_tokens", len(probe.forced)) != len(probe.forced):
        found.saw("BOS", False, "tokens are added to a prompt that is given as token ids")
    return [abs(a - b) for a, b in zip(told, exact, strict=True)]


def _served_stop(found: Compared, endpoint: Endpoint, exact: Scores) -> None:
    if exact.ending is None:
        return found.lacks("stop", NEVER_ENDS)
    try:
        answer = endpoint.post("/v1/completions", prompt=exact.ending[1], max_tokens=ANSWER_TOKENS, temperature=0)
    except Lacks as why:
        return found.lacks("stop", f"/v1/completions: {why}")
    choice = answer["choices"][0]
    what = f"where the model ends its turn the server goes on: {choice['text']!r} ({choice['finish_reason']})"
    return found.saw("stop", choice["finish_reason"] == "stop" and choice["text"] == "", what)
