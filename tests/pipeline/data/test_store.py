"""Snapshots: stored once under the hash of their content, read back as they were, and never believed unchecked."""

import gzip
import json
from typing import Any

import pytest

from pipeline.data import store
from pipeline.data.read import read_rows
from pipeline.data.rows import Conversation, PreferencePair, describe, row_hash
from pipeline.errors import UserError
from pipeline.workspace import Workspace

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n} é\u2028"}]} | extra
    for n, extra in enumerate([{"id": "own", "source": "wiki"}, {}, {"domain": "d", "date": "2026-01-01"}])
]


def read(home: Workspace, rows: list[dict[str, Any]]) -> list[Conversation]:
    home.path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(home, "rows.jsonl", Conversation)


def kept(home: Workspace, rows: list[Conversation]) -> str:
    path = store.keep(home, rows)
    assert path.parent == home.checkpoints / "data"
    return path.name.removesuffix(".jsonl.gz")


def test_snapshot_gives_back_the_very_rows_with_their_ids_and_places(home: Workspace) -> None:
    rows = read(home, ROWS)
    sha256 = kept(home, rows)
    assert sha256 == describe(rows)["sha256"]
    found = sorted(store.load(home, sha256, Conversation), key=lambda row: row.line)
    assert found == rows and [r.where for r in found] == [r.where for r in rows]
    assert [r.id for r in found] == ["own", "rows.jsonl:2", "rows.jsonl:3"]
    assert [row_hash(r) for r in found] == [row_hash(r) for r in rows]


def test_one_set_is_one_file_byte_for_byte_whatever_its_order(home: Workspace) -> None:
    rows = read(home, ROWS)
    path = store.keep(home, rows)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert store.keep(home, rows[::-1]) == path and (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.unlink()
    assert store.keep(home, rows[::-1]).read_bytes() == before[0]
    assert len(list(path.parent.iterdir())) == 1


def test_another_content_is_another_snapshot(home: Workspace) -> None:
    first = kept(home, read(home, ROWS))
    second = kept(home, read(home, [*ROWS[:2], ROWS[2] | {"domain": "e"}]))
    assert first != second and sorted(store.named(home, "")) == sorted([first, second])
    assert store.named(home, first[:8]) == [first]


@pytest.mark.parametrize("damage", ["changed", "cut", "no gzip", "a row less", "gone"])
def test_snapshot_that_is_not_what_its_name_says_is_refused(home: Workspace, damage: str) -> None:
    sha256 = kept(home, read(home, ROWS))
    path = home.checkpoints / "data" / f"{sha256}.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({
            "changed": gzip.compress(b"".join(lines).replace(b"a1", b"b1")),
            "cut": path.read_bytes()[:-20],
            "no gzip": b"".join(lines),
            "a row less": gzip.compress(b"".join(lines[1:])),
        }[damage])  # fmt: skip
    with pytest.raises(UserError, match=rf"^checkpoints/data/{sha256}\.jsonl\.gz: "):
        store.load(home, sha256, Conversation)


def test_a_write_that_fails_leaves_nothing(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read(home, ROWS)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.keep(home, rows)
    assert list((home.checkpoints / "data").iterdir()) == []


def test_pairs_are_kept_too(home: Workspace) -> None:
    ask, one, two = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    home.path("pairs.jsonl").write_text(json.dumps({"prompt": [ask], "chosen": [one], "rejected": [two]}))
    pairs = read_rows(home, "pairs.jsonl", PreferencePair)
    sha256 = store.keep(home, pairs).name.removesuffix(".jsonl.gz")
    assert store.load(home, sha256, PreferencePair) == pairs
    assert set(store.first_values(home, sha256)) >= {"prompt", "chosen", "rejected"}
    assert store.first_values(home, "0" * 64) == {}
