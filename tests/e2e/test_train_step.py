"""The training step as its users meet it: stopped, damaged, poisoned, handed on to stage 2."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.chain import Chain, environment, metrics, run_step, sample_ids
from tests.helpers.patience import PATIENCE, wait_for

STEPS = 24
FLAGS = (
    "--stage=2", "--gpus=2", "--tp=2", f"--train-steps={STEPS}", "--warmup-steps=3", "--lr=1e-3",
    "--global-batch-size=4", "--micro-batch-size=2", "--save-interval=1000",
)  # fmt: skip


def value(out: Path) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """(losses, sample ids, digests of the final checkpoint)"""
    digests = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("iter_*/**/*"))
        if path.is_file()
    }
    return [row["loss_hex"] for row in metrics(out)], sample_ids(out), digests


def reported(work: Path) -> int:
    """Steps that a running training has reported."""
    path = work / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stopped(chain: Chain, name: str, *flags: str, rank: int | None = None) -> Path:
    """Train until a few steps are done, ask for a stop; returns the unfinished store entry.

    With `rank` only that worker hears of it.
    """
    line = [sys.executable, "-m", "llava_steps.train", *chain.train_flags(name), *flags]
    process = subprocess.Popen(line, cwd=chain.root, env=environment(), stderr=subprocess.PIPE)
    work = chain.root / "results" / name / "work"
    try:
        wait_for(lambda: reported(work) >= 4, process)
    except AssertionError:
        process.kill()
        print(process.communicate()[1].decode())
        raise
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if rank is None else int(workers[rank]), signal.SIGTERM)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, log.decode()
    done = len(metrics(work))
    assert (work / f"iter_{done:07d}/commit.json").is_file(), "saved at the step it stopped at"
    return work.resolve()


def test_a_stop_is_saved_and_resumed_bit_for_bit(chain: Chain) -> None:
    out = chain.train("stop_whole", *FLAGS, "--seed=5")
    whole = value(out)
    shutil.rmtree((out / "samples").resolve().parent)
    stopped(chain, "stop_resumed", *FLAGS, "--seed=5")
    assert value(chain.train("stop_resumed", *FLAGS, "--seed=5")) == whole
    assert len(whole[0]) == STEPS
    assert len({i for ids in whole[1] for i in ids}) == STEPS * 4, "no sample twice"


@pytest.mark.parametrize(
    ("layout", "rank"), [(("--tp=2",), 1), (("--tp=1", "--pp=2"), 0), (("--tp=1",), 1)]
)
def test_one_rank_that_is_asked_to_stop_stops_them_all(
    chain: Chain, layout: tuple[str, ...], rank: int
) -> None:
    stopped(chain, f"one_{''.join(layout)}", *FLAGS, *layout, "--seed=8", rank=rank)


def test_a_stop_while_the_workers_start(chain: Chain) -> None:
    line = [sys.executable, "-m", "llava_steps.train", *chain.train_flags("early"), *FLAGS]
    for moment in ("job.json", "logs/rank-0001.log"):
        job = chain.root / "results/early/work/.work" / moment
        job.unlink(missing_ok=True)  # of the attempt before
        process = subprocess.Popen(
            [*line, "--seed=9"], cwd=chain.root, env=environment(), stderr=subprocess.PIPE
        )
        wait_for(job.exists, process)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 75 and b"Traceback" not in log, log.decode()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_an_older_one(chain: Chain) -> None:
    flags = (*FLAGS, "--seed=6", "--save-interval=2")
    whole = chain.train("damaged_whole", *flags)
    expected = value(whole)
    shutil.rmtree((whole / "samples").resolve().parent)
    entry = stopped(chain, "damaged", *flags)
    old, new = sorted(entry.glob("iter_*"))
    flip(next(new.glob("weights/*.distcp")))
    result = run_step("train", *chain.train_flags("damaged"), *flags, cwd=chain.root)
    assert "DAMAGED CHECKPOINT" in result.stderr and f"resuming from {old.name}" in result.stderr
    assert value(chain.root / "results/damaged") == expected
    assert (entry / ".work/damaged" / new.name).is_dir(), "kept to be looked at"


def test_without_a_whole_checkpoint_nothing_starts_over(chain: Chain) -> None:
    entry = stopped(chain, "ruined", *FLAGS, "--seed=7")
    (only,) = entry.glob("iter_*")
    flip(next(only.glob("optimizer/*.distcp")))
    line = ("train", *chain.train_flags("ruined"), *FLAGS, "--seed=7")
    for _ in range(2):
        result = run_step(*line, cwd=chain.root, check=False)
        assert result.returncode == 4 and ".distcp" in result.stderr, result.stderr
        assert "no older checkpoint is whole" in result.stderr and only.is_dir()


def test_a_checkpoint_without_its_marker_is_a_damaged_one(chain: Chain) -> None:
    """Not none: nothing goes back to an older one, or to the beginning, without saying so."""
    flags = (*FLAGS, "--seed=12", "--save-interval=2")
    entry = stopped(chain, "unmarked", *flags)
    line = ("train", *chain.train_flags("unmarked"), *flags)
    old, new = sorted(entry.glob("iter_*"))
    for path in (old, new):
        (path / "commit.json").rename(entry / ".work" / path.name)
    result = run_step(*line, cwd=chain.root, check=False)
    assert result.returncode == 4 and f"{new} " in result.stderr and new.is_dir(), result.stderr
    assert "has no commit.json; no older checkpoint is whole" in result.stderr
    (entry / ".work" / old.name).rename(old / "commit.json")
    result = run_step(*line, cwd=chain.root)
    assert f"DAMAGED CHECKPOINT: {new} " in result.stderr, result.stderr
    assert f"resuming from {old.name}" in result.stderr
    assert (entry / ".work/damaged" / new.name).is_dir()


SLOW_END = """
import time
from llava_steps.core import filesystem
from llava_steps.training import trackers
trackers.PATIENCE = 7
flush = filesystem.fsync_tree
filesystem.fsync_tree = lambda root: (time.sleep(7), flush(root))
Settings = dict
init = lambda **settings: __import__("wandb")
log = lambda *row, **step: None
finish = lambda: time.sleep(600)
"""


def test_what_comes_behind_the_last_step_may_take_longer_than_one(
    chain: Chain, tmp_path: Path
) -> None:
    """A commit beside the training, and a tracker that hangs in the end."""
    (tmp_path / "wandb.py").write_text(SLOW_END)
    env = environment()
    result = subprocess.run(
        [
            sys.executable, "-m", "llava_steps.train", *chain.train_flags("slow_end"), "--seed=13",
            "--global-batch-size=2", "--wandb", "--async-save", "--stall-timeout=4",
        ],
        cwd=chain.root, env=env | {"PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "W&B: it did not finish within 7 s; training continues without it" in result.stderr


def test_the_time_limit_stops_in_order(chain: Chain) -> None:
    """Limits from one that no machine can keep on, until one leaves time for a step."""
    line = ("train", *chain.train_flags("limit"), *FLAGS, "--gpus=1", "--tp=1", "--seed=10")
    for minutes in (0.0001, 0.1, 0.25, 0.5, 1, 2, 4):
        limit = ("--train-steps=100000", f"--exit-before={minutes}")
        result = run_step(*line, *limit, cwd=chain.root, check=False)
        commits = list(chain.root.glob("results/limit/work/iter_*/commit.json"))
        if result.returncode == 75:
            break
        assert result.returncode == 2 and not commits, result.stderr
        assert f"exit_before: {minutes:g} minutes passed before the first step" in result.stderr, (
            result.stderr
        )
    assert minutes > 0.0001 and "stopped on request after step" in result.stderr and commits


def test_a_rank_that_stands_still_ends_the_job(chain: Chain) -> None:
    line = [sys.executable, "-m", "llava_steps.train", *chain.train_flags("stall"), *FLAGS]
    process = subprocess.Popen(
        [*line, "--train-steps=5000", "--stall-timeout=8", "--seed=11"], cwd=chain.root,
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    work = chain.root / "results/stall/work"
    wait_for(lambda: reported(work) >= 2, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGSTOP)
    _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "rank 1 (stopped)" in log, log
    assert "rank 0 (" in log and "distributed_c10d.py" in log, "where rank 0 waited"
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_loss_that_is_not_finite_stops_before_the_update(chain: Chain, tmp_path: Path) -> None:
    poisoned = tmp_path / "hf"
    shutil.copytree(chain.hf, poisoned, ignore=shutil.ignore_patterns("manifest.json"))
    path = poisoned / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if "multi_modal_projector.linear_2.bias" in n)
    weights[name][0] = float("inf")
    path.unlink()
    save_file(weights, path, {"format": "pt"})
    out = tmp_path / "megatron"
    run_step("hf_to_megatron", f"--hf-dir={poisoned}", f"--save-dir={out}", cwd=chain.root)
    flags = chain.train_flags("poisoned")[1:]
    line = ("train", f"--megatron-load-dir={out}", *flags, *FLAGS)
    result = run_step(*line, cwd=chain.root, check=False)
    assert result.returncode == 6, result.stderr
    assert "step 0" in result.stderr and "train-" in result.stderr, "says where and on what"
    assert "no checkpoint yet to roll back to" in result.stderr
    assert not list(chain.root.glob("results/poisoned/work/iter_*")), "nothing was saved"


def test_skipped_steps_pass_their_batches_over(chain: Chain) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    common = ("--stage=2", "--gpus=1", "--global-batch-size=4", "--micro-batch-size=4", "--lr=1e-3")
    whole = chain.train("skip_none", *common, "--train-steps=9")
    out = chain.train(
        "skip_some", *common, "--train-steps=9", "--tensorboard", "--eval-interval=4",
        "--eval-samples=4", "--skip-train-iteration-range", "3-4", "9-9",
    )  # fmt: skip
    rows = metrics(out)
    assert [row["step"] for row in rows if "skipped" in row] == [2, 3, 8]
    assert sample_ids(out) == sample_ids(whole), "the stream goes on as ever"
    expected = metrics(whole)
    for step in (0, 1):
        assert rows[step]["loss_hex"] == expected[step]["loss_hex"]
    assert rows[4]["lr"] == expected[4]["lr"] and rows[4]["loss"] != expected[4]["loss"]
    state = json.loads(next(out.glob("iter_*/train_state.json")).read_text())
    assert state["step"] == 9 and state["updates"] == 6 and state["rejected"] == 0
    entry = (out / "metrics.jsonl").resolve().parent
    events = accumulators.EventAccumulator(str(entry / ".work/tensorboard"))
    events.Reload()
    seen = [(event.step, pytest.approx(event.value)) for event in events.Scalars("val_loss")]
    assert seen == [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    assert [step for step, _ in seen] == [3, 7, 8], "after skipped steps too"


def test_each_stage_moves_only_what_it_trains(chain: Chain, tmp_path: Path) -> None:
    common = (
        "--train-steps=3", "--lr=1e-3", "--global-batch-size=8", "--micro-batch-size=4", "--gpus=2",
        "--weight-decay=0.1",
    )  # fmt: skip
    one = chain.train("moves1", "--stage=1", "--freeze-lm", "--tp=2", *common)
    two = chain.train("moves2", f"--megatron-load-dir={one}", "--stage=2", "--pp=2", *common)
    state = json.loads(next(two.glob("iter_*/train_state.json")).read_text())
    assert state["step"] == 3 and state["loader"]["consumed_samples"] == 24, "fresh counters"
    before = load_file(chain.hf / "model.safetensors")
    changed = {}
    for out in (one, two):
        hf = tmp_path / out.name
        run_step(
            "megatron_to_hf", f"--megatron-dir={out}", f"--tokenizer-dir={chain.hf}",
            f"--save-dir={hf}", cwd=chain.root,
        )  # fmt: skip
        after = load_file(hf / "model.safetensors")
        assert after.keys() == before.keys()
        changed[out.name] = {n for n in after if not torch.equal(after[n], before[n])}
        before = after
    assert all("projector" in n for n in changed["moves1"]) and len(changed["moves1"]) == 4
    assert changed["moves2"] == {n for n in before if "vision_tower" not in n}


@pytest.mark.parametrize("layout", [("--gpus=1",), ("--gpus=2", "--tp=2", "--sequence-parallel")])
def test_bf16_follows_fp32(chain: Chain, layout: tuple[str, ...]) -> None:
    common = (
        "--train-steps=12", "--lr=1e-3", "--global-batch-size=8", "--micro-batch-size=4",
        "--stage=2", *layout,
    )  # fmt: skip
    name = f"bf16_{len(layout)}"
    exact = [row["loss"] for row in metrics(chain.train(f"{name}_fp32", *common))]
    rough = [
        row["loss"] for row in metrics(chain.train(f"{name}_bf16", *common, "--precision=bf16"))
    ]
    assert exact[-1] < exact[0]
    deviations = [abs(a - b) / b for a, b in zip(rough, exact, strict=True)]
    assert 0 < deviations[0] < 0.02 and sum(deviations) / len(deviations) < 0.04, deviations
