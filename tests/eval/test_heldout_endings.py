"""Where answers end: figures of conversations whose probabilities are given."""

import pytest

from eval import endings
from pipeline.train.heldout import Ends


def test_probabilities_become_paired_figures() -> None:
    theirs = [Ends(5.0, [0.1 + 0.01 * i], 0.4 + 0.001 * i, 3.0 + 0.1 * i) for i in range(8)]
    ours = [Ends(4.0, [0.8 + 0.02 * i, 0.6 + 0.01 * i], 0.1, 2.0) for i in range(8)]  # two answers each
    found = endings.compare(theirs, ours)
    at_end, inside, surprise = found["at_end"], found["inside"], found["surprise"]
    assert at_end.after.value == pytest.approx(0.7525) and at_end.delta.ci_low > 0
    assert inside.before.value == 0.4035 and inside.after.value == 0.05, "inside an answer, not a conversation"
    assert surprise.after.value == 1.0 and surprise.verdict(True) == "better"
    assert found["likely_at_end"].delta.value == 1.0
    assert found["median"]["before"].value == pytest.approx(0.135)
    assert found["expected"]["after"].value == pytest.approx(0.8025) and found["expected"]["actual"] == 1.0
    assert "better" in endings.told(found)


def test_a_model_that_ends_anywhere_is_seen_to() -> None:
    always = [Ends(3.0, [0.9], 20.0 + i, 30.0 + i) for i in range(8)]
    careful = [Ends(3.0, [0.5], 0.5, 1.2 + 0.01 * i) for i in range(8)]
    found = endings.compare(careful, always)
    assert found["at_end"].after.value == 0.9, "which alone would look better"
    assert found["expected"]["after"].value > 20 and "worse" in endings.told(found)
