"""`aletheia check …`: the pipeline checks itself, on this machine and with the libraries that are installed."""

import sys

import typer

from aletheia.options import JsonOption
from aletheia.output import print_json, print_table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Keeps `gradients` a command of its own while it is the only one."""


@app.command()
def gradients(as_json: JsonOption = False) -> None:
    """Training's gradients against central differences in float64: through LoRA, packed and padded, with every loss.

    \b
    Example:  aletheia check gradients
    """
    from pipeline.errors import StageFailed
    from pipeline.gradient_check import TOLERANCE, check_gradients
    from pipeline.quiet import quiet

    quiet()
    found = check_gradients()
    if as_json:
        print_json([vars(checked) | {"ok": checked.ok} for checked in found])
    else:
        rows = [
            (c.loss, c.forward, f"{c.parameters:,}", f"{c.relative_error:.1e}", "yes" if c.ok else "NO") for c in found
        ]
        print_table(("loss", "forward", "parameters checked", "relative error", "ok"), rows, sys.stdout)
    wrong = [f"{c.loss} ({c.forward})" for c in found if not c.ok]
    if wrong:
        what = f"gradients are off by more than {TOLERANCE:g}: {', '.join(wrong)}"
        raise StageFailed(what, remedy="make test, which tells what changed")
