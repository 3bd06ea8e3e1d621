"""The page in a real browser, where there is one: it draws, compares and sorts, and what a record says never runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from aletheia.report import write_report
from pipeline.workspace import Workspace
from tests.aletheia.report.conftest import Put, change

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
QUIET = [
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_compares_in_the_dark_and_runs_nothing_that_a_record_says(
    put: Put, place: Workspace, tmp_path: Path
) -> None:
    names = ["EXP-2026-01-01-001", "EXP-2026-01-01-002"]
    for number, name in enumerate(names):
        log = [
            {"step": step, "loss": 2 - step / 50, HOSTILE: 1.0, "grad_norm_by_layer": {HOSTILE: 0.5}}
            for step in range(30)
        ]
        facts = {
            "profile": HOSTILE,
            "results": {"eval_loss": change(2, 1 + number)},
            "configuration": {"rank": 8 * number},
        }
        put(name, facts, {"description": HOSTILE, "notes": HOSTILE}, log)
    page = place.root / write_report(place, None, markdown=False)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *QUIET,
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    address = f"{page.as_uri()}#dark&compare={','.join(names)}&{names[0]}"
    shown = subprocess.run(
        [*command, "--virtual-time-budget=8000", "--dump-dom", address], capture_output=True, text=True, timeout=120
    ).stdout
    assert 'data-theme="dark"' in shown
    comparison = shown.partition('id="comparison">')[2].partition("</section>")[0]
    assert "<code>rank</code>" in comparison and "[0.90, 1.10]" in comparison
    assert "main-svg" in comparison  # the curves, one over the other
    section = shown.partition(f'<details class="record" id="{names[0]}" open')[2]
    assert section, "the address opens the record"
    assert "<title>place: experiments</title>" in shown and "<img" not in shown
