"""Which steps of a run are done and which will be computed, and why."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_steps.core.errors import ConfigError, InputError, IntegrityError
from llava_steps.core.format import duration, listing
from llava_steps.pipeline.rules import Rule
from llava_steps.settings import paths
from llava_steps.settings.config import Config
from llava_steps.settings.fields import StepConfig
from llava_steps.store import attempts, identity, store
from llava_steps.store.commit import committed
from llava_steps.store.digest import Digests

LISTED = 4


@dataclass(frozen=True)
class State:
    """A rule's outlook. done: its value is in the store. run: it will be computed. after: it
    depends on what is computed before, so its value may turn out to exist already.
    """

    rule: str
    outlook: Literal["done", "run", "after"]
    why: str
    manifest: Mapping[str, Any] | None = None
    shown: bool = False
    """Whether the run's results show exactly this value: its job would have nothing to do."""
    lost: bool = False
    """Whether the results show a value that the store does not hold: moved, or not mounted."""


def states(rules: Mapping[str, Rule], root: Path, image: str = "") -> Iterator[State]:
    """The outlook of each rule, in order; `root` is the store, `image` the image's digest.

    A step whose value or input is damaged has the outlook `run`: it is the one that reports it.

    Raises:
        IntegrityError: a manifest cannot be read.
    """
    entries: dict[str, Path] = {}
    shown: set[str] = set()
    digests = Digests(root)
    for rule in rules.values():
        settings, pinned = _pinned(rule, entries, rules)
        # What a blend names is read through the results, so these must show it.
        known = {name for name in rule.upstream if name in entries}
        waits = [n for n in rule.upstream if n not in known or (n not in pinned | shown)]
        state, entry = _state(rule, settings, waits, root, digests, image)
        if entry is not None:
            entries[rule.name] = entry
        if state.shown:
            shown.add(rule.name)
        yield state
    if root.is_dir():
        digests.save()


def _state(
    rule: Rule, settings: StepConfig, waits: list[str], root: Path, digests: Digests, image: str
) -> tuple[State, Path | None]:
    """The state of a rule, and the store entry that holds its value."""
    shown = store.read_manifest(rule.out)
    lost = shown is not None and not store.is_held(rule.out, shown)
    step = importlib.import_module(rule.module).STEP
    directory = root / step.named(settings)
    if not any(directory.glob(f"*/{store.MANIFEST}")):
        return State(rule.name, "run", _begun(directory), lost=lost), None
    if waits:
        why = "reads the result of " + ", ".join(waits)
        return State(rule.name, "after", why, lost=lost), None
    try:
        recorded = shown["inputs"] if shown else {}
        computation = identity.identify(step, rule.module, settings, digests, image, recorded)
        entry = root / computation.name / computation.fingerprint
        manifest = store.read_manifest(entry)
        if manifest is None:
            saved = [path.name for _, path in committed(entry)] if entry.is_dir() else []
            why = f"resumes after {saved[-1]}" if saved else _difference(shown, computation)
            return State(rule.name, "run", why, lost=lost), None
        store.check(entry, manifest, sha256=None)
        shows = _shows(rule, entry, shown)
    except (InputError, ConfigError, IntegrityError, OSError, RuntimeError) as error:
        # The step itself reports it, if it has to run at all.
        return State(rule.name, "run", str(error), lost=lost), None
    note = f"took {duration(attempts.whole_s(manifest))} in {manifest['attempts']} attempt"
    note += "s" * (manifest["attempts"] > 1)
    return State(rule.name, "done", note, manifest, shows), entry


def _shows(rule: Rule, entry: Path, shown: Mapping[str, Any] | None) -> bool:
    """Whether the run shows this very entry, with the file that its job copies beside it."""
    if shown is None or not store.shows(rule.out, entry):
        return False
    if rule.page is None:
        return True
    made = (entry / rule.page.name).read_bytes()
    return rule.page.is_file() and rule.page.read_bytes() == made


def outlook(config: Config, rules: Mapping[str, Rule], image: str) -> dict[str, State]:
    """The state of each rule of a configuration; `image` is the digest of its image."""
    return {state.rule: state for state in states(rules, Path(config.store), image)}


def demanded(
    rules: Mapping[str, Rule], outlooks: Mapping[str, State], forced: Collection[str] = ()
) -> dict[str, str]:
    """Rules whose jobs must run, each with the reason: the run does not show their value.

    That value may be unknown yet, because the rule reads what is made anew; `forced` rules are.
    What is only published again has a known value, so what reads it need not run.
    """
    reasons: dict[str, str] = {}
    renewed: set[str] = set()
    for name, rule in rules.items():
        state = outlooks[name]
        waits = [other for other in rule.upstream if other in renewed]
        missing = [other for other in rule.before if not os.path.exists(rules[other].manifest)]
        if name in forced:
            reasons[name] = "forced"
        elif state.outlook != "done":
            reasons[name] = state.why
        elif waits:
            reasons[name] = "reads the result of " + ", ".join(waits)
        if name in reasons:
            renewed.add(name)
        elif not state.shown:
            reasons[name] = "its value is in the store, not in the results of this run"
        elif missing:
            reasons[name] = "missing: the result of " + ", ".join(missing)
    return reasons


def nearest(rules: Mapping[str, Rule], name: str, demand: Collection[str]) -> list[str]:
    """The demanded rules before a rule that no other demanded rule separates from it."""
    nearest_rules: dict[str, None] = {}
    todo = [*rules[name].before]
    while todo:
        other = todo.pop()
        if other in demand:
            nearest_rules[other] = None
        else:
            todo += rules[other].before
    return [*nearest_rules]


def _begun(directory: Path) -> str:
    return "was begun, never finished" if directory.is_dir() else "never computed"


def _pinned(
    rule: Rule, entries: Mapping[str, Path], rules: Mapping[str, Rule]
) -> tuple[StepConfig, set[str]]:
    """Settings with each result of this run named by the store entry that the run will show; the
    rules whose results are named so."""
    pinned: dict[str, str] = {}
    named: set[str] = set()
    for item in paths.given(rule.settings):
        for name in rule.upstream if item.text else ():
            inside = rules[name].holds(item.text)
            if inside is not None and name in entries:
                pinned[item.key] = str(entries[name] / inside)
                named.add(name)
    return paths.replaced(rule.settings, pinned), named


def _difference(shown: Mapping[str, Any] | None, computation: identity.Identity) -> str:
    """Why the value that the run shows is not the requested one."""
    if shown is None:
        return "not computed with these settings and inputs yet"
    old = shown["config"]
    changed = [
        f"{key} {old.get(key)!r} -> {value!r}"
        for key, value in computation.settings.items()
        if old.get(key) != value
    ]
    before = {key: item["digest"] for key, item in shown["inputs"].items()}
    changed += [
        f"{key} has other content"
        for key, item in computation.inputs.items()
        if before.get(key) != item.digest
    ]
    changed += [f"{key} is no longer read" for key in before if key not in computation.inputs]
    if shown["code"] != computation.code:
        changed.append("code of the step")
    if not changed:
        gone = shown["fingerprint"] == computation.fingerprint
        return "its value is no longer in the store" if gone else "changed: the container image"
    return "changed: " + listing(changed, LISTED)


def audit_of(outlooks: Mapping[str, State], rule: str) -> Mapping[str, Any] | None:
    """Figures of the audit that a rule makes, if that is done."""
    state = outlooks.get(rule)
    metrics = state.manifest["metrics"] if state and state.manifest else {}
    return metrics if metrics.get("usable") else None
