"""The README that a model carries on the hub: metadata for the hub, and what a reader must know before using it.

    aletheia exp export EXP-2026-11-21-006 --to model-card

For the record of an sft, dpo or merge. Writes `experiments/EXP-…/model-card.md`; into a folder given with --output,
`README.md`, as the hub wants it. The figures are those of the records in its lineage and of the evaluations made of it.
Nothing is asked of the hub. What only a person can say stands above the record's line: `license`, `language`,
`datasets` (on the hub), `intended_use`, `limitations`, `deployment`, `issues`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aletheia.exp.exporters.page import label, place, render, write_page
from aletheia.exp.exporters.record import Finished, as_number, besides, finished, texts
from aletheia.exp.exporters.tables import changes, one_line, settings, values
from aletheia.exp.reading import number
from pipeline.chat import Contract
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.records import index
from pipeline.records.metrics import metrics
from pipeline.workspace import Workspace

OUTPUT = {"sft": "adapter", "dpo": "adapter", "merge": "model"}
SUFFIX = {"sft": "sft", "dpo": "dpo", "merge": "merged"}
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


@dataclass(frozen=True)
class Subject:
    """The model: its record, those it was made by (first to last, itself among them), those that judged it, its pipeline."""

    record: Finished
    made_by: list[Finished]
    judged_by: list[Finished]
    pipeline: Finished | None

    @property
    def name(self) -> str:
        return f"{self.record.facts.configuration.get('name') or self.record.facts.profile}-{SUFFIX[self.record.facts.stage]}"

    @property
    def is_adapter(self) -> bool:
        return self.record.facts.stage != "merge"

    @property
    def base(self) -> dict[str, Any]:
        return self.record.facts.lineage.base or {}

    @property
    def base_on_hub(self) -> str | None:
        """Only what came from the hub has a revision."""
        return str(self.base["name"]) if self.base.get("revision") and self.base.get("name") else None

    @property
    def is_control(self) -> bool:
        sections = [one.facts.configuration.get("sft_config") for one in self.made_by]
        return any(isinstance(section, dict) and section.get("shuffle_answers") for section in sections)


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
    pipeline = _finished_or_none(record, facts.lineage.parent) if facts.lineage.parent else None
    subject = Subject(record, _made_by(record), list(_judged_by(record)), pipeline)
    target = place(output, record.file.folder / "model-card.md", "README.md")
    return write_page(workspace, target, card(subject), force, facts)


def card(subject: Subject) -> str:
    """Metadata and body, as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    record = subject.record
    licence, licence_note = _licence(subject)
    body = render(
        "model_card.md.jinja",
        id=record.id,
        name=subject.name,
        what=_what(subject),
        control=subject.is_control,
        description=texts(record.person.get("description")),
        snippet=_snippet(subject),
        usage=list(_usage(subject)),
        stages=[_stage(one) for one in subject.made_by],
        measured=[_measured(one) for one in [*subject.made_by, *subject.judged_by] if any(changes(one.facts.results))],
        not_shown=list(_not_shown(subject)),
        limits=list(_limits(subject)),
        provenance=list(_provenance(subject)),
        licence=licence_note,
    )
    text = f"---\n{_metadata(subject, licence).to_yaml()}\n---\n\n{body}"
    return str(ModelCard(text)).rstrip() + "\n"


def _metadata(subject: Subject, licence: dict[str, str]) -> Any:
    from huggingface_hub import ModelCardData

    person = subject.record.person
    relation = {"base_model_relation": "adapter" if subject.is_adapter else "finetune"} if subject.base_on_hub else {}
    return ModelCardData(
        base_model=subject.base_on_hub,
        **relation,
        library_name="peft" if subject.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["aletheia", "lora", *(one.facts.stage for one in subject.made_by if one.facts.stage != "merge")],
        datasets=texts(person.get("datasets")) or None,
        language=texts(person.get("language")) or None,
        **licence,
        model_name=subject.name,
        eval_results=list(_eval_results(subject)) or None,
    )


def _eval_results(subject: Subject) -> Iterator[Any]:
    """Every figure that rests on counted rows, of this model; those of an earlier stage are another model's."""
    from huggingface_hub import EvalResult

    for record in [subject.record, *subject.judged_by]:
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


def _licence(subject: Subject) -> tuple[dict[str, str], str]:
    """For the metadata, and for the reader."""
    own = {
        k: texts(subject.record.person.get(k))[0]
        for k in ("license", "license_name", "license_link")
        if texts(subject.record.person.get(k))
    }
    if "license" in own:
        return own, f"Licence: {own['license']}, as whoever trained it says."
    known = LICENCES.get(subject.base_on_hub or "")
    if known:
        return known, f"Licence: that of the base, {known['license_name']} ({known['license_link']})."
    base = subject.base.get("name", "the base")
    return (
        {},
        f"Licence: not stated. That of {base} applies and is not known here; license: … above the record's line states it.",
    )


def _what(subject: Subject) -> str:
    base = subject.base.get("name", "a base that was not recorded")
    where = "" if subject.base_on_hub else f" {base} is a local model and not on the hub."
    how = " and then ".join(TITLES[one.facts.stage].lower() for one in subject.made_by if one.facts.stage != "merge")
    if subject.is_adapter:
        return f"A LoRA adapter on {base}, made by {how or 'training'}.{where}"
    return f"{base} with a LoRA adapter merged into its weights; the adapter was made by {how or 'training'}.{where}"


