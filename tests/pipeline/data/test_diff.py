"""Two sets of rows compared by content: what is added, removed, changed and moved."""

from pipeline.data.diff import Item, difference, fields
from pipeline.data.rows import Conversation, row_hash, validated


def row(question: str, answer: str, line: int = 1, **more: str) -> Conversation:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return validated({"messages": turns, **more}, Conversation, "rows.jsonl", line)


def side(*rows: Conversation, part: str = "") -> list[Item]:
    return [Item(row_hash(r), r.id, part, r) for r in rows]


def test_order_file_and_line_do_not_count() -> None:
    found = difference(side(row("q", "a", 1), row("r", "b", 2)), side(row("r", "b", 1), row("q", "a", 2)))
    assert (found.same, found.added, found.removed, found.changed) == (2, [], [], [])


def test_row_with_the_same_id_or_else_the_same_prompt_is_changed() -> None:
    before = side(row("q", "a", id="one"), row("r", "b", 2), row("s", "c", 3))
    after = side(row("other words", "a", id="one"), row("r", "better", 9), row("t", "d", 3))
    found = difference(before, after)
    pairs = [(old.row.answers, new.row.answers) for old, new in found.changed if old.row and new.row]
    assert pairs == [(["a"], ["a"]), (["b"], ["better"])]
    assert [i.row.asked for i in found.added if i.row] == [["t"]]
    assert [i.row.asked for i in found.removed if i.row] == [["s"]]


def test_two_rows_with_one_prompt_are_each_paired_once() -> None:
    found = difference(side(row("q", "a"), row("q", "b", 2)), side(row("q", "c"), row("q", "d", 2), row("q", "e", 3)))
    assert len(found.changed) + len(found.removed) == 2 and len(found.changed) + len(found.added) == 3


def test_row_that_stands_twice_on_one_side_is_added_or_removed_once() -> None:
    once, twice = side(row("q", "a"), row("r", "b", 2)), side(row("q", "a"), row("r", "b", 2), row("q", "a", 3))
    found = difference(once, twice)
    assert (found.same, [i.id for i in found.added], found.removed, found.changed) == (2, ["rows.jsonl:3"], [], [])
    found = difference(twice, once)
    assert (found.same, found.added, [i.id for i in found.removed], found.changed) == (2, [], ["rows.jsonl:3"], [])
    found = difference(twice, twice)
    assert (found.same, found.added, found.removed, found.changed) == (3, [], [], [])


def test_rows_of_one_text_that_all_changed_are_all_paired() -> None:
    found = difference(side(row("q", "a"), row("q", "a", 2)), side(row("q", "b"), row("q", "b", 2)))
    assert (found.same, found.added, found.removed, len(found.changed)) == (0, [], [], 2)


def test_row_that_stands_in_two_parts_has_moved_only_where_the_parts_differ() -> None:
    train, held_out = side(row("q", "a"), part="train"), side(row("q", "a", 2), part="held_out")
    found = difference(train + held_out, held_out + train)
    assert (found.same, found.moved) == (2, [])
    found = difference(train + held_out, train + train)
    assert (found.same, [(o.part, n.part) for o, n in found.moved]) == (2, [("held_out", "train")])


def test_row_with_the_same_id_goes_before_one_with_the_same_prompt() -> None:
    found = difference(side(row("q", "a", id="one")), side(row("q", "b", id="two"), row("q", "c", id="one")))
    assert [new.id for _, new in found.changed] == ["one"] and [i.id for i in found.added] == ["two"]


def test_row_that_went_from_training_to_held_out_is_named() -> None:
    one, two = row("q", "a"), row("r", "b", 2)
    found = difference(side(one, two, part="train"), side(one, part="held_out") + side(two, part="train"))
    assert [(old.part, new.part) for old, new in found.moved] == [("train", "held_out")] and found.same == 2
    assert difference(side(one, part="train"), side(one)).moved == [], "a path has no parts"


def test_hashes_alone_still_tell_what_was_added_and_changed() -> None:
    before = [Item("1" * 64, "a"), Item("2" * 64, "b")]
    after = [Item("1" * 64, "a"), Item("3" * 64, "b"), Item("4" * 64, "c")]
    found = difference(before, after)
    assert (found.same, [i.id for i in found.added], [n.id for _, n in found.changed]) == (1, ["c"], ["b"])


def test_changed_fields_are_named() -> None:
    assert fields(row("q", "a"), row("q", "b", 7, domain="d")) == ["domain", "messages"]
    assert fields(row("q", "a", 1), row("q", "a", 2)) == [], "an id that the place gave is no field"
