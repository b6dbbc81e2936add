"""Names on the Hugging Face hub: `org/name`, `org/name@revision`, `org/name@revision/path`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(
    rf"(?P<name>(?:{_PART}/)?{_PART})"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[\w-]+|[^/@\s]+))?"
    r"(?:/(?P<inside>[^@\s].*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DATA = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, at a revision, and a path inside it."""

    name: str
    revision: str = ""
    """A commit, a tag or a branch; empty: the newest commit."""
    inside: str = ""
    """A file or a folder; empty: the whole repository."""

    @property
    def is_pinned(self) -> bool:
        """Whether it always names the same content."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse_model(text: str) -> HubId | None:
    """The model that a text names; None for what cannot be the name of one."""
    match = _ID.fullmatch(text)
    if match is None or match["inside"]:
        return None
    return HubId(match["name"], match["revision"] or "")


def parse_dataset(text: str) -> HubId | None:
    """The dataset that a text names; None for a path, also for one that does not exist.

    Without `@` a name is a path if it has more than two parts, begins with a directory that exists
    here, or ends like a file.
    """
    match = _ID.fullmatch(text)
    if match is None or "/" not in match["name"] or os.path.exists(text):
        return None
    plain = match["revision"] is None
    if plain and os.path.isdir(match["name"].partition("/")[0]):
        return None
    if plain and (match["inside"] or match["name"].lower().endswith(_DATA)):
        return None
    return HubId(match["name"], match["revision"] or "", match["inside"] or "")


def is_hub_id(text: str, kind: str) -> bool:
    """Whether a text names a repository of this kind: `model`, `dataset`, or an empty text."""
    if kind == "model":
        return parse_model(text) is not None
    return kind == "dataset" and parse_dataset(text) is not None
