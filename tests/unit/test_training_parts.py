"""Parts of the training engine without a process group: schedule, metrics, job, launcher."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from llava_steps.core.errors import (
    DivergedError,
    InputError,
    StepError,
    StoppedError,
    environment_error,
)
from llava_steps.core.stop_signals import STOP_SIGNALS
from llava_steps.launch import launch as launching
from llava_steps.launch.job import Job
from llava_steps.launch.stop import StopRequest, age
from llava_steps.settings.stage.stage import Stage
from llava_steps.training.lr_schedule import learning_rate
from llava_steps.training.metrics import Lines
from tests.helpers.patience import wait_for


def stage(**values: object) -> Stage:
    return Stage.model_validate({"train_steps": 100, "lr": 1.0, **values})


def test_cosine_with_warmup() -> None:
    s = stage(warmup_steps=10, min_lr=0.1)
    rates = [learning_rate(s, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 89)) / 2
    assert rates[55] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("kind", "end"), [("linear", 0.0), ("constant", 1.0), ("cosine", 0.0)])
def test_ends(kind: str, end: float) -> None:
    assert learning_rate(stage(lr_schedule=kind), 0) == 1.0
    assert learning_rate(stage(lr_schedule=kind), 99) == pytest.approx(end)
    assert learning_rate(stage(lr_schedule=kind, train_steps=1), 0) == 1.0


def test_warmup_stable_decay() -> None:
    s = stage(lr_schedule="wsd", warmup_steps=10, decay_steps=20, min_lr=0.2)
    rates = [learning_rate(s, i) for i in range(100)]
    assert rates[9] == 1.0 and set(rates[9:80]) == {1.0} and rates[80] < 1.0
    assert rates[89] == pytest.approx(0.2 + 0.8 * 10 / 20) and rates[99] == pytest.approx(0.2)


def test_lines_forget_steps_that_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = Lines(path, 0)
    for step in range(10):
        lines.write({"step": step})
    lines.close()
    with path.open("ab") as file:
        file.write(b'{"step": 10, "lo')
    again = Lines(path, 6)
    again.write({"step": 6, "again": True})
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7)) and rows[-1]["again"]


def test_a_line_that_a_lost_machine_left_unwritten_is_none(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + bytes(30) + b'}\n{"step": 3}\n')
    Lines(path, 2).close()
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "m.jsonl", 0)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as raised:
        os.dup2(full.fileno(), lines._file.fileno())
        lines.write({"step": 0})
    known = environment_error(raised.value)
    assert known and f"{tmp_path / 'm.jsonl'}: No space left" in str(known)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"gpus": 3, "tensor_model_parallel": 2}, "does not divide"),
        ({"gpus": 2, "global_batch_size": 3}, "micro_batch_size x data parallel"),
        ({"sequence_parallel": True}, "tensor_model_parallel > 1"),
        ({"warmup_steps": 100}, "below train_steps"),
        ({"min_lr": 2.0}, "above lr"),
        ({"lr_schedule": "wsd"}, "decay_steps 0 must be 1 to"),
        ({"lr_schedule": "wsd", "decay_steps": 99, "warmup_steps": 2}, "must be 1 to .* = 98"),
        ({"decay_steps": 5}, "decay_steps needs lr_schedule wsd"),
        ({"skip_train_iteration_range": ["9-3"]}, "ends before it begins"),
        ({"skip_train_iteration_range": ["0-3"]}, "pattern"),
        ({"freeze_projector": True, "freeze_lm": True}, "all parts are frozen"),
        ({"freeze_projector": True}, "all parts are frozen"),
        ({"virtual_pipeline": 2}, "set pipeline_model_parallel above 1"),
        (
            {"gpus": 2, "pipeline_model_parallel": 2, "virtual_pipeline": 2},
            "set global_batch_size 1 to a multiple of .* x 2 = 2",
        ),
        (
            {"gpus": 2, "pipeline_model_parallel": 2, "pipeline_split": "4"},
            "1 numbers; .* = 2 are needed, or auto",
        ),
        ({"pipeline_split": "4,0"}, "pattern"),
        ({"overlap_param_gather": True}, "needs overlap_grad_reduce; set it"),
        ({"bucket_size": 5}, "bucket_size needs overlap_grad_reduce"),
        ({"vision_lr": 1e-4}, "set freeze_vision to false"),
        ({"stage": 1, "lm_lr": 1e-4}, "set freeze_lm to false"),
        ({"stage": 2, "freeze_projector": True, "projector_lr": 1e-4}, "freeze_projector to false"),
        ({"stage": 1, "lora_rank": 4}, "set freeze_lm to false"),
        (
            {"stage": 2, "lora_rank": 4, "lora_targets": []},
            "name each linear once, and at least one",
        ),
        ({"stage": 2, "lora_rank": 4, "lora_targets": ["linear_qkv"] * 2}, "each linear once"),
        ({"stage": 2, "lora_targets": ["q_proj"]}, "linear_qkv"),
        ({"nodes": 2, "global_batch_size": 1}, "not a multiple"),
        ({"lr": "2e-5"}, "number"),
        ({"master_port": 65536}, "less than or equal to 65535"),
        ({"rdzv_port": -1}, "greater than or equal to 0"),
        ({"lrr": 1.0}, "Extra inputs"),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        stage(**values)


def test_stage_1_keeps_the_language_model_unless_told() -> None:
    assert stage(stage=1).freeze_lm and stage(stage=1) == stage(stage=1, freeze_lm=True)
    assert not stage(stage=2).freeze_lm and not stage(stage=1, freeze_lm=False).freeze_lm


def job(tmp_path: Path, gpus: int = 2, **values: object) -> Job:
    (tmp_path / "logs").mkdir()
    settings = stage(gpus=gpus, global_batch_size=gpus, **values)
    return Job(settings, tmp_path, tmp_path, tmp_path, tmp_path, tmp_path, "f")


def test_job_file_round_trip(tmp_path: Path) -> None:
    made = job(tmp_path, lr=3.7e-5, name='"; rm -rf / #')
    assert Job.read(made.write()) == made


WORKER = """
import os, signal, sys, time
from pathlib import Path
from llava_steps.launch.job import Failure, Job
from llava_steps.training.worker import follow_launcher
follow_launcher()
job, rank = Job.read(Path(sys.argv[-1])), int(os.environ["RANK"])
(job.work / f"pid{rank}.part").write_text(str(os.getpid()))
(job.work / f"pid{rank}.part").rename(job.work / f"pid{rank}")
"""


def as_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Have the launcher start `body` instead of the real worker."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER + body)
    real = subprocess.Popen

    def popen(line: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, str(script), line[-1]], **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))


def test_first_failure_decides_and_the_others_are_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = """
if rank == 1:
    Failure(1, 6, "loss nan at step 3").write(job.work)
    sys.exit(6)
