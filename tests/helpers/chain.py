"""The chain's first steps at a tiny size, made once for all tests of a session that train.

Everything goes through the steps' command lines, as a user would by hand. Parallel test workers
share one store: whoever comes first computes, the others wait and find.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.patience import PATIENCE
from tests.helpers.zygote import warm

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--pretrain-vision-steps=0",
    "--pretrain-text-steps=0",
    "--text-layers=2",
    "--vision-layers=2",
)

STEPS = (
    ("demo_assets", *SMALL, "--save-dir=results/demo_assets"),
    (
        "shard_tars",
        "--source=results/demo_assets/raw/train.json",
        "--samples-per-shard=300",
        "--save-dir=results/tar_shards",
    ),
    (
        "prepare_energon",
        "--tar-dir=results/tar_shards",
        "--split=9,1,0",
        "--save-dir=results/energon_dataset",
    ),
    (
        "build_hf",
        "--vision-tower=results/demo_assets/vision_tower",
        "--text-model=results/demo_assets/text_model",
        "--save-dir=results/hf_model",
    ),
    ("hf_to_megatron", "--hf-dir=results/hf_model", "--save-dir=results/megatron_checkpoint"),
)


def environment() -> dict[str, str]:
    """The caller's environment with this checkout importable and the hub out of reach."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_step(
    module: str, *flags: str, cwd: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`python -m llava_steps.MODULE FLAGS...`; its log is the failure message of the test.

    What another test worker makes at this moment is waited for, and then found.
    """
    line = [sys.executable, "-m", f"llava_steps.{module}", *flags]
    if module in WARM and not shutil.which("nvidia-smi"):  # CUDA outlives no fork
        out = next((f for f in flags if f.startswith("--save-dir=")), "")
        with alone(cwd, out.rpartition("/")[2]) if out else contextlib.nullcontext():
            result = warm(f"llava_steps.{module}", flags, cwd, environment())
    else:
        result = subprocess.run(
            line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=PATIENCE
        )
    if check:
        assert result.returncode == 0, f"{' '.join(line)}\n{result.stdout}\n{result.stderr}"
    return result


@contextlib.contextmanager
def alone(root: Path, what: str) -> Iterator[None]:
    """One test worker at a time makes `what` in `root`."""
    with open(root / f"{what}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


WARM = ("train", "hf_to_megatron", "megatron_to_hf")
"""Steps that import megatron: forks of a process that has done so (tests/helpers/zygote.py)."""


@dataclass(frozen=True)
class Chain:
    """A directory with results/ and store/ in which the steps up to the conversion are done."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "results/demo_assets/raw"

    @property
    def hf(self) -> Path:
        return self.root / "results/hf_model"

    @property
    def dataset(self) -> Path:
        return self.root / "results/energon_dataset"

    @property
    def checkpoint(self) -> Path:
        return self.root / "results/megatron_checkpoint"

    def train(self, name: str, *flags: str, check: bool = True) -> Path:
        """Train a stage with these flags into results/NAME; returns that directory."""
        run_step("train", *self.train_flags(name), *flags, cwd=self.root, check=check)
        return self.root / "results" / name

    def train_flags(self, name: str) -> Sequence[str]:
        return (
            "--megatron-load-dir=results/megatron_checkpoint",
            "--tokenizer-load-dir=results/hf_model",
            "--data-path=results/energon_dataset",
            f"--save-dir=results/{name}",
            "--precision=fp32",
            "--num-workers=0",
            "--seq-length=256",
        )


def make(root: Path, steps: Sequence[Sequence[str]] = STEPS) -> Chain:
    """Run the steps up to the Megatron checkpoint, or find them done."""
    root.mkdir(parents=True, exist_ok=True)
    with alone(root, "chain"):
        done = root / "done"
        if not done.exists():
            for module, *flags in steps:
                run_step(module, *flags, cwd=root)
            done.touch()
    return Chain(root)


def shared(factory: pytest.TempPathFactory) -> Path:
    """The temporary directory that all parallel test workers of this session have in common."""
    base = factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


def metrics(directory: Path) -> list[dict]:
    """The steps that a training reported."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def logged(directory: Path) -> str:
    """What the first attempt of a training logged: its launcher, then its rank 0."""
    logs = (directory / "metrics.jsonl").resolve().parent / ".work/logs"
    return "".join((logs / name).read_text() for name in ("attempt-0001.log", "rank-0000.log"))


def sample_ids(directory: Path) -> list[list[str]]:
    """Ids of each global batch, in the order of the sample stream, whatever the DP size."""
    files = sorted((directory / "samples").glob("dp_*.jsonl"))
    rows = [[json.loads(line) for line in f.read_text().splitlines()] for f in files]
    steps = []
    for parts in zip(*rows, strict=True):
        assert len({p["step"] for p in parts}) == 1
        placed = {
            place: i
            for part in parts
            for ids, places in zip(part["ids"], part["places"], strict=True)
            for i, place in zip(ids, places, strict=True)
        }
        steps.append([placed[place] for place in range(len(placed))])
    return steps
