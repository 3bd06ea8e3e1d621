"""What the gate found: a rule, a place and a reason; and where rows stand, kept small for a million of them."""

from array import array
from dataclasses import dataclass
from typing import Any

from pipeline.data.rows import place
from pipeline.gate.rules import Rule


@dataclass(frozen=True, slots=True)
class Finding:
    rule: Rule
    file: str
    line: int  # 0: the set as a whole
    reason: str
    id: str = ""
    remedy: str = ""  # where the rule's own does not fit
    item: int = 0  # which row of the file, where the line does not tell it

    @property
    def where(self) -> str:
        return place(self.file, self.line, self.item) if self.line else self.file

    @property
    def text(self) -> str:
        """`D205 secret: an AWS access key in line 3`."""
        return f"{self.rule.code} {self.rule.name}: {self.reason}"

    @property
    def what_to_do(self) -> str:
        return self.remedy or self.rule.remedy

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "line": self.line or None,
            "item": self.item or None,
            "rule": self.rule.code,
            "name": self.rule.name,
            "severity": self.rule.severity,
            "reason": self.reason,
            "remedy": self.what_to_do,
            "id": self.id or None,
        }


class Places:
    """File and line of each row by its number: 16 bytes a row."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._files, self._lines, self._items = array("I"), array("Q"), array("I")

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, file: str, line: int, item: int = 0) -> None:
        if not self._names or self._names[-1] != file:  # files come one after another
            self._names.append(file)
        self._files.append(len(self._names) - 1)
        self._lines.append(line)
        self._items.append(item)

    def file(self, number: int) -> str:
        return self._names[self._files[number]]

    def line(self, number: int) -> int:
        return self._lines[number]

    def item(self, number: int) -> int:
        return self._items[number]

    def where(self, number: int) -> str:
        return place(self.file(number), self.line(number), self.item(number))
