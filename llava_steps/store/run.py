"""The one entry of every step: settings, inputs, fingerprint, lease, work, seal, publish.

    main(Step(name=..., config=..., run=...))

reads the command line, finds the store entry that the step's value belongs to and returns at once
when it is sealed. Otherwise it takes the lease, calls `run(ctx, config)`, which writes its payload
into the empty `ctx.entry`, seals the entry and publishes it at `--save-dir`. Only a step that
resumes is given what an earlier attempt left. While another process writes the entry the step waits
for its value. Exit codes are those of core/errors.py.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llava_steps.core import filesystem, stop_signals
from llava_steps.core.errors import (
    ConfigError,
    InputError,
    StepError,
    StoppedError,
    environment_error,
)
from llava_steps.core.log import ignore_known_warnings, logger
from llava_steps.settings import cli, paths
from llava_steps.settings.fields import StepConfig, flag_name, values, whole_of
from llava_steps.store import attempts, container, registry, store
from llava_steps.store.digest import Digests
from llava_steps.store.identity import Identity, changed_input, identify
from llava_steps.store.lease import Lease
from llava_steps.store.step import C, Context, Step
from llava_steps.store.store import Input
from llava_steps.store.waiting import Report, claimed_value, only_writer, publish_whole, stamp

FORCE_REQUEST = ".force"
"""File in the published directory that makes the next run of the step recompute its value."""
RESULT_FLAG = "result_flag"
"""Which name of its flag the result directory is given under."""


def main(step: Step[C], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the step from the command line and exit with its code."""
    sys.exit(execute(step, sys.argv[1:] if arguments is None else arguments))


def execute(step: Step[C], arguments: Sequence[str]) -> int:
    """Run the step; errors that it reports become one line and their exit code."""
    module = step.run.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    ignore_known_warnings()
    log = logger(module.rpartition(".")[2])
    try:
        given = vars(parser(step, module).parse_args(list(arguments)))
        if given["sif_path"]:
            container.enter(given["sif_path"], module, arguments, _named_paths(step, given))
        with stop_signals.handled_by(_stop):
            _evaluate(step, module, cli.settings(step.config, given), given, log)
    except Exception as error:
        known = error if isinstance(error, StepError) else environment_error(error)
        if known is None:
            raise
        logging.getLogger(log.name).error("%s", known)
        return known.exit_code
    return 0


def _named_paths(step: Step[C], given: Mapping[str, Any]) -> list[Path]:
    """What a container must see: where the value goes, and the inputs on the command line."""
    settings = cli.settings(step.config, dict(given))
    named = [Path(item.text) for item in paths.given(settings) if item.text]
    return [given["save_dir"], given["store"], *named]


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End the step in order, with exit code 75."""
    raise StoppedError(f"stopped by {signal.Signals(number).name}; run it again to resume")


class _ResultDirectory(argparse.Action):
    """Takes one directory, under whichever of its names; ConfigError for two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given: dict[str | None, Path] = {}

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        self._given[option_string] = values
        if len(set(self._given.values())) > 1:
            both = " and ".join(f"{flag} {path}" for flag, path in self._given.items())
            raise ConfigError(f"{both} both name the result; give one of them")
        setattr(namespace, self.dest, values)
        setattr(namespace, RESULT_FLAG, option_string)


