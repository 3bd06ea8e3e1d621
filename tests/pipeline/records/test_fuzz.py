"""Hundreds of broken and hostile records: one line at most is said of each, nothing above the line is lost, nothing runs."""

import copy
import datetime
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aletheia.exp.lint import lint
from aletheia.exp.listing import Filters, list_records
from aletheia.exp.mend import repair, sync
from aletheia.exp.show import show
from pipeline import yamlio
from pipeline.errors import UserError
from pipeline.records import file as record_file
from pipeline.records.file import LINE, RecordFile, split
from pipeline.records.schema import Facts
from pipeline.workspace import Workspace

ID = "EXP-2026-01-01-001"
CASES = 40  # of each kind of damage
MARK = LINE.encode() + b"\n"
AFTER = Facts(status="failed", stage="sft", profile="small", results={"after": 1})
FIGURE = {"value": 5.0, "ci_low": 4.0, "ci_high": 6.0, "n": 100}
FACTS: dict[str, Any] = {
    "status": "complete",
    "stage": "sft",
    "profile": "small",
    "history": [
        {"status": "running", "at": "2026-01-01T00:00:00Z", "host": "vm", "pid": 1234, "started": 1.5},
        {"status": "complete", "at": "2026-01-01T00:01:00Z", "note": "so"},
    ],
    "lineage": {
        "parent": "EXP-2026-01-01-009",
        "base": {"name": "tiny"},
        "inputs": [{"id": "EXP-2026-01-01-008", "stage": "sft", "path": "checkpoints/x", "sha256": "ab"}],
    },
    "overrides": {"sft_config.epochs": 1.0},
    "configuration": {"name": "small", "sft_config": {"epochs": 1.0, "shuffle_answers": False}},
    "data": {"sft": {"train": {"rows": 7}, "held_out": {"rows": 3}}, "contract": "cd"},
    "results": {
        "training": {"steps": 8, "seconds": 3.5, "loss": 3.2},
        "eval_loss": {"before": FIGURE, "after": FIGURE, "delta": FIGURE, "unit": "nats a token"},
        "preference_accuracy": FIGURE,
        "win_rate": FIGURE,
        "benchmarks": {"choices": {"before": FIGURE, "after": FIGURE, "delta": FIGURE}},
    },
    "verdict": {
        "frozen_at": "2026-01-01T00:00:00Z",
        "finding": "supported",
        "criteria": [{"criterion": "eval_loss < 7"}],
        "judged": [{"criterion": "eval_loss < 7", "finding": "supported", "observed": "5", "why": "all below"}],
        "changed_after_start": ["added: x < 1"],
    },
    "visualizations": [{"path": "EXP/loss.png", "purpose": "the loss"}],
    "artifacts": [{"path": "checkpoints/x/weights", "sha256": "ab", "bytes": 3}],
    "failure": {"kind": "StageFailed", "message": "no", "step": 3, "rows": ["a"]},
    "code": {"command": "aletheia sft", "commit": "ab", "patch": {"path": "x", "sha256": "y"}},
    "environment": {"python": "3.11", "libraries": {"torch": "2"}, "lock": {"sha256": "ab", "differing": {}}},
    "resources": {
        "wall_seconds": 5.0,
        "energy": {"kwh": 0.1, "how": "estimated"},
        "cost": {"amount": 1.0, "currency": "USD"},
    },
    "external": {"mlflow": {"run_id": "x"}},
}
PERSON = f"""\
# Yours. The pipeline never touches what stands above the line.
experiment_id: {ID}
date: 2026-01-01
profile: small
stages: [sft, dpo]   # both
from: base
description: 'naïve 🚀'
hypothesis: >
  More data
  lowers the loss.
success_criteria:
  - eval_loss < 7
  - {{criterion: "b > 2", role: guardrail, min_n: 50}}
overrides: {{sft_config.lora_rank: 32}}
tags: [lora, "ablation"]
observations: []
journal:
  - date: 2026-01-02
    learned: |
      Much.
    open_questions: [why]
learnings: {{training: [a], domain: [b]}}
next_steps:
  - Try rank 64
  - {{step: rest, done: true}}
related: [EXP-2026-01-01-002]
conclusion:

"""
HOSTILE = [
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{canary}]]",
    '!!python/object/apply:os.system ["touch {canary}"]',
    "!!python/name:os.system ''",
    "!!python/object/new:os.system [touch {canary}]",
    "!!binary ////",
    "!!set {{a, b}}",
    "!!omap [a: 1]",
    "!!timestamp maybe",
    "!!float x",
    "!<tag:yaml.org,2002:int> [1]",
    "!custom {{}}",
    "&a [*a]",
    "&a {{b: *a}}",
    "[&x [1, 2], *x, *x, *x, *x, *x, *x, *x, *x, *x, *x, *x, *x]",
    "[&a [x, x, x, x], &b [*a, *a, *a], &c [*b, *b, *b], &d [*c, *c, *c]]",
    "*nowhere",
    "{{<<: [{{a: 1}}, {{b: 2}}]}}",
    "{{<<: 5}}",
    "[" * 30 + "]" * 30,
    "[" * 2000,
    "{{a: " * 39 + "}}" * 39,
    "1" * 300,
    "1" * 400,
    "{{x: {{value: " + "1" * 400 + "}}, eval_loss: " + "-1" + "0" * 400 + "}}",
    '["loss is low", {{criterion: x}}, {{criterion: "a < 1", min_n: many}}, 5, [a < 1]]',
    "[&a0 [x], " + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)) + "]",
    "-" + "9" * 5000,
    "1e400",
    "-.inf",
    ".nan",
    "0x" + "f" * 400,
    "1:59:59:59",
    "2026-02-30",
    "2026-13-01T99:00:00Z",
    "0001-01-01",
    '"\\ud800"',
    '"\\0\\a\\e[31m\\u2028\\x85"',
    "'" + "x" * 100_000 + "'",
    "null",
    "~",
    "true",
    "[]",
    "{{}}",
    "[null, [null], {{null: null}}]",
    "{{1: 2, true: 3, null: 4, 2026-01-01: 5, [a]: 6}}",
    "? [a, b]\n: {{c}}",
    '{{value: .nan, ci_low: "x", ci_high: [], n: -1}}',
    "{{before: 1, after: {{value: 1e999}}, delta: {{ci_low: 0}}}}",
    "|\n  text\n\tmore",
    "%YAML 9.9",
    "--- a\n--- b\n...",
    "# ─── Below this line",
]

