"""python -m tests.cluster.drive: the tiny chain on a real Slurm, in a real Apptainer container.

Installs both on this Debian machine, as root, builds environments/cpu.def, runs `snakemake
--profile slurm all` with stage 1 on one node and stage 2 on two, looks at the result, and disturbs
stage 2 --rounds times in each way: the weights must be those of the undisturbed run. Ends with one
line of JSON; nothing is left running.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tests.workflow.values import HOSTILE

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PLACE = Path("/tmp/llava-steps-cluster")
NASTY = " ".join(HOSTILE)
"""A label of stage 2 and the title of the report, which must arrive as they are."""
OVERLAY = """
run: tiny
image: cpu.sif
demo_assets: {pretrain_vision_steps: 0, pretrain_text_steps: 0, text_layers: 2, vision_layers: 2}
cluster:
  gres: gpu
  mem_mb: {stage1_checkpoint: 3000, stage2_checkpoint: 3000}
  runtime: {stage1_checkpoint: 20, stage2_checkpoint: 20}
stage1:
  {gpus: 1, tensor_model_parallel: 1, micro_batch_size: 4, global_batch_size: 4, train_steps: 4,
   warmup_steps: 1, save_interval: 2, wandb: true}
stage2:
  {nodes: 2, gpus: 2, tensor_model_parallel: 2, micro_batch_size: 2, global_batch_size: 4,
   train_steps: 60, warmup_steps: 2, save_interval: 5, stall_timeout: 600}
audit: {samples: 20}
evaluation: {max_new_tokens: 2}
"""
SITE = (
    "slurm_account=test", "slurm_partition=batch", "runtime=20", "mem_mb=3000",
    "slurm_extra='--signal=TERM@50'",
)  # fmt: skip
SECRETS = {
    name: f"planted-{name.lower()}-8d1f"
    for name in (
        "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN", "OPENAI_API_KEY", "NGC_API_KEY", "DATABASE_PASSWORD",
    )
}  # fmt: skip
PATIENCE = 900.0
"""Seconds that anything may take; a loaded machine is slow."""


def sh(*words: str | Path, check: bool = True) -> str:
    """stdout of a command; one that fails tells the end of what it wrote."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{words[0]}: {done.stdout[-3000:]}{done.stderr[-6000:]}")
    return done.stdout


def left_running(state: Path) -> list[str]:
    """Command lines of processes that this run started, by their directories."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            names = (path / "environ").read_bytes().split(b"\0")
            started = f"STATE={state}".encode() in names
            if started or PLACE in (where := (path / "cwd").readlink(), *where.parents):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line]


def until(what: str, condition: Callable[[], Any]) -> Any:
    """The first value of `condition` that counts as true."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.3)
    return value


