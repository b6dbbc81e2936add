"""Reads the YAML files of a run into a checked `Config`; problems name key, file and line.

`load` reads files in order; a later file changes single keys of the earlier ones, and a file with
`standalone: true` at its top replaces all files before it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llava_steps.core.errors import ConfigError, reason
from llava_steps.settings import yaml_loader
from llava_steps.settings.config import Config
from llava_steps.settings.fields import facts

SHIPPED = Path("config/config.yaml")
STANDALONE = "standalone"
COMMAND_LINE = "--config"
LISTED = 12
"""Most keys that a message lists."""
DEMO = "demo:"
"""Prefix of paths in the result of the demo_assets rule."""

Key = tuple[str, ...]


@dataclass
class Source:
    """Merged values and, for each key path, the file and line that set it last."""

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[Key, str] = field(default_factory=dict)
    written: dict[Key, str] = field(default_factory=dict)
    """Each scalar as it is written."""
    problems: list[str] = field(default_factory=list)

    def location(self, key: Key) -> str:
        """`file:line` of a key, of the nearest section above it, or nothing."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.locations:
                return self.locations[key[:end]] + ": "
        return ""

    def take(self, later: Source) -> None:
        """Merge a later source into this one, unless it has problems."""
        self.problems += later.problems
        if not later.problems:
            self.locations.update(later.locations)
            self.written.update(later.written)
            _merge(self.values, later.values)

    def blame(self, key: Key, message: str) -> None:
        self.problems.append(f"{self.location(key)}{'.'.join(key)}: {message}")

    def stop_if_wrong(self) -> None:
        if self.problems:
            lines = "".join(f"\n  {problem}" for problem in dict.fromkeys(self.problems))
            count = len(dict.fromkeys(self.problems))
            noun = "a problem" if count == 1 else f"{count} problems"
            raise ConfigError(f"the configuration has {noun}:{lines}")


def with_overlays(overlays: Sequence[Path]) -> Config:
    """The shipped configuration with overlays, for commands outside the workflow.

    Raises:
        ConfigError: as `load`, or the current directory is not that of the project.
    """
    if not SHIPPED.exists():
        raise ConfigError(f"{SHIPPED} is missing; run this in the directory of the project")
    return load([SHIPPED, *overlays])


def load(files: Sequence[str | Path], arguments: Sequence[str] = ()) -> Config:
    """The configuration of a run from its files and, last, the arguments of `--config`.

    Raises ConfigError that lists every problem of all files at once.
    """
    source = Source()
    for file in files:
        _read(Path(file), source)
    for argument in arguments:
        source.take(_read_argument(argument))
    source.stop_if_wrong()
    _name_stages(source)
    _check_texts(source.values, (), source)
    config = _validate(source)
    source.stop_if_wrong()
    assert config is not None
    _check_demo_paths(config, source)
    source.stop_if_wrong()
    return config


def _read(path: Path, source: Source) -> None:
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


def _read_argument(argument: str) -> Source:
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


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge section by section; anything that is not a section on both sides is replaced."""
    for name, item in changes.items():
        old = base.get(name)
        if isinstance(old, dict) and isinstance(item, Mapping):
            _merge(old, item)
        elif isinstance(item, Mapping):
            base[name] = {}
            _merge(base[name], item)
        else:
            base[name] = item


def _name_stages(source: Source) -> None:
    """Set `stage` of the sections stage1 and stage2."""
    for section, number in (("stage1", 1), ("stage2", 2)):
        values = source.values.get(section)
        if isinstance(values, dict) and values.setdefault("stage", number) != number:
            source.blame((section, "stage"), f"must be {number}; leave the key out")


def _check_texts(value: Any, key: Key, source: Source) -> None:
    """Refuse texts that a command line cannot contain."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(item, (*key, str(name)), source)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_texts(item, (*key, str(index)), source)
    for text in (value, *key[-1:]):
        if isinstance(text, str) and ("\0" in text or not _encodable(text)):
            source.blame(
                key, "contains a NUL or half a surrogate pair, which a command line cannot contain"
            )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _validate(source: Source) -> Config | None:
    try:
        return Config.model_validate(source.values)
    except ValidationError as error:
        if _restore_texts(source, error):
            return _validate(source)
        for problem in error.errors():
            key = tuple(str(part) for part in problem["loc"])
            source.blame(key, _explain(problem, key, source.written.get(key)))
    return None


