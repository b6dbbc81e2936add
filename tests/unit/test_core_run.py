"""A step's life: computed once, cached, resumed, refused, forced, not trusted when damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llava_steps.store import attempts
from tests.helpers.patience import PATIENCE, wait_for

STEP = '''
"""A small step for the tests."""
import os, time
from pathlib import Path
from llava_steps.settings.fields import StepConfig, quiet, source, value
from llava_steps.core.errors import InputError
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

class Settings(StepConfig):
    data: str = source("", "what is copied")
    times: int = value(1, "copies")
    label: str = quiet("", "a label")

def run(ctx: Context, cfg: Settings):
    if cfg.times == 13:
        raise InputError("thirteen copies are refused")
    if cfg.times == 14:
        Path("/dev/full").write_text("x")
    (ctx.entry / "partial").write_text("x")
    while Path("hold").exists():
        time.sleep(0.01)
    (ctx.entry / "partial").unlink()
    text = ctx.inputs["data"].path.read_text()
    (ctx.entry / "out.txt").write_text(text * cfg.times)
    with open("calls", "a") as f:
        f.write("call\\n")
    return {"length": len(text) * cfg.times}

if __name__ == "__main__":
    main(Step(name="copy", config=Settings, run=run, doc=__doc__))
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copystep.py").write_text(textwrap.dedent(STEP))
    (tmp_path / "data.txt").write_text("hello")
    return tmp_path


def call(*flags: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "copystep", "--save-dir", "out", "--data", "data.txt", *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)


def calls(place: Path) -> int:
    path = place / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def manifest(place: Path) -> dict:
    return json.loads((place / "out/manifest.json").read_text())


@pytest.fixture(autouse=True)
def only_core(monkeypatch: pytest.MonkeyPatch) -> None:
    # The step of these tests lives outside the package; its code version is that of a core module.
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))


def test_computed_once_and_found_again(place: Path) -> None:
    assert call().returncode == 0
    first = (place / "out/manifest.json").read_bytes()
    assert (place / "out/out.txt").read_text() == "hello"
    assert call("--label", "another").returncode == 0
    assert calls(place) == 1
    assert (place / "out/manifest.json").read_bytes() == first


def test_settings_and_content_decide(place: Path) -> None:
    assert call().returncode == 0
    assert call("--times", "2").returncode == 0
    (place / "data.txt").write_text("other")
    assert call("--times", "2").returncode == 0
    assert calls(place) == 3
    (place / "data.txt").write_text("hello")
    assert call("--times", "2").returncode == 0
    assert calls(place) == 3, "going back must cost nothing"
    assert (place / "out/out.txt").read_text() == "hellohello"


def test_force_computes_again_and_keeps_the_old_value(place: Path) -> None:
    assert call().returncode == 0
    assert call("--force").returncode == 0
    (place / "out/.force").touch()
    assert call().returncode == 0
    assert calls(place) == 3
    assert len(list((place / "store/copy").glob("*.replaced-*"))) == 2
    assert call().returncode == 0
    assert calls(place) == 3, "a request is honoured once"


@pytest.mark.parametrize("text", ["hell", "hellO", "hello "])
def test_damaged_entry_is_an_error_not_a_rebuild(place: Path, text: str) -> None:
    assert call().returncode == 0
    (place / "out/out.txt").resolve().write_text(text)
    result = call()
    assert result.returncode == 4
    assert "out.txt" in result.stderr and calls(place) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "content": ""}'])
def test_damaged_manifest_is_an_error(place: Path, text: str) -> None:
    assert call().returncode == 0
    (entry,) = (place / "store/copy").iterdir()
    (entry / "manifest.json").write_text(text)
    assert call().returncode == 4


def started(*flags: str) -> subprocess.Popen[str]:
    where = [] if "--save-dir" in flags else ["--save-dir", "out"]
    line = [sys.executable, "-m", "copystep", "--data", "data.txt", *where, *flags]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def test_a_live_writer_is_waited_for_and_a_dead_one_is_replaced(place: Path) -> None:
    (place / "hold").touch()
    first = started()
    wait_for(lambda: list((place / "store").glob("copy/*/partial")), first)
    second = started("--save-dir", "out2")
    assert second.stderr is not None
    line = second.stderr.readline()
    (entry,) = (place / "store/copy").iterdir()
    assert f"copy {entry.name} is being computed by process {first.pid} on " in line
    first.kill()
    first.communicate()
    wait_for(lambda: (place / "out2/work/.work/logs/attempt-0002.log").exists(), second)
    assert not (place / "out/manifest.json").exists()
    third = started()
    (place / "hold").unlink()
    for process in (second, third):
        assert process.communicate(timeout=PATIENCE) and process.returncode == 0
    assert manifest(place)["attempts"] == 2 and calls(place) == 1
    assert (place / "out2/manifest.json").read_bytes() == (place / "out/manifest.json").read_bytes()
    assert not list((place / "store").glob("copy/*/.work/lease.json"))


def consume(out: str = "consumed") -> subprocess.Popen[str]:
    """A step that reads what `call` shows, started and waiting for `hold` to go away."""
    line = [sys.executable, "-m", "copystep", "--save-dir", out, "--data", "out/out.txt"]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def test_another_run_that_publishes_meanwhile_changes_no_input(place: Path) -> None:
    """Two runs of one name, say: the second shows its value while a step reads the first's."""
    assert call("--times", "2").returncode == 0 and call().returncode == 0
    (place / "hold").touch()
    reader = consume()
    wait_for(lambda: len(list((place / "store").glob("copy/*/partial"))) == 1)
    assert call("--times", "2").returncode == 0  # from the store: publishes at once
    assert (place / "out/out.txt").read_text() == "hellohello"
    (place / "hold").unlink()
    assert reader.wait(PATIENCE) == 0
    assert (place / "consumed/out.txt").read_text() == "hello"


