"""The program's half of a record, typed. One version number for all of it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
Status = Literal["planned", "running", "complete", "failed", "cancelled"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class StatusChange(Part):
    status: Status
    at: str  # UTC, ISO 8601
    host: str | None = None
    pid: int | None = None
    started: float | None = None  # the process's creation time: a pid alone is reused
    note: str | None = None


class Input(Part):
    """What a stage built on: another record's output, named by the hash of what was taken."""

    id: str
    stage: str
    path: str
    sha256: str


class Lineage(Part):
    parent: str | None = None  # the pipeline experiment this stage is part of
    children: list[str] = []
    base: dict[str, Any] | None = None  # the base model: name, revision, hash of its weights
    inputs: list[Input] = []


class Artifact(Part):
    path: str
    sha256: str
    bytes: int


class Visualization(Part):
    path: str
    purpose: str


class Criterion(Part):
    """`METRIC OP NUMBER`. A refuted guardrail refutes the whole, whatever the primary ones say."""

    criterion: str
    role: Literal["primary", "guardrail"] = "primary"
    min_n: int | None = None  # fewer rows behind the figure than this decide nothing


Finding = Literal["supported", "refuted", "inconclusive", "not evaluable"]


class Judged(Criterion):
    """A criterion and what became of it."""

    finding: Finding
    observed: str  # the figure with its interval and n
    why: str
    n_needed: int | None = None  # rows that would decide it, were the figure to stay


class Verdict(Part):
    """`criteria` as they stood when the run started; what was changed above the line since then is shown, not used."""

    frozen_at: str
    finding: Finding | None = None  # None until the run is complete
    criteria: list[Criterion] = []
    of_profile: list[Criterion] = []  # guardrails that the profile asks for, beside the person's criteria
    judged: list[Judged] = []
    changed_after_start: list[str] = []


class Failure(Part):
    kind: str
    message: str
    step: int | None = None
    rows: list[str] = []
    traceback: str | None = None  # a file beside the record


class Facts(Part):
    schema_version: int = SCHEMA_VERSION
    status: Status
    stage: str
    profile: str = Field(
        alias="profile_used"
    )  # not `profile`: both halves are one YAML document, and no key stands twice
    history: list[StatusChange] = []
    lineage: Lineage = Lineage()
    overrides: dict[str, Any] = Field({}, alias="overrides_used")  # by --set; a resume takes them up again
    configuration: dict[str, Any] = {}
    data: dict[str, Any] = {}
    results: dict[str, Any] = {}
    verdict: Verdict | None = None  # of the person's success_criteria
    visualizations: list[Visualization] = []
    artifacts: list[Artifact] = []
    failure: Failure | None = None
    code: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    resources: dict[str, Any] = {}
    external: dict[str, Any] = {}  # where it was exported to, or the log it was taken in from
    seal: str | None = None  # SHA-256 of the lines above it, up to the line: an edit shows in any checkout
