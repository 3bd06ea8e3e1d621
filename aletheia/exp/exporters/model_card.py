"""The README that a model carries on the hub: metadata for the hub, and what a reader must know before using it.

    aletheia exp export EXP-2026-11-21-006 --to model-card

For the record of an sft, dpo or merge. Writes `experiments/EXP-…/model-card.md`; into a folder given with --output,
`README.md`, as the hub wants it. The figures are those of the records in its lineage and of the evaluations made of it.
Nothing is asked of the hub. What only a person can say stands above the record's line: `license`, `language`,
`datasets` (on the hub), `intended_use`, `limitations`, `deployment`, `issues`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aletheia.exp.exporters.model import OUTPUT, Model, model_of
from aletheia.exp.exporters.page import label, place, render, write_page
from aletheia.exp.exporters.record import Finished, as_number, besides, finished, texts
from aletheia.exp.exporters.tables import changes, one_line, settings, values
from aletheia.exp.exporters.usage import remarks, snippet
from aletheia.exp.reading import number
from pipeline.errors import UserError
from pipeline.records.metrics import metrics
from pipeline.workspace import Workspace

TITLES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "merge": "Merge of the adapter into the base",
}
WRITTEN = ("intended_use", "out_of_scope", "limitations", "deployment", "issues", "conclusion")
LICENCES = {  # of bases that the shipped profiles name, from their own cards
    "deepseek-ai/deepseek-coder-7b-instruct-v1.5": {
        "license": "other",
        "license_name": "deepseek",
        "license_link": "https://huggingface.co/deepseek-ai/deepseek-coder-7b-instruct-v1.5/blob/main/LICENSE",
    }
}


def export_model_card(workspace: Workspace, exp: str, output: Path | None, force: bool) -> str:
    """The path of the card. Raises `UserError`."""
    record = finished(workspace, exp)
    facts, shown = record.facts, workspace.shown(record.file.path)
    if facts.stage not in OUTPUT:
        raise UserError(
            f"is a record of {facts.stage}, which makes no model", where=shown, remedy=_nearest_model(record)
        )
    if record.status != "complete":
        raise UserError(f"is {record.status}: there is no model to describe", where=shown)
    model = model_of(record)
    target = place(output, record.file.folder / "model-card.md", "README.md")
    return write_page(workspace, target, card(model), force, facts)


def card(model: Model) -> str:
    """Metadata and body, as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    record = model.record
    licence, licence_note = _licence(model)
    body = render(
        "model_card.md.jinja",
        id=record.id,
        name=model.name,
        what=_what(model),
        control=model.is_control,
        description=texts(record.person.get("description")),
        snippet=snippet(model),
        usage=list(remarks(model)),
        stages=[_stage(one) for one in model.made_by],
        measured=[_measured(one) for one in [*model.made_by, *model.judged_by] if any(changes(one.facts.results))],
        not_shown=list(_not_shown(model)),
        limits=list(_limits(model)),
        provenance=list(_provenance(model)),
        licence=licence_note,
    )
    text = f"---\n{_metadata(model, licence).to_yaml()}\n---\n\n{body}"
    return str(ModelCard(text)).rstrip() + "\n"


def _metadata(model: Model, licence: dict[str, str]) -> Any:
    from huggingface_hub import ModelCardData

    person = model.record.person
    relation = {"base_model_relation": "adapter" if model.is_adapter else "finetune"} if model.base_on_hub else {}
    return ModelCardData(
        base_model=model.base_on_hub,
        **relation,
        library_name="peft" if model.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["aletheia", "lora", *(one.facts.stage for one in model.made_by if one.facts.stage != "merge")],
        datasets=texts(person.get("datasets")) or None,
        language=texts(person.get("language")) or None,
        **licence,
        model_name=model.name,
        eval_results=list(_eval_results(model)) or None,
    )


def _eval_results(model: Model) -> Iterator[Any]:
    """Every figure that rests on counted rows, of this model; those of an earlier stage are another model's."""
    from huggingface_hub import EvalResult

    for record in [model.record, *model.judged_by]:
        results = record.facts.results
        benchmarks = results.get("benchmarks")
        for path, metric in metrics(results).items():
            if metric.n is None or path.endswith((".before", ".delta")):
                continue
            task = path.removeprefix("benchmarks.")
            entry = benchmarks.get(task) if isinstance(benchmarks, dict) and task != path else None
            interval = {"ci_low": metric.ci_low, "ci_high": metric.ci_high, "n": metric.n, "record": record.id}
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task if entry else "held-out",
                dataset_name=task if entry else f"held-out rows of {record.facts.profile}",
                metric_type=str(entry.get("metric", "score")) if isinstance(entry, dict) else path,
                metric_value=metric.value,
                metric_name=f"{path}, 95 % interval in args",
                metric_args={key: value for key, value in interval.items() if value is not None},
            )


def _licence(model: Model) -> tuple[dict[str, str], str]:
    """For the metadata, and for the reader."""
    own = {
        k: texts(model.record.person.get(k))[0]
        for k in ("license", "license_name", "license_link")
        if texts(model.record.person.get(k))
    }
    if "license" in own:
        return own, f"Licence: {own['license']}, as whoever trained it says."
    known = LICENCES.get(model.base_on_hub or "")
    if known:
        return known, f"Licence: that of the base, {known['license_name']} ({known['license_link']})."
    base = model.base.get("name", "the base")
    return (
        {},
        f"Licence: not stated. That of {base} applies and is not known here; license: … above the record's line states it.",
    )


