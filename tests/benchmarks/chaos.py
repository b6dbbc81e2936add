"""python -m tests.benchmarks.chaos [--kills N] [--signals N]: a training that is never left alone.

Kills: SIGKILL to one rank, to the launcher or to the whole group, at random moments, every second
one inside a save. Signals: SIGTERM, SIGINT or SIGUSR1 at random moments, start-up included, and a
second one inside the save that follows; the step must end with exit code 75. After each the same
command is given again, and again disturbed, until the training is done. Losses (as hex floats),
sample ids and the bytes of the final checkpoint must be those of an undisturbed one.
The last line is JSON: {"kills", "signals", "identical", "rounds", "lost_steps_max", "wall_s"}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import chain
from tests.helpers.patience import PATIENCE

STEPS, INTERVAL = 45, 4
FLAGS = (
    "--stage=2", "--gpus=2", f"--train-steps={STEPS}", "--warmup-steps=3", "--lr=1e-3",
    "--global-batch-size=4", "--micro-batch-size=2", f"--save-interval={INTERVAL}",
    "--eval-interval=9", "--eval-samples=5",
)  # fmt: skip
LAYOUTS = (("--tp=2",), ("--pp=2",), ("--tp=1",))
STOPPED = 75


@dataclass
class Training:
    """One layout's training in a chain's directory."""

    made: chain.Chain
    name: str
    flags: tuple[str, ...]
    expected: object = None

    @property
    def out(self) -> Path:
        return self.made.root / "results" / self.name

    @property
    def entry(self) -> Path:
        return self.out / "work"

    def start(self) -> subprocess.Popen[bytes]:
        """The step, as the leader of a process group of its own."""
        line = [sys.executable, "-m", "llava_steps.train", *self.made.train_flags(self.name)]
        with (self.made.root / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(
                [*line, *FLAGS, *self.flags], cwd=self.made.root, env=chain.environment(),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def log(self) -> str:
        path = self.made.root / f"{self.name}.log"
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        """Steps that were reported so far."""
        try:
            return (self.entry / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:  # not there yet, or on its way from .work to its place
            return 0

    def saving(self) -> bool:
        """Whether a save is under way."""
        return any(self.entry.glob(".tmp-iter_*"))

    def value(self) -> object:
        """All that must not depend on what happened on the way."""
        files = {
            path.relative_to(self.out).as_posix(): path.read_bytes()
            for path in sorted(self.out.glob("iter_*/**/*"))
            if path.is_file()
        }
        rows = chain.metrics(self.out)
        losses = [(row["loss_hex"], row.get("val_loss"), row.get("val_accuracy")) for row in rows]
        return losses, chain.sample_ids(self.out), files

    def forget(self) -> None:
        """As before the training."""
        shutil.rmtree((self.out / "samples").resolve().parent)
        shutil.rmtree(self.out)

    def attempts(self) -> int:
        """Attempts that have said that they began."""
        return len(re.findall(r" attempt \d+ in ", self.log()))

    def resumed(self) -> list[int]:
        """The step that each attempt so far went on from, if it came that far."""
        found = re.findall(r"resuming after step (\d+)|starting from", self.log())
        return [int(step or 0) for step in found]


def wait(condition: object, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Until `condition()`; False when the process ends or the time is over."""
    end = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill(training: Training, chooser: random.Random, number: int) -> bool:
    """Disturb one attempt by SIGKILL; False when it was done first."""
    began = training.steps()
    process = training.start()
    if number % 2:
        wait(lambda: training.steps() > began, process, PATIENCE)
        wait(training.saving, process, PATIENCE)
        time.sleep(chooser.uniform(0.0, 0.05))
    else:
        wait(lambda: False, process, chooser.uniform(0.5, 9.0))
    target = ("rank", "launcher", "group")[number % 3]
    workers = children(process.pid)
    if target == "rank" and workers:
        os.kill(chooser.choice(workers), signal.SIGKILL)
    elif target == "launcher":
        process.kill()
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait(PATIENCE)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, f"workers {workers} outlived their launcher"
        time.sleep(0.01)
    print(f"kill {number}: {target}, {training.steps()} steps done, exit code {code}", flush=True)
    return not (training.out / "manifest.json").exists()


def stop(training: Training, chooser: random.Random, number: int) -> bool:
    """Disturb one attempt by signals; False when it was done first."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    known = training.attempts()
    process = training.start()
    if number % 2:
        target = training.steps() + chooser.randrange(2 * INTERVAL)
        wait(lambda: training.steps() > target, process, PATIENCE)
    else:
        # Not before the step has started: until then a signal has its usual meaning.
        wait(lambda: training.attempts() > known, process, PATIENCE)
        wait(lambda: False, process, chooser.uniform(0.0, 8.0))
    if process.poll() is None:
        process.send_signal(kinds[number % 3])
    if wait(training.saving, process, 30) and process.poll() is None:
        process.send_signal(chooser.choice(kinds))
    code = process.wait(PATIENCE)
    done = (training.out / "manifest.json").exists()
    print(f"signal {number}: {training.steps()} steps done, exit code {code}", flush=True)
    assert code == (0 if done else STOPPED), training.log()[-3000:]
    return not done


def trainings(made: chain.Chain) -> Iterator[Training]:
    """Trainings without end, the layouts in turn, each with its undisturbed value."""
    values: dict[str, object] = {}
    while True:
        for flags in LAYOUTS:
            training = Training(made, f"chaos{''.join(flags)}", flags)
            if training.name not in values:
                assert training.start().wait(PATIENCE) == 0, training.log()
                values[training.name] = training.value()
            training.forget()
            training.expected = values[training.name]
            yield training


def disturb(made: chain.Chain, kills: int, signals: int, seed: int) -> dict[str, object]:
    """All disturbances; returns the figures."""
    began, chooser, identical, rounds = time.monotonic(), random.Random(seed), 0, 0
    plan = [kill] * kills + [stop] * signals
    lost: list[int] = []
    number = 0
    for training in trainings(made):
        if number >= len(plan):
            break
        first, open_ = number, True
        while open_ and number < len(plan):
            before, known = training.steps(), len(training.resumed())
            open_ = plan[number](training, chooser, number)
            lost += [before - step for step in training.resumed()[known:]]
            number += 1
        if open_:
            assert training.start().wait(PATIENCE) == 0, training.log()[-3000:]
        same = training.value() == training.expected
        identical += (number - first) * same
        rounds += 1
        print(f"done after {number - first} disturbances: {'identical' if same else 'DIFFERENT'}")
    return {
        "kills": kills,
        "signals": signals,
        "identical": identical,
        "rounds": rounds,
        "lost_steps_max": max(lost, default=0),
        "wall_s": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=20240607)
    given = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        found = disturb(chain.make(room), given.kills, given.signals, given.seed)
    finally:
        shutil.rmtree(room)
    print(json.dumps(found))
    return found["identical"] != given.kills + given.signals


if __name__ == "__main__":
    sys.exit(main())
