"""Steps that need what another process computes: they wait, report it, and take its value."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llava_steps.store import lease
from tests.helpers.patience import PATIENCE, wait_for
from tests.unit.test_core_run import STEP

BEAT = "from llava_steps.store import lease, waiting\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "copystep.py").write_text(textwrap.dedent(STEP))
    (tmp_path / "data.txt").write_text("hello")
    return tmp_path


def quick(place: Path, **constants: float) -> None:
    """Set constants of the modules that wait."""
    lines = [f"{'lease' if hasattr(lease, k) else 'waiting'}.{k} = {constants[k]}\n"
             for k in constants]  # fmt: skip
    step = place / "copystep.py"
    text = step.read_text().replace("\nclass ", f"\n{BEAT}{''.join(lines)}\nclass ", 1)
    step.write_text(text)


def start(out: str, *flags: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "copystep", "--save-dir", out, "--data", "data.txt", *flags]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def held(place: Path, out: str = "first", *flags: str) -> subprocess.Popen[str]:
    """A step that is at work until the file `hold` is removed."""
    (place / "hold").touch()
    process = start(out, *flags)
    wait_for(lambda: list((place / "store").glob("copy/*/partial")), process)
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """The rest of what a step reports."""
    text = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == code, text
    return text


def calls(place: Path) -> int:
    path = place / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def entry_of(place: Path) -> Path:
    (entry,) = (place / "store/copy").glob("?" * 32)
    return entry


def test_all_who_wait_take_the_value_of_the_first(place: Path) -> None:
    first = held(place)
    others = [start(f"out{number}") for number in range(4)]
    for process in others:
        assert f"is being computed by process {first.pid} on" in line(process)
    (place / "hold").unlink()
    assert "is done" in end(first)
    for process in others:
        assert "is up to date; nothing to compute" in end(process)
    shown = {(place / f"out{n}/out.txt").resolve() for n in range(4)}
    assert shown == {entry_of(place) / "out.txt"} and calls(place) == 1
    assert not [*place.glob("out*/.tmp-*"), *entry_of(place).glob(".work/lease.json")]


def test_who_waits_reports_it_from_time_to_time(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(place, LINE_EVERY=0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = held(place)
    second = start("second")
    who = f"copy {entry_of(place).name} is being computed by process {first.pid} on "
    assert f"{who}{os.uname().nodename} (Slurm job 77); waiting for its value" in line(second)
    for _ in range(2):
        text = line(second)
        assert "waiting for " in text and f" s: {who}" in text
    (place / "hold").unlink()
    end(first)
    end(second)


def test_one_fails_and_the_next_computes_for_itself(place: Path) -> None:
    first = held(place)
    second = start("second")
    line(second)
    first.terminate()
    assert "stopped by SIGTERM" in end(first, 75)
    wait_for((place / "second/work/.work/logs/attempt-0002.log").exists, second)
    (place / "hold").unlink()
    assert "is done" in end(second) and calls(place) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_who_waits_and_does_no_harm(place: Path, number: signal.Signals) -> None:
    first = held(place)
    second = start("second")
    line(second)
    second.send_signal(number)
    text = end(second, 75)
    assert f"stopped by {number.name}" in text and "Traceback" not in text
    assert json.loads((entry_of(place) / ".work/lease.json").read_text())["pid"] == first.pid
    (place / "hold").unlink()
    end(first)
    assert calls(place) == 1


def test_a_forced_value_that_another_computes_anew_is_waited_for(place: Path) -> None:
    end(start("zero"))
    first = held(place, "first", "--force")
    second = start("second", "--force")
    assert f"is being computed by process {first.pid}" in line(second)
    (place / "hold").unlink()
    end(first)
    end(second)
    assert calls(place) == 2, "one value replaced the old one"
    assert len(list((place / "store/copy").glob("*.replaced-*"))) == 1
    assert (place / "second/out.txt").resolve() == entry_of(place) / "out.txt"
    assert not list((place / "store/copy").glob("*/.work/lease.json"))


def test_the_lease_of_a_lost_machine_is_waited_out(place: Path) -> None:
    quick(place, HEARTBEAT=0.05, STALE_AFTER=1.0)
    killed = held(place)
    killed.kill()
    killed.communicate()
    path = entry_of(place) / ".work/lease.json"
    lost = json.loads(path.read_text()) | {"boot_id": "another", "host": "lost"}
    path.write_text(json.dumps(lost))
    (place / "hold").unlink()
    second = start("second")
    assert f"is being computed by process {killed.pid} on lost; waiting" in line(second)
    assert "attempt 2" in end(second)