def _snippet(subject: Subject) -> str:
    """Runs as it stands from the workspace's root."""
    record = subject.record
    trust = ", trust_remote_code=True" if record.facts.configuration.get("trust_remote_code") else ""
    load = f'dtype="auto", device_map="auto"{trust}'
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"path = {json.dumps(record.workspace.shown(_folder(record)))}  # or the name it is published under",
        f"tokenizer = AutoTokenizer.from_pretrained(path{trust})",
    ]
    if not subject.is_adapter:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained(path, {load})")
    elif subject.base_on_hub:
        lines[0:0] = ["from peft import PeftModel"]
        source = f"{json.dumps(subject.base_on_hub)}, revision={json.dumps(str(subject.base['revision']))}"
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({source}, {load})",
            "model = PeftModel.from_pretrained(base, path)",
        ]
    else:
        lines[0:0] = ["from peft import PeftConfig, PeftModel"]
        lines += [
            "source = PeftConfig.from_pretrained(path).base_model_name_or_path  # where the base lay when it was trained",
            f"base = AutoModelForCausalLM.from_pretrained(source, {load})",
            "model = PeftModel.from_pretrained(base, path)",
        ]
    contract = _contract(record)
    stop = f", eos_token_id={contract.end_of_turn_id}" if contract else ""
    return "\n".join(
        [
            *lines,
            "",
            'messages = [{"role": "user", "content": "How do I find out why a query is slow?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
            f"output = model.generate(**inputs, max_new_tokens=256{stop})",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _usage(subject: Subject) -> Iterator[str]:
    contract = _contract(subject.record)
    if contract:
        stop = f"{contract.end_of_turn} (token {contract.end_of_turn_id})"
        yield f"It was trained to end its turn with {stop}; without that stop it runs on."
        yield f"Prompts must go through the chat template beside the weights, whose contract is {contract.sha256}."
    else:
        yield "Its chat contract is not at hand, so the token that ends its turn cannot be named here."
    if subject.is_adapter:
        yield "The adapter's weights are float32 and are added to the base as it is stored; on another base they mean nothing."


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


def _not_shown(subject: Subject) -> Iterator[str]:
    """What a reader might take the figures to say, and they do not."""
    if subject.is_control:
        yield "Anything about content: the answers it was trained on were shuffled."
    control = subject.pipeline.facts.results.get("control") if subject.pipeline else None
    control = control if isinstance(control, dict) else {}
    for change in changes(control):
        if not change.is_shown:
            other = f"the control {one_line(control.get('record'))}, trained on answers shuffled between the questions"
            yield f"That it learnt content and not only form: {other}, came out the same. {change.text()}."
    if not subject.judged_by:
        yield "How it compares with its base: no evaluation was made of it."
    for record in [*subject.made_by, *subject.judged_by]:
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
    seed = one_line(subject.record.facts.configuration.get("seed")) or "not recorded"
    yield "Work unlike the held-out rows, which come from the same collection as the training rows."
    yield f"Spread between runs: this is one run, with seed {seed}."
    yield "Safety, bias, and whether training rows can be drawn out of it: unless a figure above says so, none was tested."


def _limits(subject: Subject) -> Iterator[tuple[str, Any]]:
    """From the record, and where it is silent from the pipeline experiment that it is a part of."""
    halves = [one.person for one in (subject.record, subject.pipeline) if one]
    for key in WRITTEN:
        value = next((half[key] for half in halves if half.get(key) not in (None, "", [], {})), None)
        if value is not None:
            yield label(key), value


def _provenance(subject: Subject) -> Iterator[tuple[str, str]]:
    for record in [*subject.made_by, *subject.judged_by]:
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
    if subject.base:
        yield "base weights", f"SHA-256 {one_line(subject.base.get('sha256'))}"
    for artifact in subject.record.facts.artifacts:
        yield Path(artifact.path).name, f"{artifact.bytes} bytes, SHA-256 {artifact.sha256}"


def _made_by(record: Finished) -> list[Finished]:
    """The chain of the records whose outputs it was built from, first to last. One that is gone ends it, aloud."""
    chain = [record]
    while chain[0].facts.lineage.inputs:
        taken = chain[0].facts.lineage.inputs[0].id
        if any(one.id == taken for one in chain):
            break
        before = _finished_or_none(record, taken)
        if before is None or before.facts.stage not in OUTPUT:
            break
        chain.insert(0, before)
    return chain


def _judged_by(record: Finished) -> Iterator[Finished]:
    """The complete evaluations of this model; for an adapter also those of the merges of it, which are the same model."""
    entries = [e for e in index.entries(record.workspace) if e.facts and e.facts.status == "complete"]
    taken = {e.id: {i.id for i in e.facts.lineage.inputs} for e in entries if e.facts}
    stage = {e.id: e.facts.stage for e in entries if e.facts}
    same = {record.id} | {one for one in taken if stage[one] == "merge" and record.id in taken[one]}
    for one in reversed(taken):
        judge = _finished_or_none(record, one) if stage[one] == "eval" and taken[one] & same else None
        if judge:
            yield judge


def _finished_or_none(record: Finished, other: str) -> Finished | None:
    try:
        return finished(record.workspace, other)
    except UserError as error:
        say(f"note: {error}; the card is without it")
        return None


def _of(record: Finished) -> str:
    return (
        record.facts.lineage.inputs[0].id if record.facts.stage == "eval" and record.facts.lineage.inputs else record.id
    )


def _of_a_change(path: str, results: dict[str, Any]) -> bool:
    return any(path in (row[0], f"{row[0]}.before") for row in changes(results))


def _folder(record: Finished) -> Path:
    return record.workspace.checkpoints / record.id / OUTPUT[record.facts.stage]


def _contract(record: Finished) -> Contract | None:
    try:
        return Contract.load(_folder(record))
    except UserError:
        return None


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
