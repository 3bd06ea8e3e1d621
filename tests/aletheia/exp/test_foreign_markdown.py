from typing import Any

import pytest

from aletheia.exp.foreign_markdown import logs


def values(text: str) -> dict[str, Any]:
    (log,) = logs(text)
    return log.values


@pytest.mark.parametrize(
    ("heading", "foreign_id", "title"),
    [
        ("## Experiment 3: LoRA rank", "Experiment 3", "LoRA rank"),
        ("# 🧪 Experiment #4 – more rows", "Experiment #4", "more rows"),
        ("## EXP-2024-03-15-002", "EXP-2024-03-15-002", None),
        ("### EXP-2024-XX-XX-002: where rows come from", "EXP-2024-XX-XX-002", "where rows come from"),
        ("### 20240131_142233_j123456", "20240131_142233_j123456", None),
        ("## Milestone 2: Attention", "Milestone 2", "Attention"),
        ("Run 7\n-----", "Run 7", None),
    ],
)
def test_a_heading_names_an_experiment(heading: str, foreign_id: str, title: str | None) -> None:
    first, second = logs(f"{heading}\n\n{'#' * 6} Objective\n\nx\n\n{heading.replace('Run 7', '## Run 7')} again\n")
    assert (first.foreign_id, first.values.get("title"), first.values["Objective"]) == (foreign_id, title, "x")
    assert second.line > first.line


def test_a_dated_heading_names_one_too() -> None:
    first, second = logs(
        "# Log\n\n## 2024-01-31: rank sweep\n\n### Observations\n\n- a\n\n## 2 February 2024\n\n### Metrics\n\nx\n"
    )
    assert (first.values["date"], first.values["title"], first.values["Observations"]) == (
        "2024-01-31",
        "rank sweep",
        ["a"],
    )
    assert (second.values["date"], second.foreign_id) == ("2 February 2024", None)


def test_the_uppermost_such_headings_are_the_experiments() -> None:
    first, second = logs("# Log\n\n## January\n\n### EXP-1-a\n\n#### Run 1\n\nx\n\n### EXP-1-b\n\n## Summary\n\nall\n")
    assert first.values == {"Run 1": "x"}
    assert first.outside == {"Log": "# Log\n\n## January", "Summary": "## Summary\n\nall"}
    assert second.values == {}


def test_runs_below_one_hypothesis_are_one_experiment() -> None:
    found = values("# Rank study\n\n## Hypothesis\n\nRank matters.\n\n## Runs\n\n### Run 1\n\na\n\n### Run 2\n\nb\n")
    assert found == {"title": "Rank study", "Hypothesis": "Rank matters.", "Runs": {"Run 1": "a", "Run 2": "b"}}


def test_dated_headings_over_what_was_learned_are_a_journal() -> None:
    text = """# Mine

## 2024-03-12

### What I learned

- a

### On tea

Green.

## 2024-03-14: late

Tired.

### Open questions

1. why
"""
    assert values(text) == {
        "title": "Mine",
        "journal": [
            {"date": "2024-03-12", "What I learned": ["a"], "On tea": "Green."},
            {"date": "2024-03-14", "title": "late", "text": "Tired.", "Open questions": ["why"]},
        ],
    }


def test_a_journal_may_stand_inside_an_experiment() -> None:
    first, _ = logs("## Experiment 1\n\n### 2024-03-12\n\n#### Learned\n\na\n\n## Experiment 2\n")
    assert first.values == {"journal": [{"date": "2024-03-12", "Learned": "a"}]}


def test_lines_with_a_key_are_values() -> None:
    text = "## Experiment 1\n\n**Date:** 2024-02-04\n**Seed**: 42\nStatus: ✅ done\n\n**Owner:** -\n\nA note: this is text.\n"
    assert values(text) == {
        "Date": "2024-02-04",
        "Seed": 42,
        "Status": "✅ done",
        "Owner": None,
        "description": "A note: this is text.",
    }


def test_a_list_of_keys_is_a_mapping_where_a_mapping_belongs() -> None:
    text = "## Experiment 1\n\n### Configuration\n\n- lr: 2e-4\n- **rank**: 16\n\n### Observations\n\n- Loss: it falls\n- 3\n"
    assert values(text) == {"Configuration": {"lr": 2e-4, "rank": 16}, "Observations": ["Loss: it falls", 3]}


def test_text_beside_a_mapping_is_kept_in_it() -> None:
    text = "## Experiment 1\n\n### Configuration\n\nAs before, but:\n\n- lr: 1\n\n```yaml\nrank: 8\n```\n"
    assert values(text)["Configuration"] == {"lr": 1, "rank": 8, "notes": ["As before, but:"]}


