"""Checks --config and --configfile before Snakemake parses them.

Snakemake shows a mistake in them with a traceback, or without the name of the file. The default
profile in workflow/profiles/default calls `check`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from llava_steps.core.errors import reason
from llava_steps.settings import yaml_loader

KEY = re.compile(r"[a-zA-Z_][\w-]*\w")
"""Keys that Snakemake accepts."""


def check() -> None:
    """End the call with one line when Snakemake would not accept what the options are given."""
    for option, names, problem_of in (
        ("--config", ("--config", "-C"), mistake),
        ("--configfile", ("--configfile", "--configfiles"), unreadable),
    ):
        for word in values(sys.argv[1:], names):
            if problem := problem_of(word):
                print(f"Error: {option} {word}: {problem}", file=sys.stderr)
                sys.exit(1)


def values(words: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """The words that an option with these names takes: all up to the next option."""
    inside = False
    for word in words:
        name, equals, value = word.partition("=")
        if name in names:
            inside = True
            if equals:
                yield value
        elif word.startswith("-"):
            inside = False
        elif inside:
            yield word


def unreadable(file: str) -> str:
    """Why a configuration file cannot be read, and what to do; empty if it has keys."""
    try:
        keys = yaml_loader.load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no such file in {Path.cwd()}; a target belongs before --configfile"
    except OSError as error:
        return f"{reason(error)}; name a YAML file"
    except UnicodeDecodeError:
        return "not text in UTF-8; name a YAML file"
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"not valid YAML: {line}{error.problem}"
    except (yaml.YAMLError, ValueError, LookupError) as error:
        return f"not valid YAML: {error}"
    return "" if isinstance(keys, dict) else "expected keys and values at the top level"


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
