"""What a check found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output."""

    level: Literal["ok", "note", "fail"]
    """note: good to know, or could not be checked; fail: a run would fail."""
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        """The line that is printed."""
        return f"{self.level:<5} {self.what}: {self.found}{self.fix and '. ' + self.fix}"
