"""The gate: judges rows one by one as they stream past, then the set as a whole.

    gate = Gate(config.training_data.check)
    for source in sources(workspace, "data/sft"):
        for raw in source.raws():
            row, findings = gate.judge(source.shown, raw)
    for finding in gate.finish(): ...

A row with an error is rejected and takes no further part: no later row is its duplicate. What is kept of a row is some
230 bytes, so that a million rows fit in memory; the rows themselves are not kept.
"""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from pipeline.chat import Chat
from pipeline.config import Check
from pipeline.data.read import row_of
from pipeline.data.rows import Conversation, PreferencePair, Row, RowFault, digest, text_digest
from pipeline.data.source import Raw, Source
from pipeline.gate import bias, code, confidential, text, tokens
from pipeline.gate.duplicates import Exact, NearDuplicates
from pipeline.gate.finding import Finding, Places
from pipeline.gate.leaks import Leaks
from pipeline.gate.rules import OF_THE_SET, selected
from pipeline.gate.text import tidy
from pipeline.progress import Progress

ENOUGH_PAIRS = 20  # fewer say nothing of a bias
_MARKUP = re.compile(r"<\|[a-zA-Z_]{2,30}\|>|<｜[^｜<>]{2,40}｜>|\[/?INST\]")  # special tokens of common models
_OF_CODE, _LEAKS = {"code-syntax", "code-fence", "code-fails"}, {"leak", "near-leak"}
MEGABYTE = 1_000_000
LARGE = 20 * MEGABYTE  # judging more than this takes seconds, and is shown


@dataclass
class Count:
    """Rows of one file, or of all."""

    rows: int = 0  # read
    rejected: int = 0
    kinds: Counter[type[Row]] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Tokenized:
    """The tokenizer and the lengths that rows are judged by."""

    chat: Chat
    totals: Mapping[type[Row], tokens.Totals]  # with the max_length of each kind


