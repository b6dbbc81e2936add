"""Checks `--config` before Snakemake parses it, which shows its own mistakes with a traceback.

The default profile in workflow/profiles/default calls `check`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

KEY = re.compile(r"[a-zA-Z_][\w-]*\w")
"""Keys that Snakemake accepts."""


def check() -> None:
    """End the call with one line when Snakemake would not accept a value of --config."""
    for entry in entries(sys.argv[1:]):
        if problem := mistake(entry):
            print(f"Error: --config {entry}: {problem}", file=sys.stderr)
            sys.exit(1)


def entries(words: Sequence[str]) -> Iterator[str]:
    """The words that `--config` takes: all up to the next option."""
    inside = False
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "-C"):
            inside = True
            if equals:
                yield value
        elif word.startswith("-"):
            inside = False
        elif inside:
            yield word


def mistake(entry: str) -> str:
    """What is wrong with one word of --config and what to write; empty if it is well formed."""
    key, equals, value = entry.partition("=")
    if not equals:
        return "not of the form KEY=VALUE; a target belongs before --config"
    section, *rest = key.split(".")
    if rest and KEY.fullmatch(section):
        nested = "".join(f"{{{name}: " for name in rest) + value + "}" * len(rest)
        return f"a key within a section is written --config '{section}={nested}'"
    if not KEY.fullmatch(key):
        return f"{key!r} is not a key; config/README.md lists them"
    if value and (not value.strip() or value.lstrip().startswith("#")):
        return f"put the value in quotes: --config \"{key}='{value}'\""
    return ""
