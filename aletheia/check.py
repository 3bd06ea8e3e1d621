"""`aletheia check …`: the pipeline checks itself, on this machine and with the libraries that are installed."""

import sys
from typing import Annotated

import typer

from aletheia.options import DEFAULT, FromOption, JsonOption, ProfileOption, SetOption
from aletheia.output import print_json, print_table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def gradients(as_json: JsonOption = False) -> None:
    """Training's gradients against central differences in float64: through LoRA, packed and padded, with every loss.

    \b
    Example:  aletheia check gradients
    """
    from pipeline.errors import StageFailed
    from pipeline.quiet import quiet
    from pipeline.train.gradient_check import TOLERANCE, check_gradients

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


@app.command()
def parity(
    profile: ProfileOption = DEFAULT,
    set_: SetOption = None,
    source: FromOption = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend to start and compare; repeatable. Default: all that are here.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="URL of a running server, compared in their place.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision it computes in: float32, bfloat16, float16. Default: as stored.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The served model is the trained one: token ids, BOS, stop and log-probs, through every backend.

    Plain transformers and each backend are compared with the training template, on held-out rows and
    hard cases. The key of an endpoint that wants one is taken from ALETHEIA_API_KEY.

    \b
    Example:  aletheia check parity --profile tiny --backend transformers
    """
    from aletheia.jobs import make_job
    from pipeline.errors import StageFailed, UserError
    from pipeline.progress import say
    from pipeline.quiet import quiet
    from serving.parity.check import check_parity
    from serving.parity.compared import REMEDIES, WORDS
    from serving.parity.probes import PRECISIONS

    if dtype not in (None, *PRECISIONS):
        raise UserError(f"there is no precision `{dtype}`", where="--dtype", remedy=", ".join(PRECISIONS))
    quiet()
    found, left_out = check_parity(make_job(profile, set_, source=source), backend or [], endpoint, dtype)
    for name, why in left_out.items():
        say(f"left out: {name}: {why}")
    if as_json:
        print_json({"compared": [c.as_record() for c in found], "left_out": left_out})
    else:
        header = ("backend", *REMEDIES, "worst, nats", "bound", "mean, nats", "bound", "verdict")
        rows = []
        for c in found:
            spreads = [(key, spread) for key in ("worst", "mean") for spread in (c.spread, c.bound)]
            figures = [f"{getattr(spread, key):.2g}" if spread else "–" for key, spread in spreads]
            rows.append((c.backend, *(WORDS[c[check]] for check in REMEDIES), *figures, c.verdict))
        print_table(header, rows, sys.stdout)
    for c in found:
        for check, why in c.not_compared.items():
            say(f"not compared: {c.backend}, {check}: {why}")
    for c in found:
        if c.problem:
            what, remedy = c.problem
            raise StageFailed(f"{c.backend}: {what}", remedy=remedy)
        if c.verdict == "not compared":
            raise StageFailed(f"{c.backend}: it could be asked nothing", remedy="aletheia serve")