def parser(step: Step[C], module: str) -> argparse.ArgumentParser:
    """The command line of a step."""
    made = cli.Parser(
        prog=f"llava-steps {module.rpartition('.')[2]}",
        description=step.doc or step.config.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_flags(made, step.config)
    where = made.add_argument_group("where")
    where.add_argument(
        *step.result_flags,
        dest="save_dir",
        action=_ResultDirectory,
        type=Path,
        required=True,
        metavar="DIR",
        help="directory that shows the result",
    )
    where.add_argument(
        "--store",
        type=Path,
        default=Path("store"),
        metavar="DIR",
        help="directory of the store (default: store)",
    )
    where.add_argument(
        "--image", default="", metavar="DIGEST", help="digest of the container image this runs in"
    )
    where.add_argument(
        "--sif-path", type=Path, metavar="FILE",
        help="run in this container image, with apptainer or singularity",
    )  # fmt: skip
    where.add_argument(
        "--force", action="store_true", help="compute again although it is up to date"
    )
    if step.resolve:
        where.add_argument(
            "--update", action="store_true", help="take the newest commit of hub ids"
        )
    return made


def _evaluate(
    step: Step[C], module: str, config: C, given: Mapping[str, Any], log: logging.Logger
) -> None:
    out: Path = given["save_dir"]
    root: Path = given["store"]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"--store {root} is a file; name a directory") from None
    _not_in_place_of_an_input(step, config, out, given[RESULT_FLAG])
    known = Digests(root)
    image = _image(given, known)
    identity = identify(step, module, config, known, image, update=given.get("update", False))
    entry = root / identity.name / identity.fingerprint
    forced = given["force"] or (out / FORCE_REQUEST).exists()
    if step.follows(config):
        _follow(step, module, config, entry, identity.inputs, out, forced)
        return
    _register(root, out, log)
    replaced = stamp(entry) if forced else None
    waiting = Report(log, f"{identity.name} {entry.name}")
    whole = functools.partial(_sealed_whole, config, identity, image, root)
    while True:
        if not forced and stamp(entry) is None and publish_whole(whole(), out, waiting):
            log.info("%s, the whole value, is up to date; no share of it is needed", identity.name)
            return
        with contextlib.ExitStack() as stack:
            sealed = stack.enter_context(claimed_value(entry, out, waiting))
            held: Lease | None = None
            # Shares are removed with no regard to claims: only the lease protects them.
            if replaced or not sealed or whole_of(config):
                held = stack.enter_context(only_writer(entry, replaced, waiting))
                if not forced and stamp(entry) is None and whole():
                    _remove(entry, held)  # shares are no longer needed
                    continue
            (out / FORCE_REQUEST).unlink(missing_ok=True)
            if waiting.waited:
                known.reload()
            manifest = store.read_manifest(entry)
            if manifest is None and held is None:
                continue  # another process has just set the value aside
            if manifest is not None:
                store.check(entry, manifest, known.file)
                done = f"{identity.name} {entry.name} is up to date; nothing to compute"
            else:
                attempt = _Attempt(identity, image, module, entry)
                log, done = attempt.log, f"{identity.name} is done: {out}"
                until_sealed = stack.enter_context(contextlib.ExitStack())
                attempt.compute(step, config, out, until_sealed, known)
            known.save()
            store.publish(entry, out)
            step.published(config)
            log.info("%s", done)
        return


class _Attempt:
    """One try to compute a value in its entry, with its number and its log."""

    def __init__(self, identity: Identity, image: str, module: str, entry: Path) -> None:
        self._identity, self._image, self._entry = identity, image, entry
        self._work = entry / store.WORK
        self._logs = self._work / "logs"
        self._number, log = attempts.begin(self._logs)
        self.log = logger(module.rpartition(".")[2], log)

    def compute(
        self,
        step: Step[C],
        config: C,
        out: Path,
        until_sealed: contextlib.ExitStack,
        known: Digests,
    ) -> None:
        """Compute the value and seal it.

        Raises:
            InputError: an input changed meanwhile.
        """
        description = self._run(step, config, out, until_sealed)
        if changed := changed_input(step, config, self._identity.inputs, known):
            # What was read from both versions is of no use to the next attempt either.
            clear(self._entry)
            raise InputError(
                f"{changed} changed while the step read it; nothing was kept, so run it again"
            )
        store.seal(self._entry, description, step.volatile, known.file)

    def _run(
        self, step: Step[C], config: C, out: Path, until_sealed: contextlib.ExitStack
    ) -> dict[str, Any]:
        """Compute the value; returns what its manifest says beside the list of files."""
        name, settings, inputs, code, print_ = self._identity
        self.log.info("%s %s attempt %d in %s", name, print_, self._number, self._entry)
        if not step.resumes:
            clear(self._entry)
        store.show_work(self._entry, out)
        _note_inputs(self._entry, inputs)
        start = time.monotonic()
        context = Context(
            self._entry.resolve(),
            inputs,
            self.log,
            self._work.resolve(),
            print_,
            until_sealed,
            _relative(out, self._entry),
        )
        with self._errors_logged(name):
            metrics = dict(step.run(context, config))
        return {
            "step": name,
            "fingerprint": print_,
            "config": settings,
            "code": code,
            "image": self._image,
            "inputs": {key: item.described for key, item in inputs.items()},
            "metrics": metrics,
            "attempts": self._number,
            "wall_s": round(time.monotonic() - start, 3),
            "earlier_s": attempts.earlier_s(self._logs, self._number),
        }

    @contextlib.contextmanager
    def _errors_logged(self, name: str) -> Iterator[None]:
        try:
            yield
        except StepError as error:
            self.log.error("%s", error)
            with contextlib.suppress(IndexError):
                self.log.handlers.pop(0)  # the file has it; `execute` prints it once
            raise
        except Exception as error:
            if environment_error(error) is None:
                self.log.exception("%s failed; the traceback is also in %s", name, self._logs)
            raise