def _what(model: Model) -> str:
    base = model.base.get("name", "a base that was not recorded")
    where = "" if model.base_on_hub else f" {base} is a local model and not on the hub."
    how = " and then ".join(TITLES[one.facts.stage].lower() for one in model.made_by if one.facts.stage != "merge")
    if model.is_adapter:
        return f"A LoRA adapter on {base}, made by {how or 'training'}.{where}"
    return f"{base} with a LoRA adapter merged into its weights; the adapter was made by {how or 'training'}.{where}"


def _stage(record: Finished) -> dict[str, Any]:
    facts = record.facts
    took = as_number(facts.resources.get("wall_seconds"))
    hardware = facts.environment.get("gpus") or facts.environment.get("cpu")
    extra = [("hardware", one_line(hardware)), ("seconds", "" if took is None else number(took))]
    # figures that have a before and an after stand below, with the intervals of their change
    single = [row for row in values(facts.results) if not _of_a_change(row[0], facts.results)]
    return {
        "title": f"{TITLES[facts.stage]} ({record.id})",
        "settings": [*settings(facts), *(row for row in extra if row[1])],
        "figures": single,
    }


def _measured(record: Finished) -> dict[str, Any]:
    facts = record.facts
    against = one_line(facts.results.get("against")) or ("its reference" if facts.stage == "dpo" else "the base")
    what = "Evaluation" if facts.stage == "eval" else TITLES[facts.stage]
    judged = [row for row in values(facts.results) if not _of_a_change(row[0], facts.results)]
    return {
        "title": f"{what} ({record.id}): before is {against}, after is the model of {_of(record)}.",
        "changes": list(changes(facts.results)),
        "figures": judged if facts.stage == "eval" else [],
        "besides": besides(facts.results) if facts.stage == "eval" else {},
    }


def _not_shown(model: Model) -> Iterator[str]:
    """What a reader might take the figures to say, and they do not."""
    if model.is_control:
        yield "Anything about content: the answers it was trained on were shuffled."
    control = model.pipeline.facts.results.get("control") if model.pipeline else None
    control = control if isinstance(control, dict) else {}
    for change in changes(control):
        if not change.is_shown:
            other = f"the control {one_line(control.get('record'))}, trained on answers shuffled between the questions"
            yield f"That it learnt content and not only form: {other}, came out the same. {change.text()}."
    if not model.judged_by:
        yield "How it compares with its base: no evaluation was made of it."
    for record in [*model.made_by, *model.judged_by]:
        facts, name = record.facts, f"{record.facts.stage} {record.id}"
        for change in changes(facts.results):
            if not change.is_shown:
                yield f"A change of {change.text()}, by {name}."
        if facts.verdict and facts.verdict.finding not in (None, "supported"):
            yield f"What was expected of {name}: its criteria were found {facts.verdict.finding}."
        win_rate = facts.results.get("win_rate")
        if isinstance(win_rate, dict) and win_rate.get("weakness"):
            judge, weakness = one_line(win_rate.get("judge")), one_line(win_rate["weakness"])
            yield f"The quality of answers, by the win_rate of {name}: its judge, {judge}, {weakness}."
    seed = one_line(model.record.facts.configuration.get("seed")) or "not recorded"
    yield "Work unlike the held-out rows, which come from the same collection as the training rows."
    yield f"Spread between runs: this is one run, with seed {seed}."
    yield "Safety, bias, and whether training rows can be drawn out of it: unless a figure above says so, none was tested."


def _limits(model: Model) -> Iterator[tuple[str, Any]]:
    """From the record, and where it is silent from the pipeline experiment that it is a part of."""
    halves = [one.person for one in (model.record, model.pipeline) if one]
    for key in WRITTEN:
        value = next((half[key] for half in halves if half.get(key) not in (None, "", [], {})), None)
        if value is not None:
            yield label(key), value


def _provenance(model: Model) -> Iterator[tuple[str, str]]:
    for record in [*model.made_by, *model.judged_by]:
        facts = record.facts
        commit = one_line(facts.code.get("commit")) or "not known"
        yield (
            f"{facts.stage} {record.id}",
            f"commit {commit}{', with uncommitted changes' if facts.code.get('dirty') else ''}",
        )
        for taken in facts.lineage.inputs:
            yield f"{record.id} took", f"{taken.stage} {taken.id}, SHA-256 {taken.sha256}"
        for part, described in facts.data.items():
            if isinstance(described, dict) and described.get("sha256"):
                yield (
                    f"{record.id} {part}",
                    f"{one_line(described.get('rows'))} rows, SHA-256 {one_line(described['sha256'])}",
                )
    if model.base:
        yield "base weights", f"SHA-256 {one_line(model.base.get('sha256'))}"
    for artifact in model.record.facts.artifacts:
        yield Path(artifact.path).name, f"{artifact.bytes} bytes, SHA-256 {artifact.sha256}"


def _of(record: Finished) -> str:
    return (
        record.facts.lineage.inputs[0].id if record.facts.stage == "eval" and record.facts.lineage.inputs else record.id
    )


def _of_a_change(path: str, results: dict[str, Any]) -> bool:
    return any(path in (row[0], f"{row[0]}.before") for row in changes(results))


def _nearest_model(record: Finished) -> str:
    """A record to name instead: what this one judged or served, or the last model that it made."""
    for one in [*(taken.id for taken in record.facts.lineage.inputs), *reversed(record.facts.lineage.children)]:
        try:
            other = finished(record.workspace, one)
        except UserError:
            continue
        if other.facts.stage in OUTPUT and other.status == "complete":
            return one
    return "the record of an sft, dpo or merge"
