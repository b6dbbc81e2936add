"""One writer per directory: `lease.json` names the process that works in it.

`lease.log` records who took it, gave it back or lost it, and when: a line of JSON each.

A lease is alive while its process is. On the same machine (boot id and pid namespace) the
kernel knows that, by pid and process start time. For another machine, or another container, the
heartbeat decides: an mtime that is renewed every few seconds. Such a lease is watched, and taken
over after `STALE_AFTER` seconds without a renewal. Clocks of machines are never compared: an age is
measured by the clock of the file system, and even a very old lease is watched for a few beats. A
lease that cannot be read is treated like a very old one, because a living holder writes it anew. A
process that finds its own lease taken over ends at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, LockedError

FILE = "lease.json"
LOCK = "lease.lock"
HEARTBEAT = 5.0
"""Seconds between renewals."""
STALE_AFTER = 120.0
"""Seconds without a renewal after which a lease of another machine counts as dead."""
LONG_DEAD = 10 * STALE_AFTER
"""Age in seconds, by the file system's clock, beyond which three heartbeats without one suffice."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Holder = dict[str, Any]
Waiting = Callable[[str], None]
"""Called again and again while a lease is waited for, with a description of its holder."""


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


def _identity() -> Holder:
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
    except IsADirectoryError:
        raise InputError(f"{path} is a directory where a file is expected; remove it") from None


def _parsed(content: bytes) -> Holder | None:
    """The holder that a lease names; None when the lease is damaged."""
    try:
        holder = json.loads(content)
        known = [holder[key] for key in ("host", "boot_id", "pid_namespace", "started")]
        return {**holder, "pid": int(holder["pid"])} if known else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _lives(holder: Holder | None) -> bool | None:
    """Whether the holder of a lease lives; None when only its next beats would show that."""
    if holder is None:
        return None
    if (holder["boot_id"], holder["pid_namespace"]) == (_boot_id(), _pid_namespace()):
        return bool(_started(holder["pid"]) == holder["started"])
    return None


def _age(path: Path, modified: int) -> float | None:
    """Seconds since a file was modified; None where the file system does not show its time.

    Of a file touched now: the clock of this machine may differ from that of others.
    """
    clock = path.with_name(LOCK)
    try:
        with open(clock, "a"):
            os.utime(clock)
        return (clock.stat().st_mtime_ns - modified) / 1e9
    except OSError:  # read-only, full or gone: the caller then relies on beats only
        return None


def _silence(path: Path, beat: tuple[bytes, int], holder: Holder | None) -> float:
    """Seconds without a further beat after which a lease counts as dead."""
    age = _age(path, beat[1])
    if holder is None or (age is not None and age >= LONG_DEAD):
        return 3 * HEARTBEAT
    return STALE_AFTER


def alive(directory: Path) -> bool:
    """Whether a process may hold the lease of `directory`, without waiting for a beat."""
    path = directory / FILE
    beat = _beat(path)
    if beat is None:
        return False
    holder = _parsed(beat[0])
    lives = _lives(holder)
    if lives is not None:
        return lives
    age = _age(path, beat[1])
    return age is None or age < (LONG_DEAD if holder else 3 * HEARTBEAT)


def slurm_job(directory: Path) -> str:
    """The Slurm job that took the lease of `directory`; empty without one."""
    beat = _beat(directory / FILE)
    holder = _parsed(beat[0]) if beat else None
    return str((holder or {}).get("slurm_job_id", ""))