def _sealed_whole(config: StepConfig, identity: Identity, image: str, root: Path) -> Path | None:
    """The sealed entry of the whole value that `config` makes a share of, if it exists."""
    whole = whole_of(config)
    if whole is None:
        return None
    contents = {key: item.digest for key, item in identity.inputs.items()}
    print_ = store.fingerprint(identity.name, values(whole), contents, identity.code, image)
    entry = root / identity.name / print_
    return entry if (entry / store.MANIFEST).exists() else None


def _register(root: Path, out: Path, log: logging.Logger) -> None:
    """Register `out` for `clean`; a user who cannot write to the store cannot clean it either."""
    try:
        registry.register_result(root, out)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        log.warning(
            "%s: %s; to clean this store, its owner must name %s with --results",
            error.filename,
            error.strerror,
            out,
        )


def _remove(entry: Path, held: Lease) -> None:
    """Remove an entry whose lease is held."""
    doomed = store.removed_name(entry)
    if held.rename(entry, doomed):
        filesystem.remove(doomed)


def _note_inputs(entry: Path, inputs: Mapping[str, Input]) -> None:
    """Name the entries that an attempt reads, for `clean`: perhaps nothing shows them now."""
    read = {os.path.relpath(i.entry, entry.resolve()) for i in inputs.values() if i.entry}
    filesystem.write_json(entry / store.WORK / store.READS, sorted(read))


def _not_in_place_of_an_input(step: Step[C], config: C, out: Path, result_flag: str) -> None:
    """ConfigError when the result is to be shown where an input is.

    It would replace the input, so the same command could not run again, for example to resume.
    """
    for item in paths.given(config):
        text = item.text
        if text and Path(os.path.abspath(text)).is_relative_to(os.path.abspath(out)):
            flag = flag_name(item.field, item.info)
            raise ConfigError(
                f"{result_flag} {out} would replace {flag} {text}, "
                "which the same command needs to resume; choose another directory"
            )


def _follow(
    step: Step[C],
    module: str,
    config: C,
    entry: Path,
    inputs: Mapping[str, Input],
    out: Path,
    force: bool,
) -> None:
    """Take part in the computation of a value that another process leads."""
    # In this order: the lead sets a value aside before it takes back the request to.
    if not force and (entry / store.MANIFEST).exists():
        return
    work = entry / store.WORK
    (work / "logs").mkdir(parents=True, exist_ok=True)
    log = logger(module.rpartition(".")[2])
    with contextlib.ExitStack() as until_sealed:
        context = Context(
            entry.resolve(),
            inputs,
            log,
            work.resolve(),
            entry.name,
            until_sealed,
            _relative(out, entry),
            force,
        )
        step.run(context, config)


def _relative(out: Path, entry: Path) -> str:
    return os.path.relpath(out.resolve(), entry.resolve())


def clear(entry: Path) -> None:
    """Remove the payload of an unfinished entry; the bookkeeping of its attempts stays."""
    for made in entry.iterdir():
        if made.name != store.WORK:
            filesystem.remove(made)


def _image(given: Mapping[str, Any], digests: Digests) -> str:
    """Digest of the image this runs in, as the workflow names it too."""
    stated: str = given["image"]
    if not given["sif_path"]:
        return stated
    digest = container.file_digest(given["sif_path"], digests)
    if stated and stated != digest:
        raise ConfigError(f"--image {stated}: --sif-path {given['sif_path']} has {digest}")
    return digest
