"""What a set of rows gives away besides its content: the length of a chosen answer, the few rows of a domain.

Lengths are in any unit, as long as both sides have the same. It looks at length alone: other tells of the chosen side
(headings, a greeting) are not seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lengths = Sequence[float] | NDArray[Any]

_UNKNOWN = "unknown"  # the domain of rows that name none


def auc(chosen: Lengths, rejected: Lengths) -> float:
    """The chance that any chosen answer is longer than any rejected one, ties half: 0.5 where length tells nothing.

    Mann and Whitney 1947: U / (n m), the area under the curve of a classifier by length. O(n log n). Raises ValueError
    for no answers.
    """
    one, other = np.asarray(chosen), np.sort(np.asarray(rejected))
    if not len(one) or not len(other):
        raise ValueError("an AUC of no answers")
    shorter, as_long_or_shorter = (np.searchsorted(other, one, side).mean() for side in ("left", "right"))
    return float((shorter + as_long_or_shorter) / 2 / len(other))


def paired_auc(chosen: Lengths, rejected: Lengths) -> float:
    """The share of pairs whose chosen answer is the longer one, ties half: what a preference loss sees.

    Prompts whose answers are long on both sides count for nothing here, while in `auc` they hide a bias. Raises
    ValueError for no pairs, or sides of different counts.
    """
    one, other = np.asarray(chosen), np.asarray(rejected)
    if len(one) != len(other):
        raise ValueError(f"{len(one)} chosen and {len(other)} rejected")
    if not len(one):
        raise ValueError("an AUC of no pairs")
    return float(((one > other).mean() + (one >= other).mean()) / 2)


def small_domains(counts: Mapping[str, int], share: float) -> list[tuple[str, int, float]]:
    """Domains of fewer rows than `share` of an even share: name, rows and the even share (all rows / domains), smallest first.

    Rows of the domain `unknown` take no part: a set that names no domains is not unbalanced.
    """
    known = {domain: count for domain, count in counts.items() if domain != _UNKNOWN}
    even = sum(known.values()) / len(known) if known else 0.0
    small = [(domain, count, even) for domain, count in known.items() if count < share * even]
    return sorted(small, key=lambda found: (found[1], found[0]))
