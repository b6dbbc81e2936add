"""This machine: whether a cluster can be made of it, its commands and processes."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATIENCE = 900.0
"""Seconds that anything may take; a loaded machine is slow."""


SLURM_CONF = Path("/etc/slurm/slurm.conf")


def missing(state: Path) -> str:
    """Why there can be no cluster here, with its files in `state`; empty if there can."""
    if os.geteuid():
        return "not root: packages are installed and daemons started"
    system = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if system.get("ID") != "debian" or platform.machine() != "x86_64":
        return "not Debian on x86-64: packages and programs are taken from there"
    if shutil.which("apt-get") is None:
        return "no apt-get: Slurm and Apptainer are installed with it"
    for words in (("--mount", "--pid", "--fork"), ("--user", "--map-root-user")):
        if subprocess.run(["unshare", *words, "true"], capture_output=True).returncode:
            return f"the kernel allows no unshare {' '.join(words)}, as containers need it"
    if SLURM_CONF.exists() and f"StateSaveLocation={state}/ctld\n" not in SLURM_CONF.read_text():
        return f"{SLURM_CONF} is there: this machine is part of another cluster"
    known = Path("/proc/filesystems").read_text().split()
    if not Path("/dev/fuse").exists() and not {"squashfs", "overlay"} <= {*known}:
        return "neither FUSE nor squashfs and overlay in the kernel, which show an image's files"
    with tempfile.TemporaryDirectory(dir="/var/lib") as path:
        try:
            os.mknod(f"{path}/gpu", 0o20666, os.makedev(1, 3))
            Path(path, "gpu").read_bytes()
        except OSError as error:
            return f"no devices can be made ({error.strerror}), which stand in for GPUs"
    return ""


def sh(*words: str | Path, check: bool = True, cwd: Path | None = None) -> str:
    """stdout of a command; one that fails tells the end of what it wrote."""
    process = subprocess.Popen(
        [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, process_group=0, cwd=cwd,
    )  # fmt: skip
    try:
        out, error = process.communicate()
    except BaseException:
        # All that it started ends with it, when the time is over.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if check and process.returncode:
        raise AssertionError(f"{words[0]}: {out[-3000:]}{error[-6000:]}")
    return out


def until(what: str, condition: Callable[[], Any]) -> Any:
    """The first value of `condition` that counts as true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.3)
    return value


def processes() -> Iterator[tuple[Path, set[bytes], bytes]]:
    """Directory in /proc, environment and command line of each process that is alive."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            if line:
                yield path, {*(path / "environ").read_bytes().split(b"\0")}, line


def tasks_of(job: str, node: int, word: bytes = b"") -> list[int]:
    """Processes of a job's task on a node, in its container, by a word of their command lines."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={node}".encode()}
    return [int(path.name) for path, names, line in processes() if wanted <= names and word in line]


def left_running(place: Path, state: Path) -> list[str]:
    """Command lines of processes of the cluster, by their environment and directories."""
    found = []
    for path, names, line in processes():
        with contextlib.suppress(OSError):
            where = (path / "cwd").readlink()
            started = f"STATE={state}".encode() in names
            if int(path.name) != os.getpid() and (started or place in (where, *where.parents)):
                found.append(line.decode(errors="replace"))
    return found
