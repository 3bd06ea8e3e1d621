import datetime as dt
from typing import Any

import pytest

from aletheia.exp.foreign import GROUPS, INNER, NAMES, Log, Placed, as_date, inner, number, place, plain, target
from pipeline.records.person import KEYS, Person


def placed(**values: Any) -> Placed:
    return place(Log(values, 1, ""))


def test_every_place_is_a_key_of_ours() -> None:
    assert {ours.partition(".")[0] for ours in NAMES} <= KEYS.keys()
    assert INNER.keys() <= KEYS.keys()
    assert {rest for rest in GROUPS.values() if rest} <= KEYS.keys()


def test_no_name_has_two_places() -> None:
    for table in (NAMES, *INNER.values()):
        names = [name for names in table.values() for name in names.split()]
        assert sorted(names) == sorted(set(names))
        assert all(name == plain(name) for name in names)
    assert {name for names in NAMES.values() for name in names.split()} & KEYS.keys() == {"experiment_id"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("🎯 2.1 Objective", "objective"),
        ("What didn't work", "analysis.did_not_work"),
        ("What didn’t work:", "analysis.did_not_work"),
        ("**Set-up**", "set_up"),
        ("Next Steps", "next_steps"),
        ("1. Metrics", "metrics"),
        ("Visualisations", "plots"),
        ("experiment_id", "foreign_id"),
        ("The weather", None),
        ("", None),
    ],
)
def test_a_name_is_known_whatever_stands_around_it(name: str, key: str | None) -> None:
    assert target(name) == key


def test_names_inside_a_key_are_known_too() -> None:
    assert inner("journal", "What I would do differently") == "do_differently"
    assert inner("metrics", "Metric") == "name"
    assert inner("metrics", "Target") == "target"
    assert inner("journal", "On reading late") == "On reading late"


def test_what_has_no_place_is_kept_as_it_was_written_and_named() -> None:
    one = placed(hypothesis="x", rows="100-500", owner_of={"date": "TBD"})
    assert one.person["notes"] == {"rows": "100-500", "owner_of": {"date": "TBD"}}
    assert list(one.unplaced) == ["rows", "owner_of"]
    assert one.remarks == []


def test_what_does_not_fit_its_place_is_kept_and_named() -> None:
    one = placed(stages=["pretraining"], plots=[{"caption": "no path"}], epochs=8)
    assert one.person == {"notes": {"stages": ["pretraining"], "plots": [{"caption": "no path"}], "epochs": 8}}
    assert one.remarks == [f"{key}: does not fit `{key}`" for key in ("stages", "plots", "epochs")]


def test_two_of_one_place_are_joined_or_both_kept() -> None:
    one = placed(findings=["a"], observations=["b"], config={"x": 1}, params={"x": 2}, author="A", owner="B")
    assert one.person["observations"] == ["a", "b"]
    assert one.person["hyperparameters"] == {"x": 1}
    assert one.person["experimenter"] == "A"
    assert one.person["notes"] == {"params": {"x": 2}, "owner": "B"}
    assert one.remarks == ["params: does not fit `hyperparameters`", "owner: does not fit `experimenter`"]


def test_groups_are_looked_into_and_what_is_left_stays_together() -> None:
    one = placed(
        results={"f1": 0.9, "best_epoch": {"epoch": 3}, "conclusion": "good"}, metadata={"author": "A", "mood": "b"}
    )
    assert one.person["metrics"] == {"f1": 0.9}
    assert one.person["epochs"] == {"best": {"epoch": 3}}
    assert (one.person["conclusion"], one.person["experimenter"]) == ("good", "A")
    assert one.person["notes"] == {"metadata.mood": "b"}


@pytest.mark.parametrize(
    "text",
    [
        "TBD",
        "tbd",
        "TODO",
        "to do",
        "N/A",
        "XX",
        "???",
        "…",
        "<fill in>",
        "<your name>",
        "<!-- what you expect -->",
        "YYYY-MM-DD",
        "2024-XX-XX",
        "[fill in]",
    ],
)
def test_a_placeholder_becomes_null_and_is_named(text: str) -> None:
    one = placed(objective=text, config={"lr": [1, text]})
    assert one.person == {"objective": None, "hyperparameters": {"lr": [1, None]}}
    assert one.remarks == [f"objective: `{text}` became null", f"config.lr.2: `{text}` became null"]


@pytest.mark.parametrize(
    "text", ["TBD once 001 is done", "<pad>", "</s>", "<https://x.y/a b>", "NA", "none", "X", "x1", "?"]
)
def test_what_only_looks_like_a_placeholder_stays(text: str) -> None:
    assert placed(objective=text).person == {"objective": text}


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("100-500", [100, 500]),
        ("100 – 500", [100, 500]),
        ("1e-5-1e-3", [1e-5, 1e-3]),
        ("0.0 to 0.2", [0.0, 0.2]),
        ("-1--0.5", [-1, -0.5]),
        ("8..64", [8, 64]),
    ],
)
def test_a_range_is_two_numbers(text: str, ends: list[float]) -> None:
    assert placed(config={"x": text}).person["hyperparameters"] == {"x": ends}