ODD: list[Any] = [
    10**400,
    -(10**400),
    math.nan,
    -math.inf,
    1e308,
    -1,
    0,
    None,
    True,
    "",
    "5",
    "x\x1b[31m\u2028\r",
    b"\xff",
]
ODD += [
    [],
    [None],
    [[1]],
    {},
    {"value": 10**400},
    {"value": 1, "ci_low": math.nan, "ci_high": "x", "n": -1},
    ["a is low"],
]
ODD += [[{"criterion": "x"}], {"before": [], "after": {}}, {1: {None: 2}}, datetime.date(1, 1, 1), "EXP-2026-01-01-001"]


def _lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 20])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def block_deleted(content: bytes, draw: random.Random) -> bytes:
    lines = _lines(content)
    begin = draw.randrange(len(lines))
    return b"".join(lines[:begin] + lines[begin + draw.randint(1, 12) :])


def block_doubled(content: bytes, draw: random.Random) -> bytes:
    lines = _lines(content)
    begin = draw.randrange(len(lines))
    end = begin + draw.randint(1, 30)
    return b"".join(lines[:end] + lines[begin:])


def block_moved(content: bytes, draw: random.Random) -> bytes:
    lines = _lines(content)
    begin = draw.randrange(len(lines))
    block = lines[begin : begin + draw.randint(1, 12)]
    rest = lines[:begin] + lines[begin + len(block) :]
    at = draw.randrange(len(rest) + 1)
    return b"".join(rest[:at] + block + rest[at:])


def indented_otherwise(content: bytes, draw: random.Random) -> bytes:
    lines = _lines(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(lines))
        lines[at] = draw.choice([b" ", b"\t", b"   ", b"- ", b"? ", b": "]) + lines[at]
    return b"".join(lines)