time.sleep(600)
"""
    as_worker(monkeypatch, tmp_path, body)
    monkeypatch.setattr(launching, "GRACE", 0.5)
    with pytest.raises(DivergedError, match="rank 1: loss nan at step 3"):
        launching.launch(job(tmp_path))
    assert not alive(int((tmp_path / "pid0").read_text()))


BEATS = """
from llava_steps.launch.watchdog import Beat
beat = Beat(rank, job.work / "logs")
"""


def test_a_stall_is_measured_by_what_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Busy ranks get longer; one that stands still without being busy ends the job, by name."""
    body = (
        BEATS
        + """
with beat.busy():
    beat.settled()
    time.sleep(3.0)
(job.work / f"came{rank}").touch()
while rank:
    beat()
    time.sleep(0.05)
    if (job.work / "came0").exists() and (job.work / "came1").exists():
        rank = 0
def stands_here():
    time.sleep(600)
stands_here()
"""
    )
    as_worker(monkeypatch, tmp_path, body)
    with pytest.raises(StepError, match=r"no progress for 1 s(.|\n)*in stands_here"):
        launching.launch(job(tmp_path, stall_timeout=1, io_timeout=300))
    assert all((tmp_path / f"came{rank}").exists() for rank in (0, 1)), "busy for longer than 1 s"


