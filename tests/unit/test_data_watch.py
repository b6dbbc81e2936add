"""Loader workers that die or hang: an error that names what they held, never a wait for ever."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_steps.core.errors import StepError
from llava_steps.data import pool
from llava_steps.data.energon.reader import RawSample
from llava_steps.data.loader import loader as loader_module
from llava_steps.data.loader.corpus import SampleRef
from llava_steps.data.loader.feed import Feed
from llava_steps.data.loader.row_builder import RowBuilder
from llava_steps.data.loader.workers import Task, Workers, _Worker
from tests.helpers.data_fixtures import make_energon, make_hf_dir, train_loader
from tests.helpers.patience import wait_for

server = forkserver._forkserver  # type: ignore[attr-defined]
STUCK = 3
"""Index of the sample that takes for ever. Key and index are the same in this dataset."""


class Stuck(RowBuilder):
    """What a worker looks like from outside whose storage has gone away."""

    def _encode(self, ref: SampleRef, raw: RawSample) -> Any:
        if ref.index == STUCK:
            time.sleep(1000)
        return super()._encode(ref, raw)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many that no worker comes to the second epoch while another is stuck in the first."""
    return make_energon(tmp_path_factory.mktemp("ds") / "energon", 96, 7)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "hangs"])
def test_the_sample_that_a_lost_worker_held_is_named(
    dataset: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch, how: str, packing: bool
) -> None:
    feeds: list[Feed] = []
    start = Feed.start
    monkeypatch.setattr(loader_module, "RowBuilder", Stuck)
    monkeypatch.setattr(Feed, "start", lambda feed: (feeds.append(feed), start(feed)))
    loader = train_loader(dataset, hf_dir, num_workers=2, packing=packing, patience=600)
    steps = iter(loader)
    # The first step starts the workers; the stuck sample is not in it.
    corpus = loader._builder.corpus
    stuck = next(p for p in range(96) if corpus[p].index == STUCK)
    assert 8 <= stuck < 24, "choose another seed"
    next(steps)
    workers = feeds[0]._workers
    board = workers._board

    def holders() -> list[int]:
        return [n for n in range(2) if board[2 * n + 1] == stuck]

    for _ in range(stuck // 8 - 1):
        next(steps)
    wait_for(holders)
    process = workers.workers[holders()[0]].process
    if how == "hangs":
        workers._patience = 2.0
    elif how == "SIGSTOP":
        os.kill(process.pid, signal.SIGSTOP)
        workers._patience = 2.0
    else:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(StepError) as caught:
        next(steps)
    message = str(caught.value)
    if how == "hangs":  # the one before may only have measured how long the sample is
        process = workers.workers[holders()[0]].process
    assert ("was killed by SIGKILL" if how == "SIGKILL" else "silent for 2 s") in message
    assert f"(process {process.pid})" in message
    assert message.count(".tar/") == 1 and "/000000.tar/000003" in message, message
    steps.close()
    assert not any(worker.process.is_alive() for worker in workers.workers), "nobody stays behind"


def test_of_several_silent_workers_the_one_that_stood_still_first_is_named(
    dataset: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others stand still because of it, or are only slow."""
    loader = train_loader(dataset, hf_dir, num_workers=2)
    workers = Workers.__new__(Workers)
    workers._builder, workers._patience, workers._seen = loader._builder, 600.0, 0.0
    workers._board = (ctypes.c_int64 * 6)(1, 8, 1, 9, 1, 10)
    processes = [SimpleNamespace(pid=1000 + number) for number in range(3)]
    tasks = {1: Task("row", (8, [0, 1, 2], None))}
    workers.workers = [_Worker(process, None, dict(tasks)) for process in processes]  # type: ignore[arg-type]
    for second in range(1, 11):
        monkeypatch.setattr(time, "monotonic", lambda now=second: float(now))
        workers._board[0] += second <= 3
        workers._board[4] += second <= 2
        workers._check_board()
    workers._patience = 5.0
    with pytest.raises(StepError, match=r"loader worker 1 \(process 1001\)"):
        workers._check_board()


def signal_a_stop(process: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process, number)


def test_signals_that_ask_for_a_stop_leave_workers_and_their_server_alone(
    dataset: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm and terminals signal every process; the training decides when its workers may go."""
    feeds: list[Feed] = []
    start = Feed.start
    monkeypatch.setattr(Feed, "start", lambda feed: (feeds.append(feed), start(feed)))
    loader = train_loader(dataset, hf_dir, num_workers=2)
    steps = iter(loader)
    next(steps)
    processes = [worker.process.pid for worker in feeds[0]._workers.workers]
    for process in (*processes, server._forkserver_pid):
        signal_a_stop(process)
    for _ in range(20):
        next(steps)
    assert processes == [worker.process.pid for worker in feeds[0]._workers.workers]
    steps.close()
    for process in processes:
        assert not Path(f"/proc/{process}").exists()


def test_the_server_outlives_such_signals_whoever_starts_it() -> None:
    """There is one for a process, and the first of its users to come starts it."""
    server._stop()
    try:
        assert list(pool.ordered(math.sqrt, [1.0, 4.0], 2)) == [1, 2]
        process = server._forkserver_pid
        signal_a_stop(process)
        assert list(pool.ordered(math.sqrt, [9.0, 16.0], 2)) == [3, 4]
        assert server._forkserver_pid == process
    finally:
        server._stop()  # the next one to start it has more to import
