import pytest

from pipeline.errors import AletheiaError, Interrupted, StageFailed, UserError


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("is gone"), "is gone", 2),
        (UserError("is gone", where="a.yaml:3"), "a.yaml:3: is gone", 2),
        (UserError("is gone", where="a.yaml:3", remedy="another"), "a.yaml:3: is gone; try another", 2),
        (StageFailed("loss is nan", step=3, remedy="a lower rate"), "loss is nan; try a lower rate", 1),
        (Interrupted("interrupted by SIGTERM"), "interrupted by SIGTERM", 130),
    ],
)
def test_an_error_is_one_line_with_place_remedy_and_exit_code(error: AletheiaError, line: str, code: int) -> None:
    assert str(error) == line
    assert error.exit_code == code


def test_a_failed_stage_carries_its_step_and_rows() -> None:
    error = StageFailed("x", step=7, rows=["a", "b"])
    assert (error.step, error.rows) == (7, ["a", "b"])
    assert StageFailed("x").rows == []
