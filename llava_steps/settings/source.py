"""What the YAML files of a run say together, and where each key was set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llava_steps.core.errors import ConfigError, reason
from llava_steps.settings import forms, yaml_loader

STANDALONE = "standalone"
COMMAND_LINE = "--config"

Key = tuple[str, ...]


@dataclass
class Source:
    """Merged values and, for each key path, the file and line that set it last.

    Stages are in `stages`, in whichever form the files have them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[Key, str] = field(default_factory=dict)
    written: dict[Key, str] = field(default_factory=dict)
    """Each scalar as it is written."""
    problems: list[str] = field(default_factory=list)
    sections: set[str] = field(default_factory=set)
    """Stages that the last file with them has as sections."""

    def location(self, key: Key) -> str:
        """`file:line` of a key, of the nearest section above it, or nothing."""
        key = self._origin(key)
        depth = self._depth(key)
        return self.locations[key[:depth]] + ": " if depth else ""

    def text(self, key: Key) -> str | None:
        """A scalar as it is written; None if the value is not a scalar."""
        return self.written.get(self._origin(key))

    def _origin(self, key: Key) -> Key:
        """The key as its file has it: a stage may have it from `stages.all`."""
        if key[:1] != ("stages",):
            return key
        return max(key, ("stages", forms.EVERY, *key[2:]), key=self._depth)

    def _depth(self, key: Key) -> int:
        """Number of leading parts of the key that a file has."""
        return next((end for end in range(len(key), 0, -1) if key[:end] in self.locations), 0)

    def take(self, later: Source) -> None:
        """Merge a later source into this one, unless it has problems."""
        if twice := forms.given_twice(later.values):
            later.blame((twice,), "is in stages too; describe it once")
        if not isinstance(every := forms.every(later.values), Mapping):
            later.blame(("stages", forms.EVERY), f"expected keys of every stage, got {every!r}")
        for key in forms.removed(later.values):
            section, name = ("stages", *key)[-2:]
            if len(key) == 1 or name not in (self.values.get(section) or {}):
                later.blame(key, "expected a section with keys, got nothing")
        self.problems += later.problems
        if later.problems:
            return
        self.sections |= forms.FIRST_STAGES.keys() & later.values.keys()
        inner = later.values.get("stages")
        self.sections -= {*inner} if isinstance(inner, Mapping) else set()
        for noted, new in ((self.locations, later.locations), (self.written, later.written)):
            changed = {_canonical(key): text for key, text in new.items()}
            _forget(noted, {key[2:] for key in changed if key[:2] == ("stages", forms.EVERY)})
            noted.update(changed)
        changes = forms.canonical(later.values)
        forms.spread(self.values, changes)
        forms.make_room(self.values, changes)
        forms.merge(self.values, changes)

    def blame(self, key: Key, message: str) -> None:
        """Note a problem of a key, named as its file has it."""
        key = self._origin(key)
        shown = key[1:] if key[:1] == ("stages",) and {*key[1:2]} & self.sections else key
        problem = f"{'.'.join(shown)}: {message}" if shown else message
        self.problems.append(f"{self.location(key)}{problem}")

    def stop_if_wrong(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self.problems:
            lines = "".join(f"\n  {problem}" for problem in dict.fromkeys(self.problems))
            count = len(dict.fromkeys(self.problems))
            noun = "a problem" if count == 1 else f"{count} problems"
            raise ConfigError(f"the configuration has {noun}:{lines}")


def _forget(noted: dict[Key, str], of_every_stage: set[Key]) -> None:
    """Drop what is noted of keys of stages that a later file sets for every stage."""
    stale = [key for key in noted if key[:1] == ("stages",) and key[2:] in of_every_stage - {()}]
    for key in stale:
        del noted[key]


def _canonical(key: Key) -> Key:
    return ("stages", *key) if key[0] in forms.FIRST_STAGES else key


def read_file(path: Path, source: Source) -> None:
    """Merge one file into `source`; syntax errors and duplicate keys become problems."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        advice = f"; relative paths start at {Path.cwd()}" * (not path.is_absolute())
        raise ConfigError(f"{path} cannot be read: {reason(error)}{advice}") from None
    part = Source()
    try:
        values = _parse(text, (), lambda line: f"{path}:{line}", part)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level")
    part.values = values or {}
    standalone = part.values.pop(STANDALONE, False)
    if not isinstance(standalone, bool):
        where = part.locations[(STANDALONE,)]
        part.problems.append(f"{where}: {STANDALONE}: expected true or false")
    if standalone is True:
        for kept in (source.values, source.locations, source.written):
            kept.clear()
    source.take(part)


def read_argument(argument: str) -> Source:
    """The values of one `KEY=VALUE` of --config; VALUE is written as in a file."""
    name, _, text = argument.partition("=")
    part = Source(locations={(name,): COMMAND_LINE})
    value: Any = text
    try:
        value = _parse(text, (name,), lambda line: COMMAND_LINE, part)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        if text.lstrip().startswith(("{", "[")):
            reason = getattr(error, "problem", None) or str(error)
            part.blame((name,), f"{text!r} is not valid YAML: {reason}")
    if isinstance(value, str) and not text.lstrip().startswith(tuple("'\"!&|>")):
        value = text  # all of it, also "a #b", in which YAML sees a comment
    part.written[(name,)] = text
    part.values[name] = value
    return part


def _parse(text: str, key: Key, location: Callable[[int], str], source: Source) -> Any:
    """The value of a YAML document at `key`; what is noted of it, and problems, go to `source`.

    Raises:
        yaml.YAMLError, ValueError, LookupError: not a YAML document.
    """
    loader = yaml_loader.Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _walk(node, key, location, source)
        return None if source.problems else loader.construct_document(node)
    finally:
        loader.dispose()


def _walk(node: yaml.Node, key: Key, location: Callable[[int], str], source: Source) -> None:
    """Note the line of every key below `node` and what is written there.

    Reports duplicate keys and keys that are not text.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.value:
            source.written[key] = str(node.value)
        return
    line = node.start_mark.line + 1
    if len(key) > 8:
        source.problems.append(f"{location(line)}: {'.'.join(key)}: nested too deeply")
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*key, str(index)), location, source)
        return
    seen: dict[str, int] = {}
    for name_node, item in node.value:
        line = name_node.start_mark.line + 1
        if name_node.tag == "tag:yaml.org,2002:merge":
            source.problems.append(f"{location(line)}: '<<' is not supported; write the keys out")
            continue
        if isinstance(name_node, yaml.ScalarNode) and yaml_loader.is_ambiguous(name_node.value):
            name_node.tag = yaml_loader.TEXT  # a key is never a number
        if name_node.tag != yaml_loader.TEXT:
            source.problems.append(
                f"{location(line)}: key {name_node.value!r} is not text; quote it"
            )
            continue
        name = str(name_node.value)
        here = (*key, name)
        if name in seen:
            source.problems.append(
                f"{location(line)}: {'.'.join(here)}: given twice (first on line {seen[name]})"
            )
        seen.setdefault(name, line)
        source.locations[here] = location(line)
        _walk(item, here, location, source)
