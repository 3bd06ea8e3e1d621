"""Training rows that give an evaluation away: its prompts and answers, word for word or nearly.

    leaks = Leaks(words=13, threshold=0.8)
    leaks.forbid("Why does …?", "data/eval/questions/databases.jsonl:3")
    leaks.found(prompt)  # None, or a Leak

**Words.** A run of 13 words that an evaluation's text holds too, whatever their case and punctuation (Brown et al. 2020,
appendix C). A text too short for that counts when it stands whole in the training text and weighs 8 words. What many
texts share by their nature is no leak:

- a word of code weighs a third: a run with code in it counts from 39 words, for thirteen words are the first lines of
  any Dockerfile or manifest. Code is what Markdown takes for it, in fences or indented. A character of a script without
  spaces weighs a third too;
- a run of fewer than 5 different words, all numbers taken as one, is a table or a ruler;
- the words of the usual licences' notices belong to nobody;
- nor do runs, or whole texts, of more than 10 of the evaluation's texts and more than 1 % of them: its template.

**Near.** A whole text nearly the same as a whole text of the evaluation, by its MinHash signature (`duplicates`).

It finds copies, not paraphrases or translations, and nothing at all of a text that weighs fewer than 8 words, such as
"Use a composite index": it would be everywhere.
"""

import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.gate.duplicates import (
    PERMUTATIONS,
    Signature,
    Signer,
    band_keys,
    bands,
    enough,
    parts,
    shared_bytes,
    similarity,
)
from pipeline.gate.notices import NOTICES
from pipeline.gate.words import Hashes, Words, runs

FEWEST_OF_A_PROMPT = 3  # words
FEWEST = 8  # words that a text must weigh to be looked for
DIFFERENT = 5  # words in a run
CODE_WEIGHT = 3  # words of code that weigh as one of prose
COMMON_TEXTS, COMMON_SHARE = 10, 0.01  # a run in more of the evaluation's texts than both is its template's
SHOWN = 60  # characters of the shared words

