"""Duplicates, exact and near: planted ones are found, others are not, and a cluster costs what its rows cost."""

import hashlib
import random
from collections import Counter

import pytest

from pipeline.gate.duplicates import PERMUTATIONS, Exact, NearDuplicates, bands, enough, recall, similarity

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in "dklmnrst"]
Pairs = list[tuple[int, int, float]]


def words(rng: random.Random, count: int) -> list[str]:
    return rng.choices(VOCABULARY, k=count)


def near(threshold: float, *texts: str) -> Pairs:
    found = NearDuplicates(threshold)
    for text in texts:
        found.add(text)
    return list(found.pairs())


def altered(rng: random.Random, text: list[str], jaccard: float) -> list[str]:
    """Another end, so that the two share this much of their triples."""
    triples = len(text) - 2
    kept = round(2 * triples * jaccard / (1 + jaccard)) + 2
    return text[:kept] + words(rng, len(text) - kept)


# ── Exact ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_later_row_is_paired_once_with_the_first_of_its_digest() -> None:
    exact = Exact()
    for content in "abacabda":
        exact.add(hashlib.sha256(content.encode()).digest())
    assert list(exact.pairs()) == [(2, 0), (4, 0), (5, 1), (7, 0)]


def test_every_byte_of_the_first_sixteen_counts() -> None:
    exact = Exact()
    exact.add(bytes(16))
    for place in range(16):
        exact.add(bytes(1 if n == place else 0 for n in range(16)))
    assert list(exact.pairs()) == []


def test_no_rows_have_no_duplicates() -> None:
    assert list(Exact().pairs()) == []
    assert near(0.8) == []


def test_short_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        Exact().add(bytes(8))


# ── Near ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_planted_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(1)
    texts = [words(rng, 300) for _ in range(800)]
    planted = {len(texts) + n: n for n in range(100)}
    levels = {0.95: range(40), 0.9: range(40, 80), 0.6: range(80, 100)}
    for level, numbers in levels.items():
        texts += [altered(rng, texts[n], level) for n in numbers]
    found = {later: (earlier, share) for later, earlier, share in near(0.8, *map(" ".join, texts))}
    assert all(planted.get(later) == earlier for later, (earlier, _) in found.items())
    for level, numbers in levels.items():
        shares = [found[800 + n][1] for n in numbers if 800 + n in found]
        assert len(shares) == (0 if level < 0.8 else len(numbers))
        assert all(share == pytest.approx(level, abs=0.12) for share in shares)


def test_same_words_are_one_and_rows_are_numbered_with_those_that_take_no_part() -> None:
    found = NearDuplicates(0.8)
    found.add("Use a composite index.")
    found.add("?")
    found.add("")
    found.add("use a COMPOSITE index")
    found.add("🙂 …")
    found.add("")
    found.add("Use a - composite - index")
    assert list(found.pairs()) == [(3, 0, 1.0), (6, 0, 1.0)]


def test_texts_without_words_are_not_alike() -> None:
    assert near(0.8, "", "!", "", "🙂", "\n") == []


@pytest.mark.parametrize("form", ["{}", "a{}", "it is {}", "it is {} now"])
def test_short_texts_that_differ_are_not_alike(form: str) -> None:
    """Without the mixing of `Signer`, one pair in 256 of these would be."""
    assert near(0.8, *(form.format(n) for n in range(4000))) == []


@pytest.mark.parametrize("text", ["yes", "yes please", "yes please do"])
def test_short_texts_that_are_the_same_are_alike(text: str) -> None:
    assert near(0.8, text, "no", text.upper()) == [(2, 0, 1.0)]


def test_text_without_spaces_is_compared_by_its_characters() -> None:
    text = (
        "数据库索引是一种数据结构它可以提高查询速度但是会占用额外的存储空间并且降低写入的性能所以需要权衡利弊再做决定"
    )
    (pair,) = near(
        0.7, text, "今天天气很好我们去公园散步吧然后再去图书馆看书晚上回家做饭", text.replace("利弊", "得失")
    )
    assert pair[:2] == (2, 0) and 0.7 <= pair[2] < 1


def test_row_is_named_with_the_most_similar_one_and_never_with_an_exact_duplicate() -> None:
    rng = random.Random(2)
    text = words(rng, 300)
    middle = altered(rng, text, 0.85)
    last = [*middle[:-1], "changed"]
    pairs = near(0.75, *map(" ".join, (text, text, middle, middle, middle, last)))
    assert [p[:2] for p in pairs] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]


def test_large_cluster_is_named_row_by_row_with_the_first_of_its_kind() -> None:
    rng = random.Random(3)
    text = " ".join(words(rng, 50))
    pairs = near(0.8, *["Dear all,", *[text] * 3000, " ".join(words(rng, 50))])
    assert pairs == [(row, 1, 1.0) for row in range(2, 3001)]


def test_near_duplicate_among_rows_of_one_template_is_found() -> None:
    rng = random.Random(4)
    template = words(rng, 120)
    texts = [template + words(rng, 60) for _ in range(1500)]
    texts += [[*texts[n][:-1], "changed"] for n in range(40)]
    found = {later: earlier for later, earlier, _ in near(0.8, *map(" ".join, texts))}
    assert [found.get(1500 + n) for n in range(40)] == list(range(40))


def test_pairs_do_not_depend_on_other_rows_or_when_they_are_asked() -> None:
    rng = random.Random(5)
    text = words(rng, 200)
    found = NearDuplicates(0.8)
    for row in (text, altered(rng, text, 0.95)):
        found.add(" ".join(row))
    before = list(found.pairs())
    for _ in range(50):
        found.add(" ".join(words(rng, 200)))
    assert before == list(found.pairs()) and len(before) == 1


def test_threshold_of_one_names_the_same_alone() -> None:
    rng = random.Random(6)
    text = words(rng, 200)
    assert near(1.0, " ".join(text), " ".join([*text, "more"] * 1), " ".join(text)) == [(2, 0, 1.0)]


def test_very_long_text_is_compared_whole() -> None:
    text = words(random.Random(7), 60_000)
    assert near(0.8, " ".join(text), " ".join(text[:30_000])) == []
    assert [p[:2] for p in near(0.8, " ".join(text), " ".join(text[:59_000]))] == [(1, 0)]


@pytest.mark.parametrize("threshold", [0.51, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_nine_of_ten_pairs_at_the_threshold(threshold: float) -> None:
    parts = bands(threshold)
    length = parts[0].stop
    assert recall(threshold, len(parts), length) >= 0.9
    assert length == PERMUTATIONS or recall(threshold, PERMUTATIONS // (length + 1), length + 1) < 0.9
    places = Counter(place for part in parts for place in range(PERMUTATIONS)[part])
    assert set(places.values()) == {1} and all(part.stop - part.start == length for part in parts)


@pytest.mark.parametrize("threshold", [0.51, 0.6, 0.75, 0.8, 0.9, 1.0])
def test_enough_is_the_least_that_reaches_the_threshold(threshold: float) -> None:
    assert similarity(enough(threshold)) >= threshold - 1e-9 > similarity(enough(threshold) - 1)


def test_figures_of_the_docstring() -> None:
    assert (len(bands(0.8)), bands(0.8)[0].stop) == (16, 8)
    assert [round(recall(s, 16, 8), 4) for s in (0.8, 0.85, 0.9)] == [0.9470, 0.9938, 0.9999]