@pytest.mark.parametrize("body", ["time.sleep(600)", BEATS + "time.sleep(600)"])
def test_a_start_that_does_not_end_is_noticed(
    body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_worker(monkeypatch, tmp_path, body)
    with pytest.raises(StepError, match="no progress for 2 s"):
        launching.launch(job(tmp_path, stall_timeout=60, io_timeout=2))


def test_a_killed_worker_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_worker(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StepError, match="SIGKILL"):
        launching.launch(job(tmp_path))


def test_scratch_goes_with_the_launcher_or_with_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Workers leave files behind, W&B's for one; a killed launcher cannot remove them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(launching, "LONGEST", 200)
    (tmp_path / "tmp/llava-steps-old").mkdir(parents=True)
    (tmp_path / "scratch").write_text(str(tmp_path / "tmp/llava-steps-old"))
    body = "import tempfile; (job.work / f'tmp{rank}').write_text(tempfile.mkdtemp())"
    as_worker(monkeypatch, tmp_path, body)
    launching.launch(job(tmp_path))
    for rank in (0, 1):
        assert (tmp_path / f"tmp{rank}").read_text().startswith(str(tmp_path / "tmp/llava-steps-"))
    assert not list((tmp_path / "tmp").iterdir()) and not (tmp_path / "scratch").exists()


def test_sockets_fit_into_scratch_however_long_tmpdir_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / f"{'job-1234567' * 9}"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    body = """
from multiprocessing.connection import Listener
with Listener(family="AF_UNIX") as listener:
    (job.work / f"socket{rank}").write_text(listener.address)
"""
    as_worker(monkeypatch, tmp_path, body)
    launching.launch(job(tmp_path))
    (address,) = {Path((tmp_path / f"socket{r}").read_text()).parents[1].parent for r in (0, 1)}
    assert address == Path("/tmp") and not list(place.iterdir())


def test_the_time_limit_counts_what_the_launcher_did_before() -> None:
    """It reads all inputs, before it starts a worker."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = time.monotonic()
    try:
        stop = StopRequest()
        stop.limit(1e6, other.pid)
        assert not stop.requested
        time.sleep(1.5)
        late = StopRequest()
        late.limit(1.0 / 60, other.pid)
        assert late.requested, "its second is over, and it has just begun"
        assert age(other.pid) == pytest.approx(time.monotonic() - began, abs=30)
    finally:
        other.communicate(b"\n")


def test_a_full_disk_leaves_no_report_but_the_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is said where there is room to: on stderr."""
    body = """
import errno
from llava_steps.core import filesystem
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
filesystem.write_json = full
Failure(rank, 3, "full").write(job.work)
sys.exit(3)
"""
    as_worker(monkeypatch, tmp_path, body)
    with pytest.raises(InputError, match="ended with code 3 without a report"):
        launching.launch(job(tmp_path))
    assert "rank 0: full" in capfd.readouterr().err


LISTENS = """
from llava_steps.launch.stop import StopRequest
def listen():
    stop = StopRequest()
    (job.work / f"ready{rank}").touch()
    while not stop.signalled:
        time.sleep(0.01)
    Failure(rank, 75, "stopped").write(job.work)
    sys.exit(75)
"""
LATE = """
(job.work / f"ready{rank}").touch()
while not (job.work / "sent").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("late", ["", LATE], ids=["listening", "not yet"])
def test_a_stop_signal_reaches_the_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: str, number: signal.Signals
) -> None:
    """Sent to the whole group, as terminals and Slurm do; also before they listen."""
    as_worker(monkeypatch, tmp_path, f"{LISTENS}{late}\nlisten()\n")

    def send() -> None:
        wait_for(lambda: all((tmp_path / f"ready{r}").exists() for r in (0, 1)))
        for rank in (0, 1):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), number)
        os.kill(os.getpid(), number)
        (tmp_path / "sent").touch()

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(StoppedError):
        launching.launch(job(tmp_path))
    thread.join()


def test_workers_die_with_a_killed_launcher(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.write()
    script = tmp_path / "worker.py"
    script.write_text(WORKER + "\ntime.sleep(600)\n")
    launcher = (
        "import os, subprocess, sys\n"
        "os.environ['LLAVA_STEPS_LAUNCHER'] = str(os.getpid())\n"
        "os.environ['RANK'] = '0'\n"
        f"subprocess.run([sys.executable, {str(script)!r}, {str(made.work / 'job.json')!r}])\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment)
    wait_for((tmp_path / "pid0").exists, process)
    process.kill()
    process.wait()
    worker = int((tmp_path / "pid0").read_text())
    wait_for(lambda: not alive(worker), seconds=120)  # left alone it would live for 600


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