def test_an_input_that_changes_under_a_step_seals_nothing(place: Path) -> None:
    (place / "hold").touch()
    line = [sys.executable, "-m", "copystep", "--save-dir", "out", "--data", "data.txt"]
    step = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((place / "store").glob("copy/*/partial")))
    (place / "data.txt").write_text("other")
    (place / "hold").unlink()
    assert (
        "data.txt changed while" in step.communicate(timeout=PATIENCE)[1] and step.returncode == 3
    )
    (entry,) = (place / "store/copy").iterdir()
    assert [item.name for item in entry.iterdir()] == [".work"]
    assert call().returncode == 0 and (place / "out/out.txt").read_text() == "other"


def test_an_input_that_vanishes_from_the_store_says_what_makes_it(place: Path) -> None:
    assert call().returncode == 0
    shutil.rmtree(place / "store")
    reader = consume()
    _, text = reader.communicate(timeout=PATIENCE)
    assert reader.returncode in (3, 4) and "out.txt" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_end_a_step_in_order(place: Path, number: signal.Signals) -> None:
    (place / "hold").touch()
    line = [sys.executable, "-m", "copystep", "--save-dir", "out", "--data", "data.txt"]
    step = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((place / "store").glob("copy/*/partial")))
    step.send_signal(number)
    _, text = step.communicate(timeout=PATIENCE)
    assert step.returncode == 75 and f"stopped by {number.name}" in text, text
    assert "Traceback" not in text and not list((place / "store").rglob("lease.json"))


@pytest.mark.parametrize("resumes", [False, True])
def test_an_attempt_begins_with_an_empty_entry_unless_its_step_resumes(
    place: Path, resumes: bool
) -> None:
    step = place / "copystep.py"
    step.write_text(step.read_text().replace("doc=__doc__", f"doc=__doc__, resumes={resumes}"))
    (place / "hold").touch()
    line = [sys.executable, "-m", "copystep", "--save-dir", "out", "--data", "data.txt"]
    killed = subprocess.Popen(line)
    wait_for(lambda: list((place / "store").glob("copy/*/partial")), killed)
    (partial,) = (place / "store").glob("copy/*/partial")
    began = partial.parent / ".work/logs/attempt-0001.begun"
    os.utime(began, (began.stat().st_mtime - 60,) * 2)
    killed.kill()
    killed.wait()
    (partial.parent / "folder").mkdir()
    (partial.parent / "folder/half").write_text("h")
    (place / "hold").unlink()
    assert call().returncode == 0
    assert (partial.parent / "folder").exists() == resumes
    assert manifest(place)["attempts"] == 2, "the logs of the first attempt stay"
    assert 60 <= manifest(place)["earlier_s"] < 60 + PATIENCE
    assert attempts.whole_s(manifest(place)) > 60 > manifest(place)["wall_s"]


def test_surroundings_are_told_in_one_line(place: Path) -> None:
    full = call("--times", "14")
    assert full.returncode == 3 and "No space left on device; free some" in full.stderr
    file = call("--store", "data.txt/store")
    assert file.returncode == 3 and "data.txt/store: Not a directory" in file.stderr
    assert "Traceback" not in full.stderr + file.stderr


def test_exit_codes_and_messages(place: Path) -> None:
    assert call("--times", "13").returncode == 3
    assert call("--times", "x").returncode == 2
    assert call("--tines", "3").returncode == 2
    assert call("--data", "nowhere").returncode == 3
    assert "--data" in call("--data", "nowhere").stderr


def test_a_result_directory_of_somebody_else_is_left_alone(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out/thesis.tex").write_text("years of work")
    assert call().returncode == 3
    assert (place / "out/thesis.tex").read_text() == "years of work"


def test_input_inside_an_artefact_is_known_by_its_content(place: Path) -> None:
    assert call().returncode == 0
    line = [sys.executable, "-m", "copystep", "--save-dir", "out2", "--data", "out/out.txt"]
    assert subprocess.run(line, timeout=PATIENCE).returncode == 0
    used = json.loads((place / "out2/manifest.json").read_text())["inputs"]["data"]["digest"]
    assert used == manifest(place)["content"] + "/out.txt"
    assert call("--force").returncode == 0, "same bytes made again"
    assert subprocess.run(line, timeout=PATIENCE).returncode == 0
    assert calls(place) == 3, "an equal value keeps later steps cached"


def test_a_result_does_not_take_the_place_of_its_input(place: Path) -> None:
    """As with one directory to load from and to save to: after a stop there was no start again."""
    call()
    for given in ("out", "out/out.txt", "./x/../out"):
        result = call("--data", given, "--times", "3")
        assert result.returncode == 2, result.stderr
        assert f"--save-dir out would replace --data {given}" in result.stderr
    assert (place / "out/out.txt").read_text() == "hello" and calls(place) == 1
