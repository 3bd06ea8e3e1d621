"""The errors a person meets: one line each, saying where, what, and what to try.

Raised where the cause is known, printed in one place (`aletheia.cli`). Exit codes: 2 a user's mistake, 1 a failed
stage, 130 interrupted.
"""


class AletheiaError(Exception):
    """`where: what; try remedy`, each part optional but `what`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        line = f"{where}: {what}" if where else what
        super().__init__(f"{line}; try {remedy}" if remedy else line)


class UserError(AletheiaError):
    """Something the person can put right before anything has run."""

    exit_code = 2


class StageFailed(AletheiaError):
    """A stage that had started and could not finish. `step` and `rows` go into the record."""

    def __init__(self, what: str, *, step: int | None = None, rows: list[str] | None = None, remedy: str = "") -> None:
        super().__init__(what, remedy=remedy)
        self.step, self.rows = step, rows or []


class Interrupted(AletheiaError):
    """Ctrl-C, SIGTERM or SIGHUP: what was done is kept."""

    exit_code = 130
