"""python -m tests.cluster.drive: the tiny chain on a real Slurm, in a real Apptainer container.

Installs both on this Debian machine, as root, builds environments/cpu.def, runs `snakemake
--profile slurm all` with stage 1 on one node and stage 2 on two, looks at the result, and disturbs
stage 2 --rounds times in each way: the weights must be those of the undisturbed run. Ends with one
line of JSON; nothing is left running. Where no cluster can be made it says so, and ends well.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tests.cluster.checks import check_doctor, check_result, check_shares, secrets_found
from tests.cluster.disturb import WAYS, disturbed
from tests.cluster.machine import SLURM_CONF, left_running, missing, sh
from tests.cluster.project import SECRETS, Project

HERE = Path(__file__).resolve().parent
PLACE = Path("/tmp/llava-steps-cluster")


def stop(number: int, _: object) -> NoReturn:
    """A signal ends the run in order, with the cluster taken down."""
    signal.alarm(0)
    why = "not done within --minutes" if number == signal.SIGALRM else signal.Signals(number).name
    raise AssertionError(why)


def skip(why: str) -> NoReturn:
    """End well, and say why there is no cluster."""
    print(f"test-cluster is skipped: {why}", file=sys.stderr)
    print(json.dumps({"skipped": why}))
    sys.exit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="disturbances of each kind")
    parser.add_argument("--ways", nargs="*", choices=[way.__name__ for way in WAYS])
    parser.add_argument("--minutes", type=float, default=27, help="a run that takes longer fails")
    parser.add_argument("--image", type=Path, help="use this image instead of building it")
    parser.add_argument("--go-on", action="store_true", help=f"use what --keep left in {PLACE}")
    parser.add_argument("--keep", action="store_true", help=f"leave {PLACE} behind")
    arguments = parser.parse_args()
    state = Path(os.environ.setdefault("STATE", "/var/lib/llava-steps-cluster"))
    if why := missing(state):
        skip(why)
    lock = open(f"{state}.lock", "w")  # noqa: SIM115  held to the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        skip("another run of this test has its cluster on this machine")
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.alarm(round(60 * arguments.minutes))
    os.environ |= SECRETS | {"SLURM_CONF": str(SLURM_CONF), "PYTHON": sys.executable}
    # Bytecode is kept: each of the many processes would compile all it imports anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.monotonic()
    report: dict[str, Any] = {"ok": False}
    project = Project(PLACE)

    @contextlib.contextmanager
    def lap(name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        report[f"{name}_s"] = round(time.monotonic() - start)
        print(f"{name}: {report[f'{name}_s']} s", file=sys.stderr, flush=True)

    try:
        if not arguments.go_on:
            project.copy()
        with lap("apptainer"):
            sh(HERE / "apptainer.sh")
        with lap("slurm"):
            sh(HERE / "slurm.sh", "up")
        with lap("image"):
            if arguments.image:
                shutil.copy(arguments.image, project.image)
            elif not project.image.exists():
                sh(HERE / "build_image.sh", project.image)
        with lap("chain"):
            project.end(project.start("all"))
            if not arguments.go_on:
                check_result(project)
        if not arguments.go_on:
            with lap("shares"):
                check_shares(project)
        with lap("doctor"):
            check_doctor(project)
        for how in WAYS:
            if arguments.ways is None or how.__name__ in arguments.ways:
                with lap(how.__name__):
                    rounds = [disturbed(project, how) for _ in range(arguments.rounds)]
                report[how.__name__] = rounds
        with lap("secrets"):
            report["secrets_planted"] = len(SECRETS)
            report["secrets_found"] = secrets_found(project, state)
            assert not report["secrets_found"], report["secrets_found"]
        report["ok"] = True
    except Exception as error:
        if not isinstance(error, AssertionError | subprocess.SubprocessError | OSError):
            traceback.print_exc()
        message = str(error) or repr(error)
        print(message[-9000:], file=sys.stderr)
        report["error"] = message[:300]
    finally:
        signal.alarm(0)
        if project.running is not None and project.running.poll() is None:
            os.killpg(project.running.pid, signal.SIGKILL)
        sh(HERE / "slurm.sh", "down", check=False)
        left = left_running(PLACE, state)
        if left:
            report |= {"ok": False, "still_running": [line[:200] for line in left]}
        if not arguments.keep and report["ok"]:
            shutil.rmtree(PLACE, ignore_errors=True)
    report["seconds"] = round(time.monotonic() - began)
    print(json.dumps(report))
    sys.exit(not report["ok"])


if __name__ == "__main__":
    main()
