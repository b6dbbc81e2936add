"""One writer per store entry: `lease.json` names the process that works in it.

A lease is alive while its process is: on the same host (boot id) that is asked of the kernel, by
pid and process start time; for another host the heartbeat, an mtime renewed every few seconds,
must be younger than `STALE_AFTER`. A dead lease is taken over, a live one refuses the second.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_steps.core import fsio
from llava_steps.core.errors import LockedError

HEARTBEAT = 5.0
"""Seconds between renewals."""
STALE_AFTER = 120.0
"""Seconds without a renewal after which a lease of another host counts as dead."""


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


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
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
    }


class Lease:
    """Context manager that holds `lease.json` in `directory` for the life of the block.

    Raises LockedError if a live process holds it, also when it is this very process.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lease.json"
        self._lock = directory / "lease.lock"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        # The lock only orders takers on one file system; the lease itself decides.
        with open(self._lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            holder = self._holder()
            if holder is not None:
                raise LockedError(
                    f"{self.path.parent} is being written by process {holder['pid']} on "
                    f"{holder['host']}; wait for it or end it, then run again"
                )
            fsio.write_json(self.path, _identity())
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.path.unlink(missing_ok=True)

    def _holder(self) -> dict[str, Any] | None:
        """The live holder, or None when the lease is absent or dead."""
        try:
            holder: dict[str, Any] = json.loads(self.path.read_bytes())
            age = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        if holder["boot_id"] == _boot_id():
            return holder if _started(int(holder["pid"])) == holder["started"] else None
        return holder if age < STALE_AFTER else None

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            os.utime(self.path)
