"""`aletheia data …`: a function a command; each calls the module of its name.

aletheia data --help
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aletheia.options import DEFAULT, DryRunOption, JsonOption, ProfileOption, SetOption


class Quality(StrEnum):
    MEDIUM = "medium"
    LOW = "low"


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("check")
def check_(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Files, folders or hub:OWNER/NAME; default: the profile's.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Whose rules, tokenizer and evaluation; without: no rule on tokens.")
    ] = None,
    set_: SetOption = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Evaluation rows that must not stand in training rows; repeatable.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A rule to leave out: its code, name or start; repeatable.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend, and say what.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Run the Python of rows marked `run`; no sandbox.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Print every finding, not the first few of a rule.")] = False,
    rejects: Annotated[
        Path | None, typer.Option(help="Write every rejected row's place and reason to this file.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The gate: reads every row, names what would spoil a training with file, line and rule; exit code 1 if rows are rejected.

    \b
    Example:  aletheia data check mine/ --profile tiny --against data/eval
    """
    from aletheia.data import check

    if rules:
        check.print_rules(as_json)
    elif not check.check(paths or [], profile, set_, against or [], ignore or [], fix, run, every, rejects, as_json):
        raise typer.Exit(1)


@app.command("show")
def show_(
    path: Annotated[str, typer.Argument(help="A file, folder or hub:OWNER/NAME of conversations or preference pairs.")],
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    row: Annotated[str | None, typer.Option("--row", help="One row: its id, or FILE:LINE.")] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="How many; default: 1 in the terminal, 200 on a page.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page to this file.")] = None,
    totals: Annotated[bool, typer.Option("--totals", help="Only what all rows come to.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Rows as they are trained, token by token: trained, masked or past max_length, each end-of-turn marked; and totals.

    \b
    Example:  aletheia data show data/sft --profile tiny --row devops-sft-001
    """
    from aletheia.data.show import show
    from aletheia.jobs import make_job

    show(path, make_job(profile, set_), row, rows, html, totals, as_json)


@app.command("snapshot")
def snapshot_(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Rows to keep without a record; default: the profile's, with one.")
    ] = None,
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Sends the profile's data through the gate, keeps what passes under its hash, and records counts and split.

    \b
    Example:  aletheia data snapshot --profile tiny
    """
    if paths:
        from aletheia.data.snapshot import keep

        keep(paths)
        return
    from aletheia.jobs import make_job, run_or_plan
    from pipeline.snapshot import Snapshot

    run_or_plan(Snapshot, make_job(profile, set_), dry_run)


@app.command("diff")
def diff_(
    before: Annotated[
        str, typer.Argument(metavar="A", help="A path, a record's id, or a snapshot's hash (its first digits).")
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    text: Annotated[bool, typer.Option("--text", help="The words that changed, too.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every row, not the first twenty of a sort.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Rows added, removed and changed between two paths, records or snapshots; exit code 1 when there are any.

    \b
    Example:  aletheia data diff EXP-2026-11-20-002 data/sft --text
    """
    from aletheia.data.diff import diff

    if not diff(before, after, text, every, as_json):
        raise typer.Exit(1)


@app.command("degrade")
def degrade_(
    path: Annotated[str, typer.Argument(help="Conversations of high quality.")],
    to: Annotated[Quality, typer.Option(help="medium: right but incomplete; low: generic.")],
    output: Annotated[Path, typer.Option(help="A folder that is not there yet.")],
) -> None:
    """The medium or low condition of a set on the same prompts, to test quality against quantity.

    \b
    Example:  aletheia data degrade data/sft --to medium --output data/sft-medium
    """
    from aletheia.data.degrade import write_degraded

    write_degraded(path, to.value, output)


@app.command("feedback")
def feedback_(
    to: Annotated[Path, typer.Option("--to", help="The JSONL file of pairs to write.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[EXP|FILE]...", help="Servers' records; default: all of them.")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add to the file what it does not hold yet.")] = False,
) -> None:
    """What people thought of served answers, as preference pairs; says which ratings give none, and why.

    \b
    Example:  aletheia data feedback EXP-2026-11-20-007 --to data/dpo/feedback.jsonl
    """
    from aletheia.data.feedback import write_pairs

    write_pairs(paths or [], to, add)
