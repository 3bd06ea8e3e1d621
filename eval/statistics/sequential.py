"""A review that may be looked at after every vote and opened as soon as it is clear.

    E = B(1 + W, 1 + L) / (θ^W (1 − θ)^L)        W wins and L losses among decisive votes, θ the share of wins supposed

At θ = ½ this is B(1 + W, 1 + L)·2^(W + L). While θ is true E grows beyond 1/α with a chance of at most α, however often
one looks (Ville 1939; the uniform mixture of Robbins 1970), so E ≥ 20 opens a review, and the θ with E < 20 are an
interval that holds at every look. A test for a planned n must not be added when that n comes: both together err more.

A vote is a prompt's, not a reviewer's: votes of several people on one prompt are alike, and would count as so many.
"""

import math
from typing import Any

from pipeline.statistics import CONFIDENCE, Figure

ENOUGH = math.log(1 / (1 - CONFIDENCE))  # log E from which a review may be opened


def log_e_value(wins: Any, losses: Any, share: Any = 0.5) -> Any:
    """Natural log of the evidence against `share`, of numbers or arrays of them; 0 before the first vote."""
    from scipy.special import betaln, xlog1py, xlogy

    return betaln(1 + wins, 1 + losses) - xlogy(wins, share) - xlog1py(losses, -share)


def may_open(wins: int, losses: int, ties: int, planned: int) -> bool:
    """At the planned number of prompts, ties among them, or as soon as the evidence against ½ is enough."""
    return wins + losses + ties >= planned or bool(log_e_value(wins, losses) >= ENOUGH)


def share_of_wins(wins: int, losses: int) -> Figure:
    """Among decisive votes, with the interval that holds however often it was looked at.

    It leaves out ½ exactly where `may_open` has enough. Raises ValueError where no vote is decisive.
    """
    from scipy.optimize import brentq

    votes = wins + losses
    if votes == 0:
        raise ValueError("a share of no decisive votes")

    def lowest(wins: int, losses: int) -> float:
        if wins == 0:
            return 0.0
        return float(brentq(lambda share: float(log_e_value(wins, losses, share)) - ENOUGH, 1e-300, wins / votes))

    low, high = lowest(wins, losses), 1 - lowest(losses, wins)
    return Figure(value=round(wins / votes, 6), ci_low=round(low, 6), ci_high=round(high, 6), n=votes)
