"""Reads the YAML files of a run into a checked `Config`; problems name key, file and line.

`load` reads files in order; a later file changes single keys of the earlier ones, and a file with
`standalone: true` at its top replaces all files before it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llava_steps.core.errors import ConfigError
from llava_steps.settings import forms, paths, sweep, yaml_loader
from llava_steps.settings.config import Config, Variant
from llava_steps.settings.explain import explain, sections
from llava_steps.settings.source import COMMAND_LINE, Key, Source, read_argument, read_file

SHIPPED = Path("config/config.yaml")
DEMO = "demo:"
"""Prefix of paths in the result of the demo_assets rule."""


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
        read_file(Path(file), source)
    for argument in arguments:
        source.take(read_argument(argument))
    source.stop_if_wrong()
    forms.without_removed(source.values, DEMO)
    _name_stages(source)
    _check_texts(source.values, (), source)
    config = _checked(source)
    config.sweep_over(_variants(config, source))
    source.stop_if_wrong()
    return config


def _checked(source: Source) -> Config:
    """The configuration of the merged values; ConfigError lists all problems."""
    config = _validate(source)
    source.stop_if_wrong()
    assert config is not None
    _check_demo_paths(config, source)
    source.stop_if_wrong()
    return config


def _variants(config: Config, source: Source) -> Iterator[Variant]:
    """The configuration of each variant of a sweep."""
    try:
        combinations = sweep.combinations(config.sweep) if config.sweep else []
        names = {"stages": [*config.stages], "datasets": [*config.datasets]}
        sweep.refuse_unknown((key for each in combinations for key in each), names)
    except sweep.SweepError as error:
        source.blame(("sweep",), str(error))
        return
    wrong: dict[str, list[str]] = {}
    for assignments in combinations:
        values = copy.deepcopy(source.values)
        del values["sweep"]
        sweep.assign(values, assignments)
        # Its problems are those of the section sweep, wherever their keys are in the files.
        of_variant = Source(values, {}, source.written, sections=source.sections)
        _name_stages(of_variant)
        try:
            yield Variant(assignments, _checked(of_variant))
        except ConfigError:
            for problem in dict.fromkeys(of_variant.problems):
                wrong.setdefault(problem, []).append(sweep.label(assignments))
    for problem, labels in wrong.items():
        of_all = len(labels) == len(combinations)
        source.blame(("sweep",), problem if of_all else f"{', '.join(labels)}: {problem}")


def _name_stages(source: Source) -> None:
    """Set `stage` of stage1 and stage2; that of other stages follows from what they train."""
    stages = source.values.get("stages")
    for name, values in stages.items() if isinstance(stages, dict) else ():
        if not isinstance(values, dict):
            continue
        number = forms.FIRST_STAGES.get(name)
        if number is None and "stage" in values:
            source.blame(("stages", name, "stage"), "follows from train; leave the key out")
        elif number is not None and values.setdefault("stage", number) != number:
            source.blame(("stages", name, "stage"), f"must be {number}; leave the key out")


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
            key = tuple(str(part) for part in problem["loc"] if part != "[key]")
            key += getattr(problem.get("ctx", {}).get("error"), "key", ())
            source.blame(key, explain(problem, key, source.text(key)))
    return None


def _restore_texts(source: Source, error: ValidationError) -> bool:
    """Give settings that want text what was written, as in `name: 1e3` and `--config run=001`."""
    restored = False
    for problem in error.errors():
        key = tuple(str(part) for part in problem["loc"])
        written = source.text(key)
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


def _check_demo_paths(config: Config, source: Source) -> None:
    """`demo:` paths need the demo_assets section and stay inside its result."""
    for where, values in _all_sections(config):
        for item in paths.given(values):
            text, key = item.text, (*where, item.field)
            if not text.startswith(DEMO):
                continue
            inside = Path(text.removeprefix(DEMO))
            if config.demo_assets is None:
                source.blame(key, f"{text!r} needs the section demo_assets; add it")
            elif inside.is_absolute() or ".." in inside.parts or not inside.parts:
                source.blame(key, f"{text!r} must name something inside demo_assets")


def _all_sections(config: Config) -> Iterator[tuple[Key, BaseModel]]:
    """The sections that the configuration has, each with its key."""
    for name, _ in sections():
        values = getattr(config, name)
        if isinstance(values, dict):
            yield from (((name, each), section) for each, section in values.items())
        elif values is not None:
            yield (name,), values