@pytest.mark.parametrize(
    "text", ["2024-01", "500-100", "2024-01-31", "100-500 rows", "3.10-3.12", "007-008", "a-b", "5", "1-2-3", "10-20%"]
)
def test_what_is_no_range_of_numbers_stays(text: str) -> None:
    assert placed(config={"x": text}).person["hyperparameters"] == {"x": text}


def test_ids_dates_and_tags_are_never_ranges() -> None:
    one = placed(id="100-500", tags=["1-2"], related=["12-15"], config={"date": "10-12"})
    assert one.person == {
        "foreign_id": "100-500",
        "tags": ["1-2"],
        "related": ["12-15"],
        "hyperparameters": {"date": "10-12"},
    }


@pytest.mark.parametrize(
    "text",
    ["2024-01-31", "20240131", "2024/01/31", "31 January 2024", "Jan 31, 2024", "January 31st, 2024", "31.01.2024",
     "31/01/2024", "01/31/2024"],
)  # fmt: skip
def test_a_date_that_can_mean_one_day_is_read(text: str) -> None:
    assert as_date(text) == dt.date(2024, 1, 31)


@pytest.mark.parametrize(
    "text", ["01/02/2024", "31/31/2024", "next week", "2024-02-30", "2024", "January 2024", 5, 1e9, ""]
)
def test_a_date_that_could_mean_another_is_kept_as_a_note(text: Any) -> None:
    assert as_date(text) is None
    one = placed(date=text)
    assert one.person == {"date": None, "notes": {"date": text}}
    assert "only one day" in one.remarks[0]


def test_the_day_in_an_id_is_the_date_where_none_is_given() -> None:
    assert place(Log({}, 1, "", "20240131_142233_j123456")).person["date"] == dt.date(2024, 1, 31)
    assert place(Log({}, 1, "", "EXP-2024-03-15-002")).person["date"] == dt.date(2024, 3, 15)
    assert "date" not in place(Log({}, 1, "", "EXP-2024-XX-XX-002")).person
    assert place(Log({"date": "2024-02-01"}, 1, "", "20240131_142233")).person["date"] == dt.date(2024, 2, 1)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("✅ Complete", "complete"),
        ("done", "complete"),
        ("FAILED: CUDA out of memory", "failed"),
        ("❌", "failed"),
        ("stopped by hand", "cancelled"),
        ("in progress", "cancelled"),
        ("planned", "planned"),
        ("Not started", "planned"),
        ("planned after the failed run", "planned"),
    ],
)
def test_how_it_ended_is_read_from_its_status(text: str, status: str) -> None:
    one = placed(Status=text, hypothesis="x")
    assert one.status == status
    assert one.person["notes"] == {"Status": text}


def test_an_open_id_or_date_with_nothing_found_is_a_plan() -> None:
    assert placed(id="EXP-2024-XX-XX-002", hypothesis="x").status == "planned"
    assert placed(date="TBD", hypothesis="x", metrics_to_track=["f1"]).status == "planned"
    assert placed(date="TBD", metrics={"f1": 0.9}).status == "complete"
    assert placed(id="EXP-2024-XX-XX-002", observations=["x"]).status == "complete"
    assert placed(hypothesis="x").status == "complete"


def test_criteria_that_cannot_be_computed_are_kept_as_notes() -> None:
    one = placed(
        success_criteria=[
            "f1 > 0.9",
            "people like it",
            {"metric": "loss", "operator": "<=", "threshold": 2},
            {"criterion": "x"},
        ]
    )
    assert one.person["success_criteria"] == ["f1 > 0.9", "loss <= 2"]
    assert one.person["notes"] == {"success_criteria": ["people like it", {"criterion": "x"}]}
    assert one.remarks == ["success_criteria: 2 not of the form METRIC OP NUMBER"]


def test_own_notes_and_what_was_not_placed_stand_side_by_side() -> None:
    assert placed(notes="mine", odd=1).person["notes"] == {"notes": "mine", "odd": 1}
    assert placed(notes={"a": "mine"}, odd=1).person["notes"] == {"a": "mine", "odd": 1}
    assert placed(notes="mine").person["notes"] == "mine"


def test_whatever_is_placed_is_a_persons_half() -> None:
    odd: tuple[Any, ...] = (
        None,
        0,
        1.5,
        "x",
        "",
        True,
        [],
        [1],
        ["a"],
        [{}],
        [[]],
        {},
        {"a": 1},
        {"a": {"b": [1]}},
        dt.date(2024, 1, 1),
    )
    for name in [*KEYS, *GROUPS, *(name for names in NAMES.values() for name in names.split())]:
        for value in odd:
            Person.model_validate(placed(**{name: value}).person)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-0.5", -0.5), ("2e-4", 2e-4), ("1.50", 1.5), ("007", None), ("1234567e8", None), ("1,234", None),
     ("1e999", None), ("9" * 5000, None), ("", None), ("nan", None), ("12:30", None)],
)  # fmt: skip
def test_a_number_is_what_can_be_nothing_else(text: str, value: float | None) -> None:
    assert number(text) == value


def test_a_step_that_is_done_in_words_is_done_or_not() -> None:
    steps = [{"task": "a", "done": "no"}, {"task": "b", "done": "Yes"}, {"task": "c"}]
    assert place(Log({"next": steps}, 1, "")).person["next_steps"] == [
        {"step": "a", "done": False},
        {"step": "b", "done": True},
        {"step": "c"},
    ]
