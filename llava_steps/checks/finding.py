"""What a check found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer."""

    level: Literal["ok", "note", "fail"]
    """note: to be known, or what could not be looked at; fail: a run would end here."""
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        """The line that people read."""
        return f"{self.level:<5} {self.what}: {self.found}{self.fix and '. ' + self.fix}"
