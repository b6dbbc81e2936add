"""Disturb stage 2 in mid-training: its weights must be those of the run that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tests.cluster.checks import check_secrets_travel
from tests.cluster.machine import sh, tasks_of, until
from tests.cluster.project import Project

Run: TypeAlias = "subprocess.Popen[bytes]"


def requeue(project: Project, process: Run) -> Run:
    """Slurm takes the job off its nodes and runs it again."""
    job = project.job()
    sh("scontrol", "requeue", job)
    until("the job to wait", lambda: "PENDING" in sh("squeue", "-h", "-j", job, "-o", "%T"))
    time.sleep(3)  # Slurm takes no new start time at once
    sh("scontrol", "update", f"JobId={job}", "StartTime=now")
    return process


def time_limit(project: Project, process: Run) -> Run:
    """The job's time is over, its signal comes before."""
    job = project.job()
    # Slurm looks at limits once in a while: the training must not end before. A worker that is
    # stopped keeps all others waiting; Slurm lets it go on when it sends its signal.
    worker = until("a worker", lambda: tasks_of(job, 1, b"training.worker"))[0]
    os.kill(worker, signal.SIGSTOP)
    minutes = int(sh("squeue", "-h", "-j", job, "-o", "%M").split(":")[-2]) + 2
    sh("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    until("the signal before the time limit", lambda: not is_stopped(worker))
    return process


def is_stopped(pid: int) -> bool:
    """Whether a process is alive and stopped by a signal."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def killed_step(project: Project, process: Run) -> Run:
    """All processes of the job's step on its second node are killed."""
    for pid in tasks_of(project.job(), 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process


def killed_controller(project: Project, process: Run) -> Run:
    """snakemake is killed, and started again while its job runs on."""
    job = project.job()
    # Held by one of its workers: the job must not end before the new snakemake has found it.
    worker = until("a worker", lambda: tasks_of(job, 1, b"training.worker"))[0]
    os.kill(worker, signal.SIGSTOP)
    process.kill()
    process.wait()
    again = project.start("stage2_checkpoint")
    waits = f"waiting for Slurm job {job}, which computes stage2_checkpoint"
    until("the new one to wait", lambda: waits in project.log() or again.poll() is not None)
    os.kill(worker, signal.SIGCONT)
    return again


WAYS: tuple[Callable[[Project, Run], Run], ...] = (
    requeue, time_limit, killed_step, killed_controller,
)  # fmt: skip


def disturbed(project: Project, how: Callable[[Project, Run], Run]) -> dict[str, Any]:
    """Train stage 2 again, disturb it, and compare."""
    wanted = project.undisturbed()
    began = time.monotonic()
    project.forget_stage2()
    process = project.start("stage2_checkpoint")
    until(
        "some steps of stage 2",
        lambda: project.steps() >= 8 or process.poll() is not None,
    )
    assert process.poll() is None, project.logs()
    at = project.steps()
    check_secrets_travel(project.job())
    project.end(how(project, process))
    found = project.manifest("stage2_checkpoint")
    assert found["content"] == wanted, f"{how.__name__}: other weights"
    # A run that goes on after its controller was killed is the only one that needs no second try.
    assert (found["attempts"] > 1) == (how is not killed_controller), found["attempts"]
    writers = one_writer(project.entry())
    return {
        "seconds": round(time.monotonic() - began),
        "at_step": at,
        "attempts": found["attempts"],
        "writers": writers,
    }


def one_writer(entry: Path) -> list[str]:
    """What the lease log tells: never two at a time. Returns its events."""
    log = (entry / ".work/lease.log").read_text()
    events = [json.loads(line) for line in log.splitlines()]
    holder = None
    for event in events:
        who = (event["pid"], event["started"])
        if event["event"] == "given back":
            assert who == holder, events
            holder = None
        else:
            # Taken over from a holder whose process was gone, as the kernel said.
            assert (holder is None) == (event["event"] == "taken"), events
            holder = who
    assert holder is None and events, events
    return [event["event"] for event in events]