def hostile_line(content: bytes, draw: random.Random) -> bytes:
    lines = _lines(content)
    key = draw.choice(["", "x: ", "tags: ", "- ", "results: ", "  "])
    lines.insert(draw.randrange(len(lines) + 1), f"{key}{draw.choice(HOSTILE)}\n".encode())
    return b"".join(lines)


def hostile_value(content: bytes, draw: random.Random) -> bytes:
    """One key's value replaced, at any depth, its block with it."""
    keys = list(re.finditer(rb"(?m)^([ -]*)([a-z_]+):(.*\n(?:\1[ -].*\n)*)", content))
    if not keys:
        return hostile_line(content, draw)
    match = draw.choice(keys)
    return content[: match.start(3)] + f" {draw.choice(HOSTILE)}\n".encode() + content[match.end(3) :]


def hostile_values(content: bytes, draw: random.Random) -> bytes:
    for _ in range(6):
        content = hostile_value(content, draw)
    return content


def odd_values(content: bytes, draw: random.Random) -> bytes:
    """YAML as good as before, with values of other kinds in its places."""
    above, mark, below = content.rpartition(MARK)
    values = yamlio.load(below.decode()).value
    for _ in range(draw.choice([1, 3, 10])):
        within, key = draw.choice(list(_places(values)))
        within[key] = copy.deepcopy(draw.choice(ODD))
    return above + mark + yamlio.dump(values).encode()


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(values, dict | list):
        for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
            yield values, key
            yield from _places(value)


def odd_bytes(content: bytes, draw: random.Random) -> bytes:
    odd = [b"\0", b"\r", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"\xed\xa0\x80", b"\x1b[31m", b"\t"]
    odd += ["🚀".encode(), b"\xf0\x9f", b"\x0c", b"\x7f", b"\xf4\x90\x80\x80", b"\n\n", b"\r\r\n", b"\r\n"]
    for _ in range(draw.choice([1, 2, 8])):
        at = draw.randrange(len(content) + 1)
        content = content[:at] + draw.choice(odd) + content[at:]
    return content