class Watch:
    """Observes the lease of a directory while a process waits for it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self.alive = False
        """Whether its holder lives for certain: by the kernel, or because it was renewed."""
        self.holder = ""
        """Description of its holder; empty without a lease."""
        self._beat: tuple[bytes, int] | None = None
        self._since = self._silence = 0.0

    def held(self) -> bool:
        """Whether a process holds the lease, or may hold it."""
        beat, now = _beat(self.path), time.monotonic()
        if beat is None:
            self.alive, self.holder, self._beat = False, "", None
            return False
        holder = _parsed(beat[0])
        lives = _lives(holder)
        if beat != self._beat:
            self.alive = self._beat is not None and holder is not None
            self._beat, self._since = beat, now
            self._silence = _silence(self.path, beat, holder) if lives is None else math.inf
            self.holder = self._described(holder)
        self.alive = self.alive if lives is None else lives
        return lives is not False and now - self._since < self._silence

    def _described(self, holder: Holder | None) -> str:
        if holder is None:
            return f"an unknown process: {self.path} is damaged, and is replaced if it stays so"
        job = holder.get("slurm_job_id")
        where = f"{holder['host']} (Slurm job {job})" if job else str(holder["host"])
        return f"process {holder['pid']} on {where}"


def _pause(begun: float) -> None:
    """Sleep until a lease is read again: soon at first, then once a second."""
    time.sleep(min(1.0, HEARTBEAT / 2, 0.1 + (time.monotonic() - begun) / 10))


def wait_until_free(directory: Path, waiting: Waiting = lambda holder: None) -> None:
    """Return once no live process holds the lease of `directory`."""
    watch, begun = Watch(directory), time.monotonic()
    while watch.held():
        waiting(watch.holder)
        _pause(begun)


class Lease:
    """Context manager that holds `lease.json` in `directory` for the life of the block.

    Raises LockedError if a live process holds it, also when it is this very process. With `waiting`
    it waits for that process instead, and makes the directory anew if it is removed meanwhile.
    `checking` is called while it is not known yet whether the holder lives.
    """

    def __init__(
        self,
        directory: Path,
        waiting: Waiting | None = None,
        checking: Waiting = lambda holder: None,
    ) -> None:
        self.path = directory / FILE
        self._lock = directory / LOCK
        self._waiting, self._checking = waiting, checking
        self._identity = _identity()
        self._written = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        watch, begun = Watch(self.path.parent), time.monotonic()
        try:
            while watch.held() or not self._taken(watch):
                if self._waiting is not None:
                    self._waiting(watch.holder)
                elif watch.alive:
                    raise LockedError(
                        f"{self.path.parent} is being written by {watch.holder}; wait for it or "
                        "end it, then run again"
                    )
                elif watch.holder:
                    self._checking(watch.holder)
                _pause(begun)
        except BaseException:  # a stop signal too
            self._give_back()
            raise
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        self._give_back()

    def settle(self) -> None:
        """Renew no longer: the holder is about to move the directory, which ends the lease."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def rename(self, entry: Path, target: Path) -> bool:
        """Rename the directory that is written, which ends the lease; False if it was lost."""
        self.settle()
        if not self.is_ours():
            return False
        entry.rename(target)
        return True

    def _give_back(self) -> None:
        if self._written and (self.is_ours() or self._repaired()):
            self._note("given back")
            self.path.unlink()

    def _taken(self, watch: Watch) -> bool:
        """Take the lease unless it is held; whether that was possible."""
        if self._waiting is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._locked():
                if watch.held():
                    return False
                event = "taken over" if watch.holder else "taken"
                self._written = True
                filesystem.write_json(self.path, self._identity)
                self._note(event)
                return True
        except FileNotFoundError:
            if self._waiting is None:
                raise
            return False  # `clean` has just removed the directory

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Order takers on one file system; the lease itself decides."""
        while True:
            with open(self._lock, "a") as lock:
                try:
                    with filesystem.named(self._lock):
                        fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    raise InputError(
                        f"{self._lock}: the file system has no locks ({error.strerror}); mount it "
                        "with lock support (NFS 4, or Lustre with -o flock), or use another store"
                    ) from None
                # Of a directory that was removed and made again the old file orders no takers.
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self._lock)):
                    yield
                    return

    def _note(self, event: str) -> None:
        row = {"event": event, "time": round(time.time(), 3), **self._identity}
        with open(self.path.with_suffix(".log"), "a") as log:
            log.write(json.dumps(row, sort_keys=True) + "\n")

    def is_ours(self) -> bool:
        """Whether the directory still holds the lease as this process took it."""
        seen = _beat(self.path)
        return seen is not None and _parsed(seen[0]) == self._identity

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                ours = self.is_ours() or self._repaired()
                if ours:
                    os.utime(self.path)
            except OSError as error:  # tried again; if it stays so, others take the lease over
                print(f"{self.path} cannot be renewed: {error}", file=sys.stderr, flush=True)
                continue
            if not ours:
                # Suspended for so long that another process works here now.
                print(f"{self.path} was taken over by another process; ending", file=sys.stderr)
                sys.stderr.flush()
                os._exit(LockedError.exit_code)

    def _repaired(self) -> bool:
        """Write the lease anew if it was damaged; False when it is another's, or gone."""
        if not self._is_damaged():
            return False
        with self._locked():
            if not self._is_damaged():
                return False
            filesystem.write_json(self.path, self._identity)
            self._note("repaired")
            return True

    def _is_damaged(self) -> bool:
        seen = _beat(self.path)
        return seen is not None and _parsed(seen[0]) is None
