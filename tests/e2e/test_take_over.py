"""Two runs that train the same value: the second waits for the first, or takes over from it."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.chain import Chain, environment, metrics
from tests.helpers.patience import PATIENCE, wait_for

FLAGS = (
    "--stage=2", "--train-steps=40", "--warmup-steps=2", "--lr=1e-3", "--global-batch-size=4",
    "--micro-batch-size=2", "--save-interval=2", "--seed=51",
)  # fmt: skip


def start(chain: Chain, name: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "llava_steps.train", *chain.train_flags(name), *FLAGS]
    return subprocess.Popen(
        line, cwd=chain.root, env=environment(), stderr=subprocess.PIPE, text=True
    )


def steps(chain: Chain, name: str) -> int:
    work = chain.root / "results" / name / "work"
    try:
        return len(metrics(work))
    except FileNotFoundError:
        return 0


def test_a_run_takes_over_the_training_of_one_that_is_killed(chain: Chain) -> None:
    first = start(chain, "wait_first")
    wait_for(lambda: steps(chain, "wait_first") > 4, first)
    second = start(chain, "wait_second")
    assert second.stderr is not None
    wait_for(
        lambda: f"is being computed by process {first.pid}" in second.stderr.readline(), second
    )
    first.kill()
    first.communicate()
    _, log = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0 and "resuming after step" in log, log
    taken = [row["loss_hex"] for row in metrics(chain.root / "results/wait_second")]
    again = start(chain, "wait_first")
    _, log = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0 and "is up to date; nothing to compute" in log, log
    alone = chain.train("wait_alone", *FLAGS, "--force")
    assert [row["loss_hex"] for row in metrics(alone)] == taken and len(taken) == 40
