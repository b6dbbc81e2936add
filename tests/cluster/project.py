"""The project in a directory of its own, run as a user would on the cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.machine import PATIENCE, sh
from tests.workflow.values import HOSTILE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NASTY = " ".join(HOSTILE)
"""The label of stage 2 and the title of the report, which must arrive as they are."""
SHARES = 4
"""Jobs that make the tar shards."""
OVERLAY = f"""
run: tiny
image: cpu.sif
demo_assets: {{pretrain_vision_steps: 0, pretrain_text_steps: 0, text_layers: 2, vision_layers: 2}}
cluster:
  jobs: {{tar_shards: {SHARES}}}
  gres: gpu
  mem_mb: {{stage1_checkpoint: 3000, stage2_checkpoint: 3000}}
  runtime: {{stage1_checkpoint: 20, stage2_checkpoint: 20}}
stage1:
  {{gpus: 1, tensor_model_parallel: 1, micro_batch_size: 4, global_batch_size: 4, train_steps: 4,
   warmup_steps: 1, save_interval: 2, wandb: true}}
stage2:
  {{nodes: 2, gpus: 2, tensor_model_parallel: 2, micro_batch_size: 2, global_batch_size: 4,
   train_steps: 60, warmup_steps: 2, save_interval: 5, stall_timeout: 600}}
audit: {{samples: 20}}
evaluation: {{max_new_tokens: 2}}
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


class Project:
    """Its directory, its runs, and what they made."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = place / "store"
        self.out = place / "results/tiny"
        self.image = place / "cpu.sif"
        self.running: subprocess.Popen[bytes] | None = None

    def copy(self) -> None:
        """A fresh copy of this checkout, with the tiny configuration."""
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
            sys.executable, HERE / "eager.py", "--profile", "slurm", "--configfile", "tiny.yaml",
            "--apptainer-args=--cleanenv", "--latency-wait", "20", "--default-resources", *SITE,
            "--slurm-init-seconds-before-status-checks", "2", "--", *targets,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SNAKEMAKE")}
        with (self.place / "snakemake.log").open("ab") as log:
            self.running = subprocess.Popen(
                line, cwd=self.place, stdout=log, stderr=log, start_new_session=True,
                env=environment | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return self.running

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a run, which must end well."""
        code = process.wait(timeout=4 * PATIENCE)
        self.running = None
        assert code == 0, self.logs()

    def log(self) -> str:
        """What snakemake has told so far, in all its runs."""
        return (self.place / "snakemake.log").read_text()

    def logs(self) -> str:
        """The end of every log of a run that failed."""
        texts = [self.log()[-6000:]]
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

    def undisturbed(self) -> str:
        """Content of stage 2 as the chain made it, which its export has noted."""
        noted: str = self.manifest("hf_export")["inputs"]["megatron_dir"]["digest"]
        return noted

    def forget_stage2(self) -> None:
        """As if stage 2 and what follows had never run."""
        shutil.rmtree(self.store / "stage2_checkpoint", ignore_errors=True)
        shutil.rmtree(self.out / "stage2_checkpoint", ignore_errors=True)

    def steps(self) -> int:
        """How many steps stage 2 has made so far."""
        with contextlib.suppress(FileNotFoundError):
            return len((self.stage2 / "metrics.jsonl").read_text().splitlines())
        return 0

    def job(self) -> str:
        """Slurm's number of the job that trains stage 2."""
        lease = json.loads((self.stage2 / ".work/lease.json").read_text())
        return str(lease["slurm_job_id"])