_CODE = re.compile(
    r"^[ \t]*(?P<fence>`{3,}(?![^\n]*`)|~{3,}).*?(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)|^(?: {4}|\t)[^\n]*",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Leak:
    where: str  # of the evaluation's text
    kind: Literal["words", "near"]
    what: str  # words: as they stand in the training text, shortened; near: the similarity


class Leaks:
    """What the evaluation's texts forbid: first all of `forbid`, then `found`. About 25 bytes a word of theirs."""

    def __init__(self, words: int, threshold: float) -> None:
        """`words`: of a run in common. `threshold`: the similarity from which whole texts are nearly the same."""
        self._run, self._code_run = words, words * CODE_WEIGHT
        self._least = min(FEWEST, words)
        self._near = enough(threshold)
        self._bands = bands(threshold)
        self._signer = Signer()
        self._notices = np.concatenate([runs(Words.of(notice).hashes, FEWEST) for notice in NOTICES])
        self._prompts: dict[bytes, str] = {}  # where each whole prompt stands
        self._where: list[str] = []  # of each text
        self._runs, self._counts = bytearray(), array("I")  # the hashes of each text's runs, each once, and how many
        self._shorts: list[_Short] = []
        self._signatures = bytearray()
        self._index: _Index | None = None

    def forbid(self, text: str, where: str, prompt: bool = False) -> None:
        """A prompt or an answer of an evaluation. Raises RuntimeError once `found` was asked.

        A whole `prompt` of three words or more is a leak however short it is.
        """
        if self._index:
            raise RuntimeError("forbid comes before found")
        words = Words.of(text)
        if prompt and len(words) >= FEWEST_OF_A_PROMPT:
            self._prompts.setdefault(words.hashes.tobytes(), where)
        light, nobodys = words.characters | _code(words), self._in_notice(words)
        signature = self._signer.sign(words.hashes[~nobodys])
        if signature is None or np.where(nobodys, 0, np.where(light, 1 / CODE_WEIGHT, 1)).sum() < FEWEST:
            return
        prose = _windows(light | nobodys, self._run) == 0
        code = (_windows(light, self._code_run) > 0) & (_windows(nobodys, self._code_run) == 0)
        if not prose.any() and not code.any() and _different(words, len(words))[0] >= DIFFERENT:
            first, whole = (int(runs(words.hashes, length)[0]) for length in (FEWEST, len(words)))
            self._shorts.append(_Short(first, len(words), whole, len(self._where)))
        found = [
            runs(words.hashes, length)[counts & (_different(words, length) >= min(DIFFERENT, length))]
            for length, counts in ((self._run, prose), (self._code_run, code))
        ]
        each = np.unique(np.concatenate(found))
        self._runs += each.data
        self._counts.append(len(each))
        self._signatures += signature.data
        self._where.append(where)

    def found(self, text: str, prompt: bool = False) -> Leak | None:
        """What a prompt or an answer of a training row gives away: a whole prompt first, then words, in their order."""
        words = Words.of(text)
        if prompt and (where := self._prompts.get(words.hashes.tobytes())):
            return Leak(where, "words", _shortened(text))
        if len(words) < self._least or not self._where:
            return None
        self._index = self._index or self._built()
        return self._shared_words(words, self._index) or self._nearly_same(words, self._index)

    def _in_notice(self, words: Words) -> NDArray[np.bool_]:
        """Words in a run that a licence's notice has too."""
        found = np.zeros(len(words), bool)
        for start in np.flatnonzero(np.isin(runs(words.hashes, FEWEST), self._notices)):
            found[start : start + FEWEST] = True
        return found

    def _shared_words(self, words: Words, index: "_Index") -> Leak | None:
        for length in (self._run, self._code_run):
            for place, owners in index.runs.found(runs(words.hashes, length)):
                return self._leak_of_words(words, place, length, int(owners[0]))
        for place, owners in index.shorts.found(runs(words.hashes, FEWEST)):
            for short in (self._shorts[owner] for owner in owners):
                if runs(words.hashes[place : place + short.words], short.words).tolist() == [short.whole]:
                    return self._leak_of_words(words, place, short.words, short.owner)
        return None

    def _leak_of_words(self, words: Words, place: int, length: int, owner: int) -> Leak:
        return Leak(self._where[owner], "words", _shortened(words.shown(place, length)))

    def _nearly_same(self, words: Words, index: "_Index") -> Leak | None:
        signature = self._signer.sign(words.hashes)
        if signature is None:
            return None
        matches = [owners[: index.common + 1] for _, owners in index.bands.found(self._keys(signature[None])[0])]
        if not matches:
            return None
        owners = np.unique(np.concatenate(matches))
        shared = shared_bytes(index.signatures[owners], signature)
        if not 0 < (shared >= self._near).sum() <= index.common:
            return None
        best = shared.argmax()
        return Leak(self._where[owners[best]], "near", f"{similarity(int(shared[best])):.0%}")

    def _keys(self, signatures: Signature) -> Hashes:
        """(texts, 128) → (texts, bands): one hash for each, another in each band for the same bytes."""
        count, length = len(self._bands), self._bands[0].stop
        banded = signatures[:, : count * length].reshape(-1, length)
        return band_keys(banded).reshape(-1, count) + np.arange(count).astype(np.uint64)

    def _built(self) -> "_Index":
        common = max(COMMON_TEXTS, int(COMMON_SHARE * len(self._where)))
        signatures = np.frombuffer(self._signatures, np.uint8).reshape(-1, PERMUTATIONS)
        often = Counter(short.whole for short in self._shorts)
        shorts = [number for number, short in enumerate(self._shorts) if often[short.whole] <= common]
        every, self._runs = np.frombuffer(self._runs, np.uint64), bytearray()
        return _Index(
            _Table(every, _numbered(self._counts), common),
            _Table(np.array([self._shorts[n].first for n in shorts], np.uint64), np.array(shorts, np.uint32)),
            _Table(self._keys(signatures).ravel(), _numbered([len(self._bands)] * len(signatures))),
            signatures,
            common,
        )


@dataclass(frozen=True, slots=True)
class _Short:
    """A text without a run of its own: the hash of its first words, how many it has, and the hash of all."""

    first: int
    words: int
    whole: int
    owner: int


class _Table:
    """Who owns a hash: sorted arrays, 12 bytes an entry, behind a filter of 2 to 4 bytes an entry (Bloom 1970, with one
    hash) that fits in a cache and turns away 15 of 16 hashes that nobody owns."""

    def __init__(self, keys: Hashes, owners: NDArray[np.uint32], common: int = sys.maxsize) -> None:
        """`common`: keys of more owners are left out."""
        order = np.argsort(keys, kind="stable")
        keys, owners = keys[order], owners[order]
        del order
        kept = np.ones(len(keys), bool)
        for key in np.unique(keys[common:][keys[common:] == keys[:-common]]):
            kept[keys.searchsorted(key, "left") : keys.searchsorted(key, "right")] = False
        self._keys, self._owners = keys[kept], owners[kept]
        bits = max(8, (16 * len(self._keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << (bits - 3), np.uint8)
        for part in parts(self._keys):
            byte, bit = self._places(part)
            np.bitwise_or.at(self._filter, byte, np.left_shift(np.uint8(1), bit))

    def found(self, keys: Hashes) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """The place of each key that is here, with its owners."""
        byte, bit = self._places(keys)
        places = np.flatnonzero((self._filter[byte] >> bit) & np.uint8(1))
        if not len(places):
            return
        left, right = (self._keys.searchsorted(keys[places], side) for side in ("left", "right"))
        for place, begin, end in zip(places, left, right, strict=True):
            if begin < end:
                yield int(place), self._owners[begin:end]

    def _places(self, keys: Hashes) -> tuple[Hashes, NDArray[np.uint8]]:
        """Of the filter's bits."""
        places = keys >> self._shift
        return places >> np.uint64(3), (places & np.uint64(7)).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Index:
    runs: _Table
    shorts: _Table  # by their first words
    bands: _Table
    signatures: Signature
    common: int  # texts: what more of them share is nobody's


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _numbered(counts: Sequence[int]) -> NDArray[np.uint32]:
    return np.repeat(np.arange(len(counts), dtype=np.uint32), counts)


def _code(words: Words) -> NDArray[np.bool_]:
    """Words inside of Markdown's code blocks."""
    edges = [edge for block in _CODE.finditer(words.text) for edge in block.span()]
    return np.searchsorted(edges, words.starts, "right") % 2 == 1


def _windows(of: NDArray[np.bool_], length: int) -> NDArray[np.int64]:
    """How many are true in each run of `length`."""
    sums = np.r_[0, np.cumsum(of)]
    return sums[length:] - sums[: max(0, len(sums) - length)]


def _different(words: Words, length: int) -> NDArray[np.int64]:
    """Different words in each run of `length`, all numbers as one."""
    if len(words) < length:
        return np.empty(0, np.int64)
    values = np.where(words.numbers, np.uint64(0), words.hashes)
    ordered = np.sort(np.lib.stride_tricks.sliding_window_view(values, length), axis=1)
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
