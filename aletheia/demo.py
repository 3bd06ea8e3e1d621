"""The pipeline experiment: every stage in order, each with a record of its own below one that holds them together.

    aletheia demo --profile tiny        make demo

After SFT a control is trained on the same answers shuffled between the questions: what it also gains is form, not
content. The served model is asked through the openai client, and stopped as a person would stop it.
"""

import json
import signal
import subprocess
import sys
import time
from typing import Any

from aletheia.summary import summary_table
from eval.evaluate import Evaluate
from pipeline import statistics
from pipeline.dpo import Dpo
from pipeline.errors import StageFailed
from pipeline.merge import Merge
from pipeline.profile import load_profile
from pipeline.progress import say
from pipeline.records.find import records
from pipeline.records.lifecycle import Record, open_record
from pipeline.sft import Sft
from pipeline.snapshot import Snapshot
from pipeline.stage import Job, persons_half, run_stage

STAGES = ["data", "sft", "dpo", "merge", "serve", "eval"]
READY_WITHIN = 120.0  # seconds for the server
QUESTION = "How do I find out why a PostgreSQL query is slow?"


def run_demo(job: Job) -> Record:
    with open_record(
        job.workspace,
        stage="pipeline",
        profile=job.profile.id,
        person=persons_half(job, STAGES) | {"description": "The demo: every stage once, and the control beside SFT."},
        overrides=job.profile.overrides,
        configuration=job.config.model_dump(mode="json"),
        cost=job.config.cost,
    ) as pipeline:
        _Demo(job, pipeline).run()
    say("")
    summary_table(_own_records(job, pipeline))
    say(_closing(job, pipeline))
    return pipeline


class _Demo:
    def __init__(self, job: Job, pipeline: Record) -> None:
        self.job, self.pipeline = job, pipeline

    def run(self) -> None:
        self._stage(Snapshot)
        sft = self._stage(Sft)
        control = self._stage(Sft, overrides=["sft_config.shuffle_answers=true"])
        self.pipeline.facts.results["control"] = _control(sft, control)
        dpo = self._stage(Dpo, source=sft.id)
        merge = self._stage(Merge, source=dpo.id)
        self.pipeline.facts.results["served"] = self._serve(merge)
        self._stage(Evaluate, source=merge.id)

    def _stage(self, stage: Any, source: str | None = None, overrides: list[str] | None = None) -> Record:
        say("")
        profile = self.job.profile
        if overrides:
            profile = load_profile(
                self.job.workspace, str(profile.path), [*_assignments(profile.overrides), *overrides]
            )
        job = Job(self.job.workspace, profile, source=source, parent=self.pipeline.id)
        record = run_stage(stage, job)
        self._adopt(record.id)
        return record

    def _adopt(self, record_id: str) -> None:
        self.pipeline.facts.lineage.children.append(record_id)
        self.pipeline.save()

    def _serve(self, merge: Record) -> dict[str, Any]:
        """Starts `aletheia serve` as a process of its own, talks to it, and ends it with SIGTERM."""
        say("")
        command = [sys.executable, "-m", "aletheia.cli", "serve", "--profile", str(self.job.profile.path)]
        command += ["--from", merge.id, "--port", "0", "--parent", self.pipeline.id]
        command += [word for text in _assignments(self.job.profile.overrides) for word in ("--set", text)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            record_id, results = self._address(server)
            said = _talk(results["address"], results["model"])
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                code = server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                raise StageFailed("the server did not end within 30 s of SIGTERM") from None
        if code != 0:
            raise StageFailed(f"the server ended with exit code {code}")
        self._adopt(record_id)
        return said

    def _address(self, server: "subprocess.Popen[bytes]") -> tuple[str, dict[str, Any]]:
        """The address stands in the server's record as soon as it listens."""
        import httpx

        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise StageFailed(f"the server ended with exit code {server.returncode} before it was ready")
            for file, facts in records(self.job.workspace):
                if facts.lineage.parent == self.pipeline.id and facts.stage == "serve" and "address" in facts.results:
                    try:
                        if httpx.get(facts.results["address"].removesuffix("/v1") + "/health").status_code == 200:
                            return file.id, facts.results
                    except httpx.TransportError:
                        pass
            time.sleep(0.2)
        raise StageFailed(f"the server was not ready within {READY_WITHIN:.0f} s")


def _talk(address: str, model: str) -> dict[str, Any]:
    """One question through the openai client, whole and streamed; a model that is not there."""
    import openai

    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    ask: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**ask)
    text = answer.choices[0].message.content or ""
    chunks = client.chat.completions.create(**ask, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    if streamed != text:
        raise StageFailed("the streamed greedy answer is not the whole one")
    try:
        client.chat.completions.create(**ask | {"model": "no-such-model"})
    except openai.NotFoundError as error:
        refusal = str(error.body["message"]) if isinstance(error.body, dict) else str(error)
    else:
        raise StageFailed("the server answered for a model it does not have")
    say(f"asked: {QUESTION}\nit said: {text.strip()[:200]!r}\nunknown model: {refusal}")
    return {"question": QUESTION, "answer": text, "streamed_equals_whole": True, "unknown_model": refusal}


def _control(sft: Record, control: Record) -> dict[str, Any]:
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
        "better": "the right answers gained more than shuffled ones: some content was learnt",
        "worse": "shuffled answers gained even more: what was learnt is form",
        "no difference shown": "shuffled answers gained as much: what was learnt is form, not content",
    }[verdict]
    name = job.config.name
    small = (
        "\n         so small a model shows that the pipeline works; it says nothing about quality."
        if name == "tiny"
        else ""
    )
    return (
        f"\ncontrol  {content}\n"
        f"         (held-out loss, right minus shuffled: {change.delta.text()} nats a token, n = {change.delta.n}){small}\n"
        f"\nnext     make serve PROFILE={job.profile.id}          talk to it at http://127.0.0.1:8000/v1\n"
        f"         .venv/bin/aletheia exp list         all records\n"
        f"         cp configs/{job.profile.id}.yaml configs/mine.yaml, name your folder in it, make sft dpo merge PROFILE=mine\n"
    )


def _own_records(job: Job, pipeline: Record) -> list[Any]:
    order = [*pipeline.facts.lineage.children, pipeline.id]
    known = {file.id: facts for file, facts in records(job.workspace)}
    return [(i, known[i]) for i in order if i in known]


def _assignments(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
