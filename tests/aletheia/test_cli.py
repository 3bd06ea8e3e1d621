"""The command as a person meets it: help, errors, exit codes, and what goes where."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from aletheia import cli
from pipeline.errors import StageFailed
from pipeline.snapshot import Snapshot
from pipeline.workspace import CHECKOUT, Workspace
from tests.conftest import few_words

if TYPE_CHECKING:
    from tests.conftest import Said, Trained

HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "lm_eval", "scipy", "fastapi", "openai", "numpy")


def levels() -> Iterator[tuple[str, ...]]:
    """The words of every command and group: (), ("data",), ("data", "check"), …"""

    def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, inner in getattr(command, "commands", {}).items():
            yield from below(inner, (*words, name))

    yield from below(typer.main.get_command(cli.app), ())


# ── help ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", list(levels()), ids=lambda words: " ".join(words) or "aletheia")
def test_help_of_every_level_has_an_example_that_names_it(
    aletheia: "Callable[..., Said]", workspace: Workspace, words: tuple[str, ...]
) -> None:
    said = aletheia(workspace, *words, "--help")
    assert (said.code, said.err) == (0, ""), said.err
    assert re.search(rf"Example:  aletheia {' '.join(words)}", said.out)
    assert all(len(line) <= 100 for line in said.out.splitlines())


@pytest.mark.parametrize("words", [(), ("data",), ("config",), ("exp",)])
def test_a_group_alone_shows_its_help(
    aletheia: "Callable[..., Said]", workspace: Workspace, words: tuple[str, ...]
) -> None:
    assert aletheia(workspace, *words).out == aletheia(workspace, *words, "--help").out


def test_help_of_every_level_imports_nothing_heavy() -> None:
    script = f"""
