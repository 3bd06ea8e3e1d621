"""`aletheia data check`: the gate over files, folders and hub data sets, as they stream past."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from aletheia.output import print_json, print_table
from pipeline.config import Check, TrainingData
from pipeline.data.read import kind_of
from pipeline.data.rows import NAMES, Conversation, MultipleChoice, PreferencePair, Question, Row
from pipeline.data.source import Source, sources
from pipeline.errors import UserError
from pipeline.gate.admit import evaluation_parts, forbid
from pipeline.gate.benchmarks import forbid_tasks
from pipeline.gate.finding import Finding
from pipeline.gate.gate import Gate, Tokenized, run
from pipeline.gate.leaks import Leaks
from pipeline.gate.rules import RULES
from pipeline.gate.tokens import Totals
from pipeline.progress import printable, say
from pipeline.stage import Job
from pipeline.workspace import Workspace

DOMAINS = 12  # named of a file
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
    found = _sources(workspace, paths, config if job else None)
    if fix:
        from pipeline.gate.fix import fix as mend

        mend(workspace, [source for source, _ in found], rules)
    leaks = _leaks(workspace, [source for source, _ in found], against, job)
    gate = Gate(rules, _tokenized(job) if job else None, leaks, run_code)
    with _written(rejects, {source.path.resolve() for source, _ in found}) as write:
        printer = Printer(sys.stderr if as_json else sys.stdout, every, as_json, write)
        run(gate, found, printer)
    if not gate.total.rows:
        raise UserError("holds no rows", where=", ".join(paths))
    if as_json:
        print_json(_json(gate, printer))
    else:
        _print(gate, printer, rejects, job)
    return not (gate.total.rejected or gate.failed)


def _sources(
    workspace: Workspace, paths: Sequence[str], config: TrainingData | None
) -> list[tuple[Source, type[Row] | None]]:
    """Each file once, with the kind of row that training takes it for. Raises `UserError` where nothing is named."""
    kinds: dict[str, type[Row] | None] = {}
    if config and not paths:
        kinds = {config.sft: Conversation, config.dpo: PreferencePair, **evaluation_parts(workspace, config)}
    names = list(paths) or list(kinds)
    if not names:
        raise UserError("names nothing to check", where="data check", remedy="a path, or --profile NAME")
    found: dict[str, tuple[Source, type[Row] | None]] = {}
    for name in names:
        for source in sources(workspace, name):
            found.setdefault(source.shown if source.hub else str(source.path.resolve()), (source, kinds.get(name)))
    return list(found.values())


def _leaks(workspace: Workspace, found: Sequence[Source], against: Sequence[str], job: Job | None) -> Leaks:
    """What must not stand in a training row: evaluation rows among those checked, and those that are named."""
    check = job.config.training_data.check if job else Check()
    leaks = Leaks(check.leak_words, check.near_duplicate)
    forbid(leaks, [source for source in found if kind_of(source) in EVALUATION], EVALUATION)
    read = {source.shown for source in found}
    names = list(against)
    if job:
        config = job.config.training_data
        names += [name for name in (config.eval, config.validation.path) if name and workspace.path(name).exists()]
        forbid_tasks(leaks, workspace.path(config.eval), job.config.eval_config.tasks)
    for name in names:
        forbid(leaks, [source for source in sources(workspace, name) if source.shown not in read])
    return leaks


@contextmanager
def _written(path: Path | None, read: set[Path]) -> Iterator[Callable[[str], None] | None]:
    """What writes a line to a file, which is there once all is written. Raises `UserError` where it is one of those `read`.

    A link, a pipe or a device (/dev/null) is written into, not replaced: that would take it from the whole machine.
    """
    if path is None:
        yield None
        return
    if path.resolve() in read or path.is_dir():
        raise UserError("is what is checked, or a folder", where=f"--rejects {path}", remedy="another file")
    in_place = path.is_symlink() or (path.exists() and not path.is_file())
    new = path if in_place else path.with_name(f".writing-{os.getpid()}")
    with _writing(path):
        out = new.open("w" if in_place else "x", encoding="utf-8")

    def write(line: str) -> None:
        with _writing(path):
            out.write(line)

    try:
        yield write
        with _writing(path):
            out.close()
            if not in_place:
                os.replace(new, path)
    finally:
        with suppress(OSError):
            out.close()
        if not in_place:
            new.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=f"--rejects {path}") from None


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

    def __init__(self, out: TextIO, every: bool, as_json: bool, rejects: Callable[[str], None] | None) -> None:
        self.out, self.every, self.as_json, self.rejects = out, every, as_json, rejects
        self.counts: Counter[str] = Counter()
        self.kept: list[Finding] = []  # for JSON
        self._last = ""
        self._told: set[tuple[str, str]] = set()

    def __call__(self, finding: Finding) -> None:
        self.counts[finding.rule.name] += 1
        if self.rejects and finding.rule.severity == "error" and finding.where != self._last:  # a row's come together
            self.rejects(json.dumps(finding.as_json(), ensure_ascii=False) + "\n")
            self._last = finding.where
        if self.as_json:
            if self.counts[finding.rule.name] <= KEPT:
                self.kept.append(finding)
        elif self.every or self.counts[finding.rule.name] <= SHOWN:
            line = f"{finding.where}: {finding.rule.code} {finding.rule.severity}: {finding.reason}"
            if finding.remedy and (finding.rule.name, finding.remedy) not in self._told:
                self._told.add((finding.rule.name, finding.remedy))  # the same advice once
                line += f"; try {finding.remedy}"
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
            _domains(count.domains),
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
        f"\n{total.rows:,} rows, {total.rejected:,} rejected{share}, "
        f"{warnings:,} warning{'' if warnings == 1 else 's'}{tokens}"
    )
    if job and total.rejected:
        for name, read, rejected in _by_part(gate, job.config.training_data):
            limit = job.config.training_data.max_reject_share
            verdict = "training would stop" if rejected > limit * read else "training would go on without them"
            print(
                f"{name}: {rejected:,} of {read:,} rejected ({rejected / read:.1%}, the limit is {limit:.0%}): {verdict}"
            )
    if rejects:
        say(f"every rejected row: {rejects}")


def _by_part(gate: Gate, config: TrainingData) -> Iterator[tuple[str, int, int]]:
    """Rows and rejected rows of the training data that a profile names."""
    for name in (config.sft, config.dpo):
        counts = [count for file, count in gate.files.items() if file == name or file.startswith(f"{name}/")]
        if rows := sum(count.rows for count in counts):
            yield name, rows, sum(count.rejected for count in counts)


def _domains(counts: Counter[str]) -> str:
    shown = ", ".join(f"{domain} {n:,}" for domain, n in sorted(counts.most_common(DOMAINS)))
    return f"{shown}, {len(counts) - DOMAINS:,} more" if len(counts) > DOMAINS else shown


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
