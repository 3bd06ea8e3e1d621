"""A verdict that was given is not asked for again; a failure is."""

from pathlib import Path

import pytest

from eval.judges.judge import Verdict
from eval.judges.kept import Kept, key
from pipeline.workspace import Workspace

IDENTITY = key("http://here/v1", "reader")


@pytest.fixture
def there(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_verdicts_are_found_by_another_process(there: Workspace) -> None:
    Kept(there, IDENTITY).put("a", Verdict(0.5, "alike: „gleich“"))
    again = Kept(there, IDENTITY)
    assert again.get("a") == Verdict(0.5, "alike: „gleich“")
    assert again.get("b") is None
    assert Kept(there, key("http://here/v1", "another")).get("a") is None


def test_a_failure_is_not_kept(there: Workspace) -> None:
    kept = Kept(there, IDENTITY)
    with pytest.raises(ValueError, match="not kept"):
        kept.put("a", Verdict(None, "no answer"))
    assert not kept.path.exists()


@pytest.mark.parametrize(
    "torn", [b'{"key": "b", "sco', b'{"key": "b", "score": 0.7, "why": ""}', b'{"key": "b"}', b"[]", b"\xff\x00"],
    ids=["cut off", "no score of ours", "no score", "no row", "no text"],
)  # fmt: skip
def test_what_is_no_verdict_is_passed_over_and_spoils_no_other(there: Workspace, torn: bytes) -> None:
    kept = Kept(there, IDENTITY)
    kept.put("a", Verdict(1.0))
    with kept.path.open("ab") as out:
        out.write(torn)
    after = Kept(there, IDENTITY)
    assert after.get("b") is None
    after.put("c", Verdict(0.0))
    last = Kept(there, IDENTITY)
    assert (last.get("a"), last.get("b"), last.get("c")) == (Verdict(1.0), None, Verdict(0.0))


def test_parts_that_differ_have_different_keys() -> None:
    assert (
        len({key("ab", "c"), key("a", "bc"), key("abc"), key(["a", "b"], "c"), key("ab", None), key("ab", "None")}) == 6
    )
