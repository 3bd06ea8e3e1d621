"""Takes a record out of the house, to where others look: MLflow, W&B, a Markdown report, a model card for the hub.

    aletheia exp export EXP-2026-11-21-003 --to markdown

An export never changes what the record says, but for one line: where it went (`external.mlflow`, `external.wandb`).
"""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.workspace import Workspace

TARGETS = ("mlflow", "wandb", "markdown", "model-card")


def export(workspace: Workspace, exp: str, to: str, uri: str | None, output: Path | None, force: bool) -> str:
    """What to print: the path that was written, or URI and run id. Raises `UserError`."""
    if to not in TARGETS:
        choices = f"{', '.join(TARGETS[:-1])} or {TARGETS[-1]}"
        raise UserError(f"there is no export to `{to}`", where="--to", remedy=choices)
    if uri is not None and to != "mlflow":
        raise UserError(f"is for mlflow, not for {to}", where="--uri")
    if output is not None and to == "mlflow":
        raise UserError("is not for mlflow, which writes into a store", where="--output", remedy="--uri sqlite:///…")
    if to == "mlflow":
        from aletheia.exp.exporters.mlflow_run import export_mlflow

        return export_mlflow(workspace, exp, uri, force)
    if to == "wandb":
        from aletheia.exp.exporters.wandb_run import export_wandb

        return export_wandb(workspace, exp, output, force)
    if to == "markdown":
        from aletheia.exp.exporters.markdown import export_markdown

        return export_markdown(workspace, exp, output, force)
    from aletheia.exp.exporters.model_card import export_model_card

    return export_model_card(workspace, exp, output, force)
