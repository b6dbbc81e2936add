"""What is looked at after the chain has run on the cluster."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.cluster.machine import processes, sh, tasks_of
from tests.cluster.project import NASTY, SECRETS, SHARES, Project

NUMBERS = range(1, SHARES + 1)


def check_result(project: Project) -> None:
    """What ran where, and that the export is a trained model."""
    image = "sha256:" + hashlib.sha256(project.image.read_bytes()).hexdigest()
    assert project.manifest("stage2_checkpoint")["image"] == image
    jobs = sh("sacct", "-nXP", "-S", "now-2hours", "-o", "JobID,NNodes,State,Comment")
    rows = [line.split("|") for line in jobs.splitlines()]
    nodes = {row[3].removeprefix("rule_").partition("_wildcards")[0]: row[1] for row in rows}
    assert nodes.get("stage2_checkpoint", nodes.get("stage2_checkpoint_")) == "2", jobs
    assert all(row[2] == "COMPLETED" for row in rows), jobs
    before, after = (
        load_file(next((project.out / rule).glob("*.safetensors")))
        for rule in ("hf_model", "hf_export")
    )
    assert before.keys() == after.keys()
    changed = [name for name in after if not after[name].equal(before[name])]
    assert any("projector" in name for name in changed) and len(changed) > 4
    assert not [name for name in changed if "vision_tower" in name], "the tower is frozen"
    assert json.loads((project.out / "evaluation/results.json").read_text())
    assert project.manifest("report")["config"]["title"] == NASTY
    for job in ("job.json", "node-0001.json"):
        given = json.loads((project.entry() / ".work" / job).read_text())
        assert given["stage"]["name"] == NASTY, job
    assert not list(project.place.rglob("canary*")), "a value was taken for code"


def check_doctor(project: Project) -> None:
    """It sees this cluster as it is: partitions, image, processes that meet on two nodes."""
    done = subprocess.run(
        [
            sys.executable, "-m", "llava_steps", "doctor", "--json", "--configfile", "tiny.yaml",
            "--profile", "slurm", "--on-nodes", "--srun=-A test -p batch --mem=3000",
            "--apptainer-args=--cleanenv",
        ],
        cwd=project.place, capture_output=True, text=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and found, done.stdout + done.stderr
    told = "\n".join(f"{row['what']}: {row['found']}" for row in found)
    assert "stage2_checkpoint: nodes=2 gres=gpu:2" in told and "fits partition batch" in told, told
    assert "nodes of stage 2: 2 processes connected, all-reduce by gloo" in told, told


def check_shares(project: Project) -> None:
    """Sharding in several jobs: the bytes of one call, and nothing else is left."""
    jobs = sh("sacct", "-nXP", "-S", "now-2hours", "-o", "Comment,State").split()
    wanted = {f"rule_tar_shards_part_wildcards_{k}-of-{SHARES}|COMPLETED" for k in NUMBERS}
    assert {job for job in jobs if "tar_shards_part" in job} == wanted, jobs
    sh(
        "apptainer", "exec", f"--home={project.place}", "--cleanenv", project.image,
        "python", "-m", "llava_steps.shard_tars", "--samples-per-shard=500",
        "--source=results/tiny/demo_assets/raw/train.json",
        "--store=alone/store", "--save-dir=alone/shown", cwd=project.place,
    )  # fmt: skip
    alone = json.loads((project.place / "alone/shown/manifest.json").read_text())
    made = project.manifest("tar_shards")
    assert made["content"] == alone["content"] and made["files"] == alone["files"]
    assert made["metrics"] == alone["metrics"] and made["metrics"]["shards"] >= SHARES
    assert len(list((project.store / "tar_shards").iterdir())) == 1
    assert not list(project.out.glob("*parts*"))


def check_secrets_travel(job: str) -> None:
    """Workers are given the secrets of W&B and the hub, by their environment, and no other."""
    lines = [line for _, _, line in processes()]
    assert not [line for line in lines if any(text.encode() in line for text in SECRETS.values())]
    pids = tasks_of(job, 1, b"training.worker")
    for pid in pids:
        names = Path(f"/proc/{pid}/environ").read_bytes()
        given = {name for name, text in SECRETS.items() if text.encode() in names}
        assert given == {"WANDB_API_KEY", "HF_TOKEN"}, given
    assert pids, "no worker to look at"


def secrets_found(project: Project, state: Path) -> list[str]:
    """Files, job scripts and parts of the image that hold a planted secret."""
    texts = [text.encode() for text in SECRETS.values()]
    looked, found = 0, []
    for root in (project.place, state / "log"):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                looked += 1
                found += [str(path) for text in texts if text in data]
    offline = [path for path in project.store.rglob("*.wandb") if path.stat().st_size]
    assert offline, "no W&B offline file was written"
    assert looked > 100, "hardly a file to look at"
    numbers = sh("sacct", "-nXP", "-S", "now-3hours", "-o", "JobID").split()
    scripts = "".join(sh("sacct", "-B", "-j", number, check=False) for number in numbers)
    assert "#!/bin/sh" in scripts, "no job script was kept"
    shown = sh("scontrol", "show", "job") + sh("sacct", "-nP", "-S", "now-3hours", "-o", "ALL")
    labels = sh("apptainer", "inspect", "--all", project.image)
    given = sh("apptainer", "exec", "--cleanenv", project.image, "env")
    for what, text in (
        ("job script", scripts), ("Slurm", shown), ("labels", labels), ("environment", given),
    ):  # fmt: skip
        found += [what for value in SECRETS.values() if value in text]
    places = ("/opt", "/etc", "/root", "/var", "/usr/local", "/.singularity.d")
    inside = sh(
        "apptainer", "exec", "--cleanenv", "--no-mount", "home,tmp,cwd", project.image,
        "grep", "-rlsF", "--exclude=*.so*", "--exclude=*.pyc", "\n".join(SECRETS.values()), *places,
        check=False,
    )  # fmt: skip
    return found + [f"image: {line}" for line in inside.splitlines()]
