"""Training over several nodes: launchers on this host, each with a worker of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.chain import Chain, environment, metrics, sample_ids
from tests.helpers.patience import PATIENCE, wait_for

FLAGS = (
    "--stage=2", "--tp=2", "--train-steps=6", "--warmup-steps=2", "--lr=1e-3",
    "--global-batch-size=4", "--micro-batch-size=2", "--save-interval=1000",
)  # fmt: skip
NODES = ("--gpus=1", "--node=2", "--master-addr=127.0.0.1")
LONG = ("--train-steps=5000", "--warmup-steps=2")
STARTED: list[subprocess.Popen[str]] = []


def start(
    chain: Chain, name: str, rank: int | None, *flags: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """One launcher of the training; with `rank` the number of its node."""
    line = [sys.executable, "-m", "llava_steps.train", *chain.train_flags(name), *FLAGS, *NODES]
    own = [] if rank is None else [f"--rank={rank}"]
    process = subprocess.Popen(
        [*line, *flags, *own], cwd=chain.root, env=environment() | (env or {}),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Launchers of a test that failed train no more; their workers die with them."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def steps(work: Path) -> int:
    """Steps that are done; the link to the entry may be made anew at this moment."""
    try:
        return len(metrics(work))
    except FileNotFoundError:
        return 0


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and log."""
    try:
        _, log = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(process.communicate()[1]) from None
    return process.returncode, log


def begun(work: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until some steps are done."""
    wait_for(lambda: any(p.poll() is not None for p in processes) or steps(work) > 2)
    assert not [p for p in processes if p.poll() is not None], [end(p) for p in processes]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def losses(out: Path) -> list[str]:
    return [row["loss_hex"] for row in metrics(out)]


@pytest.fixture(scope="module")
def whole(chain: Chain) -> Path:
    """The same training on one node."""
    return chain.train("node_one", *FLAGS, "--gpus=2", "--seed=21")


def test_two_nodes_train_what_one_does(chain: Chain, whole: Path) -> None:
    # The other one first: it waits for the lead.
    second = start(chain, "nodes", 1, "--seed=21")
    first = start(chain, "nodes", 0, "--seed=21")
    assert [end(p)[0] for p in (first, second)] == [0, 0]
    out = chain.root / "results/nodes"
    assert losses(out) == losses(whole) and sample_ids(out) == sample_ids(whole)
    assert json.loads((out / "manifest.json").read_text())["attempts"] == 1
    # Once more: both find it done.
    assert [end(start(chain, "nodes", rank, "--seed=21"))[0] for rank in (1, 0)] == [0, 0]


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_tasks_that_were_started_for_us_join(chain: Chain, whole: Path, starter: str) -> None:
    name = f"nodes_{starter}"
    if starter == "srun":  # what each of two tasks finds, on two nodes
        common = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        tasks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} for i in (0, 1)]
        started = [start(chain, name, None, "--seed=22", env=common | task) for task in tasks]
        assert [end(p)[0] for p in started] == [0, 0]
    else:
        flags = [*chain.train_flags(name), *FLAGS, "--gpus=2", "--seed=22"]
        line = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        run = subprocess.run(
            [sys.executable, "-m", *line, "llava_steps.train", *flags], cwd=chain.root,
            env=environment(), capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert sorted(losses(chain.root / "results" / name)) != sorted(losses(whole)), "another seed"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_launcher_ends_the_other_and_the_next_attempt_goes_on(
    chain: Chain, victim: int
) -> None:
    name = f"nodes_kill_{victim}"
    flags = (*LONG, f"--seed={30 + victim}", "--save-interval=2")
    pair = [start(chain, name, rank, *flags) for rank in (0, 1)]
    work = chain.root / "results" / name / "work"
    begun(work, pair)
    workers = [pid for process in pair for pid in workers_of(process)]
    pair[victim].kill()
    code, log = end(pair[1 - victim])
    assert code == 1 and f"node {victim}" in log and "is gone" in log, log
    end(pair[victim])
    wait_for(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])
    # The same command again resumes; a stop to the second node alone stops both, in order.
    done = steps(work)
    pair = [start(chain, name, rank, *flags) for rank in (0, 1)]
    wait_for(lambda: steps(work) > done + 2, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    codes = [end(process) for process in pair]
    assert [code for code, _ in codes] == [75, 75], codes
    assert any("resuming after step" in log for _, log in codes)
    assert not (work / ".work/nodes.json").exists()


def test_a_failure_of_one_node_is_that_of_all(chain: Chain) -> None:
    flags = (*LONG, "--seed=40")
    pair = [start(chain, "nodes_fail", rank, *flags) for rank in (0, 1)]
    begun(chain.root / "results/nodes_fail/work", pair)
    os.kill(workers_of(pair[1])[0], signal.SIGKILL)
    for code, log in [end(process) for process in pair]:
        assert code == 1, log


def test_two_runs_of_several_nodes_train_one_value_once(chain: Chain) -> None:
    runs = [[start(chain, name, rank, "--seed=41") for rank in (1, 0)] for name in ("both", "too")]
    ends = [end(process) for run in runs for process in run]
    assert [code for code, _ in ends] == [0] * 4, ends
    assert sum("is up to date; nothing to compute" in log for _, log in ends) == 1
    first, second = (chain.root / "results" / name / "manifest.json" for name in ("both", "too"))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text())["attempts"] == 1
