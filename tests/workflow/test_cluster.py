"""What reaches Slurm: the lines of sbatch and srun, for one node and for several."""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path

import pytest
import yaml

from tests.workflow.project import Project
from tests.workflow.values import VALUES

SBATCH = """#!/bin/sh
# Notes its arguments and refuses: what is asked for is all that the tests look at.
printf '%s\\0' "$@" >"$NOTES/sbatch-$$"
exit 1
"""
SRUN = """#!/bin/sh
# As srun: a task for each node, with what Slurm tells it; our own options end at --gres or before.
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURMD_NODENAME=n1 exec "$@"
"""
EXEC = """#!/bin/sh
# As `apptainer exec`: enters with APPTAINERENV_* alone.
case $1 in --version) echo "apptainer version 1.4.5"; exit ;; version) echo 1.4.5; exit ;; esac
shift
for word; do printf '%s\\0' "$word"; done >>"$NOTES/apptainer"
while [ "${1%.sif}" = "$1" ]; do shift; done
shift
env | grep ^APPTAINERENV_ | sort >>"$NOTES/environment"
exec "$@"
"""


@pytest.fixture
def cluster(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose PATH begins with stand-ins for the programs of a cluster."""
    scripts = {"sbatch": SBATCH, "srun": SRUN, "apptainer": EXEC, "singularity": EXEC}
    scripts |= dict.fromkeys(
        ("sacct", "sacctmgr", "sshare", "sinfo", "squeue", "scontrol"), "#!/bin/sh\n"
    )
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    path = finished.env["PATH"]
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{path}")
    monkeypatch.setenv("NOTES", str(tmp_path))
    return finished


def calls(
    project: Project, tmp_path: Path, *arguments: str, target: str = "stage2_checkpoint"
) -> list[list[str]]:
    """The words of each sbatch call that a run makes before it knows that all are refused."""
    site = ("slurm_account=a", "slurm_partition=p", "runtime=9", "mem_mb=500",
            "slurm_extra='--signal=TERM@300'")  # fmt: skip
    at_once = ("--slurm-init-seconds-before-status-checks", "1")
    options = (*at_once, "--retries", "0", "--default-resources", *site, "--", target)
    output = project.snakemake("--profile", "slurm", *arguments, *options, code=1)
    found = [path.read_text().split("\0")[:-1] for path in tmp_path.glob("sbatch-*")]
    assert found, output
    return found


def submitted(project: Project, tmp_path: Path, *arguments: str) -> list[str]:
    """The words of the one sbatch call that a run makes."""
    (words,) = calls(project, tmp_path, *arguments)
    return words


def test_one_node(cluster: Project, tmp_path: Path) -> None:
    overlay = cluster.overlay(
        "stage1: {seed: 7, num_workers: 2}\n"
        "cluster: {gres: 'gpu:h100', runtime: {stage1_checkpoint: 77}}\n"
    )
    words = submitted(cluster, tmp_path, "--configfile", overlay)
    assert {"--gres=gpu:h100:2", "--nodes=1", "--signal=TERM@300", "--requeue"} <= {*words}
    assert words[words.index("-t") + 1] == "77" and words[words.index("--mem") + 1] == "200000"
    assert "--cpus-per-task=6" in words, "two processes, each with two loader workers"
    assert not [word for word in words if "ntasks" in word and "per-gpu" in word]
    assert "a" in words and "p" in words


def test_several_nodes(cluster: Project, tmp_path: Path) -> None:
    overlay = cluster.overlay(
        "stage2: {nodes: 2, tensor_model_parallel: 2, name: '$(touch canary)'}\n"
        "cluster: {gres: gpu}\nreport: {title: '`touch canary`'}\n"
    )
    words = submitted(cluster, tmp_path, "--configfile", overlay)
    assert {"--gres=gpu:2", "--nodes=2", "--ntasks=2", "--cpus-per-task=2"} <= {*words}
    assert words[words.index("-t") + 1] == "1440"
    assert words[words.index("--comment") + 1] == "rule_stage2_checkpoint"
    assert "canary" not in " ".join(words) and not list(cluster.root.rglob("canary*"))


def test_shares_of_sharding_are_jobs_of_their_own(cluster: Project, tmp_path: Path) -> None:
    overlay = cluster.overlay(
        "tar_shards: {samples_per_shard: 7, workers: 4}\n"
        "cluster: {jobs: {tar_shards: 3}, runtime: {tar_shards: 33}, mem_mb: {tar_shards: 777}}\n"
    )
    found = calls(cluster, tmp_path, "--configfile", overlay, target="tar_shards")
    comments = {words[words.index("--comment") + 1] for words in found}
    assert comments == {f"rule_tar_shards_part_wildcards_{k}-of-3" for k in (1, 2, 3)}
    for words in found:
        assert words[words.index("-t") + 1] == "33" and words[words.index("--mem") + 1] == "777"
        assert {"--ntasks=1", "--cpus-per-task=4", "--requeue", "--signal=TERM@300"} <= {*words}
        assert not [word for word in words if word.startswith(("--array", "--gres"))]


def test_the_plan_shows_what_each_job_asks_for(cluster: Project) -> None:
    (cluster.root / "image.sif").write_text("an image")
    overlay = cluster.overlay(
        "image: image.sif\n"
        "stage2: {nodes: 2, tensor_model_parallel: 2}\n"
        "tar_shards: {samples_per_shard: 7}\n"
        "cluster: {gres: 'gpu:h100', runtime: {stage2_checkpoint: 99}, jobs: {tar_shards: 8}}\n"
    )
    text = cluster.snakemake("--profile", "slurm", "-n", "all", "--configfile", overlay)
    rows = [line.split() for line in text.splitlines() if "image.sif" in line]
    table = {row[0]: row[1:] for row in rows if row[-1] == "image.sif"}
    for rule, row in {
        "stage2_checkpoint": "1 2 gpu:h100:2 2 200000 99 - image.sif",
        "stage1_checkpoint": "1 1 gpu:h100:2 2 200000 1440 - image.sif",
        "hf_model": "1 1 - 1 16000 240 - image.sif",
        "tar_shards_part": "8 1 - 2 16000 240 - image.sif",
        "tar_shards": "1 1 - 2 16000 240 - image.sif",
    }.items():
        assert table[rule] == row.split(), rule
    assert len(re.findall(r"^Shell command: .*shard_tars .*--part=\d/8", text, flags=re.M)) == 8
    (line,) = re.findall(r"^Shell command: (srun .*?)$", text, flags=re.M)
    words = shlex.split(line)
    assert words[:5] == [
        "srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
    ]  # fmt: skip
    assert words[5:8] == ["--gres=gpu:h100:2", "sh", "-c"]
    start = words.index("apptainer")
    end = words.index("python")
    assert words[start:end] == [
        "apptainer", "exec", f"--home={cluster.root}", "--nv", "--cleanenv",
        str(cluster.root / "image.sif"),
    ]  # fmt: skip


def test_nodes_need_slurm(
    cluster: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin/srun").unlink()
    real = [
        folder for folder in cluster.env["PATH"].split(":") if not Path(folder, "srun").exists()
    ]
    monkeypatch.setenv("PATH", ":".join(real))
    overlay = cluster.overlay("stage2: {nodes: 2, tensor_model_parallel: 2}\n")
    text = cluster.snakemake("--cores", "1", "--configfile", overlay, code=1)
    assert "several nodes need Slurm's srun" in text and "Traceback" not in text


def test_through_srun_and_apptainer_values_stay_what_they_are(
    cluster: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through both shells that stand between Snakemake and a launcher on another node."""
    (cluster.root / "image.sif").write_text("an image")
    monkeypatch.setenv("WANDB_API_KEY", "secret '$(touch canary)")
    monkeypatch.setenv("NOT_ASKED_FOR", "x")
    names = " ".join(VALUES)
    stage = {"nodes": 2, "tensor_model_parallel": 2, "name": names, "lang": "jp"}
    overlay = cluster.overlay(
        yaml.safe_dump({"image": "image.sif", "stage2": stage, "cluster": {"gres": "gpu"}})
    )
    cluster.snakemake(
        "--profile", "local", "--cores", "2", "--configfile", overlay, "--", "stage2_checkpoint"
    )
    call = [call for call in cluster.calls() if call["step"] == "stage2_checkpoint"][-1]
    assert call["name"] == names
    passed = (tmp_path / "environment").read_text()
    assert "APPTAINERENV_WANDB_API_KEY=secret '$(touch canary)" in passed
    assert "APPTAINERENV_SLURM_PROCID=0" in passed and "NOT_ASKED_FOR" not in passed
    assert "secret" not in (tmp_path / "apptainer").read_text(), "no key on a command line"
    assert not list(cluster.root.rglob("canary*"))
