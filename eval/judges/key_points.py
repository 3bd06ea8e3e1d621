"""The simplest judge: how much of a question's key points an answer's words cover. Weak, and it says so.

It reads words, not meaning: it cannot tell a right statement from its negation, and more words cover more. So it is a
check that the machinery works and a floor for better judges, never a claim of quality; `longest wins` stands beside it.
"""

import re

from eval.judges.judge import ByScore
from pipeline.data.rows import Question

NAME = "key-point words"
WEAKNESS = "reads words, not meaning; a longer answer covers more"
_WORD = re.compile(r"[a-z0-9_]+(?:[.-][a-z0-9_]+)*")
_COMMON = frozenset(
    ["a", "an", "and", "are", "as", "at", "be", "because", "but", "by", "can", "cannot", "do", "does", "for",
     "from", "has", "have", "if", "in", "into", "is", "it", "its", "may", "must", "no", "not", "of", "on",
     "one", "only", "or", "so", "than", "that", "the", "then", "there", "they", "this", "to", "was", "what",
     "when", "which", "will", "with", "you", "your"]
)  # fmt: skip


def score(question: Question, answer: str) -> float:
    """Mean over the key points of the share of their content words that the answer holds, 0 to 1."""
    held = _words(answer)
    shares = [len(words & held) / len(words) for words in map(_words, question.key_points) if words]
    return sum(shares) / len(shares) if shares else 0.0


def judge() -> ByScore:
    """Each answer is scored alone, so the order cannot matter."""
    return ByScore(NAME, WEAKNESS, score)


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) - _COMMON
