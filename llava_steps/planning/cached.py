"""Which steps of a run are done and which will be computed, and why."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_steps.core import run, store
from llava_steps.core.commit import committed
from llava_steps.core.digest import Digests
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.pipeline import Rule

LISTED = 4


@dataclass(frozen=True)
class State:
    """A rule's outlook. done: its value is in the store. run: it will be computed. after: it
    depends on what is computed before; should that come out as once before, it is found then.
    """

    rule: str
    outlook: Literal["done", "run", "after"]
    why: str
    manifest: Mapping[str, Any] | None = None


def states(rules: Mapping[str, Rule], root: Path, image: str = "") -> Iterator[State]:
    """The outlook of each rule, in order; `root` is the store, `image` the image's digest.

    Raises:
        IntegrityError: a result that a step would read disagrees with its manifest.
    """
    entries: dict[str, Path] = {}
    digests = Digests(root)
    for rule in rules.values():
        waits = [name for name in rule.upstream if name not in entries]
        shown = store.read_manifest(rule.out)
        step = importlib.import_module(rule.module).STEP
        place = root / step.named(rule.settings)
        if not any(place.glob(f"*/{store.MANIFEST}")):
            yield State(rule.name, "run", _begun(place))
            continue
        if waits:
            yield State(rule.name, "after", "reads the result of " + ", ".join(waits))
            continue
        settings = rule.settings.model_copy(update=_pinned(rule, entries, rules))
        try:
            found = run.identify(step, rule.module, settings, digests, image)
        except (InputError, ConfigError) as error:
            yield State(rule.name, "run", str(error))
            continue
        entry = root / found.name / found.fingerprint
        manifest = store.read_manifest(entry)
        if manifest is None:
            goes_on = [path.name for _, path in committed(entry)] if entry.is_dir() else []
            why = f"goes on after {goes_on[-1]}" if goes_on else _difference(shown, found)
            yield State(rule.name, "run", why)
            continue
        entries[rule.name] = entry
        note = f"took {manifest['wall_s']:.0f} s in {manifest['attempts']} attempt"
        yield State(rule.name, "done", note + "s" * (manifest["attempts"] > 1), manifest)
    if root.is_dir():
        digests.save()


def _begun(place: Path) -> str:
    return "was begun, never finished" if place.is_dir() else "never computed"


def _pinned(rule: Rule, entries: Mapping[str, Path], rules: Mapping[str, Rule]) -> dict[str, str]:
    """Source fields that show a result of this run, by the store entry that they will show."""
    pinned: dict[str, str] = {}
    for key in type(rule.settings).model_fields:
        text = getattr(rule.settings, key)
        for name in rule.upstream:
            if isinstance(text, str) and text == str(rules[name].out):
                pinned[key] = str(entries[name])
            elif isinstance(text, str) and text.startswith(f"{rules[name].out}/"):
                pinned[key] = str(entries[name] / text.removeprefix(f"{rules[name].out}/"))
    return pinned


def _difference(shown: Mapping[str, Any] | None, found: run.Identity) -> str:
    """Why the value that the run shows is not the one that is asked for."""
    if shown is None:
        return "not computed with these settings and inputs yet"
    old = shown["config"]
    changed = [
        f"{key} {old.get(key)!r} -> {value!r}"
        for key, value in found.settings.items()
        if old.get(key) != value
    ]
    before = {key: item["digest"] for key, item in shown["inputs"].items()}
    changed += [
        f"{key} has other content"
        for key, item in found.inputs.items()
        if before.get(key) != item.digest
    ]
    changed += [f"{key} is not read any more" for key in before if key not in found.inputs]
    if shown["code"] != found.code:
        changed.append("code of the step")
    if not changed:
        gone = shown["fingerprint"] == found.fingerprint
        return "its value is not in the store any more" if gone else "changed: the container image"
    more = f" and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
    return "changed: " + ", ".join(changed[:LISTED]) + more


def audit_of(found: Mapping[str, State], stage: int) -> Mapping[str, Any] | None:
    """Figures of the stage's audit, if that is done."""
    state = found.get(f"stage{stage}_audit")
    metrics = state.manifest["metrics"] if state and state.manifest else {}
    return metrics if metrics.get("usable") else None
