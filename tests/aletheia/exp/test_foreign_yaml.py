import pytest

from aletheia.exp.foreign_yaml import logs
from pipeline.errors import UserError


def test_a_mapping_is_one_experiment() -> None:
    (log,) = logs("\ufeff# c\nhypothesis: x\n1: y\n", "x.yaml")
    assert (log.values, log.line, log.foreign_id) == ({"hypothesis": "x", "1": "y"}, 1, None)


def test_a_list_of_mappings_is_several() -> None:
    found = logs("- hypothesis: a\n- hypothesis: b\n", "x.yaml")
    assert [(log.values["hypothesis"], log.line) for log in found] == [("a", 1), ("b", 2)]


def test_a_list_under_a_name_for_experiments_is_several_and_what_stands_around_is_kept_by_the_first() -> None:
    found = logs("project: P\nPlanned experiments:\n  - {id: A}\n  - {id: B}\nowner: O\n", "x.yaml")
    assert [log.values for log in found] == [{"id": "A"}, {"id": "B"}]
    assert [log.outside for log in found] == [{"project": "P", "owner": "O"}, {}]
    assert [log.line for log in found] == [3, 4]


def test_a_mapping_of_names_to_experiments_is_several() -> None:
    for text in ("EXP-2024-XX-XX-001: {a: 1}\nEXP-2024-XX-XX-002: {a: 2}\n", "runs:\n  one: {a: 1}\n  two: {a: 2}\n"):
        found = logs(text, "x.yaml")
        assert [log.values for log in found] == [{"a": 1}, {"a": 2}]
    assert [log.foreign_id for log in found] == ["one", "two"]


def test_a_list_of_something_else_is_a_value() -> None:
    (log,) = logs("hypothesis: x\nruns: [1, 2]\ntrials: 60\n", "x.yaml")
    assert log.values == {"hypothesis": "x", "runs": [1, 2], "trials": 60}


def test_json_is_yaml() -> None:
    (log,) = logs('{"hypothesis": "x", "metrics": {"f1": 0.9}}', "x.json")
    assert log.values == {"hypothesis": "x", "metrics": {"f1": 0.9}}


def test_an_experiment_is_known_by_what_it_says_not_by_how_it_is_written() -> None:
    texts = [logs(text, "x")[0].text for text in ("a: 1\nb: [x]\n", "# c\na:   1\nb:\n- x\n", "a: 2\nb: [x]\n")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("text", ["", "x", "- 1", "- a: 1\n- b", "3"])
def test_what_is_no_mapping_holds_no_experiment(text: str) -> None:
    assert logs(text, "x.yaml") == []


def test_no_yaml_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match=r"^x.yaml:2:3: mapping values are not allowed"):
        logs("a: 1\n b: 2\n", "x.yaml")


def test_words_stay_as_they_were_written() -> None:
    text = "# é ü\nyes: no\nit's: [On, OFF, true, 'no', 3]\n1.10: {on: x, 2024-01-01: y}\nnull: |\n  no\nkept: é no\n"
    (log,) = logs(text, "x.yaml")
    assert log.values == {
        "yes": "no",
        "it's": ["On", "OFF", True, "no", 3],
        "1.10": {"on": "x", "2024-01-01": "y"},
        "null": "no\n",
        "kept": "é no",
    }


def test_what_stands_for_something_else_in_yaml_still_does() -> None:
    (log,) = logs("base: &b {lr: 1}\nrun:\n  <<: *b\n  ? rank\n  : no # not yet\n!!str yes: !!bool no\n", "x.yaml")
    assert log.values == {"base": {"lr": 1}, "run": {"lr": 1, "rank": "no"}, "yes": False}
