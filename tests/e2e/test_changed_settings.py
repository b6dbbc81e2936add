"""Settings of a stage that its audit reads too, changed on a finished run of the real steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.chain import ROOT, environment
from tests.helpers.patience import PATIENCE

SMALL: dict[str, Any] = {
    "demo_assets": {
        "pretrain_vision_steps": 0, "pretrain_text_steps": 0, "text_layers": 2,
        "vision_layers": 2, "heldout_scans": 24,
    },
    "stage1": {
        "gpus": 1, "tensor_model_parallel": 1, "micro_batch_size": 4, "global_batch_size": 4,
        "train_steps": 1, "warmup_steps": 0,
    },
    "stage2": {
        "gpus": 1, "micro_batch_size": 4, "global_batch_size": 4, "train_steps": 1,
        "warmup_steps": 0,
    },
    "audit": {"samples": 50},
    "evaluation": {"max_new_tokens": 1},
}  # fmt: skip
RETRAINED = ("stage2_checkpoint", "hf_export", "evaluation")


def snakemake(place: Path, *overlays: dict[str, Any]) -> str:
    """A run of `evaluation` with these overlays; its output."""
    names = [f"overlay-{number}.yaml" for number in range(len(overlays))]
    for name, overlay in zip(names, overlays, strict=True):
        (place / name).write_text(yaml.safe_dump(overlay))
    ran = subprocess.run(
        [sys.executable, "-m", "snakemake", "evaluation", "--cores", "2", "--configfile", *names],
        cwd=place, env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def shown(place: Path) -> dict[str, dict[str, Any]]:
    """The manifests that the run shows."""
    files = (place / "results/demo").glob("*/manifest.json")
    return {file.parent.name: json.loads(file.read_bytes()) for file in files}


def test_a_stage_is_trained_exported_and_evaluated_anew(tmp_path: Path) -> None:
    for name in ("workflow", "config"):
        shutil.copytree(ROOT / name, tmp_path / name)
    os.symlink(ROOT / "llava_steps", tmp_path / "llava_steps")
    snakemake(tmp_path, SMALL)
    before = shown(tmp_path)

    snakemake(tmp_path, SMALL, {"stage2": {"seq_length": 240, "lr": 5e-4}})
    changed = shown(tmp_path)
    assert changed["stage2_audit"]["config"]["seq_length"] == 240
    settings = changed["stage2_checkpoint"]["config"]
    assert (settings["seq_length"], settings["lr"]) == (240, 5e-4)
    for name in RETRAINED:
        assert changed[name]["fingerprint"] != before[name]["fingerprint"]
    assert changed["hf_export"]["content"] != before["hf_export"]["content"]
    read = changed["evaluation"]["inputs"]["after_stage2"]["digest"]
    assert read == changed["hf_export"]["content"]
    assert changed["stage1_checkpoint"] == before["stage1_checkpoint"]

    snakemake(tmp_path, SMALL, {"audit": {"samples": 60}, "stage2": {"lr": 2e-4}})
    again = shown(tmp_path)
    assert again["stage2_audit"]["config"]["samples"] == 60
    assert again["stage2_checkpoint"]["config"]["lr"] == 2e-4
    for name in RETRAINED:
        assert again[name]["fingerprint"] not in (
            before[name]["fingerprint"], changed[name]["fingerprint"],
        )  # fmt: skip
