"""Libraries that transformers and peft import wherever they are installed, kept out of a stage that uses none of them.

Together they take a quarter of the time before the first step, and 120 MB. `None` in `sys.modules` is Python's own way to
say that a module cannot be had, and both libraries are made to do without; so this is for a process that ends with its
stage; `datasets`, once all rows have been read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.model import Base


def leave_out_unused(base: Base) -> None:
    """Before peft and the trainer are imported. What is imported already stays."""
    unused = ["datasets"]  # and with it pandas
    unused += ["bitsandbytes"] if base.quantization == "none" and not base.stored_quantised else []
    leave_out(*unused)


def leave_out(*names: str) -> None:
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextmanager
def left_out(*names: str) -> Iterator[None]:
    """Until the block ends: for what is used later, though not by what is imported now, and will go on without it."""
    absent = [name for name in names if name not in sys.modules]
    leave_out(*absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
