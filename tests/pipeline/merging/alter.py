"""What the tests of adapters share: how one is altered, and that what is said of it is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError

WEIGHTS = "adapter_model.safetensors"


def altered(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