class Gate:
    """`tokenized`: None leaves the rules on tokens out. `leaks`: what must not stand in a training row. `run_code`: runs
    the Python of rows that are marked `run`; only for rows that one trusts."""

    def __init__(
        self, check: Check, tokenized: Tokenized | None = None, leaks: Leaks | None = None, run_code: bool = False
    ) -> None:
        self.check, self.tokenized, self.leaks, self.run_code = check, tokenized, leaks, run_code
        self.rules = selected(check)
        self.total = Count()
        self.files: dict[str, Count] = defaultdict(Count)
        self.found: Counter[str] = Counter()  # findings, by the rule's name
        self.dropped: set[int] = set()  # numbers of rows that only the set showed to be wrong
        self._places = Places()  # of the rows that passed, as all below
        self._sorts: list[tuple[type[Row], str]] = []  # kind and domain of each
        self._known: dict[tuple[type[Row], str], tuple[type[Row], str]] = {}  # of which each is kept once
        self._ids, self._texts, self._sides = Exact(), Exact(), Exact()
        self._turned = bytearray()  # 1 where a pair's sides stand in descending order
        self._near = NearDuplicates(check.near_duplicate) if "near-duplicate" in self.rules else None
        self._pairs = array("I")
        self._chosen, self._rejected = array("I"), array("I")  # their lengths, characters

    @property
    def passed(self) -> int:
        """How many rows have passed so far: the next one's number."""
        return len(self._places)

    def judge(self, file: str, raw: Raw, kind: type[Row] | None = None) -> tuple[Row | None, list[Finding]]:
        """The row, or None where it is rejected, and what was found."""
        count = self.files[file]
        for c in (count, self.total):
            c.rows += 1
        try:
            row = row_of(raw, file, kind)
        except RowFault as fault:
            rule = self.rules[fault.rule]
            self._reject(count)
            self.found[rule.name] += 1
            return None, [Finding(rule, file, raw.line, fault.what, remedy=fault.remedy, item=raw.item)]
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, reason in self._faults(row):
            if name in self.rules:
                reasons[name].append(reason)
        findings = [
            Finding(self.rules[n], file, raw.line, "; ".join(why), row.id, item=raw.item) for n, why in reasons.items()
        ]
        self.found.update(f.rule.name for f in findings)
        if any(f.rule.severity == "error" for f in findings):
            self._reject(count)
            return None, findings
        self._count(file, type(row), row.domain, 1)
        self._remember(row)
        return row, findings

    def finish(self) -> Iterator[Finding]:
        """What only the whole set shows. Rows that it rejects are in `dropped` afterwards."""
        alike = set()
        for later, first in self._surviving(self._ids.pairs()):
            yield from self._of_set("id-twice", later, f"its id stands at {self._places.where(first)} too")
        for later, first in self._surviving(self._texts.pairs()):
            alike.add(later)
            yield from self._of_set("duplicate", later, f"its text stands at {self._places.where(first)} already")
        for later, first in list(self._surviving(self._swapped())):
            for one, two in ((later, first), (first, later)):
                yield from self._of_set("swapped", one, f"stands the other way round at {self._places.where(two)}")
        for later, first, share in self._near.pairs() if self._near else ():
            if later not in alike and not {later, first} & self.dropped:
                where = self._places.where(first)
                yield from self._of_set("near-duplicate", later, f"about {share:.0%} alike with {where}")
        yield from self._balance()

    def _surviving(self, pairs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The pairs of rows that are still there. Where the first of several is gone, the next one stands for it."""
        stands_for: dict[int, int] = {}
        for later, first in pairs:
            if later in self.dropped:
                continue
            standing = stands_for.get(first, first)
            if standing in self.dropped:
                stands_for[first] = later
            else:
                yield later, standing

    def _swapped(self) -> Iterator[tuple[int, int]]:
        """Pairs with the same sides the other way round, by their rows' numbers."""
        for later, first in self._sides.pairs():
            if self._turned[later] != self._turned[first]:
                yield self._pairs[later], self._pairs[first]

    def _faults(self, row: Row) -> Iterator[tuple[str, str]]:
        """Rule and reason, of one row by itself."""
        trained, rules = isinstance(row, Conversation | PreferencePair), self.rules
        whole = "\n".join((*row.asked, *row.answers))
        if not self.tokenized and (match := _MARKUP.search(whole) if "<" in whole or "[" in whole else None):
            yield "special-token", f"its text holds {match.group()}, a special token of common models"
        if "odd-characters" in rules and (odd := text.odd(whole)):
            yield "odd-characters", f"{odd} of its text"
        if "secret" in rules:
            yield from (("secret", f"{what} of its text") for what in confidential.secrets(whole))
        if "personal-data" in rules:
            yield from (("personal-data", f"{what} of its text") for what in confidential.personal(whole))
        if trained:
            yield from self._of_answers(row)
        if ("`" in whole or "~~~" in whole) and not rules.keys().isdisjoint(_OF_CODE):
            yield from self._of_code(row, whole)
        if trained and self.leaks and not rules.keys().isdisjoint(_LEAKS):
            yield from self._leaked(row)
        if self.tokenized and (totals := self.tokenized.totals.get(type(row))):
            yield from tokens.faults(self.tokenized.chat, row, totals.max_length, totals)

    def _of_answers(self, row: Row) -> Iterator[tuple[str, str]]:
        least, most = self.check.shortest_answer, self.check.longest_answer
        for index, answer in enumerate(row.answers):
            if not least <= len(answer) <= most:
                yield "completion-length", f"an answer of {len(answer):,} characters; the band is {least:,} to {most:,}"
            if answer != tidy(answer):
                yield "edge-whitespace", "an answer begins or ends in blank space, which is trained too"
            if isinstance(row, PreferencePair):
                if index == 0 and (why := text.refusal(answer)):
                    yield "refusal-chosen", f"chosen {why}"
            elif why := text.refusal(answer):
                yield "refusal", f"an answer {why}"

    def _of_code(self, row: Row, whole: str) -> Iterator[tuple[str, str]]:
        python = []
        for answer in row.answers:
            blocks, unclosed = code.blocks(answer)
            if unclosed:
                yield "code-fence", f"the code block of line {unclosed} of an answer is never closed"
            for block in blocks:
                if "code-syntax" in self.rules and (why := code.fault(block, whole)):
                    yield "code-syntax", f"{block.language} in line {block.line} of an answer: {why}"
                if block.language in ("python", "py"):
                    python.append(block.text)
        if self.run_code and getattr(row, "run", False) and (why := code.run(python)):
            yield "code-fails", f"its Python ends with: {why}"

    def _leaked(self, row: Row) -> Iterator[tuple[str, str]]:
        for part in (*row.asked, *row.answers):
            leak = self.leaks.found(part, prompt=part == row.asked[-1]) if self.leaks else None
            if leak and leak.kind == "words":
                yield "leak", f"shares “{leak.what}” with {leak.where}"
            elif leak:
                yield "near-leak", f"{leak.what} alike with {leak.where}"

    def _remember(self, row: Row) -> None:
        number = self.passed
        self._places.add(row.file, row.line, row.item)
        sort = (type(row), row.domain)
        self._sorts.append(self._known.setdefault(sort, sort))
        self._ids.add(digest(type(row).__name__, row.where if row.id == row.where else f"id {row.id}"))
        self._texts.add(text_digest(row))
        if self._near:
            self._near.add("\n".join((*row.asked, *row.texts)))
        if isinstance(row, PreferencePair):
            chosen, rejected = row.answers
            self._pairs.append(number)
            self._sides.add(digest(*row.asked, *sorted((chosen, rejected))))
            self._turned.append(chosen > rejected)
            self._chosen.append(len(chosen))
            self._rejected.append(len(rejected))

    @property
    def failed(self) -> bool:
        """Whether a rule about the set as a whole, made an error by the profile, is broken."""
        return any(
            self.found[name] and name in self.rules and self.rules[name].severity == "error" for name in OF_THE_SET
        )

    def _of_set(self, name: str, number: int, reason: str) -> Iterator[Finding]:
        rule = self.rules.get(name)
        if rule is None or (rule.severity == "error" and number in self.dropped):
            return
        file, line, item = self._places.file(number), self._places.line(number), self._places.item(number)
        self.found[name] += 1
        if rule.severity == "error":
            self.dropped.add(number)
            self._reject(self.files[file])
            self._count(file, *self._sorts[number], -1)
        yield Finding(rule, file, line, reason, item=item)

    def _balance(self) -> Iterator[Finding]:
        if "length-bias" in self.rules and len(self._pairs) >= ENOUGH_PAIRS:
            for measure, what in ((bias.auc, "over all pairs"), (bias.paired_auc, "within pairs")):
                auc = measure(self._chosen, self._rejected)
                if max(auc, 1 - auc) > self.check.length_auc:
                    longer = "longer" if auc > 0.5 else "shorter"
                    self.found["length-bias"] += 1
                    reason = f"“the {longer} is chosen” is right in {max(auc, 1 - auc):.0%} {what} (AUC {auc:.2f})"
                    yield Finding(self.rules["length-bias"], self._places.file(self._pairs[0]), 0, reason)
                    break
        if "unbalanced-domains" in self.rules:
            for domain, rows, even in bias.small_domains(self.total.domains, self.check.domain_share):
                self.found["unbalanced-domains"] += 1
                reason = f"{domain} has {rows:,} rows; an even share is {even:,.0f}"
                yield Finding(self.rules["unbalanced-domains"], "the set", 0, reason)

    def _count(self, file: str, kind: type[Row], domain: str, by: int) -> None:
        for count in (self.files[file], self.total):
            for counter, key in ((count.kinds, kind), (count.domains, domain)):
                counter[key] += by  # type: ignore[index]
                if not counter[key]:  # type: ignore[index]
                    del counter[key]

    def _reject(self, count: Count) -> None:
        for c in (count, self.total):
            c.rejected += 1


def run(
    gate: Gate,
    found: Sequence[tuple[Source, type[Row] | None]],
    on_finding: Callable[[Finding], None],
    on_row: Callable[[Row], None] = lambda row: None,
    quiet: bool = False,
) -> None:
    """Sends every row through the gate, with progress; beside each file the kind its rows must be, None for any.

    `on_row` gets those that pass by themselves, in the order of their numbers; the set may still drop some, `gate.dropped`.
    """
    size = sum(source.size for source, _ in found)
    with (
        nullcontext()
        if quiet or size < LARGE
        else Progress("checking", max(1, size // MEGABYTE), unit="MB") as progress
    ):
        done = 0
        for source, kind in found:
            for raw in source.raws():
                row, findings = gate.judge(source.shown, raw, kind)
                for finding in findings:
                    on_finding(finding)
                if row is not None:
                    on_row(row)
                if progress and gate.total.rows % 256 == 0:
                    progress.advance((done + source.bytes_read) // MEGABYTE, note=f"{gate.total.rows:,} rows")
            done += source.size
        if progress:
            progress.advance(size // MEGABYTE, note=f"{gate.total.rows:,} rows; compares them")
        for finding in gate.finish():
            on_finding(finding)
