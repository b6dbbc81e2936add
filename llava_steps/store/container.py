"""`--sif-path`: a step that is called directly runs in a container image.

The whole step goes into the image, its worker processes with it: the same command is run again by
apptainer (or singularity), with this checkout's code on the path. In the workflow the key `image`
does the same for every step.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.store.digest import Digests

RUNTIMES = ("apptainer", "singularity")
INSIDE = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
"""Variables that name the image to a process that runs in one."""
ROOT = Path(__file__).resolve().parents[2]
NVIDIA = Path("/proc/driver/nvidia")


def image_digest(image: str, store: Path) -> str:
    """What identifies the image that a configuration names, never its path; empty without one.

    Raises:
        ConfigError: neither a file nor pinned.
    """
    if not image:
        return ""
    if "@sha256:" in image:
        return image.rpartition("@")[2]
    if not Path(image).is_file():
        raise ConfigError(
            f"image: {image!r} is neither a file nor pinned with @sha256:...; build it or pin it"
        )
    store.mkdir(parents=True, exist_ok=True)
    digests = Digests(store)
    digest = file_digest(Path(image), digests)
    digests.save()
    return digest


def file_digest(image: Path, digests: Digests) -> str:
    """What identifies an image that is a file."""
    return "sha256:" + digests.file(image)


def enter(sif: Path, module: str, arguments: Sequence[str], named: Iterable[Path]) -> None:
    """Return when this process runs in `sif`; otherwise become `python -m module` inside it.

    Raises:
        InputError: the image does not exist.
        ConfigError: this is another image, or neither apptainer nor singularity is installed.
    """
    around = next((os.environ[name] for name in INSIDE if os.environ.get(name)), "")
    if around:
        if os.path.realpath(around) != os.path.realpath(sif):
            raise ConfigError(
                f"--sif-path {sif}: this already runs in the image {around}; leave the option out"
            )
        return
    if not sif.is_file():
        raise InputError(f"--sif-path: {sif} is not an image file")
    program = runtime()
    if program is None:
        raise ConfigError(f"--sif-path {sif}: neither {' nor '.join(RUNTIMES)} is installed")
    line = command(program, sif, module, arguments, named)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, line, os.environ | {"PYTHONPATH": path})  # noqa: S606  (no shell wanted)


def runtime() -> str | None:
    """The program that enters images, if one is installed."""
    return next(filter(None, map(shutil.which, RUNTIMES)), None)


def exec_words(program: str, image: str, arguments: Sequence[str]) -> list[str]:
    """Words that enter `image` as Snakemake's own do; a command follows."""
    return [program, "exec", f"--home={Path.cwd()}", *arguments, image]


def command(
    program: str, sif: Path, module: str, arguments: Sequence[str], named: Iterable[Path]
) -> list[str]:
    """The line that runs a step in `sif`; of `named` the directories that exist are bound."""
    line = [program, "exec"]
    if NVIDIA.exists():
        line.append("--nv")
    for directory in _directories([Path.cwd(), ROOT, sif, *named]):
        if {":", ","} & set(directory):
            raise ConfigError(f"--sif-path: {directory} cannot be bound, it contains ':' or ','")
        line += ["--bind", directory]
    return [*line, "--pwd", str(Path.cwd()), str(sif.resolve()), "python", "-m", module, *arguments]


def _directories(paths: Iterable[Path]) -> list[str]:
    """The directories that hold `paths`, links followed, without those inside another."""
    directories: set[Path] = set()
    for path in paths:
        for directory in (path.absolute(), path.resolve()):
            while not directory.is_dir():
                directory = directory.parent
            directories.add(directory)
    directories.discard(Path("/"))
    covered = {p for p in directories if any(p.is_relative_to(q) for q in directories - {p})}
    return [str(p) for p in sorted(directories - covered)]
