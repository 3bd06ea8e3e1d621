"""Rows that stand in a set twice, word for word or nearly: found in one pass and a sort, in bounded memory.

    near = NearDuplicates(0.8)
    for text in texts:
        near.add(text)
    for later, earlier, similarity in near.pairs(): ...

Rows are numbered from 0 in the order in which they are added. Nothing is compared while rows come in: a row leaves 16
bytes (`Exact`) or 132 (`NearDuplicates`), and the pairs come out of sorting these at the end.

It compares words, not meaning: a paraphrase is no near-duplicate.
"""

import math
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.gate.words import Hashes, Words, powers_of, runs

PERMUTATIONS = 128  # bytes of a signature; the estimate's standard error is at most 1 / (2 √128) = 0.044, 0.035 at 0.8
SHINGLE = 3  # words
RECALL = 0.9  # of pairs at the threshold, that banding must make candidates

Signature = NDArray[np.uint8]

_BY_CHANCE = 2.0**-8  # that the kept bits of two different values are the same
_AT_ONCE = 1 << 15  # pairs compared, and shingles hashed, at once: a few MB
_DIGEST = 16  # bytes


class Exact:
    """Rows with the same digest."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, digest: bytes) -> None:
        """Of at least 16 bytes, of which the first 16 count: in a million rows two of them are the same by chance once
        in 10^27 sets. Raises ValueError for a shorter one."""
        if len(digest) < _DIGEST:
            raise ValueError(f"a digest of {len(digest)} bytes")
        self._digests += digest[:_DIGEST]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(later row, first row with the same digest), by later row, each once."""
        halves = np.frombuffer(self._digests, np.uint64).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: within a digest, by row
        ordered = halves[order]
        later, first = _groups(order, (ordered[1:] == ordered[:-1]).all(axis=1))
        by_row = np.argsort(later)
        for row, of in zip(later[by_row], first[by_row], strict=True):
            yield int(row), int(of)


