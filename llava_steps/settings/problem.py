"""A problem of one key below the section that is validated."""

from __future__ import annotations


class KeyProblem(ValueError):
    """What is wrong with a key; `key` is its path from the section that is validated."""

    def __init__(self, key: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.key = key
