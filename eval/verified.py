"""Before anything is said of the model: that its prompts are training's, and that who answers for it is this very model."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat
from pipeline.data.rows import Conversation
from pipeline.errors import StageFailed
from pipeline.model import Base
from pipeline.progress import say
from pipeline.stage import Job, Source
from serving.endpoint import Endpoint
from serving.parity.plain import compare_template
from serving.parity.probes import Probe, Scores, held_out, make_probes, make_reference
from serving.parity.served import compare, said_precision
from serving.serve import model_name


@dataclass
class Verified:
    """`facts` are for the record, and grow with what was compared (`serving/parity/`)."""

    job: Job
    source: Source
    base: Base
    chat: Chat
    facts: dict[str, Any] = field(default_factory=dict)
    _found: tuple[list[Probe], Scores, str] | None = None  # of the model in process, and the precision it is stored in

    def model(self, model: Any) -> None:
        """transformers' own way from messages to tokens, against training's. A difference is noted aloud."""
        probes = make_probes(self.chat, held_out(self.job, self.source, Conversation))
        found, scores = compare_template(model, self.source, self.base, self.chat, probes)
        self.facts |= {"prompts": len(probes), "in_process": found.as_record()}
        if found.problem:
            say(f"note: parity: {found.problem[0]}; try {found.problem[1]}")
        self._found = probes, scores, str(model.dtype).removeprefix("torch.")

    def server(self, endpoint: Endpoint) -> None:
        """After `model`, which is no longer in memory. Raises `StageFailed` when it is another model that answers there."""
        assert self._found
        probes, scores, stored = self._found
        precision = said_precision(endpoint)
        reference = make_reference(scores, stored, self.source, self.base, self.chat, probes, {precision})
        served = compare(endpoint, endpoint.root, self.chat, probes, reference, reference.believed(precision))
        self.facts["endpoint"] = served.as_record()
        if served.problem:
            what, remedy = served.problem
            raise StageFailed(f"{endpoint.root} is not {model_name(self.job, self.source)}: {what}", remedy=remedy)
        say(f"{endpoint.root}: {served.verdict}")
