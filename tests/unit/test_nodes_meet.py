"""Launchers that meet: who is who, who is refused, who is told what, and who is missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_steps.core.errors import ConfigError, DivergedError, LockedError, StepError, StoppedError
from llava_steps.launch import group as launchers
from llava_steps.launch import rendezvous
from llava_steps.launch.group import LauncherGroup, LostError
from llava_steps.launch.launcher import Launcher, this_launcher
from llava_steps.settings.stage.stage import Stage
from llava_steps.store.lease import Lease

STAGE = Stage(nodes=2, gpus=2, global_batch_size=4, master_addr="127.0.0.1")
SRUN = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({}, Launcher(1, 2, 2, 2)),
        # The script of a job, and a step of one task, are no launchers of several.
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "0"}, Launcher(1, 2, 2, 2)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launcher(1, 2, 2, 2)),
        (
            SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            Launcher(0, 2, 0, 2, 0, "9.0"),
        ),
        (
            SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
            Launcher(3, 4, 3, 1, 1, "9.0"),
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"},
            Launcher(2, 4, 2, 1, 0, "torchrun x"),
        ),
    ],
)
def test_launchers(env: dict[str, str], launcher: Launcher) -> None:
    assert this_launcher(STAGE.model_copy(update={"rank": 1}), env) == launcher


def test_what_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rank 2"):
        this_launcher(STAGE.model_copy(update={"rank": 2}), {})
    tasks = SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with pytest.raises(ConfigError, match="srun starts 3 tasks"):
        this_launcher(STAGE, tasks)


def launcher(index: int, count: int = 2, launch: str = "") -> Launcher:
    return Launcher(index, count, 2 * index, 2, launch=launch)


def aside(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run in a thread; the returned call gives its result or raises its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(60)
        assert found, "still at it"
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    return result


def pair(work: Path) -> tuple[LauncherGroup, LauncherGroup]:
    """Lead and second launcher, met."""
    work.mkdir(exist_ok=True)
    second = aside(lambda: rendezvous.meet(STAGE, launcher(1), work))
    lead = rendezvous.meet(STAGE, launcher(0), work)
    assert lead is not None
    return lead, second()


def failure(group: LauncherGroup) -> StepError:
    end = time.monotonic() + 30
    while (error := group.others_failed()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return error


def test_they_meet_and_end_together(tmp_path: Path) -> None:
    lead, second = pair(tmp_path / ".work")
    assert (second.address, second.port) == ("127.0.0.1", lead.port) and lead.socket is not None
    assert not (tmp_path / ".work" / rendezvous.NOTE).exists(), (
        "the key is gone with the need for it"
    )
    waiting = aside(second.done)
    with lead:
        lead.done()
    waiting()
    assert lead.others_failed() is None and second.others_failed() is None


def test_the_note_is_for_its_owner_alone(tmp_path: Path) -> None:
    seen: list[int] = []

    def look() -> None:
        while not (tmp_path / rendezvous.NOTE).exists():
            time.sleep(0.005)
        seen.append((tmp_path / rendezvous.NOTE).stat().st_mode & 0o777)
        rendezvous.meet(STAGE, launcher(1), tmp_path)

    other = aside(look)
    rendezvous.meet(STAGE, launcher(0), tmp_path)
    other()
    assert seen == [0o600]


@pytest.mark.parametrize("leader_fails", [True, False])
def test_a_failure_is_told_with_its_kind(tmp_path: Path, leader_fails: bool) -> None:
    lead, second = pair(tmp_path)
    failing, other = (lead, second) if leader_fails else (second, lead)
    with pytest.raises(DivergedError), failing:
        raise DivergedError("rank 3: loss nan")
    error = failure(other)
    assert isinstance(error, DivergedError) and "rank 3: loss nan" in str(error)
    with pytest.raises(DivergedError):
        other.done()


def test_a_stop_is_told_as_one(tmp_path: Path) -> None:
    lead, second = pair(tmp_path)
    second.report(StoppedError("stopped by SIGTERM"))
    second.report(StepError("a consequence"))
    assert isinstance(failure(lead), StoppedError)


KILLED = """
import sys, time
from pathlib import Path
from llava_steps.settings.stage.stage import Stage
from llava_steps.store.lease import Lease
from llava_steps.launch import rendezvous
from llava_steps.launch.launcher import Launcher
stage = Stage(nodes=2, gpus=2, global_batch_size=4, master_addr="127.0.0.1")
group = rendezvous.meet(stage, Launcher(1, 2, 2, 2), Path(sys.argv[1]))
print("met", flush=True)
time.sleep(600)
"""


def test_one_that_is_killed_is_missed(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": root}
    )
    lead = rendezvous.meet(STAGE, launcher(0), tmp_path)
    assert lead is not None and lead.others_failed() is None
    process.kill()
    process.wait()
    error = failure(lead)
    assert isinstance(error, LostError) and "node 1" in str(error) and "is gone" in str(error)


def test_one_that_falls_silent_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a machine is lost: nothing is closed, nothing comes."""
    monkeypatch.setattr(launchers, "BEAT", 600.0)  # of both: nobody gives a sign of life
    monkeypatch.setattr(launchers, "LOST", 0.5)
    real = launchers.Connection.poll
    monkeypatch.setattr(launchers.Connection, "poll", lambda self, _=0.0: real(self, 0.05))
    lead, second = pair(tmp_path)
    assert isinstance(failure(lead), LostError) and isinstance(failure(second), LostError)


