"""What other logs call things, and where these have their place in a record.

A log is read as a mapping, whatever its format. Each of its keys is looked up here; placeholders become null, ranges
`[lo, hi]`, and a secret is taken out; each of these is remarked upon. What has no place, or does not fit there, is kept
under `notes` by its own name, as it was written.
"""

import datetime as dt
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pipeline.errors import UserError
from pipeline.records import criteria
from pipeline.records.capture import redact
from pipeline.records.person import KEYS, Person
from pipeline.records.schema import Status

NAMES = {  # our key, or a key inside it, and what others call it
    "foreign_id": "id experiment_id exp_id run_id job_id slurm_id slurm_job_id run_name",
    "title": "name experiment_name experiment_title",
    "date": "day start_date started run_date heading_date",
    "experimenter": "author owner researcher engineer assignee",
    "description": "summary overview abstract background",
    "objective": "objectives goal goals aim purpose",
    "hypothesis": "hypotheses",
    "success_criteria": "success_criterion acceptance_criteria",
    "expected_results": "expected_outcome expected_outcomes expectation expectations",
    "methodology": "method methods approach procedure protocol",
    "variables": "variables_to_test independent_variables factors",
    "conditions": "test_conditions arms method_branches branches",
    "parent": "parent_experiment parent_run based_on depends_on",
    "related": "related_experiments see_also",
    "tags": "keywords labels",
    "tracking": "tracking_platform experiment_tracking",
    "tracking.run_links": "run_links",
    "tracking.mlflow": "mlflow mlflow_run",
    "tracking.wandb": "wandb wandb_run w_b",
    "set_up": "setup experimental_setup",
    "set_up.model": "model architecture base_model",
    "set_up.environment": "environment software",
    "set_up.hardware": "hardware gpu gpus machine cluster",
    "seeds": "seed random_seed random_seeds",
    "splits": "split data_split data_splits train_test_split",
    "splits.dataset": "dataset datasets",
    "splits.samples": "samples sample_count n_samples num_samples sample_size",
    "preprocessing": "preprocessing_steps data_preprocessing",
    "hyperparameters": "config configuration parameters hyperparams params training_config settings",
    "hyperparameters.learning_rate": "learning_rate lr",
    "hyperparameters.batch_size": "batch_size",
    "hyperparameters.epochs": "num_epochs n_epochs",
    "marks": "configuration_marks config_flags flags",
    "search": "hyperparameter_search hyperparameter_tuning tuning",
    "search.space": "search_space",
    "ablations": "ablation ablation_plan ablation_plans ablation_studies planned_ablations",
    "metrics": "scores final_metrics evaluation_metrics key_metrics measurements metrics_to_track",
    "epochs.best": "best best_epoch best_checkpoint",
    "epochs.latest": "latest latest_epoch last_epoch final_epoch",
    "epochs.history": "per_epoch metrics_per_epoch epoch_metrics training_history training_progress",
    "per_group": "per_group_results group_results results_by_group per_class per_domain",
    "baselines": "baseline baseline_comparison comparison_with_baselines",
    "feature_importance": "feature_importances",
    "plots": "visualizations visualisations figures images charts",
    "artifact_uris": "artifacts artefacts outputs checkpoints",
    "code_version": "code git version_control",
    "code_version.commit": "git_commit commit commit_hash git_sha",
    "code_version.tag": "git_tag",
    "compute": "compute_resources resources resource_usage",
    "compute.gpu_hours": "gpu_hours",
    "compute.co2_kg": "co2_kg",
    "compute.estimated_time": "estimated_time estimated_duration",
    "observations": "observation findings key_findings",
    "analysis": "discussion interpretation",
    "analysis.worked": "what_worked",
    "analysis.did_not_work": "what_didnt_work what_did_not_work what_failed",
    "analysis.unexpected": "unexpected surprises",
    "issues": "issue problems challenges blockers bugs",
    "insights": "insight takeaways key_takeaways",
    "conclusion": "conclusions outcome result decision",
    "next_steps": "next next_step todo todos future_work follow_up",
    "learnings": "learned lessons lessons_learned what_i_learned key_learnings",
    "journal": "entries journal_entries diary",
    "deployment": "deployment_readiness production_readiness",
    "reviewer_notes": "review reviews review_notes reviewer_comments",
    "human_feedback": "feedback user_feedback",
    "notes": "note remarks comments misc",
}
INNER = {  # the same inside one of our keys
    "analysis": {
        "worked": "what_worked works",
        "did_not_work": "what_didnt_work what_did_not_work didnt_work what_failed",
        "unexpected": "surprises what_surprised_me",
    },
    "artifact_uris": {"uri": "url location link", "name": "artifact"},
    "baselines": {"name": "baseline model system", "delta": "difference"},
    "conditions": {
        "name": "condition arm",
        "samples": "sample_count n_samples sample_size",
        "criteria": "selection_criteria",
    },
    "journal": {
        "date": "day",
        "learned": "what_i_learned learnings lessons",
        "difficult": "what_was_difficult difficulties what_was_hard challenges",
        "do_differently": "what_i_would_do_differently would_do_differently next_time",
        "connections": "connection",
        "open_questions": "questions",
    },
    "metrics": {
        "name": "metric measure",
        "value": "result score actual achieved observed",
        "target": "goal threshold",
        "unit": "units",
        "status": "pass met",
        "notes": "note comment comments remarks",
    },
    "next_steps": {"step": "task action item", "done": "completed"},
    "search": {
        "space": "search_space",
        "method": "tuning_method algorithm",
        "trials": "n_trials",
        "best": "best_trial",
    },
    "splits": {
        "train": "train_size n_train",
        "validation": "val valid dev validation_size val_size",
        "test": "test_size n_test",
        "strategy": "split_strategy",
        "seed": "random_seed split_seed",
    },
    "variables": {"name": "variable factor", "values": "range levels options"},
    "plots": {"path": "file plot figure image filename", "purpose": "description caption what_it_shows shows"},
}
ROWS = {  # what holds a list: INNER is about each item
    "artifact_uris", "baselines", "conditions", "journal", "metrics", "next_steps", "plots", "variables",
}  # fmt: skip
GROUPS = {  # headings over several of our keys; what is left of them goes there
    "experiment": None,
    "experiment_info": None,
    "experiment_details": None,
    "general": None,
    "info": None,
    "metadata": None,
    "data": "splits",
    "evaluation": "metrics",
    "results": "metrics",
    "training": "hyperparameters",
}
VERBATIM = ("date", "foreign_id", "title", "tags", "related", "parent", "template_version")  # no ranges in these
PLACEHOLDER = re.compile(
    r"tb[acd]|to[ -]?do|n/a|x{2,}|\?{2,}|\.{3}|…|yyyy-?mm-?dd|\d{4}-xx-xx|\[?(fill in|to be (filled in|decided|determined))\]?"
    r"|<!--[^<>]*-->"
    r"|<[^<>@:]*( |fill|name|date|todo|tbd|your|insert|here)[^<>@:]*>",
    re.IGNORECASE,
)
_NUMBER = r"[-+]?(?:0|[1-9]\d*)(?:\.0|\.\d*[1-9])?(?:[eE][-+]?\d{1,3})?"  # no `3.10` and no `007`: they are names
_RANGE = re.compile(rf"({_NUMBER})\s*(?:-|–|—|to|\.\.)\s*({_NUMBER})")
LONG = 80  # characters: no placeholder, range or figure is longer, and a page need not be searched for one
_MARKS = re.compile(r"(\[[^\[\]]+\]\s*)+")  # [bf16] [packed]
_STAGE_OF_LIFE: tuple[tuple[Status, str], ...] = (
    ("failed", r"fail|crash|abort|error|out of memory|\boom\b|❌"),
    ("cancelled", r"cancel|stopp|abandon|killed|incomplete|in[ _-]progress|running|ongoing|paused|\bwip\b|🚧|⏳"),
    ("planned", r"plan|idea|propos|queued|draft|pending|not started|to ?do|backlog"),
)
_DATES = ("%d %B %Y", "%d %b %Y", "%B %d, %Y", "%b %d, %Y", "%B %d %Y", "%b %d %Y", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y")


@dataclass
class Log:
    """One experiment as another log tells it. `sources` holds the text behind a key, where `values` is only read from it."""

    values: dict[str, Any]
    line: int
    text: str  # its own part of the file, by which it is known again
    foreign_id: str | None = None
    sources: dict[tuple[str, ...], str] = field(default_factory=dict)
    outside: dict[str, Any] = field(default_factory=dict)  # by name, what belongs to none of its keys


@dataclass
class Placed:
    """The same by our keys. `remarks` tell what was changed on the way, `unplaced` what is only in the notes."""

    person: dict[str, Any] = field(default_factory=dict)
    status: Status = "complete"
    status_text: str | None = None
    remarks: list[str] = field(default_factory=list)
    unplaced: dict[str, Any] = field(default_factory=dict)


def plain(name: str) -> str:
    """`🎯 2.1 What didn't work:` is `what_didnt_work`."""
    name = re.sub(r"^[\W_]*(?:\d+(?:\.\d+)*[.)]?\s+)?", "", name.lower().replace("'", "").replace("’", ""))
    return re.sub(r"[^\w]+", "_", name).strip("_")


_TARGETS = {name: ours for ours, names in NAMES.items() for name in names.split()} | {key: key for key in KEYS}
_TARGETS |= {"experiment_id": "foreign_id"}
_INNER = {key: {name: ours for ours, names in table.items() for name in names.split()} for key, table in INNER.items()}


def target(name: str) -> str | None:
    """Our key for one of another log; dotted where it is inside one of ours."""
    return _TARGETS.get(plain(name))


def inner(key: str, name: str) -> str:
    return _INNER.get(key, {}).get(plain(name), plain(name) if plain(name) in INNER.get(key, {}) else name)


def place(log: Log) -> Placed:
    placing = _Placing(log)
    for name, value in log.values.items():
        placing.take((name,), value)
    return placing.result()


class _Placing:
    def __init__(self, log: Log) -> None:
        self.log, self.placed = log, Placed()
        if log.foreign_id:
            self._put("foreign_id", log.foreign_id)

    def take(self, path: tuple[str, ...], value: Any, rest: str | None = None) -> None:
        """`rest`: where what has no place of its own goes, by its own name."""
        name = plain(path[-1])
        key = _TARGETS.get(name)
        if name in GROUPS and isinstance(value, dict) and key is None:
            for child, its_value in value.items():
                self.take((*path, str(child)), its_value, GROUPS[name])
            return
        if name in GROUPS and key is None:
            key = GROUPS[name]
        if key == "hyperparameters" and isinstance(value, str) and _MARKS.fullmatch(value):
            key = "marks"
        if name == "status" and not isinstance(value, dict | list) and self.placed.status_text is None:
            self._status(str(value))
        remarks = len(self.placed.remarks)
        clean = self._clean(value, path, ranges=key not in VERBATIM)
        if key and self._put(key, self._shaped(key, clean, path)):
            return
        if rest and self._put(f"{rest}.{path[-1]}", clean):
            return
        del self.placed.remarks[remarks:]  # it is kept as it was written
        self._keep(path, value, fits=key is None)

    def result(self) -> Placed:
        placed = self.placed
        if "date" not in placed.person and (day := _day_of_id(str(placed.person.get("foreign_id", "")))):
            placed.person["date"] = day
        if placed.status_text is None and _is_plan(placed.person):
            placed.status = "planned"
        for name, text in self.log.outside.items():
            placed.unplaced[name] = self._secretless(text, (name,))
        notes = placed.person.pop("notes", None)
        if placed.unplaced:
            own = notes if isinstance(notes, dict) else {} if notes is None else {"notes": notes}
            notes = own | placed.unplaced
        ordered = {key: placed.person[key] for key in KEYS if key in placed.person}
        placed.person = ordered | ({} if notes is None else {"notes": notes})
        return placed

    def _put(self, key: str, value: Any) -> bool:
        """Joins the value to what stands under the key already; False where it does not fit there."""
        outer, _, within = key.partition(".")
        if within:
            value = {within: value}
        person = self.placed.person
        if value is None and person.get(outer) is not None:
            return True
        joined = _joined(person[outer], value) if person.get(outer) is not None else value
        if joined is None and value is not None:
            return False
        try:
            Person.model_validate({outer: joined})
        except ValidationError:
            return False
        person[outer] = joined
        return True

    def _keep(self, path: tuple[str, ...], value: Any, fits: bool) -> None:
        name = ".".join(path)
        if not fits:
            self.placed.remarks.append(f"{name}: does not fit `{target(path[-1]) or GROUPS.get(plain(path[-1]))}`")
        source = self.log.sources.get(path)
        self.placed.unplaced[name] = self._secretless(value if source is None else source, path)

    def _status(self, text: str) -> None:
        self.placed.status_text = text
        found = [
            (m.start(), status) for status, words in _STAGE_OF_LIFE if (m := re.search(words, text, re.IGNORECASE))
        ]
        self.placed.status = min(found)[1] if found else "complete"

    def _shaped(self, key: str, value: Any, path: tuple[str, ...]) -> Any:
        """The value in the shape that our key has."""
        outer = key.partition(".")[0]
        if outer in ROWS and isinstance(value, list):
            value = [_renamed(outer, item) if isinstance(item, dict) else item for item in value]
        if key == "next_steps" and isinstance(value, list):
            value = [_ticked(item) if isinstance(item, dict) else item for item in value]
        elif outer not in ROWS and key == outer and isinstance(value, dict):
            value = _renamed(outer, value)
        if key == "date" and value is not None:
            return self._date(value, path)
        if key == "marks" and isinstance(value, str):
            return re.findall(r"\[([^\[\]]+)\]", value) or value
        if key == "success_criteria":
            return self._criteria(value, path)
        if key in ("next_steps", "tags", "stages", "related") and value is not None:
            words = re.split(r",\s*", value) if key == "tags" and isinstance(value, str) else [value]
            items = value if isinstance(value, list) else words
            return [str(item) if isinstance(item, int | float) else item for item in items if item is not None]
        return value

    def _date(self, value: Any, path: tuple[str, ...]) -> dt.date | None:
        day = as_date(value)
        written = str(value)
        if day is None:
            self.placed.remarks.append(
                f"{'.'.join(path)}: `{written}` is no date that can mean only one day; kept as a note"
            )
            self.placed.unplaced[".".join(path)] = value
        elif written != str(day):
            self.placed.remarks.append(f"{'.'.join(path)}: `{written}` is read as {day}")
        return day

    def _criteria(self, value: Any, path: tuple[str, ...]) -> list[Any]:
        """Those that read as METRIC OP NUMBER; the others are kept as notes, and no verdict can rest on them."""
        found, others = [], []
        for item in value if isinstance(value, list) else [value]:
            criterion = _criterion(item)
            if criterion is None:
                others.append(item)
            else:
                found.append(criterion)
        others = [item for item in others if item is not None]
        if others:
            self.placed.unplaced[".".join(path)] = others
            self.placed.remarks.append(f"{'.'.join(path)}: {len(others)} not of the form METRIC OP NUMBER")
        return found

    def _clean(self, value: Any, path: tuple[str, ...], ranges: bool = True) -> Any:
        if isinstance(value, dict):
            return {
                str(k): self._clean(v, (*path, str(k)), ranges and plain(str(k)) not in VERBATIM)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [self._clean(item, (*path, str(number)), ranges) for number, item in enumerate(value, 1)]
        if not isinstance(value, str):
            return value
        text = value.strip()
        if len(text) > LONG:
            return self._secretless(value, path)
        if PLACEHOLDER.fullmatch(text):
            self.placed.remarks.append(f"{'.'.join(path)}: `{text}` became null")
            return None
        match = _RANGE.fullmatch(text) if ranges else None
        if match and (low := number(match[1])) is not None and (high := number(match[2])) is not None and low < high:
            return [low, high]
        return self._secretless(value, path)

    def _secretless(self, value: Any, path: tuple[str, ...]) -> Any:
        """A secret is known by its own look, or by the name of its key."""
        if isinstance(value, dict):
            return {k: self._secretless(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, list):
            return [self._secretless(item, path) for item in value]
        if not isinstance(value, str):
            return value
        named = f"{path[-1]}: "
        kept = redact(named + value)
        if kept == named + value:
            return value
        self.placed.remarks.append(f"{'.'.join(path)}: a secret was taken out")
        return kept.removeprefix(named)


def number(text: str) -> int | float | None:
    """A number as people write it. `1234567e8` is a commit, `007` and `1,234` are left as they are."""
    if re.fullmatch(r"[-+]?(0|[1-9]\d{0,17})", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d{1,18}\.\d{1,20}([eE][-+]?\d{1,3})?|\d{1,3}[eE][-+]?\d{1,3})", text):
        return float(text) if math.isfinite(float(text)) else None
    return None


def as_date(value: Any) -> dt.date | None:
    """None where it is no date, or could be one of two: `01/02/2024`."""
    if isinstance(value, dt.date):
        return value
    text = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", str(value).strip())
    slashed = re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", text)
    if slashed and (int(slashed[1]) > 12) != (int(slashed[2]) > 12):
        text = (
            f"{slashed[1]}.{slashed[2]}.{slashed[3]}"
            if int(slashed[1]) > 12
            else f"{slashed[2]}.{slashed[1]}.{slashed[3]}"
        )
    if re.match(r"\d{4}-?\d{2}-?\d{2}", text):
        try:
            return dt.date.fromisoformat(text) if len(text) <= 10 else dt.datetime.fromisoformat(text)
        except ValueError:
            return None
    for form in _DATES:
        try:
            return dt.datetime.strptime(text, form).date()
        except ValueError:
            continue
    return None


def _day_of_id(foreign_id: str) -> dt.date | None:
    match = re.match(r"(?:EXP-)?(\d{4})-?(\d{2})-?(\d{2})(?=[-_])", foreign_id)
    return as_date("-".join(match.groups())) if match else None


def _is_plan(person: dict[str, Any]) -> bool:
    """An experiment with nothing found yet whose id or date is still open."""
    metrics = person.get("metrics")
    measured = bool(metrics) and not (isinstance(metrics, list) and all(isinstance(name, str) for name in metrics))
    found = any(person.get(key) for key in ("epochs", "observations", "analysis", "conclusion", "learnings", "journal"))
    undated = "date" in person and person["date"] is None
    return not measured and not found and (undated or "XX" in str(person.get("foreign_id", "")))


def _renamed(key: str, values: dict[str, Any]) -> dict[str, Any]:
    """Keys that are known inside one of ours, unless ours stands there too."""
    return {
        new if (new := inner(key, name)) == name or new not in values else name: value for name, value in values.items()
    }


def _ticked(step: dict[str, Any]) -> dict[str, Any]:
    """A step whose `done` is a word is done or not; as a text, `no` would be true."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    done = words.get(str(step.get("done")).lower())
    return step if done is None else step | {"done": done}


def _joined(first: Any, second: Any) -> Any:
    """Both in one; None where only one of them could be kept."""
    if first == second:
        return first
    if isinstance(first, dict) and isinstance(second, dict):
        shared = {key: _joined(first[key], second[key]) for key in first.keys() & second.keys()}
        return None if any(value is None for value in shared.values()) else first | second | shared
    if isinstance(first, list) and isinstance(second, Iterable) and not isinstance(second, dict):
        return [*first, *([second] if isinstance(second, str) else second)]
    return None


def _criterion(item: Any) -> str | dict[str, Any] | None:
    if isinstance(item, dict):
        parts = {plain(str(key)): value for key, value in item.items()}
        if set(parts) == {"metric", "operator", "threshold"}:
            item = f"{parts['metric']} {parts['operator']} {parts['threshold']}"
    text = item.get("criterion") if isinstance(item, dict) else item
    try:
        criteria.parse(str(text))
        Person.model_validate({"success_criteria": [item]})
    except (UserError, ValidationError):
        return None
    return item
