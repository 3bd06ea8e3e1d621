"""The `aletheia` command: parses, calls the stage, prints errors.

Nothing heavy is imported before it is needed, so help is instant.

aletheia --help
"""

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, TyperException

from aletheia.check import app as check_app
from aletheia.data.commands import app as data_app
from aletheia.exp.commands import app as exp_app
from aletheia.options import (
    DEFAULT,
    CriterionOption,
    DryRunOption,
    FromOption,
    GoOnFromOption,
    HypothesisOption,
    JsonOption,
    ProfileOption,
    ResumeOption,
    SetOption,
)
from pipeline.errors import AletheiaError, UserError
from pipeline.progress import printable

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
export_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
EXAMPLE = "\n\n\b\nExample:  aletheia "
app.add_typer(check_app, name="check", help=f"The pipeline checks itself.{EXAMPLE}check gradients")
app.add_typer(
    data_app,
    name="data",
    help=f"Training data: check it, see what is trained, snapshot it.{EXAMPLE}data check data/sft data/dpo",
)
app.add_typer(
    config_app, name="config", help=f"Profiles: what is in effect, and why.{EXAMPLE}config explain --profile tiny"
)
app.add_typer(export_app, name="export", help=f"The merged model in other formats.{EXAMPLE}export gguf --profile tiny")
app.add_typer(exp_app, name="exp", help=f"Experiment records: plan, run, read, trust.{EXAMPLE}exp list")


@app.callback()
def _root(context: typer.Context) -> None:
    """Fine-tunes a code model (SFT, DPO, merge, serve, eval) and writes a truthful record of every stage.

    \b
    Example:  aletheia sft --profile tiny && aletheia dpo --profile tiny
    Errors are one line; add --debug for the traceback.
    """
    from pipeline.train.ranks import refuse, several

    if several() and context.invoked_subcommand not in ("sft", "dpo"):
        refuse(f"{context.invoked_subcommand} runs in one process", "the command without torchrun")


@app.command()
def sft(
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: GoOnFromOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    hypothesis: HypothesisOption = None,
    criterion: CriterionOption = None,
) -> None:
    """Supervised fine-tuning: a LoRA adapter on the base model (or, with --from, one that goes on from a record's).

    \b
    Example:  aletheia sft --profile tiny --set sft_config.epochs=1.0
    """
    from pipeline.sft import Sft

    _run(
        Sft,
        profile,
        set_,
        dry_run,
        source=source,
        resume=resume,
        hypothesis=hypothesis,
        criteria=tuple(criterion or ()),
    )


@app.command()
def dpo(
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    hypothesis: HypothesisOption = None,
    criterion: CriterionOption = None,
) -> None:
    """Preference optimisation: continues the newest SFT adapter (or, with --from base, starts on the base).

    \b
    Example:  aletheia dpo --profile tiny --from EXP-2026-11-20-001
    """
    from pipeline.dpo import Dpo

    _run(
        Dpo,
        profile,
        set_,
        dry_run,
        source=source,
        resume=resume,
        hypothesis=hypothesis,
        criteria=tuple(criterion or ()),
    )


@app.command()
def merge(
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    hypothesis: HypothesisOption = None,
    criterion: CriterionOption = None,
) -> None:
    """Merges the newest adapter (DPO or SFT) into the base, with a receipt.

    \b
    Example:  aletheia merge --profile tiny
    """
    from pipeline.merge import Merge

    _run(
        Merge,
        profile,
        set_,
        dry_run,
        source=source,
        resume=resume,
        hypothesis=hypothesis,
        criteria=tuple(criterion or ()),
    )


