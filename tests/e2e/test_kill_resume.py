"""SIGKILL of everything at a random moment of stage 2, then the same command again.

The resumed training must be the uninterrupted one, bit for bit: losses (as hex floats), sample ids
and final weights. A training is killed up to five times before it is left alone. LLAVA_STEPS_KILLS
sets how many kills there are; the moments come from LLAVA_STEPS_KILL_SEED.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.helpers.chain import ROOT, environment, metrics, sample_ids
from tests.helpers.patience import PATIENCE

KILLS = int(os.environ.get("LLAVA_STEPS_KILLS", "10"))
SEED = int(os.environ.get("LLAVA_STEPS_KILL_SEED", "20240607"))
STEPS, INTERVAL, TOGETHER = 25, 5, 5
OVERLAY = {
    "demo_assets": {
        "pretrain_vision_steps": 0, "pretrain_text_steps": 0, "text_layers": 2, "vision_layers": 2,
    },
    "stage1": {"train_steps": 2, "warmup_steps": 0, "save_interval": 1000},
    "stage2": {
        "train_steps": STEPS, "warmup_steps": 4, "save_interval": INTERVAL,
        "global_batch_size": 16, "micro_batch_size": 8,
    },
}  # fmt: skip


@dataclass
class Run:
    """A checkout's workflow in a directory of its own."""

    root: Path

    def command(self, target: str) -> list[str]:
        line = f"-m snakemake {target} --cores 2 --configfile overlay.yaml --quiet rules"
        return [sys.executable, *line.split()]

    def start(self, target: str = "stage2_checkpoint") -> subprocess.Popen[bytes]:
        """Start snakemake as the leader of a process group of its own."""
        log = (self.root / "log.txt").open("ab")
        return subprocess.Popen(
            self.command(target), cwd=self.root, env=environment(), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, target: str = "stage2_checkpoint") -> None:
        process = self.start(target)
        assert process.wait(timeout=PATIENCE) == 0, (self.root / "log.txt").read_text()[-5000:]

    @property
    def out(self) -> Path:
        return self.root / "results/demo/stage2_checkpoint"

    def done(self) -> bool:
        """Whether the training is sealed."""
        return (self.out / "manifest.json").exists()

    def steps(self) -> int:
        """Steps that the training has reported; the link to it may be made anew at this moment."""
        try:
            return (self.out / "work/metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def wait_for_steps(self, count: int) -> None:
        """Until the running training has reported more than `count` steps."""
        end = time.monotonic() + PATIENCE
        while self.steps() <= count and not self.done():
            assert time.monotonic() < end, (self.root / "log.txt").read_text()[-5000:]
            time.sleep(0.01)

    def forget_stage2(self) -> None:
        """As before stage 2: no store entry, no result."""
        shutil.rmtree(self.root / "store/stage2_checkpoint")
        shutil.rmtree(self.out)

    def value(self) -> tuple[list[str], list[list[str]], dict[str, bytes]]:
        """(losses, sample ids, payload bytes of the final checkpoint)"""
        files = {
            path.relative_to(self.out).as_posix(): path.read_bytes()
            for path in sorted(self.out.glob("iter_*/**/*"))
            if path.is_file()
        }
        assert any(name.endswith(".distcp") for name in files)
        return [row["loss_hex"] for row in metrics(self.out)], sample_ids(self.out), files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("kill")
    for name in ("workflow", "config"):
        (root / name).symlink_to(ROOT / name)
    (root / "overlay.yaml").write_text(yaml.safe_dump(OVERLAY))
    return Run(root)


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def worker_ids(root: Path) -> list[int]:
    """Training workers below `root` that are still alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
            dead = (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"llava_steps.training.worker" in line and bytes(root) in line and not dead:
            found.append(int(path.name))
    return found


def wait_for_orphans(root: Path) -> None:
    """The group is dead at once; whoever had left it must follow long before it is done."""
    end = time.monotonic() + 30
    while orphans := worker_ids(root):
        assert time.monotonic() < end, f"workers {orphans} outlived their launcher"
        time.sleep(0.02)


def test_killed_training_is_the_uninterrupted_one(run: Run) -> None:
    run.finish("stage1_checkpoint")
    began = time.monotonic()
    run.finish()
    alone = time.monotonic() - began
    expected = run.value()
    assert len(expected[0]) == STEPS
    chooser = random.Random(SEED)
    kills = resumed = 0
    while kills < KILLS:
        run.forget_stage2()
        first = kills
        while kills < min(first + TOGETHER, KILLS) and not run.done():
            process = run.start()
            # Every other moment is spread over what stage 2 takes alone, start-up and sealing
            # included; the others follow a number of steps, so that however slow the machine is
            # some hit a save.
            if kills % 2:
                time.sleep(chooser.uniform(0.15, 1.0) * alone)
            else:
                saved = max(run.steps(), INTERVAL + 1)
                run.wait_for_steps(saved + chooser.randrange(STEPS // TOGETHER))
                time.sleep(chooser.uniform(0.0, 0.3))
            kill_everything(process)
            wait_for_orphans(run.root)
            resumed += bool(list(run.out.glob("work/iter_*/commit.json")))
            kills += 1
        run.finish()
        assert run.value() == expected, f"one of kills {first} to {kills - 1} changed the result"
        print(f"kills {first} to {kills - 1}: the result is that of the training left alone")
    assert KILLS < 8 or resumed > 1, "no kill hit a training that had saved something"
