"""Leases: who is refused or waits, and when a lease is taken over, of another machine too."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from llava_steps.core.errors import InputError, LockedError
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


def test_who_waits_is_refused_nothing(tmp_path: Path) -> None:
    """Each of many takes the lease once, also when its directory is removed meanwhile."""
    entry, inside, most = tmp_path / "entry", 0, 0
    holders: list[str] = []

    def take(number: int) -> None:
        nonlocal inside, most
        with lease.Lease(entry / ".work", holders.append) as held:
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1
            if number % 2:
                assert held.rename(entry, tmp_path / f"removed-{number}")

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert most == 1 and not (entry / ".work/lease.json").exists()
    assert len(list(tmp_path.glob("removed-*"))) == 4
    assert {holder.partition(" on ")[0] for holder in holders} == {f"process {os.getpid()}"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\x00", b'{"pid": 1}',
    b'{"boot_id": 1, "host": 1, "pid": "x", "pid_namespace": 1, "started": 1}'])  # fmt: skip
def test_a_damaged_one_is_taken_over_after_some_beats(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease.json").write_bytes(content)
    assert lease.alive(tmp_path) and lease.slurm_job(tmp_path) == ""
    start = time.monotonic()
    with lease.Lease(tmp_path) as held:
        assert time.monotonic() - start >= 3 * lease.HEARTBEAT
        assert held.is_ours()
    events = [json.loads(row)["event"] for row in (tmp_path / "lease.log").read_text().splitlines()]
    assert events == ["taken over", "given back"]
    (tmp_path / "lease.json").write_bytes(content)
    os.utime(tmp_path / "lease.json", (0, 0))
    assert not lease.alive(tmp_path)


def test_a_living_holder_repairs_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 1.0)
    with lease.Lease(tmp_path) as held:
        for content in ("", "{"):
            held.path.write_text(content)
            with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
                lease.Lease(tmp_path).__enter__()
            assert held.is_ours()
        held.path.write_text("")
    assert not held.path.exists(), "given back although damaged"


def test_a_directory_in_its_place_is_explained(tmp_path: Path) -> None:
    (tmp_path / "lease.json").mkdir()
    with pytest.raises(InputError, match=r"lease\.json is a directory where a file is expected"):
        lease.Lease(tmp_path).__enter__()


@pytest.mark.parametrize("ahead", [25 * 60.0, -25 * 60.0, 10 * 86400.0])
def test_the_clock_of_this_machine_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER", 600.0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    path, end = foreign(tmp_path), threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(path)

    assert lease.alive(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockedError):
            lease.Lease(tmp_path).__enter__()
    finally:
        end.set()
        thread.join()


def test_a_lease_that_looks_old_but_beats_is_not_taken_over(tmp_path: Path) -> None:
    """As on a file system that takes the times of files from its clients."""
    path, end = foreign(tmp_path), threading.Event()
    long_ago = time.time() - 2 * lease.LONG_DEAD

    def beat() -> None:
        for number in range(10_000):
            os.utime(path, (long_ago + number, long_ago + number))
            if end.wait(0.02):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        wait_for(lambda: not lease.alive(tmp_path))
        with pytest.raises(LockedError):
            lease.Lease(tmp_path).__enter__()
    finally:
        end.set()
        thread.join()


def test_a_directory_that_cannot_be_written_shows_no_age(tmp_path: Path) -> None:
    os.utime(foreign(tmp_path), (0, 0))
    (tmp_path / lease.LOCK).symlink_to("missing/lease.lock")
    assert lease.alive(tmp_path)


def test_a_file_system_without_locks_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lease.fcntl, "flock", no_locks)
    with pytest.raises(InputError, match=r"no locks .* mount it with lock support"):
        lease.Lease(tmp_path).__enter__()
