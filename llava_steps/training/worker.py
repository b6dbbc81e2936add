"""python -m llava_steps.training.worker JOB: one process of a training step.

Started by `launch`. On an error it writes a report and ends with the exit code of the error.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from llava_steps.core.errors import StepError, StoppedError, environment_error
from llava_steps.core.log import ignore_known_warnings, logger
from llava_steps.core.process import die_with_parent
from llava_steps.launch.job import Failure, Job
from llava_steps.launch.stop import StopRequest
from llava_steps.launch.watchdog import Beat


def follow_launcher() -> None:
    """Have the kernel kill this process when its launcher dies, for whatever reason.

    Otherwise it would train beside the attempt that takes over its store entry.
    """
    die_with_parent()
    if os.getppid() != int(os.environ["LLAVA_STEPS_LAUNCHER"]):
        sys.exit("the launcher has already ended")


def leave_if_asked(stop: StopRequest) -> None:
    """StoppedError after a stop signal. Only before ranks connect: later they agree on a step.

    Called before the model is built, which takes longer than some clusters wait.
    """
    if stop.signalled:
        raise StoppedError("stopped by a signal while the workers started; run again")


def main() -> int:
    """Run one rank of the job in argv[1]; returns the exit code."""
    stop = StopRequest()
    follow_launcher()
    ignore_known_warnings()
    job = Job.read(Path(sys.argv[1]))
    stop.limit(job.stage.exit_before, int(os.environ["LLAVA_STEPS_LAUNCHER"]))
    rank = int(os.environ["RANK"])
    beat = Beat(rank, job.work / "logs")
    log = logger(f"train[{rank}]", job.work / "logs" / f"rank-{rank:04d}.log")
    if rank:
        log.setLevel(logging.WARNING)
    try:
        leave_if_asked(stop)
        from llava_steps.model import cpu_shim

        cpu_shim.import_megatron()
        from llava_steps.training import loop, parallel

        leave_if_asked(stop)
        with parallel.processes(job.stage):
            loop.train(job, log, stop, beat)
    except StepError as error:
        Failure(rank, error.exit_code, str(error)).write(job.work)
        return error.exit_code
    except Exception as error:
        known = environment_error(error)
        if known is not None:
            Failure(rank, known.exit_code, str(known)).write(job.work)
            return known.exit_code
        traceback.print_exc()
        log.error("%s", traceback.format_exc())
        Failure(rank, 1, f"{type(error).__name__}: {error}").write(job.work)
        return 1
    return 0


if __name__ == "__main__":
    # Threads of a broken collective may never end: exit without waiting for them.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