def recoded(content: bytes, draw: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    ways: list[Callable[[], bytes]] = [
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-16-be"),
        lambda: text.encode("latin-1", "replace"),
        lambda: text.encode("utf-8-sig"),
        lambda: b"\xef\xbb\xbf" * 2 + content,
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: content.replace(b"\n", b"\r\r\n"),
        lambda: content.replace(b"\n", b"\r\n", draw.randint(1, 20)),
        lambda: content.replace(b"\n", "\u2028".encode(), draw.randint(1, 3)),
        lambda: content.rstrip(b"\n"),
        lambda: content + b"\n" * draw.randint(1, 30),
        lambda: content.swapcase(),
        lambda: content[::-1],
        lambda: b"",
        lambda: b"\n\n",
        lambda: bytes(draw.randrange(256) for _ in range(500)),
    ]
    return draw.choice(ways)()


def line_disturbed(content: bytes, draw: random.Random) -> bytes:
    above, mark, below = content.partition(MARK)
    ways = [
        above + below,
        above + mark + mark + below,
        above + mark + b"notes: between\n" + mark + below,
        above + mark + below + mark + below,
        above + b"  " + mark + below,
        above + mark.replace(b"pipeline", b"pipe") + below,
        above.rstrip(b"\n") + mark + below,
        above + mark,
        above,
        mark + below,
        below,
        below + mark + above,
        mark,
        above + mark + above + mark + below,
        above + mark + b"\0" + below,
        above + mark + re.sub(rb"seal: .*\n", b"", below),
        above + mark + below.replace(b"seal: ", b"seal: 00"),
        above + mark + re.sub(rb"seal: .*\n", b"seal: " + b"0" * 64 + b"\n", below),
        above + mark + below + b"status: failed\n",
    ]
    return draw.choice(ways)


def several(content: bytes, draw: random.Random) -> bytes:
    for damage in draw.sample(DAMAGES[:-2], 3):
        content = damage(content or b"x: 1\n", draw)
    return content


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    truncated,
    flipped,
    block_deleted,
    block_doubled,
    block_moved,
    indented_otherwise,
    hostile_line,
    hostile_value,
    hostile_values,
    odd_bytes,
    recoded,
    line_disturbed,
    odd_values,
    several,
]
SECTIONS = ["whole", "above", "below"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole record with its folder, made once."""
    root = tmp_path_factory.mktemp("sound")
    file = RecordFile(root / f"{ID}.yaml")
    file.path.write_bytes(PERSON.encode())
    file.write(Facts(**FACTS))
    return root


def damaged(
    content: bytes, damage: Callable[[bytes, random.Random], bytes], draw: random.Random, canary: Path
) -> bytes:
    """In the whole file or in one half; an older record's lower half has no seal, and counts as it stands."""
    section = draw.choice(SECTIONS)
    above, _, below = content.partition(MARK)
    if draw.random() < 0.7:
        below = re.sub(rb"seal: .*\n", b"", below)
    if section == "above":
        changed = damage(above, draw) + MARK + below
    elif section == "below":
        changed = above + MARK + damage(below, draw)
    else:
        changed = damage(above + MARK + below, draw)
    return changed.replace(b"{canary}", str(canary).encode()).replace(b"{{", b"{").replace(b"}}", b"}")


def looks(file: RecordFile, place: Workspace, as_json: bool) -> Iterator[Callable[[], Any]]:
    yield from (file.read, file.person, file.above)
    yield partial(list_records, place, Filters(where=["eval_loss < 9"]), "-eval_loss", None, as_json)
    yield partial(lint, place, [], as_json)


def uses(file: RecordFile, place: Workspace, as_json: bool) -> Iterator[Callable[[], Any]]:
    """What may put a lower half right, or replaces it."""
    yield partial(show, place, ID, as_json)
    yield partial(repair, place, [], as_json)
    yield partial(sync, place, [], as_json)
    yield file.facts
    yield partial(file.write, AFTER)


def survives(operation: Callable[[], Any]) -> Any:
    try:
        return operation()
    except UserError as error:
        assert "\n" not in str(error)
        return error


@pytest.mark.usefixtures("parsed_once")
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_broken_or_hostile_record_crashes_loses_a_byte_or_runs_anything(
    damage: Callable[[bytes, random.Random], bytes],
    sound: Path,
    place: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(record_file, "_SETTLES_WITHIN", 0.0)  # no editor is at work here
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("os.fsync", lambda handle: None)
    canary = tmp_path / "canary"
    whole = (sound / f"{ID}.yaml").read_bytes()
    for case in range(CASES):
        draw = random.Random(f"{damage.__name__} {case}")
        content = damaged(whole, damage, draw, canary)
        copies = draw.random() < 0.4  # in another checkout there are none
        shutil.rmtree(place.experiments)
        place.experiments.mkdir()
        if copies:
            shutil.copytree(sound / ID, place.experiments / ID)
        file = RecordFile(place.experiments / f"{ID}.yaml")
        file.path.write_bytes(content)
        try:
            for look in looks(file, place, as_json=case % 2 == 0):
                survives(look)
            assert file.path.read_bytes() == content  # so far it was only looked at
            for use in uses(file, place, as_json=case % 2 == 0):
                keeps_what_is_the_persons(file, use)
            assert file.facts() == AFTER  # in the file, or beside it
            assert not canary.exists()
        except Exception as error:
            error.add_note(
                f"{damage.__name__}, case {case}, {'with' if copies else 'without'} copies: {content[:3000]!r}"
            )
            raise
        capsys.readouterr()


def keeps_what_is_the_persons(file: RecordFile, operation: Callable[[], Any]) -> None:
    """Above the line, as `split` finds it, every byte stays; where that cannot be read the whole file does."""
    before, written = file.path.read_bytes(), file._written()
    above, person = split(before, written).above, survives(file.person)
    survives(operation)
    after = file.path.read_bytes()
    if isinstance(person, UserError):
        assert after == before
    elif after != before:
        end = b"\r\n" if above.split(b"\n", 1)[0].endswith(b"\r") else b"\n"
        assert after.startswith(above + (b"" if above.endswith(b"\n") else end) + LINE.encode())