class Cluster:
    """The project in a directory of its own, and its runs."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = place / "store"
        self.out = place / "results/tiny"
        self.running: subprocess.Popen[bytes] | None = None

    def copy(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for name in ("llava_steps", "workflow", "config", "slurm", "pyproject.toml"):
            sh("cp", "-a", ROOT / name, self.place / name)
        settings = yaml.safe_load(OVERLAY) | {"report": {"title": NASTY}}
        settings["stage2"]["name"] = NASTY
        (self.place / "tiny.yaml").write_text(yaml.safe_dump(settings))

    def start(self, *targets: str) -> subprocess.Popen[bytes]:
        """snakemake --profile slurm, as a user would, with this machine's site settings."""
        line = [
            sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", "tiny.yaml",
            "--apptainer-args=--cleanenv", "--latency-wait", "20", "--default-resources", *SITE,
            "--slurm-init-seconds-before-status-checks", "2", "--", *targets,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SNAKEMAKE")}
        with (self.place / "snakemake.log").open("ab") as log:
            self.running = subprocess.Popen(
                line, cwd=self.place, stdout=log, stderr=log, start_new_session=True,
                env=environment | SECRETS | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return self.running

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a run, which must end well."""
        code = process.wait(timeout=4 * PATIENCE)
        self.running = None
        assert code == 0, self.logs()

    def logs(self) -> str:
        """The end of every log of a run that failed."""
        texts = [(self.place / "snakemake.log").read_text()[-6000:]]
        found = [*self.place.glob(".snakemake/slurm_logs/**/*.log")]
        for path in sorted(found, key=lambda p: p.stat().st_mtime)[-3:]:
            texts.append(f"--- {path}\n{path.read_text()[-4000:]}")
        return "\n".join(texts)

    def manifest(self, rule: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / rule / "manifest.json").read_text())
        return found

    @property
    def stage2(self) -> Path:
        """Store entry of stage 2 while it is trained."""
        return self.out / "stage2_checkpoint/work"

    def entry(self) -> Path:
        """Store entry of stage 2, the only one."""
        (found,) = (self.store / "stage2_checkpoint").iterdir()
        return found

    def steps(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return len((self.stage2 / "metrics.jsonl").read_text().splitlines())
        return 0

    def job(self) -> str:
        """Slurm's number of the job that trains stage 2."""
        lease = json.loads((self.stage2 / ".work/lease.json").read_text())
        return str(lease["slurm_job_id"])


def forget_stage2(cluster: Cluster) -> None:
    """As if stage 2 and what follows had never run."""
    shutil.rmtree(cluster.store / "stage2_checkpoint", ignore_errors=True)
    shutil.rmtree(cluster.out / "stage2_checkpoint", ignore_errors=True)


def requeue(cluster: Cluster, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    job = cluster.job()
    sh("scontrol", "requeue", job)
    until("the job to wait", lambda: "PENDING" in sh("squeue", "-h", "-j", job, "-o", "%T"))
    time.sleep(3)  # Slurm takes no new start time at once
    sh("scontrol", "update", f"JobId={job}", "StartTime=now")
    return process


def time_limit(cluster: Cluster, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    job = cluster.job()
    # Slurm looks at limits once in a while: the training must not end before. A worker that is
    # stopped keeps all others waiting, and the signal that came is seen by it when it goes on.
    worker = processes(job, 1, b"training.worker")[0]
    os.kill(worker, signal.SIGSTOP)
    minutes = int(sh("squeue", "-h", "-j", job, "-o", "%M").split(":")[-2]) + 2
    sh("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    asked = 1 << signal.SIGTERM - 1
    status = Path(f"/proc/{worker}/status")

    def told() -> bool:
        pending = re.findall(r"^\w+Pnd:\t(\w+)", status.read_text(), flags=re.M)
        return any(int(mask, 16) & asked for mask in pending)

    until("the signal before the time limit", told)
    os.kill(worker, signal.SIGCONT)
    return process


def killed_step(cluster: Cluster, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    for pid in processes(cluster.job(), 1, b"llava_steps.train"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process


def processes(job: str, node: int, word: bytes) -> list[int]:
    """Processes of a job's task on a node, by a word of their command lines."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={node}".encode()}

    def now() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                names = (path / "environ").read_bytes().split(b"\0")
                if wanted <= {*names} and word in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    return list(until(f"processes of node {node}", now))


def killed_controller(
    cluster: Cluster, process: subprocess.Popen[bytes]
) -> subprocess.Popen[bytes]:
    process.kill()
    process.wait()
    return cluster.start("stage2_checkpoint")


DISTURBANCES = (requeue, time_limit, killed_step, killed_controller)


def disturbed(cluster: Cluster, how: Callable[..., subprocess.Popen[bytes]]) -> dict[str, Any]:
    """Train stage 2 again, disturb it, and compare."""
    wanted = cluster.manifest("stage2_checkpoint")["content"]
    forget_stage2(cluster)
    process = cluster.start("stage2_checkpoint")
    until(
        "some steps of stage 2",
        lambda: cluster.steps() >= 8 or process.poll() is not None,
    )
    assert process.poll() is None, cluster.logs()
    began = time.monotonic()
    cluster.end(how(cluster, process))
    found = cluster.manifest("stage2_checkpoint")
    assert found["content"] == wanted, f"{how.__name__}: other weights"
    assert (found["attempts"] > 1) == (how is not killed_controller), "nothing was disturbed"
    log = (cluster.entry() / ".work/lease.log").read_text()
    events = [json.loads(line) for line in log.splitlines()]
    holder = None
    for event in events:
        who = (event["pid"], event["started"])
        if event["event"] == "given back":
            assert who == holder, events
            holder = None
        else:
            # Taken over from a holder whose process was gone, as the kernel said.
            assert holder is None or event["event"] == "taken over", events
            holder = who
    assert holder is None
    return {"seconds": round(time.monotonic() - began), "attempts": found["attempts"]}


def check_result(cluster: Cluster) -> None:
    """What ran where, and that the export is a trained model."""
    image = "sha256:" + hashlib.sha256((cluster.place / "cpu.sif").read_bytes()).hexdigest()
    assert cluster.manifest("stage2_checkpoint")["image"] == image
    jobs = sh("sacct", "-nXP", "-S", "now-2hours", "-o", "JobID,NNodes,State,Comment")
    rows = [line.split("|") for line in jobs.splitlines()]
    nodes = {row[3].removeprefix("rule_").partition("_wildcards")[0]: row[1] for row in rows}
    assert nodes.get("stage2_checkpoint", nodes.get("stage2_checkpoint_")) == "2", jobs
    assert all(row[2] == "COMPLETED" for row in rows), jobs
    before, after = (
        load_file(next((cluster.out / rule).glob("*.safetensors")))
        for rule in ("hf_model", "hf_export")
    )
    assert before.keys() == after.keys()
    changed = [name for name in after if not after[name].equal(before[name])]
    assert any("projector" in name for name in changed) and len(changed) > 4
    assert not [name for name in changed if "vision_tower" in name], "the tower is frozen"
    assert json.loads((cluster.out / "evaluation/results.json").read_text())
    assert cluster.manifest("report")["config"]["title"] == NASTY
    for job in ("job.json", "node-0001.json"):
        given = json.loads((cluster.entry() / ".work" / job).read_text())
        assert given["stage"]["name"] == NASTY, job
    assert not list(cluster.place.rglob("canary*")), "a value was taken for code"


def check_doctor(cluster: Cluster) -> None:
    """It sees this cluster as it is: partitions, image, processes that meet on two nodes."""
    done = subprocess.run(
        [
            sys.executable, "-m", "llava_steps.doctor", "--json", "--configfile", "tiny.yaml",
            "--profile", "slurm", "--on-nodes", "--srun=-A test -p batch --mem=3000",
            "--apptainer-args=--cleanenv",
        ],
        cwd=cluster.place, capture_output=True, text=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and found, done.stdout + done.stderr
    told = "\n".join(f"{row['what']}: {row['found']}" for row in found)
    assert "stage2_checkpoint: nodes=2 gres=gpu:2" in told and "fits partition batch" in told, told
    assert "nodes of stage 2: 2 processes met and added up by gloo" in told, told


def secrets_found(cluster: Cluster, state: Path) -> list[str]:
    """Files, job scripts and labels of the image that hold a planted secret."""
    found = []
    for root in (cluster.place, state / "log"):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                found += [str(path) for text in SECRETS.values() if text.encode() in data]
    numbers = sh("sacct", "-nXP", "-S", "now-2hours", "-o", "JobID").split()
    scripts = "".join(sh("sacct", "-B", "-j", number, check=False) for number in numbers)
    inside = sh("apptainer", "exec", "--cleanenv", cluster.place / "cpu.sif", "env")
    labels = sh("apptainer", "inspect", "--all", cluster.place / "cpu.sif")
    for what, text in (("job script", scripts), ("image", inside + labels)):
        found += [what for value in SECRETS.values() if value in text]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="disturbances of each kind")
    parser.add_argument("--image", type=Path, help="use this image instead of building it")
    parser.add_argument("--go-on", action="store_true", help=f"use what --keep left in {PLACE}")
    parser.add_argument("--keep", action="store_true", help=f"leave {PLACE} behind")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("make test-cluster installs packages and starts daemons: run it as root")
    state = Path(os.environ.setdefault("STATE", "/var/lib/llava-steps-cluster"))
    os.environ["SLURM_CONF"] = "/etc/slurm/slurm.conf"
    began = time.monotonic()
    report: dict[str, Any] = {"ok": False}
    cluster = Cluster(PLACE)

    def lap(name: str) -> None:
        report[f"{name}_s"] = round(time.monotonic() - began - sum(
            value for key, value in report.items() if key.endswith("_s")
        ))  # fmt: skip
        print(f"{name}: {report[f'{name}_s']} s", file=sys.stderr, flush=True)

    try:
        if not arguments.go_on:
            cluster.copy()
        sh(HERE / "apptainer.sh")
        lap("apptainer")
        sh(HERE / "slurm.sh", "up")
        lap("slurm")
        if arguments.image:
            shutil.copy(arguments.image, PLACE / "cpu.sif")
        elif not (PLACE / "cpu.sif").exists():
            os.environ["PYTHON"] = sys.executable
            sh(HERE / "build_image.sh", PLACE / "cpu.sif")
        lap("image")
        cluster.end(cluster.start("all"))
        check_result(cluster)
        lap("chain")
        check_doctor(cluster)
        lap("doctor")
        for how in DISTURBANCES:
            report[how.__name__] = [disturbed(cluster, how) for _ in range(arguments.rounds)]
            lap(how.__name__)
        report["secrets_found"] = secrets_found(cluster, state)
        assert not report["secrets_found"], report["secrets_found"]
        report["ok"] = True
    except (AssertionError, subprocess.SubprocessError, OSError) as error:
        report["error"] = str(error)[-9000:]
        print(report["error"], file=sys.stderr)
        report["error"] = report["error"][:300]
    finally:
        if cluster.running is not None and cluster.running.poll() is None:
            os.killpg(cluster.running.pid, signal.SIGKILL)
        sh(HERE / "slurm.sh", "down", check=False)
        left = left_running(state)
        if left and report["ok"]:
            report |= {"ok": False, "error": f"still running: {left}"}
        if not arguments.keep and report["ok"]:
            shutil.rmtree(PLACE, ignore_errors=True)
    report["seconds"] = round(time.monotonic() - began)
    print(json.dumps(report))
    sys.exit(not report["ok"])


if __name__ == "__main__":
    main()
