"""Which rules the variants of a sweep share, and what the others are called.

Two rules are one when they have the same settings and read the same results. A rule that differs
is named after the swept settings that it depends on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError
from llava_steps.pipeline.expand import Declared
from llava_steps.settings import sweep


class Instance(NamedTuple):
    """A rule of one or several variants."""

    name: str
    """Of the rule in Snakemake."""
    label: str = ""
    """Directory below that of the run; empty where no swept setting matters."""


def instances(
    assignments: Sequence[Mapping[str, Any]], declared: Sequence[Sequence[Declared]]
) -> list[dict[str, Instance]]:
    """For each variant the instance of each of its rules, by the rule's name.

    Raises:
        ConfigError: two rules would have one name.
    """
    tokens = [_tokens(rules) for rules in declared]
    users: dict[tuple[str, str], list[int]] = {}
    for position, of_variant in enumerate(tokens):
        for name, token in of_variant.items():
            users.setdefault((name, token), []).append(position)
    named = _named(users, [dict(each) for each in assignments])
    return [
        {name: named[name, token] for name, token in of_variant.items()} for of_variant in tokens
    ]


def _tokens(rules: Sequence[Declared]) -> dict[str, str]:
    """What stands for each rule of a variant: its settings and those of all that it reads."""
    tokens: dict[str, str] = {}
    for rule in rules:
        read = {key: [tokens[r.rule], r.inside] for key, r in rule.feeds.items()}
        after = tokens.get(rule.after, "")
        settings = rule.settings.model_dump(mode="json")
        tokens[rule.name] = filesystem.sha256_json([rule.step.kind, settings, read, after])
    return tokens


def _named(
    users: Mapping[tuple[str, str], Sequence[int]], assignments: Sequence[dict[str, Any]]
) -> dict[tuple[str, str], Instance]:
    """The instance of each rule and token; `users` are the variants that have it."""
    counts: dict[str, int] = {}
    for name, _ in users:
        counts[name] = counts.get(name, 0) + 1
    varied = sweep.varied(assignments)
    named: dict[tuple[str, str], Instance] = {}
    taken: dict[str, int] = {}
    for (name, token), variants in users.items():
        label = ""
        if counts[name] > 1:
            same = sweep.common([assignments[i] for i in variants], varied)
            label = sweep.label(same, varied) if same else f"variant_{variants[0] + 1}"
        rule = re.sub(r"\W", "_", f"{name}_{label}") if label else name
        number = taken[rule] = taken.get(rule, 0) + 1
        if number > 1:
            # Rare: what is common to its variants does not tell it from another rule.
            rule, label = f"{rule}_{number}", f"{label or 'variant'}_{number}"
        named[name, token] = Instance(rule, label)
    names = [instance.name for instance in named.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two steps would be called {twice[0]}; give a dataset or a stage another name"
        )
    return named