def test_check_boxes_are_steps() -> None:
    text = "## Experiment 1\n\n### Next steps\n\n- [x] one\n- [ ] two\n  - in part\n- three\n"
    assert values(text)["Next steps"] == [
        {"step": "one", "done": True},
        {"step": "two", "done": False, "details": ["in part"]},
        "three",
    ]


def test_a_table_is_rows_by_column_with_numbers() -> None:
    text = """## Experiment 1

### Metrics

| Metric | Value | Target |
|---|--:|---|
| **loss** | `~3e-8` | - |
| f1 | 0.90 | > 0.8 |
"""
    assert values(text)["Metrics"] == [
        {"Metric": "loss", "Value": "~3e-8", "Target": None},
        {"Metric": "f1", "Value": 0.9, "Target": "> 0.8"},
    ]


def test_a_table_without_a_heading_goes_by_its_columns() -> None:
    text = """## Experiment 1

| Metric | Value |
|---|---|
| f1 | 0.9 |

| Plot | What it shows |
|---|---|
| ![curve](loss.png) | where it turns |

| Epoch | Loss |
|---|---|
| 1 | 2.0 |

| Colour | Taste |
|---|---|
| red | sweet |
"""
    assert values(text) == {
        "metrics": [{"Metric": "f1", "Value": 0.9}],
        "plots": [{"path": "loss.png", "purpose": "where it turns", "title": "curve"}],
        "epochs.history": [{"Epoch": 1, "Loss": 2.0}],
        "table": [{"Colour": "red", "Taste": "sweet"}],
    }


def test_a_table_of_settings_or_of_splits_is_a_mapping() -> None:
    text = """## Experiment 1

### Set-up

| What | Is |
|---|---|
| gpu | A100 |

### Best epoch

| Split | Epoch | Loss |
|---|---|---|
| valid | 6 | 1.3 |
"""
    assert values(text) == {"Set-up": {"gpu": "A100"}, "Best epoch": {"valid": {"Epoch": 6, "Loss": 1.3}}}


def test_a_yaml_block_is_a_mapping_and_one_that_is_none_is_kept_by_name() -> None:
    text = "## Experiment 1\n\n```yaml\nseed: 1\n```\n\n### Config\n\n```yaml\nlr: 2e-4\n```\n\n### Odd\n\n```yaml\na: [\n```\n"
    (log,) = logs(text)
    assert log.values == {"seed": 1, "Config": {"lr": 2e-4}, "Odd": None}
    assert log.outside == {"yaml block at line 15 (did not find expected node content)": "```yaml\na: [\n```"}


def test_what_is_no_yaml_block_is_kept_with_its_fence() -> None:
    text = "## Experiment 1\n\n### Observations\n\nBefore:\n\n```python\nx = 1\n```\n\n> quoted\n"
    assert values(text)["Observations"] == ["Before:", "```python\nx = 1\n```", "> quoted"]


def test_the_text_below_a_heading_is_kept_beside_what_is_read_from_it() -> None:
    (log,) = logs("## Experiment 1\n\n### What puzzled me\n\nWhy *this*?\n\n- a\n  b\n")
    assert log.sources[("What puzzled me",)] == "Why *this*?\n\n- a\n  b"


def test_front_matter_is_a_mapping_and_hides_no_title() -> None:
    found = values("---\ntags: [a]\ntitle: short\n---\n# Long title\n\n## Hypothesis\n\nx\n")
    assert found == {"title": "Long title", "Hypothesis": "x", "tags": ["a"], "front matter title": "short"}
    (log, _) = logs("---\nteam: T\n---\n## Run 1\n\n## Run 2\n")
    assert (log.outside, log.line) == ({"team": "T"}, 4)
    assert values("---\n\nnot: [front\n")["description"] == "not: [front"


def test_two_headings_of_one_name_are_both_kept() -> None:
    text = "## Experiment 1\n\n### Notes\n\na\n\n### Notes\n\nb\n\n### Set-up\n\n- x: 1\n\n### Set-up\n\n- x: 2\n"
    assert values(text) == {"Notes": ["a", "b"], "Set-up": {"x": 1}, "Set-up (2)": {"x": 2}}


def test_a_page_without_headings_is_one_text() -> None:
    assert values("just words\n") == {"description": "just words"}
    assert values("") == {}


