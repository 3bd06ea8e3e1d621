"""A text as numbers: its words and its runs of words, each a 64-bit hash that is the same in every process.

    words = Words.of("Use a composite index.")
    triples = runs(words.hashes, 3)  # "use a composite", "a composite index"

Case, punctuation and the form in which Unicode writes a character (NFKC) do not count. Chinese, Japanese, Thai, Lao,
Khmer and Burmese have no breaks between words, so each of their characters is a word here. It does not stem, drop common
words or understand code: `max_length` is one word, `a.b` two.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_SEPARATOR, _LETTER, _DIGIT, _ALONE = 0, 1, 2, 3
_CODES = 0x33480  # code points from here on are private, or tags and selectors: separators
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, _CODES - 1),
)  # fmt: skip
_SELECTORS = (0xFE00, 0xFE0F)  # after an emoji: marks, but of no word
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_USUAL = 1 << 16  # powers kept; a longer text computes its own


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text, in order. Arrays have one entry a word."""

    text: str  # as it stands, but in NFKC: what `starts` counts in
    hashes: Hashes
    starts: NDArray[np.intp]  # characters
    kinds: NDArray[np.uint8]  # of the first character

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def numbers(self) -> NDArray[np.bool_]:
        """Words that begin with a digit."""
        return self.kinds == _DIGIT

    @property
    def characters(self) -> NDArray[np.bool_]:
        """Words that are one character of a script without spaces."""
        return self.kinds == _ALONE

    @classmethod
    def of(cls, text: str) -> "Words":
        text = unicodedata.normalize("NFKC", text)
        lower = text.lower()
        if len(lower) != len(text):  # as of İ: no place in the one is a place in the other
            text = lower
        codes = np.frombuffer(lower.encode("utf-32-le", "surrogatepass"), np.uint32)
        if not len(codes):
            return cls(text, np.empty(0, np.uint64), np.empty(0, np.intp), np.empty(0, np.uint8))
        kinds = _kinds().take(codes, mode="clip")
        inside = kinds != _SEPARATOR
        begins = inside.copy()
        begins[1:] &= ~inside[:-1] | (kinds[1:] == _ALONE) | (kinds[:-1] == _ALONE)
        starts = np.flatnonzero(begins)
        if not len(starts):
            return cls(text, np.empty(0, np.uint64), starts, np.empty(0, np.uint8))
        powers, inverses = powers_of(len(codes))
        sums = np.add.reduceat(powers * (codes * inside), starts)
        return cls(text, _mixed(sums * inverses[starts]), starts, kinds[starts])

    def shown(self, first: int, count: int) -> str:
        """Words as they stand, with what is between them."""
        end = first + count
        return self.text[self.starts[first] : self.starts[end] if end < len(self) else None].rstrip()


def runs(hashes: Hashes, length: int) -> Hashes:
    """A hash for each run of `length` words, by the place of its first; none in a shorter text.

    A polynomial of the words' hashes modulo 2^64 (Karp and Rabin 1987), by differences of its sums from the start, so
    that it costs the same for every length.
    """
    count = len(hashes) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    powers, inverses = powers_of(len(hashes))
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers, out=sums[1:])
    return (sums[length:] - sums[:count]) * inverses[:count]


def _mixed(values: Hashes) -> Hashes:
    """MurmurHash3's finaliser: every bit of a value changes every bit of the result with a chance of a half."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def powers_of(count: int) -> tuple[Hashes, Hashes]:
    """The first `count` powers, modulo 2^64, of the base of the polynomials, and those of its inverse."""
    if count > _USUAL:
        return _computed_powers(count)
    powers, inverses = _usual_powers()
    return powers[:count], inverses[:count]


@cache
def _usual_powers() -> tuple[Hashes, Hashes]:
    return _computed_powers(_USUAL)


def _computed_powers(count: int) -> tuple[Hashes, Hashes]:
    bases = np.full((2, count), [[_BASE], [_INVERSE]], np.uint64)
    bases[:, 0] = 1
    powers, inverses = np.cumprod(bases, axis=1)
    return powers, inverses


@cache
def _kinds() -> NDArray[np.uint8]:
    """What each code point is to a word, by its Unicode category; the last entry stands for all beyond."""
    of_category = {"L": _LETTER, "M": _LETTER, "N": _DIGIT}
    kinds = np.array(
        [of_category.get(unicodedata.category(chr(code))[0], _SEPARATOR) for code in range(_CODES)] + [_SEPARATOR],
        np.uint8,
    )
    kinds[ord("_")] = _LETTER
    for first, last in _UNSPACED:
        here = kinds[first : last + 1]
        here[here == _LETTER] = _ALONE
    kinds[_SELECTORS[0] : _SELECTORS[1] + 1] = _SEPARATOR
    return kinds
