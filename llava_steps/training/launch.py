"""Start the worker processes of this node, and end them together.

A worker is `python -m llava_steps.training.worker JOB` with RANK, LOCAL_RANK and WORLD_SIZE in its
environment. Signals that ask us to stop are passed on, so that the workers save first; when one
worker fails the others are ended, and the first failure decides the exit code. Workers die with
the launcher, also when it is killed (see `worker.follow_launcher`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from llava_steps.core import errors
from llava_steps.core.errors import ConfigError, StepError
from llava_steps.training.job import Failure, Job

GRACE = 10.0
"""Seconds that workers get to end by themselves after one of them failed."""
POLL = 0.05
_BY_CODE = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, StepError)
}


def launch(job: Job) -> None:
    """Run the job's workers to their end; raises the StepError of the first failure."""
    stage = job.stage
    if stage.nodes > 1:
        raise ConfigError(
            f"--node {stage.nodes}: training over several nodes is not there yet; use one node"
        )
    (job.work / Failure.FILE).unlink(missing_ok=True)
    path = job.write()
    with tempfile.TemporaryDirectory(prefix="llava-steps-") as rendezvous:
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "llava_steps.training.worker", str(path)],
                env=_environment(stage.gpus, rank, Path(rendezvous, "store")),
            )
            for rank in range(stage.gpus)
        ]
        with _Forward(workers):
            codes = _wait(workers)
    if any(codes):
        raise _error(job.work, codes)


def _environment(processes: int, rank: int, rendezvous: Path) -> Mapping[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "LLAVA_STEPS_RENDEZVOUS": str(rendezvous),
        "LLAVA_STEPS_LAUNCHER": str(os.getpid()),
    }
    # What the user's environment says about threads and the hub wins over our choice.
    chosen = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    return chosen | dict(os.environ) | own


def _wait(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all workers; once one has failed the others are ended."""
    deadline: float | None = None
    # Polled in a list: a generator would stop at the first that lives and never see the dead.
    while None in [worker.poll() for worker in workers]:
        if deadline is None and any(worker.returncode for worker in workers):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(POLL)
    return [worker.returncode for worker in workers]


def _error(work: Path, codes: list[int]) -> StepError:
    failure = Failure.read(work)
    if failure is not None:
        kind = _BY_CODE.get(failure.exit_code, StepError)
        return kind(f"rank {failure.rank}: {failure.message}")
    rank, code = next((r, c) for r, c in enumerate(codes) if c)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return StepError(
        f"rank {rank} {how} without a report; run again to go on from the last checkpoint"
    )


class _Forward:
    """While it lasts, SIGTERM, SIGINT and SIGUSR1 go to the workers instead of ending us."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, workers: list[subprocess.Popen[bytes]]) -> None:
        self._workers = workers

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._pass_on) for s in self.SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