@app.command()
def serve(
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    backend: Annotated[str | None, typer.Option(help="auto, vllm, transformers or llamacpp.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    dry_run: DryRunOption = False,
    parent: Annotated[str | None, typer.Option(hidden=True)] = None,
    follow: Annotated[int | None, typer.Option(hidden=True, help="Process that it ends with.")] = None,
) -> None:
    """Serves the newest merged model (else adapter) with OpenAI's API, until Ctrl-C.

    \b
    Example:  aletheia serve --profile tiny --port 8001
    """
    from serving.child import end_with
    from serving.serve import Serve

    if follow:
        end_with(follow)
    given = [f"serve_config.host={host}"] if host is not None else []
    given += [f"serve_config.backend={backend}"] if backend is not None else []
    given += [f"serve_config.port={port}"] if port is not None else []
    _run(Serve, profile, [*(set_ or []), *given], dry_run, source=source, parent=parent)


@app.command()
def chat(
    endpoint: Annotated[str, typer.Option(help="Any server that speaks OpenAI's API.")] = "http://127.0.0.1:8000/v1",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    model: Annotated[str, typer.Option(help="Which model of the server; default: its first.")] = "",
) -> None:
    """A conversation with a served model in the terminal; from a pipe one question, and its answer alone on stdout.

    \b
    Example:  aletheia chat --system "Be brief." < question.txt
    """
    from aletheia.chat import chat

    chat(endpoint, system, model)


@app.command("eval")
def eval_(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="heldout, benchmarks, winrate (default: these), latency; or prefetch alone."),
    ] = None,
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of a running server of the model, judged and timed.")
    ] = None,
    show: Annotated[
        str | None, typer.Option(metavar="EXP", help="Runs nothing: the result of that evaluation, and its page anew.")
    ] = None,
    dry_run: DryRunOption = False,
    hypothesis: HypothesisOption = None,
    criterion: CriterionOption = None,
) -> None:
    """Judges the newest model against its base: held-out rows, lm-eval-harness tasks, win-rate.

    And how fast a server of it answers, when `latency` is named. `prefetch` runs nothing: it downloads the data of the
    profile's benchmarks, for a machine without a hub.

    \b
    Example:  aletheia eval heldout winrate --profile tiny
              aletheia eval --show EXP-2026-11-21-008
    """
    if show is not None:
        from aletheia.evaluation import show_result

        show_result(show)
        return
    if parts == ["prefetch"]:
        from aletheia.evaluation import fetch_benchmarks

        fetch_benchmarks(_job(profile, set_))
        return
    from eval.evaluate import NAMED, Evaluate

    for part in parts or []:
        if part == "prefetch":
            raise UserError("prefetch stands alone", where="eval", remedy="aletheia eval prefetch, and then this")
        if part not in NAMED:
            raise UserError(f"there is no part `{part}`", where="eval", remedy=", ".join(NAMED))
    given = [f"eval_config.endpoint={endpoint}"] if endpoint is not None else []
    _run(
        Evaluate,
        profile,
        [*(set_ or []), *given],
        dry_run,
        source=source,
        hypothesis=hypothesis,
        criteria=tuple(criterion or ()),
        parts=tuple(parts or ()),
    )