def _restore_texts(source: Source, error: ValidationError) -> bool:
    """Give settings that want text what was written, as in `name: 1e3` and `--config run=001`."""
    restored = False
    for problem in error.errors():
        key = tuple(str(part) for part in problem["loc"])
        written = source.written.get(key)
        if problem["type"] != "string_type" or written is None:
            continue
        given = source.location(key).startswith(COMMAND_LINE)
        if given or yaml_loader.is_ambiguous(written):
            holder: Any = source.values
            for part in problem["loc"][:-1]:
                holder = holder[part]
            holder[problem["loc"][-1]] = written
            restored = True
    return restored


def _explain(problem: Any, key: Key, written: str | None) -> str:
    """What is wrong with a key, of which `written` is the scalar, and what to write instead."""
    given, kind = problem["input"], problem["type"]
    if given is None and kind not in ("missing", "model_type", "model_attributes_type"):
        return "has no value; write one after the colon, or leave the key out"
    if kind == "extra_forbidden":
        section = _section(key[:-1])
        known = sorted(section.model_fields) if section else []
        return f"unknown key; {_hint(key, known)}"
    if kind == "missing":
        section = _section(key[:-1])
        info = section.model_fields.get(key[-1]) if section else None
        return f"is missing ({info.description})" if info and info.description else "is missing"
    if kind in ("float_type", "int_type"):
        wanted = "a number" if kind == "float_type" else "a whole number"
        number = _as_number(given)
        if isinstance(given, str) and number is not None:
            whole = kind == "int_type" and number.is_integer()
            right = str(int(number)) if whole else repr(number).replace("e-0", "e-")
            # A number in YAML 1.1 too, which needs a point before the exponent.
            if "e" in right and "." not in right:
                right = right.replace("e", ".0e")
            return f"{given!r} is text in YAML, not {wanted}; write {right}"
        if isinstance(given, float):
            advice = f"; write {given:.0f}" if given.is_integer() else ""
            return f"expected {wanted}, got {given!r}{advice}"
        return f"expected {wanted}, got {written if isinstance(given, bool) else repr(given)}"
    if kind == "int_from_float":
        return f"expected a whole number, got {given!r}"
    if kind == "bool_type":
        return f"expected true or false, got {given!r}"
    if kind == "string_type":
        shown = given if isinstance(given, dict | list) or written is None else written
        return f"expected text, got {shown}; put it in quotes: {str(shown)!r}"
    if kind in ("model_type", "model_attributes_type"):
        return f"expected a section with keys, got {given!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if isinstance(given, dict) else f"{message}, got {given!r}"


def _hint(key: Key, known: Sequence[str]) -> str:
    """What a user may have meant by an unknown key, of a section with the keys `known`."""
    near = difflib.get_close_matches(key[-1], known, n=3, cutoff=0.8)
    elsewhere = [name for name, model in sections() if key[-1] in model.model_fields]
    if elsewhere and not near:
        return f"it is a key of {', '.join(elsewhere)}"
    if near := near or difflib.get_close_matches(key[-1], known, n=1):
        return f"did you mean {' or '.join(near)}?"
    if len(known) <= LISTED:
        return f"known keys: {', '.join(known)}"
    return f"config/README.md lists the {len(known)} keys of {key[-2] if key[1:] else 'a file'}"


def _as_number(given: object) -> float | None:
    try:
        return float(given) if isinstance(given, str) else None
    except ValueError:
        return None


def _section(key: Key) -> type[BaseModel] | None:
    """The settings class of a section; None if there is no such section."""
    section: type[BaseModel] = Config
    for name in key:
        info = section.model_fields.get(name)
        annotation = info.annotation if info else None
        inner = [
            part
            for part in (annotation, *get_args(annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if not inner:
            return None
        section = inner[0]
    return section


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(name, settings class) of every section of `Config`, in order."""
    for name in Config.model_fields:
        section = _section((name,))
        if section is not None:
            yield name, section


def _check_demo_paths(config: Config, source: Source) -> None:
    """`demo:` paths need the demo_assets section and stay inside its result."""
    for name, model in sections():
        values = getattr(config, name)
        for key, info in model.model_fields.items() if values is not None else ():
            if facts(info).role != "source":
                continue
            text: str = getattr(values, key)
            if not text.startswith(DEMO):
                continue
            inside = Path(text.removeprefix(DEMO))
            if config.demo_assets is None:
                source.blame((name, key), f"{text!r} needs the section demo_assets; add it")
            elif inside.is_absolute() or ".." in inside.parts or not inside.parts:
                source.blame((name, key), f"{text!r} must name something inside demo_assets")
