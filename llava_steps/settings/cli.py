"""Flags of a step from its settings class, and settings from flags.

`parse` reads a command line; `flags` writes one that `parse` reads back to equal settings. Nothing
here imports torch, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import types
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from llava_steps.core.errors import ConfigError
from llava_steps.settings.fields import facts, flag_name

C = TypeVar("C", bound=BaseModel)
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""Has a directory for each GPU, created by the driver."""


def _plain(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    while hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (a for a in get_args(annotation) if a is not type(None))
        return _plain(annotation)
    return annotation


def _int_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _gpus(text: str) -> int:
    """A number of GPUs; -1 becomes that of this machine, so that the settings have the number."""
    if text != "-1":
        return int(text)
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    count = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
    if not count:
        raise argparse.ArgumentTypeError("-1 is all GPUs, but this machine has none; give a number")
    return count


def _pair_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """A converter of NAME=VALUE, whose value is of a kind."""

    def pair(text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
        try:
            return name, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not a number") from None

    return pair


class _Switch(argparse.BooleanOptionalAction):
    """`--name` and `--no-name`, also for a name that itself begins with "no"."""

    def __init__(self, option_strings: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(option_strings, *args, **kwargs)
        self._on = frozenset(option_strings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string in self._on)


class Parser(argparse.ArgumentParser):
    """A parser of many flags, whose errors are one line without the usage of them all."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; of an unknown flag, name the flags that it may mean."""
        head, _, words = message.partition("unrecognized arguments: ")
        for word in [] if head else words.split():
            flag = word.partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=3, cutoff=0.75)
            if flag.startswith("-") and near:
                message = f"{message}; did you mean {' or '.join(near)}?"
                break
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists all flags\n")


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """Give `parser` one flag for every field of `model`."""
    groups = {
        "source": parser.add_argument_group("inputs"),
        "value": parser.add_argument_group("settings (part of the fingerprint)"),
        "quiet": parser.add_argument_group("logging and resources (never recompute)"),
    }
    for name, field in model.model_fields.items():
        plain, declared = _plain(field.annotation), facts(field)
        spec: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = _default_text(default)
        spec["help"] = (
            (field.description or "") + (f" (default: {shown})" if shown else "")
        ).replace("%", "%%")
        if plain is bool:
            spec["action"] = _Switch
        elif get_origin(plain) is Literal:
            choices = get_args(plain)
            spec |= {"choices": choices, "type": type(choices[0])}
        elif get_origin(plain) is list:
            if _plain(get_args(plain)[0]) is int:
                spec |= {"type": _int_list, "metavar": "N,N,..."}
            else:
                spec |= {"type": str, "nargs": "+", "action": "extend", "metavar": "TEXT"}
        elif get_origin(plain) is dict:
            pair = _pair_of(_plain(get_args(plain)[1]))
            spec |= {"type": pair, "action": "append", "metavar": "NAME=VALUE"}
        else:
            read = _gpus if declared.counts_gpus else plain
            kind = {str: "TEXT"}.get(plain, plain.__name__.upper())
            spec |= {"type": read, "metavar": "PATH" if declared.role == "source" else kind}
            if declared.bare is not None:
                spec |= {"nargs": "?", "const": declared.bare}
        group = groups[declared.role]
        long = flag_name(name, field)
        spelled = "--" + name.replace("_", "-")
        names = [flag for flag in dict.fromkeys([declared.short, long, spelled]) if flag]
        group.add_argument(*names, **spec)


def _default_text(default: Any) -> str:
    """A default as --help shows it, in the form of the command line; empty without one."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, dict):
        return " ".join(f"{key}={value}" for key, value in default.items())
    if isinstance(default, list):
        numbers = all(isinstance(item, int) for item in default)
        return ("," if numbers else " ").join(map(str, default))
    return str(default)


def tool_parser(name: str, doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """The command line of a tool, without its arguments."""
    return argparse.ArgumentParser(
        prog=f"llava-steps {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )


def add_configfile(parser: argparse.ArgumentParser) -> None:
    """Add --configfile, for a command that reads the configuration of a run."""
    parser.add_argument(
        "--configfile", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="configuration files; later ones override earlier ones",
    )  # fmt: skip


def settings(model: type[C], given: dict[str, Any]) -> C:
    """Settings from parsed flags; ConfigError names the flag that is wrong."""
    values = {
        name: dict(v) if isinstance(v, list) and v and isinstance(v[0], tuple) else v
        for name, v in given.items()
        if name in model.model_fields
    }
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            name = str(problem["loc"][0]) if problem["loc"] else _named(model, message, given)
            field = model.model_fields.get(name)
            lines.append(f"{flag_name(name, field)}: {message}" if field else message)
        raise ConfigError("; ".join(lines)) from None


def _named(model: type[BaseModel], message: str, given: Collection[str]) -> str:
    """The setting that a message is about: the first in it that is given, or else the first."""
    named = [word for word in re.findall(r"\w+", message) if word in model.model_fields]
    return next((name for name in named if name in given), named[0] if named else "")


def parse(model: type[C], arguments: Sequence[str]) -> C:
    """Settings from a command line that contains only a step's flags."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, model)
    return settings(model, vars(parser.parse_args(arguments)))


ROLES = ("value", "source", "quiet")


def flags(config: BaseModel, roles: Collection[str] = ROLES) -> list[str]:
    """The shortest command line that `parse` reads back to `config`: defaults are left out.

    With `roles`, only the flags of fields in these roles.

    Raises:
        ConfigError: a text that a command line cannot contain.
    """
    line: list[str] = []
    for name, field in type(config).model_fields.items():
        if facts(field).role not in roles:
            continue
        current = getattr(config, name)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if not field.is_required() and current == default and type(current) is type(default):
            continue
        flag = flag_name(name, field)
        if current == "--" or (isinstance(current, list) and "--" in current):
            raise ConfigError(f"{name}: argparse drops the value '--'; give another one")
        if isinstance(current, bool):
            line.append(flag if current else "--no-" + flag.removeprefix("--"))
        elif isinstance(current, dict):
            if not current or any("=" in key for key in current):
                raise ConfigError(f"{name}: give at least one NAME=VALUE, with names without '='")
            line += [f"{flag}={key}={where}" for key, where in current.items()]
        elif isinstance(current, list) and any(isinstance(item, str) for item in current):
            line += [f"{flag}={item}" for item in current]
        elif isinstance(current, list):
            line.append(f"{flag}={','.join(map(str, current))}")
        elif isinstance(current, float):
            line.append(f"{flag}={current!r}")
        else:
            # One word each: argparse cannot take a value that begins with a dash as a flag.
            line.append(f"{flag}={current}")
    return line
