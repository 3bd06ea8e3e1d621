"""Leaks: an evaluation's words in a training row are found, what many texts share by their nature is not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.gate.leaks import NOTICES, Leak, Leaks

DATA = Path(__file__).parents[3] / "data"
QUESTION = (
    "A checkout service writes the order and then publishes an event; after a crash between both steps, some orders "
    "never reach the warehouse. Which pattern makes both happen or neither, without a distributed transaction?"
)
UNRELATED = (
    "Explain how a write-ahead log lets a database survive a crash, and why the log is flushed before the pages that "
    "it describes are written back to their place on disk."
)
DOCKERFILE = """FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "app.py"]"""


def leaks(*forbidden: str, words: int = 13, threshold: float = 0.8) -> Leaks:
    found = Leaks(words, threshold)
    for number, text in enumerate(forbidden):
        found.forbid(text, f"eval:{number + 1}")
    return found


def fenced(code: str, prose: str = "") -> str:
    return f"{prose}\n\n```text\n{code}\n```\n"


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_thirteen_words_in_common_are_a_leak_and_twelve_are_not() -> None:
    found = leaks(UNRELATED, QUESTION)
    run = QUESTION.split()[5:18]
    assert found.found(f"Before it. {' '.join(run)} after it all.") == Leak(
        "eval:2", "words", "order and then publishes an event; after a crash between bo…"
    )
    assert found.found(f"Before it. {' '.join(run[:12])} after it all.") is None
    assert found.found(f"{' '.join(run[:6])} but {' '.join(run[6:])}") is None


def test_number_of_words_is_what_was_asked() -> None:
    run = " ".join(QUESTION.split()[5:12])
    assert leaks(QUESTION, words=7).found(f"so {run} then") and not leaks(QUESTION, words=8).found(f"so {run} then")


def test_case_punctuation_and_line_breaks_do_not_hide_a_leak() -> None:
    hidden = "> " + "\n> ".join(QUESTION.upper().replace(",", " --").split())
    leak = leaks(QUESTION).found(hidden)
    assert leak and leak.kind == "words" and leak.what.startswith("A > CHECKOUT > SERVICE") and len(leak.what) <= 60


def test_leak_is_found_anywhere_in_a_long_text() -> None:
    filler = " ".join(f"filler{n}" for n in range(3000))
    assert leaks(QUESTION).found(f"{filler} {QUESTION}") and leaks(QUESTION).found(f"{QUESTION} {filler}")
    assert leaks(f"{filler} {QUESTION}").found(QUESTION)


def test_first_text_that_has_the_words_is_named() -> None:
    leak = leaks(QUESTION, f"Read this. {QUESTION}").found(QUESTION)
    assert leak and leak.where == "eval:1"


@pytest.mark.parametrize(
    ("short", "is_leak"),
    [
        ("Why does a sequential scan beat this index?", True),  # 8 words
        ("Does a sequential scan beat this index?", False),  # 7
        ("Use a composite index", False),
    ],
)
def test_short_text_counts_whole_from_eight_words(short: str, is_leak: bool) -> None:
    found = leaks(QUESTION, short)
    assert bool(found.found(f"My colleague asked me today: {short.lower()} I did not know.")) == is_leak
    assert found.found(f"My colleague asked me: {' '.join(short.split()[:-1])} table? I did not know.") is None


def test_short_texts_that_begin_alike_are_told_apart() -> None:
    start = "What is the main reason for which a"
    found = leaks(f"{start} lock waits?", f"{start} scan is slow?")
    leak = found.found(f"Tell me: {start} scan is slow? Thanks for your help.")
    assert leak and leak.where == "eval:2"
    assert found.found(f"Tell me: {start} node is slow? Thanks for your help.") is None


def test_nothing_forbidden_finds_nothing() -> None:
    assert leaks().found(QUESTION) is None
    assert leaks("", "?!", "yes").found("yes") is None
    assert leaks(QUESTION).found("") is None and leaks(QUESTION).found("🙂") is None


def test_forbidding_after_finding_is_refused() -> None:
    found = leaks(QUESTION)
    found.found(QUESTION)
    with pytest.raises(RuntimeError):
        found.forbid(UNRELATED, "late")


# ── What many texts share ────────────────────────────────────────────────────────────────────────────────────────────


def test_boilerplate_of_code_is_no_leak_and_a_copied_program_is() -> None:
    found = leaks(
        fenced(DOCKERFILE + "\n" + "RUN echo done", "Put this into a file, build it, and push it to the registry.")
    )
    assert (
        found.found(fenced(DOCKERFILE, "Your image is large because of its base; take the slim one instead.")) is None
    )
    program = "\n".join(f"    total_{n} = price_{n} * amount_{n} + postage" for n in range(12))
    found = leaks(fenced(program, "This computes it:"))
    leak = found.found(
        fenced(program + "\n    return total_11", "I would write it as follows, one line for each order:")
    )
    assert leak and leak.kind == "words"
    assert found.found(fenced("\n".join(program.split("\n")[:7]), "I would write it in this way instead:")) is None


def test_short_program_is_no_leak_where_words_of_the_same_number_are() -> None:
    command = "docker run --rm -it -p 8080:80 -v data:/data nginx"  # 11 words
    for row in (f"Try this: {command} and look at its log.", command):
        assert leaks(fenced(command)).found(row) is None
        assert leaks(command).found(row)


def test_code_that_is_indented_is_code_too() -> None:
    indented = "\n".join(f"    {line}" for line in DOCKERFILE.split("\n"))
    found = leaks(f"Put this into a file, and build it with the usual command:\n\n{indented}")
    assert (
        found.found(fenced(DOCKERFILE, "Your image is large because of its base; take the slim one instead.")) is None
    )


def test_prose_beside_code_is_prose() -> None:
    found = leaks(f"{fenced(DOCKERFILE)}\n{QUESTION}\n{fenced(DOCKERFILE)}")
    leak = found.found(f"So: {QUESTION}")
    assert leak and leak.kind == "words"


@pytest.mark.parametrize("notice", NOTICES, ids=["apache", "mit", "bsd", "gpl"])
@pytest.mark.parametrize("as_code", [True, False])
def test_licence_notice_is_no_leak(notice: str, as_code: bool) -> None:
    commented = "\n".join(f"# {line.strip()}" for line in notice.split("\n"))
    one, other = (f"{commented}\nimport os\n\n{rest}" for rest in (QUESTION, UNRELATED))
    if as_code:
        one, other = fenced(one), fenced(other)
    found = leaks(one, notice)
    assert found.found(other) is None and found.found(notice) is None
    assert found.found(QUESTION) if not as_code else True


def test_tables_and_counting_are_no_leak() -> None:
    counting = " ".join(str(n) for n in range(40))
    found = leaks(f"Continue: {counting}", "| 0 | 0 " * 30, "a b " * 20)
    assert found.found(f"The numbers are {counting} and so on, as everybody knows by now.") is None
    assert leaks("1 2 3 4 5 6 7 8 9 10").found(f"The numbers are {counting} and so on, as everybody knows.") is None
    assert found.found("| 0 | 0 " * 12 + " is a row of the table that I was given by him") is None


def test_template_of_an_evaluation_is_no_leak_and_its_questions_are() -> None:
    template = "The following is a question with four choices, of which exactly one is right; answer with its letter."
    questions = [f"{template} Number {n}: {' '.join(f'word{n}x{m}' for m in range(20))}" for n in range(11)]
    row = f"{template} Which of these four is a mammal? A whale, B shark, C cod, D eel"
    assert leaks(*questions).found(row) is None
    assert leaks(*questions[:10]).found(row), "in ten texts it may be a shared passage"
    leak = leaks(*questions).found(questions[4].split(": ")[1])
    assert leak and leak.where == "eval:5"


def test_system_prompt_of_a_whole_evaluation_is_no_leak() -> None:
    system = "You are a careful assistant; answer briefly and say so when unsure."
    assert leaks(*[system] * 11, QUESTION).found(system) is None
    assert leaks(system, QUESTION).found(system) is not None


def test_run_of_a_script_without_spaces_is_longer() -> None:
    text = (
        "数据库索引是一种数据结构它可以提高查询速度但是会占用额外的存储空间并且降低写入的性能所以需要权衡利弊再做决定"
    )
    other = "昨天老师讲过为什么有时候全表扫描反而更快这个问题很有意思值得大家回去仔细想一想再来讨论"
    found = leaks(text)
    assert found.found(other + text[:13] + other) is None
    assert found.found(other + text[:39] + other)


# ── Near ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_nearly_the_same_is_a_leak_without_a_run_in_common() -> None:
    words = [f"word{n}" for n in range(240)]
    changed = [f"{w}s" if n % 39 == 12 else w for n, w in enumerate(words)]  # 0.85 of the triples are left
    found = leaks(QUESTION, " ".join(words), words=40)
    leak = found.found(" ".join(changed))
    assert leak and (leak.where, leak.kind) == ("eval:2", "near")
    assert 80 <= int(leak.what.removesuffix("%")) <= 95
    assert leaks(QUESTION, " ".join(words), words=40, threshold=0.97).found(" ".join(changed)) is None


def test_near_leak_is_of_whole_texts() -> None:
    words = [f"word{n}" for n in range(120)]
    changed = [f"{w}s" if n % 30 == 12 else w for n, w in enumerate(words)]
    found = leaks(" ".join(words), words=40, threshold=0.75)
    assert found.found(" ".join(changed))
    assert found.found(" ".join(changed) + UNRELATED * 3) is None


def test_most_similar_text_is_named() -> None:
    words = [f"word{n}" for n in range(300)]
    near, nearer = ([f"{w}s" if n % gap == 5 else w for n, w in enumerate(words)] for gap in (35, 150))
    leak = leaks(" ".join(near), " ".join(nearer), words=50, threshold=0.6).found(
        " ".join(f"{w}z" if n % 45 == 40 else w for n, w in enumerate(words))
    )
    assert leak and (leak.where, leak.kind) == ("eval:2", "near")


# ── The shipped set ──────────────────────────────────────────────────────────────────────────────────────────────────


def rows(*folders: str) -> Iterator[tuple[str, dict]]:
    for folder in folders:
        for file in sorted((DATA / folder).rglob("*.jsonl")):
            for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
                yield f"{file.relative_to(DATA)}:{number}", json.loads(line)


def evaluation() -> Iterator[tuple[str, str]]:
    for where, row in rows("eval"):
        for text in (row.get("prompt"), row.get("reference"), row.get("question"), *row.get("choices", [])):
            if text:
                yield where, text


def test_shipped_training_rows_leak_nothing() -> None:
    found = Leaks(13, 0.8)
    for where, text in evaluation():
        found.forbid(text, where)
    for where, row in rows("sft", "dpo"):
        for message in (
            *row.get("messages", []),
            *row.get("prompt", []),
            *row.get("chosen", []),
            *row.get("rejected", []),
        ):
            assert (where, found.found(message["content"])) == (where, None)


def test_every_shipped_question_is_found_when_it_is_planted() -> None:
    found = Leaks(13, 0.8)
    asked = {where: row.get("prompt") or row["question"] for where, row in rows("eval")}
    for where, text in asked.items():
        found.forbid(text, where)
    for where, text in asked.items():
        if len(text.split()) >= 10:
            leak = found.found(f"Hello! I have a question. {text} Please answer in detail.")
            assert leak and leak.where == where