def test_cells_beyond_the_columns_are_kept_by_name() -> None:
    (log,) = logs("## Experiment 1\n\n### Metrics\n\n| a | b |\n|---|---|\n| 1 | 2 | 3 | x \\| y |\n| 4 | 5 |\n| 6 |\n")
    assert log.values["Metrics"] == [{"a": 1, "b": 2}, {"a": 4, "b": 5}, {"a": 6, "b": None}]
    assert log.outside == {"cells beyond the columns at line 7": [3, "x | y"]}


def test_columns_and_rows_of_one_name_are_both_kept() -> None:
    table = "| a | a |\n|---|---|\n| x | 1 |\n| x | 2 |\n"
    found = values(f"## Experiment 1\n\n### Metrics\n\n{table}\n### Configuration\n\n{table}")
    assert found["Metrics"] == [{"a": "x", "a (2)": 1}, {"a": "x", "a (2)": 2}]
    assert found["Configuration"] == {"x": 1, "x (2)": 2}


@pytest.mark.parametrize("heading", ["Results", "Metrics"])
def test_what_stands_beside_figures_goes_where_it_belongs(heading: str) -> None:
    text = f"""## Experiment 1

### {heading}

| Metric | Value |
|---|---|
| f1 | 0.9 |

loss: 0.3
steps: 100

![loss](img/loss.png) caption

```yaml
a: [
```

Conclusion: ❌ failed to converge,
as before
TODO: [ ] fewer epochs

- [ ] lower lr
  - by half
- [x] f1 measured
"""
    (log,) = logs(text)
    assert log.values == {
        heading: [
            {"Metric": "f1", "Value": 0.9},
            "[x] f1 measured",
            {"name": "loss", "value": 0.3},
            {"name": "steps", "value": 100},
        ],
        "plots": [{"path": "img/loss.png", "title": "loss", "purpose": "caption"}],
        "Conclusion": "❌ failed to converge, as before",
        "next_steps": [
            {"step": "fewer epochs", "done": False},
            {"step": "lower lr", "done": False, "details": ["by half"]},
        ],
    }
    assert list(log.outside.values()) == ["```yaml\na: [\n```"]


def test_plain_lines_with_a_key_are_values() -> None:
    text = "## Experiment 1\n\nbest epoch: 3\nlatest epoch = 5\ndate: TBD\nmood: fine\nand calm\n\nIt ran.\n"
    assert values(text) == {
        "best epoch": 3,
        "latest epoch": 5,
        "date": "TBD",
        "mood": "fine and calm",
        "description": "It ran.",
    }
    assert values("## Experiment 1\n\nmodel = small\n") == {"model": "small"}


@pytest.mark.parametrize("text", ["mood: fine", "We changed the\nmodel: it was large", "One: two three\nfour"])
def test_a_lone_line_with_a_colon_is_text(text: str) -> None:
    assert values(f"## Experiment 1\n\n{text}\n") == {"description": text.replace("\n", " ")}


def test_lines_with_a_key_among_prose_keep_their_breaks() -> None:
    assert values("## Experiment 1\n\n### Observations\n\nloss: falls\nspeed: fine\n") == {
        "Observations": "loss: falls\nspeed: fine"
    }


@pytest.mark.parametrize(
    ("heading", "date"),
    [
        ("Experiment 1: rank sweep (2024-03-01)", "2024-03-01"),
        ("Run 7 – 1 March 2024", "1 March 2024"),
        ("Rank sweep [March 1, 2024]", "March 1, 2024"),
        ("Experiment 1: since 2024-03-01 it fails", None),
        ("EXP-2024-03-15-002", None),
        ("Experiment 1 (2024-13-01)", None),
    ],
)
def test_a_heading_may_hold_the_date(heading: str, date: str | None) -> None:
    assert values(f"# {heading}\n\n## Objective\n\nx\n").get("date") == date


def test_a_date_of_its_own_and_that_of_the_heading_are_both_kept() -> None:
    found = values("## Experiment 1 (2024-03-01)\n\n**date:** 2024-03-02\n")
    assert (found["date"], found["heading date"]) == ("2024-03-02", "2024-03-01")


def test_words_in_a_yaml_block_stay_as_they_were_written() -> None:
    assert values("---\noff: on\n---\n\n```yaml\nyes: no\n```\n") == {"yes": "no", "off": "on"}


def test_notes_in_a_mapping_and_text_beside_it_are_both_kept() -> None:
    text = "## Experiment 1\n\n### Configuration\n\nAs before.\n\n```yaml\nlr: 1\nnotes: warm\n```\n"
    assert values(text)["Configuration"] == {"lr": 1, "notes": ["warm", "As before."]}