def test_a_second_of_the_same_number_is_refused(tmp_path: Path) -> None:
    three = STAGE.model_copy(update={"nodes": 3})
    lead = aside(lambda: rendezvous.meet(three, launcher(0, 3), tmp_path))
    first = aside(lambda: rendezvous.meet(three, launcher(1, 3), tmp_path))
    end = time.monotonic() + 30
    while True:  # whichever of the two comes second
        again = aside(lambda: rendezvous.meet(three, launcher(1, 3), tmp_path))
        try:
            time.sleep(0.5)
            third = aside(lambda: rendezvous.meet(three, launcher(2, 3), tmp_path))
            results = []
            for call in (first, again):
                try:
                    results.append(call())
                except LockedError as error:
                    results.append(error)
            break
        finally:
            assert time.monotonic() < end + 60
    assert lead() is not None and third() is not None
    refused = [result for result in results if isinstance(result, LockedError)]
    assert len(refused) == 1 and "launcher 1 is already connected" in str(refused[0])


def test_one_of_another_job_is_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MEET", 3.0)
    other = aside(lambda: rendezvous.meet(STAGE, launcher(1, launch="8.0"), tmp_path))
    with pytest.raises(StepError, match=r"launchers \[1\] did not connect"):
        rendezvous.meet(STAGE, launcher(0, launch="9.0"), tmp_path)
    with pytest.raises(StepError, match="the first node did not connect"):
        other()


def test_a_stranger_and_an_old_note_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / rendezvous.NOTE).write_text(
        json.dumps({"address": "127.0.0.1", "port": 9, "key": "00"})
    )
    second = aside(lambda: rendezvous.meet(STAGE, launcher(1), tmp_path))
    lead = aside(lambda: rendezvous.meet(STAGE, launcher(0), tmp_path))
    assert lead() is not None and second() is not None


def test_a_value_that_is_sealed_meanwhile_needs_nobody(tmp_path: Path) -> None:
    work = tmp_path / ".work"
    work.mkdir()
    waiting = aside(lambda: rendezvous.meet(STAGE, launcher(1), work))
    (tmp_path / "manifest.json").write_text("{}")
    assert waiting() is None


def test_a_value_that_was_sealed_already_needs_nobody(tmp_path: Path) -> None:
    work = tmp_path / ".work"
    work.mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    assert rendezvous.meet(STAGE, launcher(1), work) is None


def test_a_value_that_is_to_be_replaced_is_waited_for(tmp_path: Path) -> None:
    work = tmp_path / ".work"
    work.mkdir()
    sealed = tmp_path / "manifest.json"
    sealed.write_text("{}")
    second = aside(lambda: rendezvous.meet(STAGE, launcher(1), work, again=True))
    time.sleep(0.2)
    sealed.unlink()  # what the lead does first
    lead = aside(lambda: rendezvous.meet(STAGE, launcher(0), work))
    assert lead() is not None and second() is not None


def test_while_another_run_computes_the_value_the_time_to_meet_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "MEET", 1.0)
    monkeypatch.setattr(rendezvous, "SOON", 0.1)
    holders: list[str] = []
    work = tmp_path / ".work"
    work.mkdir()
    with Lease(work):
        joined = aside(lambda: rendezvous.meet(STAGE, launcher(1), work, False, holders.append))
        time.sleep(3.0)
        (tmp_path / "manifest.json").write_text("{}")
        assert joined() is None
    assert {holder.partition(" on ")[0] for holder in holders} == {f"process {os.getpid()}"}


def test_a_damaged_note_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / rendezvous.NOTE).write_text("{")
    second = aside(lambda: rendezvous.meet(STAGE, launcher(1), tmp_path))
    lead = aside(lambda: rendezvous.meet(STAGE, launcher(0), tmp_path))
    assert lead() is not None and second() is not None
