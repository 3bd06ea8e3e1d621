"""`aletheia exp …`: a function a command; each calls the module of its name.

aletheia exp --help
"""

from pathlib import Path
from typing import Annotated

import typer

from aletheia.options import (
    DEFAULT,
    CriterionOption,
    FromOption,
    HypothesisOption,
    JsonOption,
    ProfileOption,
    SetOption,
)
from pipeline.workspace import Workspace

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Exp = Annotated[str, typer.Argument(metavar="EXP", help="Its id, or the path of its file.")]
Exps = Annotated[list[str] | None, typer.Argument(metavar="[EXP]…", help="Ids or files; default: all.")]


@app.command("plan")
def plan_(
    stages: Annotated[list[str], typer.Argument(help="What it is to run: data, sft, dpo, merge, export, serve, eval.")],
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    hypothesis: HypothesisOption = None,
    criterion: CriterionOption = None,
    description: Annotated[str | None, typer.Option(help="What it is, in a line.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; repeatable.")] = None,
) -> None:
    """Writes a planned record. Edit it as you like; `exp run` runs it and fills it in.

    \b
    Example:  aletheia exp plan sft dpo --profile tiny --criterion "dpo.preference_accuracy > 0.5"
    """
    from aletheia.exp.plan import plan

    workspace = Workspace.find()
    path = plan(workspace, stages, profile, set_ or [], source, hypothesis, criterion or [], description, tag or [])
    print(workspace.shown(path))


@app.command("run")
def run_(exp: Exp) -> None:
    """Runs a planned record and fills it in; one that failed or was interrupted goes on at the stage it stopped in.

    \b
    Example:  aletheia exp run EXP-2026-11-21-001
    """
    from aletheia.exp.run import run

    record = run(Workspace.find(), exp)
    print(record.workspace.shown(record.file.path))


