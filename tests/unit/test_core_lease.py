"""Leases of other machines and containers: watched, refused while alive, else taken over."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from llava_steps.core.errors import LockedError
from llava_steps.store import lease
from tests.helpers.patience import PATIENCE, wait_for


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lease, "STALE_AFTER", 0.6)


def foreign(directory: Path, key: str = "pid_namespace") -> Path:
    """A lease as this very process would hold it, but from another container or machine."""
    path = directory / "lease.json"
    other = directory / "other.json"
    other.write_text(json.dumps(lease._identity() | {key: "another", "pid": 4_000_000}))
    return other.rename(path)


@pytest.mark.parametrize("key", ["pid_namespace", "boot_id"])
def test_a_silent_one_is_taken_over_after_a_while(tmp_path: Path, key: str) -> None:
    """A process of another pid namespace looks dead to the kernel whether it is or not."""
    foreign(tmp_path, key)
    start = time.monotonic()
    with lease.Lease(tmp_path) as held:
        assert time.monotonic() - start >= 0.6
        assert json.loads(held.path.read_text())["pid"] == os.getpid()
    assert not held.path.exists()


def test_one_that_beats_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER", 600.0)
    path, end = foreign(tmp_path), threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockedError, match="process 4000000"), lease.Lease(tmp_path):
            pass
    finally:
        end.set()
        thread.join()
    assert json.loads(path.read_text())["pid"] == 4_000_000


def test_a_very_old_one_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER", math.inf)
    path = foreign(tmp_path)
    os.utime(path, (0, 0))
    with lease.Lease(tmp_path):
        pass  # else it would have waited for ever


def hold(directory: Path) -> None:
    lease.HEARTBEAT = 0.05
    with lease.Lease(directory):
        time.sleep(2 * PATIENCE)


def test_who_lost_the_lease_ends_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path,))
    process.start()
    wait_for((tmp_path / "lease.json").exists)
    path = foreign(tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == LockedError.exit_code
    assert json.loads(path.read_text())["pid"] == 4_000_000
