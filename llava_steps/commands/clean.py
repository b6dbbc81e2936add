"""What in the store does no run need? Lists it and, with --yes, removes it.

    llava-steps clean                        what could go, why, and the bytes that this frees
    llava-steps clean --yes                  remove it
    llava-steps clean --configfile mine.yaml --results /other/results
    llava-steps clean --unfinished --yes     also work that a run would resume
    llava-steps clean --forget /old/results  a results directory that is gone for good

Removable are values that no run shows, values that were computed again (`.replaced-N`), attempts
that were killed more than a day ago and that no run shows as `work`, and temporary names. Delete
results/RUN to let go of the values of a run. What a running step writes or reads always stays.

The store knows the results directories of its runs. When one of them is missing, nothing is
removed: its disk may only be unmounted. Without --yes no file of a step changes.
Exit codes: 0 done · 2 configuration · 3 a directory is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from llava_steps.core.errors import ConfigError, InputError, report_error
from llava_steps.core.format import size
from llava_steps.settings import cli, load
from llava_steps.store import registry, unused
from llava_steps.store.shown import shown
from llava_steps.store.unused import Unused


def main(arguments: list[str] | None = None) -> int:
    """List or remove what is unused; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        store, configured = _store(given)
        _forget(store, given.forget)

        def find(ours: Collection[Path] = ()) -> list[Unused]:
            directories = _results(store, [*configured, *given.results])
            return unused.find(store, shown(store, directories), given.unfinished, ours)

        items = find()
        if given.yes:
            items = unused.remove(items, find)
        _report(store, items, given)
    except Exception as error:
        return report_error("clean", error)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser("clean", __doc__)
    made.add_argument("--yes", action="store_true", help="remove what is listed")
    made.add_argument(
        "--store", type=Path, metavar="DIR", help="store (default: that of the configuration)"
    )
    cli.add_configfile(made)
    made.add_argument(
        "--results", type=Path, nargs="+", action="extend", default=[], metavar="DIR",
        help="more directories that show values: copies, moved ones, links made by hand",
    )  # fmt: skip
    made.add_argument(
        "--unfinished", action="store_true",
        help="also unfinished work that is younger than a day, or that a run shows",
    )  # fmt: skip
    made.add_argument(
        "--forget", type=Path, nargs="+", action="extend", default=[], metavar="DIR",
        help="remove results directories from the list that the store keeps",
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="figures as one line of JSON")
    return made


def _store(given: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The store, and the results directory of the configuration if that exists."""
    store: Path | None = given.store
    configured = []
    if store is None or given.configfile or load.SHIPPED.exists():
        config = load.with_overlays(given.configfile)
        store = store or Path(config.store)
        configured = [path for path in [Path(config.results)] if path.is_dir()]
    if not store.is_dir():
        raise InputError(f"store {store} does not exist; name it with --store")
    if not unused.is_store(store):
        raise InputError(f"{store} is not a store: no step has kept a value there")
    return store, configured


def _forget(store: Path, directories: list[Path]) -> None:
    for directory in directories:
        if not registry.forget(store, directory):
            raise ConfigError(f"--forget {directory}: the store does not list this directory")


def _results(store: Path, named: list[Path]) -> list[Path]:
    """All directories that may show values of the store."""
    for directory in named:
        if not directory.is_dir():
            raise InputError(f"--results {directory}: this directory does not exist")
    known = registry.registered(store)
    # A mount point without its disk is an empty directory.
    gone = [str(path) for path in known if not (path.is_dir() and any(path.iterdir()))]
    if gone:
        raise InputError(
            f"results directory {', '.join(gone)} is missing or empty, and its runs may still need "
            f"what nothing else shows; mount it or, if it is gone for good, --forget {gone[0]}; "
            "if it was moved, also name where it is now: --results"
        )
    if not known and not named:
        raise ConfigError(f"{store} lists no results directory; name those of its runs: --results")
    return [*known, *named]


def _report(store: Path, items: list[Unused], given: argparse.Namespace) -> None:
    total = sum(item.size for item in items)
    if given.json:
        rows = [
            {k: v for k, v in asdict(item).items() if k != "size"}
            | {"path": str(item.path), "bytes": item.size}
            for item in items
        ]
        print(json.dumps({"removed": given.yes, "bytes": total, "items": rows}))
        return
    for item in items:
        path = item.path.relative_to(store.resolve())
        print(f"{size(item.size):>11}  {item.kind:<10}  {path}  {item.why}")
    advice = "removed" if given.yes else "remove with --yes" if items else "nothing to remove"
    print(f"{size(total):>11}  in {len(items)} item{'s' * (len(items) != 1)}: {advice}")
