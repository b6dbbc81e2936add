"""Files of the user that a run needs and that do not exist, reported before its first job."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from llava_steps.core.errors import ConfigError
from llava_steps.pipeline.rules import Rule
from llava_steps.settings import paths
from llava_steps.settings.fields import facts
from llava_steps.settings.hub_id import is_hub_id
from llava_steps.store.store import WORK

SHELL = re.compile(r"~|.*\$")
"""Paths with signs that a shell expands."""


def refuse(rules: Mapping[str, Rule], names: Iterable[str]) -> None:
    """ConfigError if the rules of these names, which are to run, need paths that do not exist."""
    if messages := missing(rules, names):
        head = [f"{len(messages)} paths of the configuration are missing:"]
        raise ConfigError("\n  ".join([*head[: len(messages) - 1], *messages]))


def refuse_not_kept(
    rules: Mapping[str, Rule], names: Iterable[str], entries: Mapping[str, Path]
) -> None:
    """ConfigError if rules that are to run need checkpoints that a finished training did not keep.

    `entries` are the finished values, by rule. Kept checkpoints do not change a value, so that
    asking for them later does not train again by itself.
    """
    for name in names:
        for result in rules[name].declared.feeds.values():
            if not result.inside.startswith(WORK):
                continue
            (trained,) = (n for n in rules[name].upstream if rules[n].kind == "checkpoint")
            if trained in entries and not (entries[trained] / result.inside).exists():
                section = rules[trained].declared.stage
                raise ConfigError(
                    f"stages.{section}.evaluate_kept: {rules[trained].out} was trained without "
                    f"keep_every and kept no {Path(result.inside).name}; train it again with "
                    f"--forcerun {trained}, or set evaluate_kept to false"
                )


def missing(rules: Mapping[str, Rule], names: Iterable[str]) -> list[str]:
    """A message for each path that the rules of these names need and that does not exist."""
    messages: dict[str, str] = {}
    for name in names:
        # The stage of an audit names the same path, with its own description.
        messages |= dict(_of_rule(rules[name], rules))
    return [f"{path} does not exist{message}" for path, message in messages.items()]


def _of_rule(rule: Rule, rules: Mapping[str, Rule]) -> Iterator[tuple[str, str]]:
    """Key with path, and what to bring, of each missing path."""
    for item in paths.given(rule.settings):
        text = item.text
        if not text or os.path.exists(text):
            continue
        of_run = any(other.holds(text) is not None for other in rules.values())
        if of_run or is_hub_id(text, facts(item.info).hub):
            continue
        yield f"{rule.declared.key(item)}: {text}", f"{_where(text)}: {item.info.description}"


def _where(text: str) -> str:
    if SHELL.match(text):
        expanded = os.path.expandvars(os.path.expanduser(text))
        return f"; ~ and $ are not expanded, write {expanded} or another path"
    advice = "; bring it, or give another path"
    return advice if os.path.isabs(text) else f" in {Path.cwd()}{advice}"
