"""One writer per directory: `lease.json` names the process that works in it.

`lease.log` records who took it, gave it back or lost it, and when: a line of JSON each.

A lease is alive while its process is. On the same machine (boot id and pid namespace) the
kernel knows that, by pid and process start time. For another machine, or another container, the
heartbeat decides: an mtime that is renewed every few seconds. A process that meets such a
lease watches it: it is refused when the lease is renewed, and takes it over after `STALE_AFTER`
seconds without a renewal. A process that finds its own lease taken over ends at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from llava_steps.core import filesystem
from llava_steps.core.errors import LockedError

FILE = "lease.json"
HEARTBEAT = 5.0
"""Seconds between renewals."""
STALE_AFTER = 120.0
"""Seconds without a renewal after which a lease of another machine counts as dead."""
LONG_DEAD = 10 * STALE_AFTER
"""Age in seconds at which a lease is dead without a watch: clocks of machines differ by less."""


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
    }


def _beat(path: Path) -> tuple[bytes, int] | None:
    """Content of a lease and time of its last beat in nanoseconds; None without one."""
    try:
        return path.read_bytes(), path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _lives(beat: tuple[bytes, int]) -> bool | None:
    """Whether the holder of a lease lives; None when only its next beats would show that."""
    holder: dict[str, Any] = json.loads(beat[0])
    if (holder["boot_id"], holder["pid_namespace"]) == (_boot_id(), _pid_namespace()):
        return bool(_started(int(holder["pid"])) == holder["started"])
    return None if time.time() - beat[1] / 1e9 < LONG_DEAD else False


def alive(directory: Path) -> bool:
    """Whether a process may hold the lease of `directory`, without waiting for a beat."""
    beat = _beat(directory / FILE)
    return beat is not None and _lives(beat) is not False


def wait_until_free(directory: Path) -> None:
    """Return once no live process holds the lease of `directory`."""
    watched, since = None, time.monotonic()
    while (beat := _beat(directory / FILE)) is not None:
        lives = _lives(beat)
        if beat != watched:
            watched, since = beat, time.monotonic()
        if lives is False or (lives is None and time.monotonic() - since >= STALE_AFTER):
            return
        time.sleep(min(0.2, HEARTBEAT / 2))


class Lease:
    """Context manager that holds `lease.json` in `directory` for the life of the block.

    Raises LockedError if a live process holds it, also when it is this very process.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._lock = directory / "lease.lock"
        self._identity = _identity()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        watched: tuple[bytes, int] | None = None
        since = time.monotonic()
        while not self._taken(watched, time.monotonic() - since):
            now = _beat(self.path)
            if watched is None:
                watched, since = now, time.monotonic()
            elif now is not None and now != watched:
                self._refuse(json.loads(now[0]))
            time.sleep(min(1.0, HEARTBEAT / 2))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        if self.is_ours():
            self._note("given back")
            self.path.unlink()

    def settle(self) -> None:
        """Renew no longer: the holder is about to move the directory, which ends the lease."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _taken(self, watched: tuple[bytes, int] | None, seconds: float) -> bool:
        """Take the lease if it is free, dead, or was watched for so many seconds without a beat.

        Raises LockedError if its holder is certainly alive.
        """
        # The lock only orders takers on one file system; the lease itself decides.
        with open(self._lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            seen = _beat(self.path)
            if seen is not None:
                lives = _lives(seen)
                if lives:
                    self._refuse(json.loads(seen[0]))
                if lives is None and not (seen == watched and seconds >= STALE_AFTER):
                    return False
            filesystem.write_json(self.path, self._identity)
            self._note("taken" if seen is None else "taken over")
        return True

    def _note(self, event: str) -> None:
        row = {"event": event, "time": round(time.time(), 3), **self._identity}
        with open(self.path.with_suffix(".log"), "a") as log:
            log.write(json.dumps(row, sort_keys=True) + "\n")

    def _refuse(self, holder: dict[str, Any]) -> NoReturn:
        raise LockedError(
            f"{self.path.parent} is being written by process {holder['pid']} on "
            f"{holder['host']}; wait for it or end it, then run again"
        )

    def is_ours(self) -> bool:
        """Whether the directory still holds the lease as this process took it."""
        seen = _beat(self.path)
        return seen is not None and json.loads(seen[0]) == self._identity

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            if not self.is_ours():
                # Suspended for so long that another process works here now.
                print(f"{self.path} was taken over by another process; ending", file=sys.stderr)
                sys.stderr.flush()
                os._exit(LockedError.exit_code)
            os.utime(self.path)
