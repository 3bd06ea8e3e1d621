"""Who is compared: the model that is judged, its base, and whoever `eval_config.also` names.

also: [sft]                        what DPO began from, or `dpo`: of the judged model's own lineage
also: [EXP-2026-11-20-001]         the model of another record
also: ["http://host:8000/v1#name"] whatever answers there, in the win-rate alone
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval.names import BASE, MODEL, TAKEN
from pipeline.chat import Chat
from pipeline.errors import UserError
from pipeline.model import Base
from pipeline.progress import say
from pipeline.records import find
from pipeline.records.schema import Input
from pipeline.stage import Job, Source
from serving.endpoint import Endpoint
from serving.parity.check import names
from serving.serve import load_source, model_name, servable


@dataclass(frozen=True)
class Contestant:
    """`name` is its key in the record and beside it, `label` how people know it."""

    name: str
    label: str
    chat: Chat
    load: Callable[[], Any]  # None of a server's model
    endpoint: Endpoint | None = None
    input: Input | None = None  # of its record


def the_base(base: Base, chat: Chat) -> Contestant:
    return Contestant(BASE, base.name, chat, base.load)


def the_model(job: Job, source: Source, base: Base, chat: Chat) -> list[Contestant]:
    """In process, and where a server answers for it (`eval_config.endpoint`) that server too."""
    label = model_name(job, source)
    here = Contestant(MODEL, label, chat, partial(load_source, source, base), input=source.input)
    url = job.config.eval_config.endpoint
    if url is None:
        return [here]
    return [here, Contestant(MODEL, label, chat, _nothing, Endpoint(url, names(job, source)))]


def others(job: Job, source: Source, base: Base, chat: Chat) -> list[Contestant]:
    """Raises `UserError` where there is no such model, or it was trained with another chat template."""
    found: list[Contestant] = []
    for wanted in job.config.eval_config.also:
        other = _server(wanted, chat) if "://" in wanted else _record(job, wanted, source, base, chat)
        if other and other.name in (*TAKEN, *(known.name for known in found)):
            raise job.profile.error("eval_config.also", f"{other.name} is taken as a name", "each once")
        if other and other.input and other.input.id in [known.input.id for known in found if known.input]:
            raise job.profile.error("eval_config.also", f"{other.name} is {other.input.id}, named before", "each once")
        found += [other] if other else []
    return found


def _server(url: str, chat: Chat) -> Contestant:
    address, _, model = url.partition("#")
    endpoint = Endpoint(address, (model,) if model else ())
    if model and endpoint.model != model:
        raise UserError(f"serves no model called {model}", where=address, remedy=endpoint.model)
    name = re.sub(r"[^\w-]+", "-", endpoint.model).strip("-")  # one key of a dotted path: `others.qwen2-5.win_rate`
    return Contestant(name or "server", f"{endpoint.model} at {endpoint.root}", chat, _nothing, endpoint)


def _record(job: Job, wanted: str, judged: Source, base: Base, chat: Chat) -> Contestant | None:
    """None, aloud, where it is the judged model itself."""
    if wanted.startswith("EXP-"):
        source, _, its_chat = servable(job, wanted)
    else:
        ancestor = find.ancestor(job.workspace, judged.file, judged.facts, wanted)
        if ancestor is None:
            raise job.profile.error("eval_config.also", f"the model's lineage has no {wanted}", "sft, dpo or an EXP-…")
        source, _, its_chat = servable(job, ancestor[0].id)
    if source.file.id == judged.file.id:
        say(f"also: {wanted} is the judged model itself, and is left out")
        return None
    if its_chat.contract != chat.contract:
        raise UserError(f"its chat template is not that of {judged.file.id}", where=source.file.id)
    label = f"{model_name(job, source)} ({source.file.id})"
    return Contestant(wanted, label, its_chat, partial(load_source, source, base), input=source.input)


def _nothing() -> None:
    """A server has it in memory."""
