"""`aletheia config explain`: every effective value, where it came from, and what follows from them together."""

import sys
from collections.abc import Iterator
from typing import Any

from aletheia.output import print_json, print_table
from pipeline.errors import AletheiaError
from pipeline.profile import settings
from pipeline.stage import Job
from pipeline.training_data import PARTS, TrainingRows, read


def explain(job: Job, as_json: bool) -> None:
    rows = [(key, value, job.profile.origin(key), text) for key, value, text in settings(job.config)]
    follows = list(_follows(job))
    if as_json:
        values = {key: {"value": value, "from": origin} for key, value, origin, _ in rows}
        print_json({"values": values, "follows": dict(follows)})
        return
    print_table(("key", "value", "from", "meaning"), rows, sys.stdout)
    print()
    print_table(("what follows", ""), follows, sys.stdout)


def _follows(job: Job) -> Iterator[tuple[str, str]]:
    """A stage whose rows or base are not there is said to be unknown, and the rest is shown."""
    from pipeline.model import read_config
    from pipeline.quiet import quiet
    from pipeline.train.fit import Lengths
    from pipeline.train.footprint import Shape
    from pipeline.train.plan import orders
    from pipeline.train.preflight import predict, schedule

    quiet()
    shape, unknown = None, ""
    try:
        shape = Shape.of(read_config(job.workspace, job.profile), job.config.trust_remote_code)
        yield "parameters", f"{shape.parameters / 1e6:,.1f} M"
    except AletheiaError as error:
        unknown = f"unknown: {error}"
    for kind, stage in PARTS.items():
        rows: TrainingRows[Any]
        try:
            rows = read(job.workspace, job.config, kind, quiet=True)
        except AletheiaError as error:
            yield stage, f"unknown: {error}"
            continue
        yield f"{stage} rows", rows.text()
        config = getattr(job.config, f"{stage}_config")
        epoch = next(orders(config, rows.domains, job.config.seed))
        if shape is None:
            yield f"{stage} steps", schedule(config, len(epoch))
            continue
        try:
            found = predict(job, stage, Lengths.guessed(rows.train, rows.held_out, epoch), shape).rows()
        except AletheiaError as error:  # it does not fit
            found = [("memory", str(error))]
        yield from ((f"{stage} {label}", value) for label, value in found)
    if unknown:
        yield "memory", unknown
