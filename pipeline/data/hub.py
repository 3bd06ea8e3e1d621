"""Rows of a data set on the Hugging Face hub, streamed: nothing is kept on disk.

    hub:OWNER/NAME[@REVISION][/CONFIG][#SPLIT]      hub:HuggingFaceH4/no_robots@main#train
    hub:FOLDER[#SPLIT]                              hub:./exported#train

A revision is a branch, a tag, a commit or `refs/convert/parquet`; pin a commit for a result that can be reproduced. A folder
begins with `.`, `/` or `~` and holds files as `datasets` knows them. Without a split it is the only one, else `train`.

`datasets` fills fields that a row lacks with null, and reads dates out of texts; those
are written as texts again. A row has no line there, so its number stands in place of one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.raw import Raw, broken, say_once
from pipeline.data.tables import plain_row
from pipeline.errors import UserError
from pipeline.workspace import Workspace

PREFIX = "hub:"
SYNTAX = "hub:OWNER/NAME[@REVISION][/CONFIG][#SPLIT], or hub:./FOLDER[#SPLIT]"
_NAME = re.compile(
    r"(?P<target>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[^/#]+/[^/#]+|[^/#]+))?(/(?P<config>[^#]+))?(#(?P<split>.+))?"
)
_NO_OWNER = re.compile(r"[\w.-]+([@#].*)?")
_FOLDER = re.compile(r"(?P<target>[./~][^#]*)(#(?P<split>.+))?")


@dataclass(frozen=True)
class DataSet:
    """A name taken apart."""

    shown: str
    target: str  # OWNER/NAME, or the absolute path of a folder
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def named(cls, workspace: Workspace, name: str) -> "DataSet":
        """Raises `UserError` when the name is none."""
        named = name.removeprefix(PREFIX)
        folder = _FOLDER.fullmatch(named)
        if folder:
            return cls(name, str(workspace.path(folder["target"]).resolve()), split=folder["split"])
        found = _NAME.fullmatch(named)
        if not found:
            what = "names no owner of the data set" if _NO_OWNER.fullmatch(named) else "is no name of a data set"
            raise UserError(what, where=name, remedy=SYNTAX)
        return cls(name, found["target"], found["revision"], found["config"], found["split"])

    def raws(self) -> Iterator[Raw]:
        """Raises `UserError` when there is no such data set, or the hub cannot be reached."""
        rows = iter(self._rows())
        number = 0
        while True:
            number += 1
            try:
                values = next(rows, None)
            except Exception as error:  # of the network, the file's format or the data set's own making
                what = f"cannot be read from row {number} on: {_said(error)}"
                yield broken(number, "broken-file", what)
                return
            if values is None:
                return
            yield plain_row(number, values)

    def _rows(self) -> Any:
        from datasets import load_dataset

        try:
            splits = load_dataset(self.target, self.config, revision=self.revision, streaming=True)
        except Exception as error:  # the library has no one type for what may go wrong
            raise UserError(f"cannot be loaded: {_said(error)}", where=self.shown, remedy=_remedy(error)) from None
        names = list(splits)
        split = self.split or (names[0] if len(names) == 1 else "train")
        if split not in splits:
            what = f"has no split `{split}` (there are: {', '.join(names)})"
            raise UserError(what, where=self.shown, remedy=f"{self.shown.partition('#')[0]}#{names[0]}")
        if not self.split and len(names) > 1:
            others = ", ".join(name for name in names if name != split)
            say_once(self.shown, f"{self.shown}: the split `{split}` is read (there are also: {others})")
        return splits[split].decode(False)  # images and sounds stay as they are stored: none is trained


def _said(error: Exception) -> str:
    """One line of what may be a page."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) < 200 else f"{text[:200]}…"


def _remedy(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "again with a network, or download the data set and name its folder"
    if type(error).__name__ == "DatasetNotFoundError":
        return f"{SYNTAX}; a private or gated one needs `hf auth login`"
    return SYNTAX
