"""The lineage as a picture: base → data → SFT → DPO → merge → serve and eval, laid out here, drawn by the page as SVG.

A family is what grew from one training; families stand below each other, the newest first. A column a stage; a record
stands in the middle of what was built on it.
"""

from dataclasses import dataclass, field

from aletheia.report import figures
from aletheia.report.project import Entry, Project
from aletheia.summary import key_figures  # noqa: F401

LIMIT = 80  # records in the picture
COLUMNS = {"base": 0, "data": 1, "sft": 2, "dpo": 3, "merge": 4, "serve": 5, "eval": 5}
TITLES = ("base", "data", "SFT", "DPO", "merge", "serve, eval")
WIDTH, HEIGHT, ACROSS, DOWN, GAP, TOP = 172, 42, 200, 52, 22, 30  # pixels: a box, from box to box, between families
# The figure by which a box is known: the first that the record has.
FIGURES = (
    ("eval_loss.delta", "loss"),
    ("preference_accuracy", "accuracy"),
    ("win_rate", "win-rate"),
    ("eval_loss", "loss"),
    ("requests", "requests"),
    ("receipt.modules", "modules"),
    ("rows", "rows"),
)
