"""Loader workers that die or hang: an error that names what they held, never a wait for ever."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import make_energon, make_hf_dir

from llava_steps.core.errors import StepError
from llava_steps.data import loader as loader_module
from llava_steps.data.corpus import Place
from llava_steps.data.feed import Feed
from llava_steps.data.reader import RawSample
from llava_steps.data.rows import RowMaker

STUCK = 3
"""Index of the sample that takes for ever. Key and index are the same in this dataset."""


class Stuck(RowMaker):
    """What a worker looks like from outside whose storage has gone away."""

    def _encode(self, place: Place, raw: RawSample) -> Any:
        if place.index == STUCK:
            time.sleep(1000)
        return super()._encode(place, raw)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_energon(tmp_path_factory.mktemp("ds") / "energon", 24, 7)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "hangs"])
def test_the_sample_that_a_lost_worker_held_is_named(
    dataset: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch, how: str, packing: bool
) -> None:
    feeds: list[Feed] = []
    start = Feed.start
    monkeypatch.setattr(loader_module, "RowMaker", Stuck)
    monkeypatch.setattr(Feed, "start", lambda feed: (feeds.append(feed), start(feed)))
    loader = loader_module.TrainLoader(
        dataset, "train", hf_dir, 256, 8, 1, 0, 1, 7, 2, 0, True, packing=packing, patience=600
    )
    steps = iter(loader)
    # The first step starts the workers; the stuck sample is not in it.
    corpus = loader._maker.corpus
    stuck = next(p for p in range(24) if corpus[p].index == STUCK)
    assert stuck >= 8, "choose another seed"
    next(steps)
    workers = feeds[0]._workers
    board = workers._board

    def holders() -> list[int]:
        return [n for n in range(2) if board[2 * n + 1] == stuck]

    end = time.monotonic() + 30
    for _ in range(stuck // 8 - 1):
        next(steps)
    while not holders():
        assert time.monotonic() < end
        time.sleep(0.02)
    process = workers.workers[holders()[0]].process
    if how == "hangs":
        workers._patience = 2.0
    elif how == "SIGSTOP":
        os.kill(process.pid, signal.SIGSTOP)
        workers._patience = 2.0
    else:
        os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(StepError) as caught:
        next(steps)
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert ("was killed by SIGKILL" if how == "SIGKILL" else "silent for 2 s") in message
    assert f"(process {process.pid})" in message
    assert message.count(".tar/") == 1 and "/000000.tar/000003" in message, message
    steps.close()
    assert not any(worker.process.is_alive() for worker in workers.workers), "nobody stays behind"


def test_signals_that_ask_for_a_stop_leave_workers_and_their_server_alone(
    dataset: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm and terminals signal every process; the training decides when its workers may go."""
    feeds: list[Feed] = []
    start = Feed.start
    monkeypatch.setattr(Feed, "start", lambda feed: (feeds.append(feed), start(feed)))
    loader = loader_module.TrainLoader(dataset, "train", hf_dir, 256, 8, 1, 0, 1, 7, 2, 0, True)
    steps = iter(loader)
    next(steps)
    processes = [worker.process.pid for worker in feeds[0]._workers.workers]
    for process in (*processes, forkserver._forkserver._forkserver_pid):  # type: ignore[attr-defined]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(process, number)
    for _ in range(20):
        next(steps)
    assert processes == [worker.process.pid for worker in feeds[0]._workers.workers]
    steps.close()
    for process in processes:
        assert not Path(f"/proc/{process}").exists()