@app.command("list")
def list_(
    stage: Annotated[str | None, typer.Option(help="sft, dpo, …, or pipeline.")] = None,
    status: Annotated[str | None, typer.Option(help="planned, running, complete, failed, cancelled, dead.")] = None,
    tag: Annotated[str | None, typer.Option(help="One of its tags.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="Of this profile.")] = None,
    since: Annotated[str | None, typer.Option(help="Of this date (YYYY-MM-DD) or later.")] = None,
    until: Annotated[str | None, typer.Option(help="Of this date or earlier.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="METRIC OP NUMBER, e.g. `eval_loss < 5.5`; repeatable.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="A metric, `seconds` or `date`; -METRIC: largest first.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many at most.")] = None,
    as_json: JsonOption = False,
) -> None:
    """All records, newest first, with their true status: a run whose process is gone is dead.

    \b
    Example:  aletheia exp list --stage sft --where "eval_loss < 5.5" --sort eval_loss
    """
    from aletheia.exp.listing import Filters, list_records

    filters = Filters(stage, status, tag, profile, since, until, where or [])
    list_records(Workspace.find(), filters, sort, limit, as_json)


@app.command("show")
def show_(exp: Exp, as_json: JsonOption = False) -> None:
    """One record: what was asked, what came out, with what certainty, and the verdict on its criteria.

    \b
    Example:  aletheia exp show EXP-2026-11-21-003
    """
    from aletheia.exp.show import show

    show(Workspace.find(), exp, as_json)


@app.command("compare")
def compare_(exps: Annotated[list[str], typer.Argument(metavar="EXP EXP…")], as_json: JsonOption = False) -> None:
    """Two or more records: differences in configuration, data, environment, and figures paired on shared items.

    \b
    Example:  aletheia exp compare EXP-2026-11-21-003 EXP-2026-11-21-004
    """
    from aletheia.exp.compare import compare

    compare(Workspace.find(), exps, as_json)


@app.command("lineage")
def lineage_(exp: Exp, as_json: JsonOption = False) -> None:
    """The tree that it belongs to, from the base to what was served and judged.

    \b
    Example:  aletheia exp lineage EXP-2026-11-21-006
    """
    from aletheia.exp.lineage import lineage

    lineage(Workspace.find(), exp, as_json)


@app.command("verify")
def verify_(exp: Exp, as_json: JsonOption = False) -> None:
    """Every hash in the chain against the files: is this model really what these records say? Exit code 1 if not.

    \b
    Example:  aletheia exp verify EXP-2026-11-21-006
    """
    from aletheia.exp.verify import verify

    if not verify(Workspace.find(), exp, as_json):
        raise typer.Exit(1)


@app.command("reproduce")
def reproduce_(
    exp: Exp,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be restored, and what cannot be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Runs it again from its commit, patch, pins, data and seeds, and compares the figures; refuses with reasons.

    \b
    Example:  aletheia exp reproduce EXP-2026-11-21-003
    """
    from aletheia.exp.reproduce import reproduce

    if not reproduce(Workspace.find(), exp, dry_run, as_json):
        raise typer.Exit(1)


@app.command("analyze")
def analyze_(exp: Exp, as_json: JsonOption = False) -> None:
    """How a training went: best and latest epoch for train and valid, the gap, when validation rose, what to try.

    \b
    Example:  aletheia exp analyze EXP-2026-11-21-003
    """
    from aletheia.exp.analyze import analyze

    analyze(Workspace.find(), exp, as_json)


@app.command("repair")
def repair_(exps: Exps = None, as_json: JsonOption = False) -> None:
    """Closes records whose process is gone, truthfully, with the last step that their log knows.

    \b
    Example:  aletheia exp repair
    """
    from aletheia.exp.mend import repair

    repair(Workspace.find(), exps or [], as_json)


@app.command("sync")
def sync_(exps: Exps = None, as_json: JsonOption = False) -> None:
    """Completes records whose upper half was no YAML when the pipeline wrote, and undoes edits below the line.

    \b
    Example:  aletheia exp sync
    """
    from aletheia.exp.mend import sync

    if not sync(Workspace.find(), exps or [], as_json):
        raise typer.Exit(2)


@app.command("lint")
def lint_(exps: Exps = None, as_json: JsonOption = False) -> None:
    """Every mistake in the records, with file, line and column. Exit code 2 when there is one.

    \b
    Example:  aletheia exp lint
    """
    from aletheia.exp.lint import lint

    if not lint(Workspace.find(), exps or [], as_json):
        raise typer.Exit(2)


@app.command("renumber")
def renumber_(exp: Exp) -> None:
    """Gives a record the next free id of its day, references to it included (two checkouts may make the same id).

    \b
    Example:  aletheia exp renumber experiments/EXP-2026-11-21-003.yaml
    """
    from aletheia.exp.mend import renumber

    workspace = Workspace.find()
    print(workspace.shown(renumber(workspace, exp)))


@app.command("promote")
def promote_(exp: Exp, number: Annotated[int, typer.Argument(metavar="N", min=1, help="Which next step.")]) -> None:
    """Turns next step N of a record into a plan, and ticks it there.

    \b
    Example:  aletheia exp promote EXP-2026-11-21-003 1
    """
    from aletheia.exp.plan import promote

    workspace = Workspace.find()
    print(workspace.shown(promote(workspace, exp, number)))


@app.command("export")
def export_(
    exp: Exp,
    to: Annotated[str, typer.Option("--to", help="mlflow, wandb, markdown or model-card.")],
    uri: Annotated[
        str | None, typer.Option(help="mlflow: sqlite:///… or a server; default: experiments/mlflow.db.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File or folder to write; default: beside the record.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Takes a record out: into MLflow, a W&B offline run, a Markdown report, or a model card for the hub.

    \b
    Example:  aletheia exp export EXP-2026-11-21-003 --to model-card
    """
    from aletheia.exp.export import export

    print(export(Workspace.find(), exp, to, uri, output, force))


@app.command("schema")
def schema_() -> None:
    """The records' JSON Schema, for editors.

    \b
    Example:  aletheia exp schema > experiments/record.schema.json
    """
    from aletheia.output import print_json
    from pipeline.records.person import json_schema

    print_json(json_schema())


@app.command("add")
def add_(
    files: Annotated[list[Path], typer.Argument(help="A YAML record of another kind, or a Markdown log.")],
    as_json: JsonOption = False,
) -> None:
    """Takes in a log kept elsewhere, one record an experiment; what has no place is kept as notes, and named.

    \b
    Example:  aletheia exp add notebook.md
    """
    from aletheia.exp.add import add

    add(Workspace.find(), files, as_json)
