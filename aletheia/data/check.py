"""`aletheia data check`: the gate over files, folders and hub data sets, as they stream past."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from aletheia.data.snapshot import kind_of
from aletheia.output import print_json, print_table, printable
from pipeline.config import TrainingData
from pipeline.data.rows import NAMES, Conversation, MultipleChoice, PreferencePair, Question, Row
from pipeline.data.source import sources
from pipeline.errors import UserError
from pipeline.gate.admit import forbid
from pipeline.gate.benchmarks import forbid_tasks
from pipeline.gate.finding import Finding
from pipeline.gate.gate import Gate, Tokenized, run
from pipeline.gate.leaks import Leaks
from pipeline.gate.rules import RULES
from pipeline.gate.tokens import Totals
from pipeline.progress import say
from pipeline.stage import Job
from pipeline.workspace import Workspace

SHOWN = 10  # findings of a rule, unless all are asked for
KEPT = 1000  # findings of a rule in --json
EVALUATION = (Question, MultipleChoice)


def check(
    paths: Sequence[str],
    profile: str | None,
    assignments: list[str] | None,
    against: Sequence[str],
    ignore: Sequence[str],
    fix: bool,
    run_code: bool,
    every: bool,
    rejects: Path | None,
    as_json: bool,
) -> bool:
    """Whether no row was rejected."""
    job = _job(profile, assignments)
    workspace = job.workspace if job else Workspace.find()
    config: TrainingData = job.config.training_data if job else TrainingData()
    rules = config.check.model_copy(update={"ignore": [*config.check.ignore, *ignore]})
    names = list(paths) or ([config.sft, config.dpo, config.eval] if job else [])
    if not names:
        raise UserError("names nothing to check", where="data check", remedy="a path, or --profile NAME")
    found = [source for name in names for source in sources(workspace, name)]
    if fix:
        from pipeline.gate.fix import fix as mend

        mend(workspace, found, rules)
    leaks = Leaks(config.check.leak_words, config.check.near_duplicate)
    forbid(leaks, [source for source in found if kind_of(source) in EVALUATION])
    read = {source.shown for source in found}
    for name in [*against, *([config.eval] if job and workspace.path(config.eval).exists() else [])]:
        forbid(leaks, [source for source in sources(workspace, name) if source.shown not in read])
    if job:
        forbid_tasks(leaks, workspace.path(config.eval), job.config.eval_config.tasks)
    gate = Gate(rules, _tokenized(job) if job else None, leaks, run_code)
    with ExitStack() as stack:
        out = stack.enter_context(rejects.open("w", encoding="utf-8")) if rejects else None
        printer = Printer(sys.stderr if as_json else sys.stdout, every, as_json, out)
        run(gate, found, printer)
    if not gate.total.rows:
        raise UserError("holds no rows", where=names[0])
    if as_json:
        print_json(_json(gate, printer))
    else:
        _print(gate, printer, rejects, job)
    return not gate.total.rejected


def print_rules(as_json: bool) -> None:
    """The table of rules, on stdout."""
    if as_json:
        keys = ("code", "name", "severity", "finds", "remedy", "fixable")
        print_json([{key: getattr(rule, key) for key in keys} for rule in RULES])
        return
    rows = [(r.code, r.name, r.severity, "--fix" if r.fixable else "", r.finds) for r in RULES]
    print_table(("code", "rule", "severity", "mends", "finds"), rows, sys.stdout)


class Printer:
    """Prints the first findings of each rule as they come; all of them to `rejects`."""

    def __init__(self, out: TextIO, every: bool, as_json: bool, rejects: TextIO | None) -> None:
        self.out, self.every, self.as_json, self.rejects = out, every, as_json, rejects
        self.counts: Counter[str] = Counter()
        self.kept: list[Finding] = []  # for JSON

    def __call__(self, finding: Finding) -> None:
        self.counts[finding.rule.name] += 1
        if self.rejects and finding.rule.severity == "error":
            self.rejects.write(json.dumps(finding.as_json(), ensure_ascii=False) + "\n")
        if self.as_json:
            if self.counts[finding.rule.name] <= KEPT:
                self.kept.append(finding)
        elif self.every or self.counts[finding.rule.name] <= SHOWN:
            line = f"{finding.where}: {finding.rule.code} {finding.rule.severity}: {finding.reason}"
            print(printable(line), file=self.out)


def _print(gate: Gate, printer: Printer, rejects: Path | None, job: Job | None) -> None:
    if gate.found:
        print()
        rows = [
            (rule.code, rule.name, gate.rules.get(rule.name, rule).severity, gate.found[rule.name], rule.remedy)
            for rule in RULES
            if gate.found[rule.name]
        ]
        print_table(("rule", "", "severity", "found", "what to do"), rows, sys.stdout)
        hidden = sum(max(0, n - SHOWN) for n in printer.counts.values())
        if hidden and not printer.every:
            say(f"note: {hidden:,} findings are not shown; --all prints them")
        print()
    files = [
        (
            name,
            ", ".join(NAMES[kind] for kind in count.kinds) or "–",
            f"{count.rows:,}",
            f"{count.rejected:,}",
            ", ".join(f"{domain} {n:,}" for domain, n in sorted(count.domains.items())),
        )
        for name, count in gate.files.items()
    ]
    print_table(("file", "rows are", "rows", "rejected", "domains"), files, sys.stdout)
    for kind, totals in (gate.tokenized.totals if gate.tokenized else {}).items():
        if totals.sequences:
            print(f"\n{NAMES[kind]}: {totals.text()}")
    total, warnings = gate.total, sum(n for name, n in gate.found.items() if gate.rules[name].severity == "warning")
    share = f" ({total.rejected / total.rows:.1%})" if total.rejected else ""
    tokens = "" if job else "; tokens not counted: --profile NAME"
    print(
        f"\n{total.rows:,} rows, {total.rejected:,} rejected{share}, {warnings:,} warning{'' if warnings == 1 else 's'}{tokens}"
    )
    if rejects:
        say(f"every rejected row: {rejects}")


def _json(gate: Gate, printer: Printer) -> dict[str, Any]:
    return {
        "rows": gate.total.rows,
        "rejected": gate.total.rejected,
        "found": {name: count for name, count in gate.found.items() if count},
        "findings": [finding.as_json() for finding in printer.kept],
        "findings_left_out": sum(printer.counts.values()) - len(printer.kept),
        "files": [
            {
                "path": name,
                "kinds": {NAMES[kind]: n for kind, n in count.kinds.items()},
                "rows": count.rows,
                "rejected": count.rejected,
                "domains": dict(sorted(count.domains.items())),
            }
            for name, count in gate.files.items()
        ],
        "tokens": {
            NAMES[kind]: totals.as_json()
            for kind, totals in (gate.tokenized.totals if gate.tokenized else {}).items()
            if totals.sequences
        },
    }


def _job(profile: str | None, assignments: list[str] | None) -> Job | None:
    from aletheia.jobs import make_job

    if profile is None and assignments:
        raise UserError("needs a profile to change", where="--set", remedy="--profile NAME")
    return make_job(profile, assignments) if profile else None


def _tokenized(job: Job) -> Tokenized:
    from pipeline.model import find_base

    config = job.config
    lengths: dict[type[Row], int] = {
        Conversation: config.sft_config.max_length,
        PreferencePair: config.dpo_config.max_length,
    }
    totals = {kind: Totals(max_length) for kind, max_length in lengths.items()}
    return Tokenized(find_base(job.workspace, job.profile).chat(), totals)
