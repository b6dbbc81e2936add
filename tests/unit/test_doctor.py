"""The doctor's checks, each against a machine that is well and one that is not."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_steps.checks import disk, partitions, processes, tracking
from llava_steps.checks.finding import Finding
from llava_steps.commands import doctor
from llava_steps.pipeline.rules import chain
from llava_steps.settings import load
from llava_steps.settings.config import Config
from llava_steps.settings.stage.stage import Stage
from tests.unit.test_imports import HEAVY

ROOT = Path(__file__).parents[2]
SINFO = """batch*|up|infinite|3|8|16000|gpu:4
gpu|up|2-00:00:00|2|128|1000000|gpu:h100:8(S:0-1),tmpdisk:100
gpu|up|2-00:00:00|4|64+|500000+|gpu:a100:4(S:0)
short|up|30:00|9|8|64000|(null)
closed|drain|infinite|9|8|64000|(null)
"""
PROFILE = """
default-resources: {slurm_partition: gpu, runtime: 240, mem_mb: 16000}
set-resources: {report: {slurm_partition: short, runtime: 20}}
"""


def program(place: Path, name: str, text: str) -> None:
    place.mkdir(exist_ok=True)
    (place / name).write_text(f"#!/bin/sh\n{text}")
    (place / name).chmod(stat.S_IRWXU)


def config(**changes: Any) -> Config:
    """The demo's configuration with changes by section."""
    arguments = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return load.load([ROOT / "config/config.yaml"], arguments)


def failures(found: list[Finding]) -> list[str]:
    return [str(finding) for finding in found if finding.level == "fail"]


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("infinite", partitions.FOREVER), ("30:00", 30), ("1:30:00", 90), ("2-00:00:00", 2880),
     ("1-12:30:00", 2190), ("n/a", partitions.FOREVER)],
)  # fmt: skip
def test_limits_of_partitions(limit: str, minutes: int) -> None:
    assert partitions.minutes(limit) == minutes


def test_rows_of_sinfo() -> None:
    rows = partitions.parse(SINFO)
    assert [row.partition for row in rows] == ["batch", "gpu", "gpu", "short"]
    assert rows[0].default and rows[0].gpus == {"gpu": 4}
    assert rows[1].gpus == {"gpu": 8, "gpu:h100": 8, "tmpdisk": 100}
    assert (rows[2].cpus, rows[2].mem_mb, rows[2].gpus["gpu:a100"]) == (64, 500000, 4)


def asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], **stage: Any
) -> list[Finding]:
    program(tmp_path / "bin", "sinfo", f"cat <<'E'\n{SINFO}E\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "config.yaml").write_text(PROFILE)
    settled = config(cluster=cluster, stage2=stage)
    return list(partitions.check(chain(settled), settled.cluster, tmp_path / "config.yaml"))


def test_requests_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(
        tmp_path, monkeypatch, {"gres": "gpu:h100"},
        nodes=2, gpus=8, tensor_model_parallel=8, global_batch_size=64,
    )  # fmt: skip
    assert not failures(found)
    (line,) = [str(f) for f in found if "stage2_checkpoint" in f.what]
    assert "gres=gpu:h100:8" in line and "fits partition gpu" in line


@pytest.mark.parametrize(
    ("cluster", "stage", "reason"),
    [
        ({"gres": "gpu:h100"}, {"nodes": 3}, "2 nodes, 3 are requested"),
        ({"gres": "gpu:h200"}, {}, "0 gpu:h200 per node, 2 are requested"),
        ({"runtime": {"stage2_checkpoint": 2881}}, {}, "2880 minutes at most, 2881"),
        ({"mem_mb": {"stage2_checkpoint": 10**6 + 1}}, {}, "1000000 MB per node, 1000001"),
        ({"cpus": {"stage2_checkpoint": 129}}, {}, "128 CPUs per node, 129"),
    ],
)
def test_requests_that_never_run(
    cluster: dict[str, Any], stage: dict[str, Any], reason: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stage = {"global_batch_size": 192} | stage
    found = failures(asked(tmp_path, monkeypatch, cluster, **stage))
    assert any("stage2_checkpoint" in line and reason in line for line in found), found


def test_partitions_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(tmp_path, monkeypatch, {})
    (tmp_path / "config.yaml").write_text("default-resources: {slurm_partition: closed}")
    settled = config()
    found = partitions.check(chain(settled), settled.cluster, tmp_path / "config.yaml")
    assert all("partition 'closed' is not up" in line for line in failures(list(found)))
    program(tmp_path / "bin", "sinfo", "echo slurm_load_partitions: refused >&2; exit 1\n")
    (line,) = partitions.check({}, settled.cluster, tmp_path / "config.yaml")
    assert line.level == "fail" and "refused" in line.found


def test_a_good_directory(tmp_path: Path) -> None:
    found = list(disk.check("store", tmp_path / "new/store"))
    assert not failures(found) and "rename work" in found[0].found
    assert not list((tmp_path / "new/store").iterdir()), "nothing stays"
    assert disk.free_space("store", tmp_path, 1).level == "ok"
    assert disk.free_space("store", tmp_path, 10**18).level == "fail"
    assert disk.free_space("store", tmp_path, None).level == "note"


def test_directories_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (line,) = failures(list(disk.check("store", tmp_path / "file/below")))
    assert "file/below" in line
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)
    found = failures(list(disk.check("store", tmp_path)))
    assert any("two processes can lock one file" in line for line in found)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert any("clock" in line for line in failures(list(disk.check("store", tmp_path))))


def test_wandb() -> None:
    def told(env: dict[str, str], **stage: Any) -> str:
        return "\n".join(map(str, tracking.check([Stage(**stage)], env)))

    assert "wandb is not set for any stage" in told({})
    assert "offline" in told({}, wandb=True)
    closed = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a-secret"}
    online = told(closed, wandb=True, wandb_mode="online")
    assert "127.0.0.1 cannot be reached" in online and "an API key is set" in online
    assert "a-secret" not in online
    assert "offline" in told(closed | {"WANDB_MODE": "offline"}, wandb=True, wandb_mode="online")


def test_harnesses(tmp_path: Path) -> None:
    assert [*doctor.harnesses(config())] == []
    asked = config(lmms_eval={"tasks": ["mme"], "python": "/none/python"})
    (found,) = failures([*doctor.harnesses(asked)])
    assert "lmms_eval.python: /none/python" in found
    program(tmp_path, "python", "echo 'missing: decord' >&2; exit 1")
    asked = config(lmms_eval={"tasks": ["mme"], "python": str(tmp_path / "python")})
    (found,) = failures([*doctor.harnesses(asked)])
    assert "has no working lmms_eval: missing: decord; install it" in found
    program(tmp_path, "python", """echo '["0.4.1", false]'""")
    asked = config(llm_jp_eval_mm={"tasks": {"a": "b"}, "python": str(tmp_path / "python")})
    (ok,) = doctor.harnesses(asked)
    assert ok.level == "ok" and ok.found.startswith("eval_mm 0.4.1 in ")


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, store = tmp_path / "image.sif", str(tmp_path / "store")
    (line,) = processes.image(config(image=str(image), store=store))
    assert line.level == "fail" and "neither a file nor pinned" in line.found
    image.write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    first, second = processes.image(config(image=str(image), store=store))
    assert "sha256:e3b0c44298fc1c149afb" in first.found and second.level == "fail"
    program(tmp_path / "bin", "apptainer", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert not failures(list(processes.image(config(image=str(image), store=store))))


def test_processes_that_answer_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.sif").write_bytes(b"")
    program(tmp_path / "bin", "apptainer", "echo FATAL: no loop devices >&2; exit 255\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    settled = config(image=str(tmp_path / "image.sif"), store=str(tmp_path))
    (line,) = failures(list(processes.here(settled, ["--nv"])))
    assert "no loop devices" in line


def test_nodes_are_asked_for_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line for srun, and what is made of the answers: a node without all its GPUs."""
    rows = [
        {"rank": rank, "host": f"n{rank}", "torch": "2", "megatron": "0", "gpus": ["H100"] * gpus,
         "backend": "nccl", "meet_s": 1.0, "mb_per_s": 10**4}
        for rank, gpus in enumerate((8, 7))
    ]  # fmt: skip
    text = "\n".join(json.dumps(row) for row in rows)
    program(tmp_path / "bin", "srun", f"echo \"$*\" >{tmp_path}/line; cat <<'E'\n{text}\nE\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    settled = config(
        store=str(tmp_path), cluster={"gres": "gpu"},
        stage2={"nodes": 2, "gpus": 8, "global_batch_size": 64, "micro_batch_size": 4},
    )  # fmt: skip
    found = list(processes.on_nodes(settled, "stage2", ["-p", "gpu"], []))
    line = (tmp_path / "line").read_text()
    assert line.startswith("--cpus-per-task=8 --time=10 -p gpu --nodes=2 --ntasks=2 ")
    assert "--gres=gpu:8 python -m llava_steps.launch.probe --place=" in line
    assert any("connected, all-reduce by nccl: 10000 MB/s" in finding.found for finding in found)
    (line,) = failures(found)
    assert "n1 shows 7 GPUs" in line


def test_as_a_whole(tmp_path: Path) -> None:
    """Two real processes meet; nothing is left behind; a line of JSON for each finding."""
    overlay = tmp_path / "own.yaml"
    places = {name: str(tmp_path / name) for name in ("store", "results")}
    overlay.write_text(yaml.safe_dump(places))
    line = [
        sys.executable,
        "-m",
        "llava_steps",
        "doctor",
        "--json",
        "--configfile",
        str(overlay),
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(row) for row in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("2 processes connected, all-reduce by" in row["found"] for row in found)
    left = [path for name in places for path in (tmp_path / name).iterdir()]
    assert not [path for path in left if path.name != "digests.json"]


def test_help_is_light(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from llava_steps.commands import doctor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {*done.stdout.split()} & HEAVY
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "--on-nodes" in capsys.readouterr().out
    assert os.environ.get("SLURM_CONF") or doctor.main(["--configfile", "absent.yaml"]) == 2
