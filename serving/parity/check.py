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

from collections.abc import Sequence
from contextlib import ExitStack

from pipeline.data.rows import Conversation
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.stage import Job, Source
from serving.backends import BACKENDS
from serving.endpoint import Endpoint, own_server
from serving.parity.compared import Compared
from serving.parity.plain import compare_plain
from serving.parity.probes import held_out, make_probes
from serving.parity.served import compare, said_precision
from serving.serve import model_name, servable


def check_parity(
    job: Job, backends: Sequence[str] = (), endpoint: str | None = None, precision: str | None = None
) -> tuple[list[Compared], dict[str, str]]:
    """Every way to run the job's model, plain transformers first; and the backends left out, with the reason.

    `precision`: that they compute in; None: as the weights are stored, or as a server says of itself.

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
    said = said_precision(server) if server and not precision else None
    reference, plain = compare_plain(job, source, base, chat, probes, {*computes_in.values(), precision, said})
    found, left_out = [plain], {}
    if server:
        if said and said != reference.stored:
            say(f"{server.root} says that it computes in {said}")
        found.append(compare(server, server.root, chat, probes, reference, precision or reference.believed(said)))
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
