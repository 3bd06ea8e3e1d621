"""Options that several commands share."""

from typing import Annotated

import typer

ProfileOption = Annotated[str, typer.Option("--profile", help="Name in configs/, or a file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the profile's value; repeatable.")]
FromOption = Annotated[str | None, typer.Option("--from", help="Record to build on; default: the newest complete one.")]
GoOnFromOption = Annotated[
    str | None, typer.Option("--from", help="Record whose adapter is trained further; default: a new adapter.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the newest interrupted run of this stage.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
HypothesisOption = Annotated[str | None, typer.Option("--hypothesis", help="What you expect; kept in the record.")]
CriterionOption = Annotated[
    list[str] | None, typer.Option("--criterion", help="METRIC OP NUMBER that decides whether it holds; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="The data alone, as JSON, on stdout.")]
DEFAULT = "deepseek-coder-7b"
