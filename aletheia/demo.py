"""The pipeline experiment: every stage in order, each with a record of its own below one that holds them together.

    aletheia demo --profile tiny        make demo

After SFT a control is trained on the same answers shuffled between the questions: what it also gains is form, not
content. The served model is asked through the openai client, and stopped as a person would stop it.
"""

import json
from typing import Any

from aletheia.exp.run import Pipeline, open_pipeline
from aletheia.report import write_report
from aletheia.summary import summary_table
from pipeline import statistics
from pipeline.progress import say
from pipeline.records import find
from pipeline.records.file import RecordFile
from pipeline.records.lifecycle import Record
from pipeline.stage import Job

STAGES = ("data", "sft", "dpo", "merge", "serve", "eval")
DESCRIPTION = "The demo: every stage once, and the control beside SFT."


def run_demo(job: Job) -> Record:
    with open_pipeline(job, STAGES, DESCRIPTION) as record:
        pipeline = Pipeline(job, record)
        pipeline.run("data")
        sft = pipeline.run("sft")
        control = pipeline.run("sft", ["sft_config.shuffle_answers=true"], control=True)
        record.facts.results["control"] = _control(sft, control)
        for stage in ("dpo", "merge", "serve", "eval"):
            pipeline.run(stage)
    say("")
    summary_table([(f.id, facts) for f, facts in find.children(job.workspace, record.id)] + [(record.id, record.facts)])
    say(f"\nreport   {write_report(job.workspace, None, markdown=False)}")
    say(_closing(job, record))
    return record


def _control(sft: RecordFile, control: RecordFile) -> dict[str, Any]:
    """SFT against its control on the same held-out rows: what is left is content."""
    rows = []
    for record in (control, sft):
        lines = (record.folder / "heldout.jsonl").read_text("utf-8").splitlines()
        rows.append({row["id"]: row["after"] for row in map(json.loads, lines)})
    shared = [i for i in rows[0] if i in rows[1]]
    change = statistics.paired([rows[0][i] for i in shared], [rows[1][i] for i in shared])
    return {
        "what": "held-out loss after SFT on answers shuffled between questions (before) and on the right ones (after)",
        "record": control.id,
        "eval_loss": change.model_dump(exclude_none=True),
    }


def _closing(job: Job, pipeline: Record) -> str:
    """What was shown, what was not, and what to type next."""
    change = statistics.Change.model_validate(pipeline.facts.results["control"]["eval_loss"])
    verdict = change.verdict(lower_is_better=True)
    content = {
        "better": "right answers gained more than shuffled ones, in one run of each: it counts if other seeds agree",
        "worse": "shuffled answers gained more, in one run of each: nothing says that content was learnt",
        "no difference shown": "no difference from shuffled answers is shown: nothing says that content was learnt",
    }[verdict]
    seeds, small = "other seeds and orders of rows are not in it", ""
    if job.config.name == "tiny":  # measured there alone
        seeds = "another seed or order of rows has moved it by 0.01"
        small = "\n         so small a model shows that the pipeline works; it says nothing about quality."
    return (
        f"\ncontrol  {content}\n"
        f"         (held-out loss, right minus shuffled: {change.delta.text()} nats a token, n = {change.delta.n};\n"
        f"         the interval is over rows: {seeds}){small}\n"
        f"\nnext     make serve PROFILE={job.profile.id}          talk to it at http://127.0.0.1:8000/v1\n"
        f"         .venv/bin/aletheia exp list         all records\n"
        f"         cp configs/{job.profile.id}.yaml configs/mine.yaml, name your folder in it, make sft dpo merge PROFILE=mine\n"
    )
