"""Starts the worker processes of this node, and ends them together with those of other nodes.

A worker is `python -m llava_steps.training.worker JOB` with RANK, LOCAL_RANK and WORLD_SIZE in its
environment. Stop signals are passed on, so that the workers save first. When one worker fails the
others are ended, and the first failure decides the exit code. Workers end with the launcher, even
when it is killed (see `worker.follow_launcher`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from llava_steps.core.errors import BY_CODE, StepError
from llava_steps.core.stop_signals import handled_by, held_back
from llava_steps.launch.address import interface_environment
from llava_steps.launch.group import LauncherGroup, LostError
from llava_steps.launch.job import Failure, Job
from llava_steps.launch.launcher import Launcher
from llava_steps.launch.rendezvous import LISTENING, RENDEZVOUS
from llava_steps.launch.watchdog import BEATS, Watch
from llava_steps.settings.stage.stage import Stage

GRACE = 10.0
"""Seconds that workers have to end by themselves after one of them failed."""
HEAR = 3.0
"""Seconds until the loss of another node is noticed, if workers failed because of it."""
POLL = 0.05
SCRATCH = "llava-steps-"
LONGEST = 54
"""Bytes that the directory of the scratch directory may have: 21 for the scratch directory and 32
for multiprocessing's sockets in it make the 107 that the path of a socket can have."""


def launch(job: Job, group: LauncherGroup | None = None) -> None:
    """Run this launcher's workers to their end; raises the StepError of the job's first failure."""
    stage = job.stage
    group = group or LauncherGroup(Launcher(0, 1, 0, stage.gpus))
    launcher = group.launcher
    if launcher.count == 1:
        Failure.forget(job.work)
    path = job.write(launcher.index)
    forward = _Forward()
    with _scratch(job.work, launcher.index) as scratch, handled_by(forward.pass_on):
        # Signals wait until a worker handles them, instead of killing it.
        with held_back():
            workers = [
                forward.add(
                    subprocess.Popen(
                        [sys.executable, "-m", "llava_steps.training.worker", str(path)],
                        env=_environment(stage, group, number, scratch),
                        pass_fds=[] if group.socket is None or number else [group.socket.fileno()],
                    )
                )
                for number in range(launcher.workers)
            ]
        watch = Watch(scratch, workers, (stage.stall_timeout, stage.io_timeout), launcher.first)
        codes = _wait(workers, watch, job.work / "logs", group)
    if any(codes) or group.others_failed():
        raise _error(job.work, codes, group)


@contextlib.contextmanager
def _scratch(work: Path, launcher: int) -> Iterator[Path]:
    """Temporary directory of the launcher and its workers, removed afterwards.

    A killed launcher leaves it behind; the next attempt, which finds its name in `work`, removes
    it. It is not below `work` because sockets in it need a short path; it is in /tmp if
    the path of TMPDIR is too long.
    """
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > LONGEST:
        base = "/tmp"  # noqa: S108 (a new directory is made in it)
    note = work / (f"scratch-{launcher:04d}" if launcher else "scratch")
    if note.exists():
        left = Path(note.read_text())
        if left.name.startswith(SCRATCH) and left.parent == Path(base):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=base, ignore_cleanup_errors=True) as path:
        note.write_text(path)
        yield Path(path)
    note.unlink()


def _environment(
    stage: Stage, group: LauncherGroup, number: int, scratch: Path
) -> Mapping[str, str]:
    launcher = group.launcher
    threads = max(1, len(os.sched_getaffinity(0)) // stage.gpus)
    own = {
        "RANK": str(launcher.first + number),
        "LOCAL_RANK": str(_local_rank(launcher, number)),
        "WORLD_SIZE": str(stage.world_size),
        "LOCAL_WORLD_SIZE": str(stage.gpus),
        RENDEZVOUS: _rendezvous(stage, group, scratch),
        LISTENING: str(group.socket.fileno()) if group.socket is not None and not number else "",
        "LLAVA_STEPS_LAUNCHER": str(os.getpid()),
        # Workers end without cleaning up (see worker.py); this directory has their files.
        "TMPDIR": str(scratch),
        BEATS: str(scratch),
    }
    if stage.gpu_ids:
        own["CUDA_VISIBLE_DEVICES"] = stage.gpu_ids
    own |= interface_environment(stage.interface)
    if stage.debug:
        own |= {
            "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
            "TORCH_SHOW_CPP_STACKTRACES": "1",
            "NCCL_DEBUG": "INFO",
        }
    # The user's environment overrides these for threads and the hub.
    chosen = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Rows differ in length: memory of one size must be reusable for another.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    return chosen | dict(os.environ) | own


def _local_rank(launcher: Launcher, number: int) -> int:
    """Number of the worker on its node; 0 if a task has one GPU and sees no other."""
    alone = launcher.workers == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") == 0
    if alone and os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    return launcher.local + number


def _rendezvous(stage: Stage, group: LauncherGroup, scratch: Path) -> str:
    """URL where the processes meet: on the first node, at a configured port, or a file."""
    if group.port:
        return f"tcp://{group.address}:{group.port}"
    port = stage.rdzv_port or stage.master_port
    if port:
        return f"tcp://{stage.master_addr or '127.0.0.1'}:{port}"
    return f"file://{scratch / 'store'}"


def _wait(
    workers: list[subprocess.Popen[bytes]], watch: Watch, logs: Path, group: LauncherGroup
) -> list[int]:
    """Exit codes of all workers; once one has failed or hangs the others are ended.

    They are also ended when a launcher of another node reports a failure, or is lost.
    """
    deadline: float | None = None
    # Polled in a list: a generator would stop at the first running one and miss later ones.
    while None in [worker.poll() for worker in workers]:
        other = group.others_failed()
        if other is not None:
            group.report(other)
        if deadline is None and (other or any(worker.returncode for worker in workers)):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            _kill(workers)
        elif deadline is None and (rank := watch.stalled()) is not None:
            states = watch.dump(logs)
            _kill(workers)
            raise StepError(
                f"no progress for {watch.limit:g} s (stall_timeout, io_timeout); rank {rank} was "
                "the first to hang; run again to resume from the last checkpoint. Stacks are "
                f"in {logs}:\n{states}"
            )
        time.sleep(POLL)
    return [worker.returncode for worker in workers]


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _error(work: Path, codes: list[int], group: LauncherGroup) -> StepError:
    """Why the job failed: a lost node, else the first report, else the exit codes."""
    unclear = group.launcher.count > 1 and any(code == 1 or code < 0 for code in codes)
    until = time.monotonic() + (HEAR if unclear else 0.0)
    while not isinstance(other := group.others_failed(), LostError) and time.monotonic() < until:
        time.sleep(POLL)
    if isinstance(other, LostError):
        return other
    failure = Failure.read(work)
    if failure is not None:
        kind = BY_CODE.get(failure.exit_code, StepError)
        return kind(f"rank {failure.rank}: {failure.message}")
    if other is not None:
        return other
    rank, code = next((r, c) for r, c in enumerate(codes, group.launcher.first) if c)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    kind = BY_CODE.get(code, StepError)
    return kind(
        f"rank {rank} {how} without a report; see {work / 'logs'}, and run again to resume from "
        "the last checkpoint"
    )


class _Forward:
    """Passes stop signals on to the workers, instead of ending this process."""

    def __init__(self) -> None:
        self.asked = False
        self._workers: list[subprocess.Popen[bytes]] = []

    def add(self, worker: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Pass signals on to this worker too, including an earlier one."""
        self._workers.append(worker)
        if self.asked:
            worker.send_signal(signal.SIGTERM)
        return worker

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.asked = True
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