import contextlib, io, sys
from aletheia.cli import main
for words in {list(levels())!r}:
    sys.argv = ["aletheia", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    assert "Usage" in out.getvalue()
print(*(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_only_reads_imports_no_torch(workspace: Workspace) -> None:
    commands = [["exp", "list"], ["data", "check", "data/sft"], ["data", "diff", "data/sft", "data/sft"]]
    script = f"""
import sys
from aletheia.cli import main
for words in {commands!r}:
    sys.argv = ["aletheia", *words]
    try:
        main()
    except SystemExit as ending:
        print(*words, ending.code or 0, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"ALETHEIA_ROOT": str(workspace.root)},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.endswith((" False", " True"))]
    assert said == [f"{' '.join(words)} 0 False" for words in commands], done.stderr


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = ("--profile", "small")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown command": (("srf",), "error: No such command 'srf'.+; try aletheia --help"),
    "unknown subcommand": (("data", "chek"), "error: No such command 'chek'.+; try aletheia data --help"),
    "unknown option": (("sft", "--epochs", "3"), "error: No such option.*--epochs.*; try aletheia sft --help"),
    "option without its value": (("sft", "--set"), "error: .*--set.*; try aletheia (sft )?--help"),
    "no path": (("data", "check"), "error: data check: names nothing to check; try a path, or --profile NAME"),
    "no such profile": (("sft", "--profile", "smal"), "error: configs/smal.yaml: no profile `smal`; try --profile small"),
    "no such key": (
        ("sft", *SMALL, "--set", "sft_config.lora_rnk=4"), "error: --set: sft_config.lora_rnk: .*; try `lora_rank`"),
    "a value of another type": (("sft", *SMALL, "--set", "sft_config.epochs=many"), "error: --set: sft_config.epochs: must be"),
    "no assignment": (("sft", *SMALL, "--set", "epochs"), "error: --set: `epochs` is not KEY=VALUE"),
    "no record yet": (("dpo", *SMALL), "error: no complete sft record of profile `small` yet; try make sft"),
    "no such record": (("dpo", *SMALL, "--from", "EXP-2000-01-01-001"), "error: .*EXP-2000-01-01-001.*"),
    "a record elsewhere": (("dpo", *SMALL, "--from", "../../etc/passwd"), "error: .*passwd.*"),
    "a record by its path": (("merge", *SMALL, "--from", "experiments/EXP-2000-01-01-001.yaml"), "error: .*EXP-2000.*"),
    "nothing to resume": (("sft", *SMALL, "--resume"), "error: nothing to resume: no sft record of profile `small`"),
    "no such backend": (("serve", *SMALL, "--backend", "triton"), "error: --set: serve_config.backend: must be 'auto', 'vllm'"),
    "no such port": (("serve", *SMALL, "--port", "70000"), "error: --set: serve_config.port: must be"),
    "a port of letters": (("serve", *SMALL, "--port", "http"), "error: .*--port.*; try aletheia serve --help"),
    "no such part": (("eval", "heldot", *SMALL), "error: eval: there is no part `heldot`; try heldout, benchmarks, winrate"),
    "prefetch and more": (("eval", "prefetch", "heldout", *SMALL), "error: eval: prefetch stands alone; try aletheia eval pre"),
    "no such result": (("eval", "--show", "EXP-2000-01-01-001"), "error: .*EXP-2000-01-01-001.*"),
    "no such data": (("data", "check", "data/none"), "error: data/none.*"),
    "no such row": (("data", "show", "data/sft", *SMALL, "--row", "x"), "error: data/sft: there is no row `x`; try --row "),
    "rows of evaluation": (("data", "show", "data/eval/questions", *SMALL), "error: data/eval/questions/.*:1: these rows are"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(aletheia: "Callable[..., Said]", workspace: Workspace, name: str) -> None:
    arguments, expected = MISTAKES[name]
    said = aletheia(workspace, *arguments)
    assert re.fullmatch(f"{expected}[^\n]*\n", said.err), said.err
    assert (said.code, said.out) == (2, "")
    assert not workspace.experiments.exists()


def test_debug_adds_the_traceback_and_the_line_stays_last(
    aletheia: "Callable[..., Said]", workspace: Workspace
) -> None:
    for arguments in (("--debug", "dpo", *SMALL), ("dpo", *SMALL, "--debug")):
        said = aletheia(workspace, *arguments)
        assert said.code == 2
        assert said.err.startswith("Traceback")
        assert said.err.splitlines()[-1].startswith("error: no complete sft record")


def test_what_nobody_foresaw_is_one_line_and_exit_1(
    aletheia: "Callable[..., Said]", workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("aletheia.exp.listing.list_records", breaks)
    said = aletheia(workspace, "exp", "list")
    assert said.code == 1
    assert re.fullmatch("error: unexpected ZeroDivisionError: [^\n]*; --debug shows where\n", said.err), said.err


@pytest.fixture
def faultless(small_talk: Workspace) -> Workspace:
    """Rows of few words that give no warning: the tenth would."""
    rows = small_talk.root / "data" / "sft" / "few.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
    return small_talk


@pytest.mark.parametrize(
    ("ending", "code", "line", "status"),
    [
        (
            StageFailed("the disk is full", remedy="a larger one"),
            1,
            "error: the disk is full; try a larger one",
            "failed",
        ),
        (MemoryError("9 GB"), 1, "error: unexpected MemoryError: 9 GB; --debug shows where", "failed"),
        (KeyboardInterrupt(), 130, "error: interrupted", "cancelled"),
    ],
    ids=["failed", "unforeseen", "interrupted"],
)
def test_a_stage_that_does_not_finish_says_so_and_prints_no_path(
    aletheia: "Callable[..., Said]", faultless: Workspace, monkeypatch: pytest.MonkeyPatch,
    ending: BaseException, code: int, line: str, status: str,
) -> None:  # fmt: skip
    def run(*_: Any) -> None:
        raise ending

    monkeypatch.setattr(Snapshot, "run", run)
    said = aletheia(faultless, "data", "snapshot", *SMALL)
    assert (said.code, said.out) == (code, "")
    assert said.err.splitlines()[1:] == [line]
    [record] = faultless.experiments.glob("*.yaml")
    assert f"\nstatus: {status}\n" in record.read_text("utf-8")


def test_a_root_that_cannot_be_written_is_one_line(aletheia: "Callable[..., Said]", faultless: Workspace) -> None:
    faultless.experiments.write_text("a file where the folder should be")
    said = aletheia(faultless, "data", "snapshot", *SMALL)
    assert (said.code, said.out) == (1, "")
    assert re.fullmatch("error: [^\n]*experiments[^\n]*\n", said.err), said.err


def test_a_reader_that_has_seen_enough_ends_it_quietly(trained: "Trained") -> None:
    """`aletheia exp list | head -1`: a closed pipe is no error of ours, and no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"ALETHEIA_ROOT": str(trained.workspace.root)}
    done = subprocess.run(
        [sys.executable, "-m", "aletheia.cli", "exp", "list"],
        cwd=CHECKOUT, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert done.stderr == ""


def test_a_closed_stdout_is_no_failure(trained: "Trained") -> None:
    script = "import os, sys; os.close(1); sys.stdout = None; from aletheia.cli import main; main()"
    environment = os.environ | {"ALETHEIA_ROOT": str(trained.workspace.root)}
    done = subprocess.run(
        [sys.executable, "-c", script, "exp", "list"], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# ── what goes where ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_stdout_holds_the_records_path_alone(aletheia: "Callable[..., Said]", trained_copy: "Trained") -> None:
    for words in (["data", "snapshot"], ["merge", "--hypothesis", "It is the same model."]):
        said = aletheia(trained_copy.workspace, *words, *SMALL)
        assert said.code == 0, said.err
        assert re.fullmatch(r"experiments/EXP-\d{4}-\d\d-\d\d-\d{3}\.yaml\n", said.out)
        assert said.out.strip() in said.err  # where it began, a person saw it too
        text = (trained_copy.workspace.root / said.out.strip()).read_text("utf-8")
        assert "\nstatus: complete\n" in text
    assert "\nhypothesis: It is the same model.\n" in text


@pytest.fixture(scope="module")
def finished(trained: "Trained", tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The finished pipeline, with rows of few words: every dry run reads them all."""
    copy = trained.copy_to(tmp_path_factory.mktemp("finished") / "root").workspace
    few_words(copy)
    return copy


@pytest.mark.parametrize(
    "words",
    [["data", "snapshot"], ["sft"], ["dpo"], ["dpo", "--from", "base"], ["merge"], ["serve", "--port", "0"], ["eval"]],
    ids=" ".join,
)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    aletheia: "Callable[..., Said]", finished: Workspace, words: list[str]
) -> None:
    def everything() -> dict[Path, tuple[int, int]]:
        """But the records' index: a cache, which any reading may renew."""
        paths = [path for path in finished.root.rglob("*") if path.name != ".index.sqlite"]
        stats = {path: path.lstat() for path in paths if path != finished.experiments}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    before = everything()
    said = aletheia(finished, *words, *SMALL, "--dry-run")
    assert (said.code, said.out) == (0, ""), said.err
    assert len(said.err.splitlines()) >= 2
    assert everything() == before


@pytest.mark.parametrize(
    "words",
    [["exp", "list"], ["config", "explain", *SMALL], ["data", "check", "data"]],
    ids=lambda words: " ".join(words[:2]),
)
def test_json_is_the_data_alone_on_stdout(
    aletheia: "Callable[..., Said]", trained: "Trained", words: list[str]
) -> None:
    said = aletheia(trained.workspace, *words, "--json")
    assert (said.code, said.err) == (0, ""), said.err
    assert json.loads(said.out)