class NearDuplicates:
    """Rows whose sets of word triples overlap: their Jaccard similarity, estimated from MinHash signatures.

    MinHash over shingles (Broder 1997), 128 permutations by datasketch, of each of which 8 bits are kept (b-bit minwise
    hashing, Li and König 2010). Rows that agree in one whole band of the signature are candidates, and the signatures
    decide. Bands are as long as leaves a pair at the threshold a chance of 0.9 to be a candidate: at 0.8, 16 bands of 8,
    0.947 at the threshold, 0.994 at 0.85 and 0.9999 at 0.9. The estimate then errs by ± 0.035 (one standard error), so
    that of pairs right at the threshold about half are named, nearly all that are 0.07 above it, and hardly any 0.1 below.

    In each band a row is compared with the first row that shares it: a cluster costs what its rows cost, however large,
    and 100,000 rows of one boilerplate are at most 100,000 pairs. A row may so be named with another of its cluster than
    the nearest.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._signer = Signer()
        self._signatures = bytearray()
        self._rows = array("I")  # of the signatures
        self._count = 0

    def add(self, text: str) -> None:
        """The next row. One without a single word takes no part; one of one or two words is a shingle as a whole."""
        signature = self._signer.sign(Words.of(text).hashes)
        if signature is not None:
            self._signatures += signature.data
            self._rows.append(self._count)
        self._count += 1

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """(later row, earlier row, estimated similarity ≥ threshold), by later row, each at most once, with the most
        similar of the rows it was compared with.

        Exact duplicates are among them, with 1.0, and the earlier row of a pair is never one that `Exact` calls later.
        """
        signatures = np.frombuffer(self._signatures, np.uint8).reshape(-1, PERMUTATIONS)
        best = np.zeros(len(signatures), np.uint8)
        match = np.full(len(signatures), len(signatures), np.uint32)
        for band in bands(self._threshold):
            keys = np.concatenate([band_keys(part[:, band]) for part in parts(signatures)] or [np.empty(0, np.uint64)])
            order = np.argsort(keys, kind="stable").astype(np.uint32)  # stable: within a key, by row
            keys = keys[order]
            later, first = _groups(order, keys[1:] == keys[:-1])
            _compare(signatures, later, first, best, match)
        for row in np.flatnonzero(best >= enough(self._threshold)):
            yield self._rows[row], self._rows[match[row]], float(similarity(best[row]))


class Signer:
    """Texts into signatures: 128 bytes, of which two texts share as many as their similarity says."""

    def __init__(self) -> None:
        from datasketch import MinHash  # imports scipy

        self._sketch: Any = MinHash(PERMUTATIONS, hashfunc=int, scheme="affine32")

    def sign(self, words: Hashes) -> Signature | None:
        """None for no words."""
        if not len(words):
            return None
        shingles = runs(words, min(SHINGLE, len(words)))
        # Of a million texts of one shingle each, some have 32 bits in common by chance: both halves count.
        if len(shingles) == 1:
            shingles = np.append(shingles, shingles << np.uint64(32))
        shingles = shingles >> np.uint64(32)
        self._sketch.clear()
        for part in parts(shingles):
            self._sketch.update_batch(part.tolist())
        # The lowest bits of `a h + b` depend on the lowest of h alone: without a multiplication, whose highest depend on
        # all, two texts of one shingle each would agree in all permutations or none.
        mixed = self._sketch.hashvalues * np.uint32(0x9E3779B1)
        return (mixed >> np.uint32(24)).astype(np.uint8)


def bands(threshold: float) -> list[slice]:
    """The parts of a signature of which candidates share one, as long as the recall at the threshold allows.

    A pair of similarity s shares one of b bands of r bytes with chance 1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman
    2020, section 3.4).
    """
    lengths = range(1, PERMUTATIONS + 1)
    length = max((r for r in lengths if recall(threshold, PERMUTATIONS // r, r) >= RECALL), default=1)
    return [slice(start, start + length) for start in range(0, PERMUTATIONS - length + 1, length)]


def recall(similarity: float, count: int, length: int) -> float:
    """The chance of a pair to be a candidate, by `count` bands of `length` bytes."""
    return 1 - (1 - similarity**length) ** count


def band_keys(band: Signature) -> Hashes:
    """One hash a row, (rows, bytes of the band) → (rows,): a polynomial, as of `runs`."""
    return band.astype(np.uint64) @ powers_of(band.shape[1])[0]


def similarity(shared: Any) -> Any:
    """Estimated Jaccard similarity of texts whose signatures share this many bytes, less those shared by chance."""
    return np.maximum(0.0, (shared / PERMUTATIONS - _BY_CHANCE) / (1 - _BY_CHANCE))


def enough(threshold: float) -> int:
    """Bytes that signatures share from which their estimated similarity is at least the threshold."""
    return math.ceil(round(PERMUTATIONS * (threshold * (1 - _BY_CHANCE) + _BY_CHANCE), 9))


def shared_bytes(one: Signature, other: Signature) -> NDArray[np.uint8]:
    """How many bytes the signatures of each row share: (rows, 128) twice → (rows,)."""
    return (one == other).sum(axis=1, dtype=np.uint8)


def parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """An array in pieces that are worked on at once, so that what is made of them stays small."""
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]


def _groups(order: NDArray[Any], same: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of sorted rows, each that has the key of the one before: itself, and the first with that key."""
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(1, len(order))))
    return order[1:][same], order[starts[same]]


def _compare(
    signatures: Signature,
    later: NDArray[Any],
    earlier: NDArray[Any],
    best: NDArray[np.uint8],
    match: NDArray[np.uint32],
) -> None:
    """Keeps for each later row the most similar row so far. No row is `later` twice."""
    new = match[later] != earlier
    for rows, others in zip(parts(later[new]), parts(earlier[new]), strict=True):
        shared = shared_bytes(signatures[rows], signatures[others])
        better = shared > best[rows]
        best[rows[better]] = shared[better]
        match[rows[better]] = others[better]
