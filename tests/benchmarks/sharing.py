"""Start two runs of different names together: both end well, and shared steps are computed once.

    python -m tests.benchmarks.sharing --rounds 10

Stub steps, real workflow, real store, which is empty at the start of each round. In every second
round the two runs have different settings of stage 2, and the run that is at work in a random
shared step is killed with all its processes. The other one must take over, and the killed one must
find all shared values when it is started again. The last line is JSON; the exit code is 1 when a
round did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.helpers.patience import PATIENCE, wait_for
from tests.workflow.project import Project, make_project

SHARED = {
    "demo_assets": 1, "tar_shards": 1, "energon_dataset": 1, "hf_model": 1,
    "megatron_checkpoint": 1, "stage1_audit": 1, "stage2_audit": 1, "stage1_checkpoint": 1,
}  # fmt: skip
"""Steps that both runs share -> how often they are computed."""
AFTER = {"hf_export": 1, "stage2_checkpoint": 1, "evaluation": 1}
"""Steps that follow the setting in which two runs may differ."""
OTHERS = {"hf_export": 1, "report": 2}
"""The export of stage 1, which both share, and the report, which each has of its own."""


class Started:
    """A run that was started, in a process group of its own."""

    def __init__(self, project: Project, name: str, *options: str) -> None:
        self.log = project.root / f"{name}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snakemake", "--cores", "2", *options],
                cwd=project.root, env=project.env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def end(self) -> None:
        """Wait for the end of the run.

        Raises:
            AssertionError: its exit code is not 0.
        """
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()

    def kill(self) -> None:
        """Kill the run with all its steps."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(project: Project, differ: bool) -> list[Started]:
    """Two runs, started within a second."""
    other = "run: b\n" + ("stage2: {lr: 2.0e-3}\n" if differ else "")
    overlay = project.overlay(other, "b.yaml")
    return [
        Started(project, "a", "--config", "run=a"),
        Started(project, "b", "--configfile", overlay),
    ]


def expected(differ: bool) -> Counter[str]:
    """How often each step is computed."""
    return Counter(SHARED) + Counter(OTHERS) + Counter(AFTER) + Counter(AFTER if differ else {})


def computed(project: Project) -> Counter[str]:
    """How often each step was begun."""
    return Counter(call["step"] for call in project.calls())


def together(project: Project, differ: bool = False) -> None:
    """Both runs end with 0, and each shared step is computed once."""
    for run in start(project, differ):
        run.end()
    assert computed(project) == expected(differ), (computed(project), expected(differ))


def writer(project: Project, step: str, runs: list[Started]) -> Started:
    """The run whose process computes the step."""
    (lease,) = project.root.glob(f"store/{step}/*/.work/lease.json")
    group = os.getpgid(json.loads(lease.read_text())["pid"])
    return next(run for run in runs if run.process.pid == group)


def taken_over(project: Project) -> Counter[str]:
    """How often the writer of each step died."""
    steps: list[str] = []
    for log in project.root.glob("store/*/*/.work/lease.log"):
        events = [json.loads(row)["event"] for row in log.read_text().splitlines()]
        steps += [log.parts[-4]] * events.count("taken over")
    return Counter(steps)


def killed(project: Project, step: str) -> None:
    """The run that computes `step` is killed: the other one takes over, then both are whole."""
    hold = project.root / f"hold-{step}"
    hold.touch()
    runs = start(project, differ=True)
    wait_for(lambda: step in computed(project), runs[0].process)
    dead = writer(project, step, runs)
    (other,) = (run for run in runs if run is not dead)
    what = f"{step} "
    wait_for(lambda: f"INFO {what}" in other.log.read_text(), other.process)
    dead.kill()
    hold.unlink()
    other.end()
    again = [Started(project, "a", "--config", "run=a"),
             Started(project, "b", "--configfile", "b.yaml")]  # fmt: skip
    for run in again:
        run.end()
    # The dead run may have been at work in a second step beside this one.
    lost, twice = taken_over(project), computed(project) - expected(differ=True)
    assert twice[step] == 1 and twice <= lost, (step, twice, lost)
    assert not expected(differ=True) - computed(project)


def held(number: int, choice: random.Random) -> bool:
    """Whether a round went as promised."""
    begun = time.monotonic()
    step = choice.choice([*SHARED]) if number % 2 else ""
    with tempfile.TemporaryDirectory(prefix="sharing-") as folder:
        project = make_project(Path(folder, "project"))
        try:
            killed(project, step) if step else together(project)
            good = True
        except AssertionError as error:
            print(error, file=sys.stderr)
            good = False
    what = f"killed in {step}" if step else "undisturbed"
    state = "held" if good else "did not hold"
    print(f"round {number + 1}, {what}: {state}, {time.monotonic() - begun:.0f} s", flush=True)
    return good


def main() -> int:
    """Run all rounds; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choice = random.Random(args.seed)
    good = sum(held(number, choice) for number in range(args.rounds))
    print(json.dumps({"rounds": args.rounds, "held": good}))
    return int(good < args.rounds)


if __name__ == "__main__":
    sys.exit(main())
