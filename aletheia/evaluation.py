"""What `aletheia eval` does beside evaluating: shows a result again, and fetches what benchmarks need."""

import sys

from aletheia.output import print_table
from pipeline.stage import Job
from pipeline.workspace import Workspace


def show_result(wanted: str) -> None:
    """The result in the terminal; its page is written anew. Raises `UserError` for what is no evaluation's record."""
    from eval.page.page import write_page
    from eval.page.spent import spent
    from eval.page.told import print_result
    from pipeline.progress import say
    from pipeline.records import find

    workspace = Workspace.find()
    file = find.named(workspace, wanted)
    path, facts = write_page(file), file.facts()
    assert facts is not None
    print_result(facts, spent(file, facts))
    say(f"page: {workspace.shown(path)}")


def fetch_benchmarks(job: Job) -> None:
    """Raises `StageFailed` where some of the data could not be had."""
    from eval.benchmarks.prefetch import check_all, prefetch
    from pipeline.quiet import quiet

    quiet()
    rows = prefetch(job)
    print_table(("task", "from", "items", "size, or why not"), [row.row() for row in rows], sys.stdout)
    check_all(rows)