@app.command()
def review(
    exp: Annotated[str, typer.Argument(metavar="EXP", help="An eval record: its id, or the path of its file.")],
    against: Annotated[str, typer.Option(help="Whom the model is compared with, as in answers.jsonl.")] = "base",
    reviewer: Annotated[str, typer.Option(help="Your name; default: the page asks.")] = "",
    n: Annotated[
        int | None, typer.Option(min=1, help="Prompts, drawn at random; default: all. Fixed by the start.")
    ] = None,
    votes_each: Annotated[
        int | None, typer.Option(min=1, help="People whose votes decide a prompt; default: 1. Fixed by the start.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8010,
    result: Annotated[bool, typer.Option("--result", help="Open it: the result, into the record and printed.")] = False,
    open_early: Annotated[
        bool, typer.Option("--open-early", help="With --result: before the plan allows. Noted in the record.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """People compare the answers of an evaluation, blind, on a small page of this machine, until Ctrl-C.

    It opens at the planned number of prompts, or as soon as the evidence is enough; until then nothing is shown.

    \b
    Example:  aletheia review EXP-2026-11-21-008 --reviewer anna
    """
    from aletheia.review import serve_review, show_result
    from pipeline.workspace import Workspace

    if (open_early or as_json) and not result:
        raise UserError("goes with --result", where="--open-early" if open_early else "--json")
    if result:
        show_result(Workspace.find(), exp, against, open_early, as_json)
    else:
        serve_review(Workspace.find(), exp, against, reviewer, n, votes_each, port)


@app.command()
def demo(profile: ProfileOption = "tiny", set_: SetOption = None) -> None:
    """The whole pipeline as one experiment: data, sft, dpo, merge, serve, eval, and what it all shows.

    \b
    Example:  aletheia demo --profile tiny
    """
    from aletheia.demo import run_demo
    from aletheia.jobs import print_record

    print_record(run_demo(_job(profile, set_)))


@export_app.callback()
def _export() -> None:
    """So that `gguf` is a word of its own, and more formats may stand beside it."""


@export_app.command("gguf")
def export_gguf(
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    dry_run: DryRunOption = False,
    hypothesis: HypothesisOption = None,
    criterion: CriterionOption = None,
) -> None:
    """The newest merged model as GGUF files for llama.cpp, each with its size and its loss of quality.

    There is no --resume: an interrupted export leaves nothing under its name, and is run again.

    \b
    Example:  aletheia export gguf --profile tiny --set export_config.formats=[q8_0]
    """
    from pipeline.export import Export

    _run(Export, profile, set_, dry_run, source=source, hypothesis=hypothesis, criteria=tuple(criterion or ()))


@config_app.command("explain")
def config_explain(profile: ProfileOption = DEFAULT, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Every effective value, where it came from, and what follows from it.

    \b
    Example:  aletheia config explain --profile tiny --set sft_config.epochs=1.0
    """
    from aletheia.explain import explain

    explain(_job(profile, set_), as_json)


@app.command()
def report(
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: experiments/report.html (or .md).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The project's log as Markdown instead.")] = False,
) -> None:
    """One self-contained HTML page of all records: figures, curves, lineage, comparison, verdicts, learnings.

    \b
    Example:  aletheia report --markdown --output LOG.md
    """
    from aletheia.report import write_report
    from pipeline.workspace import Workspace

    print(write_report(Workspace.find(), output, markdown))


def main() -> None:
    """Runs the command and prints what went wrong in one line."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, spinning threads cost a third of the speed
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # 1,024 kernels, one a shape, are 400 MB: no faster
    gc.set_threshold(50_000)  # what libraries define is no garbage: to look through it took a sixth of a stage's start
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        code = app(prog_name="aletheia", standalone_mode=False)
        if code == 130:  # all that typer leaves of Ctrl-C
            raise KeyboardInterrupt
    except AletheiaError as error:
        code = _report(str(error), error.exit_code, debug)
    except (Abort, KeyboardInterrupt):
        code = _report("interrupted", 130, debug)
    except TyperException as error:
        code = _usage(error, debug)
    except OSError as error:
        code = _report(f"{error.filename or 'the system'}: {error.strerror or error}", 1, debug)
    except Exception as error:
        code = _report(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1, debug)
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.flush()
    gc.freeze()  # all of it goes with the process; to look through it once more took a second
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: TyperException, debug: bool) -> int:
    """A command typed wrongly, or one typed alone that only has subcommands: that shows its help."""
    message = error.format_message()
    if message.startswith("Usage:"):
        print(message)
        return 0
    context = getattr(error, "ctx", None)
    typed = [context.command_path] if context else ["aletheia"]
    words = list(getattr(context.command, "commands", ())) if context else []
    only = words if len(words) == 1 else []  # of `aletheia export`: gguf, whose options they may have been
    return _report(f"{message.rstrip('.')}; try {' '.join([*typed, *only])} --help", 2, debug)


def _report(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {printable(' '.join(line.splitlines()))}", file=sys.stderr)
    return code


def _job(profile: str, assignments: list[str] | None, **options: Any) -> Any:
    from aletheia.jobs import make_job

    return make_job(profile, assignments, **options)


def _run(stage: Any, profile: str, assignments: list[str] | None, dry_run: bool, **options: Any) -> None:
    from aletheia.jobs import make_job, run_or_plan

    run_or_plan(stage, make_job(profile, assignments, own_process=True, **options), dry_run)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
