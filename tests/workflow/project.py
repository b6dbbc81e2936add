"""A copy of the project: the real workflow and core, with steps that only note their call.

The stub steps go through the real entry (settings, fingerprint, lease, store, publish), so that
what Snakemake and the store decide is what they decide for the real steps, in seconds.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

ROOMS = ("core", "settings", "geometry", "store", "pipeline", "planning", "commands")
"""What the workflow itself needs of the package."""

STUB = '''
"""What every stub step does."""
import json, os, time
from pathlib import Path
from llava_steps.settings.fields import facts

def hub(name):
    """Fields that may name a model on the hub, which the stub does not ask."""
    return dict.fromkeys(HUB, lambda text, fetch: Path(text)) if name == "hf_model" else {}

HUB = ("vision_tower", "text_model")

def work(ctx, cfg):
    step = ctx.entry.parent.name
    fields = type(cfg).model_fields
    values = {k: getattr(cfg, k) for k in fields if facts(fields[k]).role == "value"}
    given = {k: getattr(cfg, k) for k in fields if facts(fields[k]).role != "value"}
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **values, **given}) + "\\n")
    for name in ("train.json", "heldout.json"):
        if step == "demo_assets":
            (ctx.entry / "raw").mkdir(exist_ok=True)
            (ctx.entry / "raw" / name).write_text(name)
    for name in ("vision_tower", "text_model"):
        if step == "demo_assets":
            (ctx.entry / name).mkdir(exist_ok=True)
            (ctx.entry / name / "config.json").write_text("{}")
    if step in ("report", "comparison"):
        (ctx.entry / f"{step}.html").write_text(step)
    if step == "blend":
        rows = [
            {"path": os.path.relpath(item.path.resolve(), ctx.entry), "repetitions": 1}
            for key, item in ctx.inputs.items()
            if key.startswith("datasets.")
        ]
        head = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
        blend = head | {"splits": {"train": {"blend_epochized": rows}}}
        (ctx.entry / "blend.yaml").write_text(json.dumps(blend))
    while Path(f"hold-{step}").exists():
        time.sleep(0.02)
    inputs = {k: v.digest for k, v in ctx.inputs.items()}
    (ctx.entry / "out.json").write_text(json.dumps([step, values, inputs]))
    return {}
'''

STEP = '''
"""Stub."""
from llava_steps import stub
from llava_steps.settings.{settings} import {config}
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

def run(ctx: Context, cfg: {config}):
    return stub.work(ctx, cfg)

STEP = Step(name={name}, config={config}, run=run, doc=__doc__, resolve=stub.hub({name}))
if __name__ == "__main__":
    main(STEP)
'''

MODULES = {
    "demo_assets": ("demo_assets.DemoAssets", "'demo_assets'"),
    "shard_tars": ("dataset.TarShards", "'tar_shards'"),
    "prepare_energon": ("dataset.EnergonDataset", "'energon_dataset'"),
    "build_hf": ("conversion.HfModel", "'hf_model'"),
    "hf_to_megatron": ("conversion.MegatronCheckpoint", "'megatron_checkpoint'"),
    "blend": ("blend_file.BlendFile", "'blend'"),
    "audit": ("dataset.Audit", "lambda cfg: f'stage{cfg.stage}_audit'"),
    "train": ("stage.stage.Stage", "lambda cfg: f'stage{cfg.stage}_checkpoint'"),
    "megatron_to_hf": ("conversion.HfExport", "'hf_export'"),
    "evaluate": ("evaluation.Evaluation", "'evaluation'"),
    "lmms_eval": ("evaluation.LmmsEval", "'lmms_eval'"),
    "llm_jp_eval_mm": ("evaluation.LlmJpEvalMm", "'llm_jp_eval_mm'"),
    "report": ("report.Report", "'report'"),
    "compare": ("comparison.Comparison", "'comparison'"),
}

# Of the shipped configuration, which asks for no benchmark.
RULES = [
    "demo_assets",
    "tar_shards",
    "energon_dataset",
    "hf_model",
    "megatron_checkpoint",
    "stage1_audit",
    "stage2_audit",
    "stage1_checkpoint",
    "stage1_export",
    "stage2_checkpoint",
    "hf_export",
    "evaluation",
    "report",
]


@functools.cache
def zygote() -> subprocess.Popen[str]:
    """The process that makes the calls of this test session (see zygote.py)."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


@dataclass
class Project:
    """A copy of the project in which snakemake runs."""

    root: Path

    def snakemake(self, *arguments: str, code: int = 0) -> str:
        """stdout and stderr of a call that ends with `code`."""
        with tempfile.NamedTemporaryFile("r") as file:
            request = {
                "arguments": arguments, "cwd": str(self.root), "env": self.env, "output": file.name,
            }  # fmt: skip
            server = zygote()
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            ended = int(server.stdout.readline())
            output = file.read()
        assert ended == code, output
        return output

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A call in a process group of its own, to be killed; the output is thrown away."""
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SNAKEMAKE")}
        return kept | {"PYTHONPATH": str(self.root)}

    def planned(self, *arguments: str) -> list[str]:
        """Rules that a dry run would execute, sorted, `all` left out."""
        output = self.snakemake("--cores", "2", "-n", *arguments)
        return sorted(set(re.findall(r"^(?:local)?rule (\w+):", output, flags=re.M)) - {"all"})

    def run(self, *arguments: str) -> list[str]:
        """Rules that a real run executed, sorted, `all` left out."""
        output = self.snakemake("--cores", "2", *arguments)
        return sorted(set(re.findall(r"^(?:local)?rule (\w+):", output, flags=re.M)) - {"all"})

    def calls(self) -> list[dict[str, Any]]:
        """What the steps were called with, in order."""
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget_calls(self) -> None:
        (self.root / "calls.jsonl").unlink(missing_ok=True)

    def overlay(self, text: str, name: str = "overlay.yaml") -> str:
        (self.root / name).write_text(text)
        return name

    def manifest(self, rule: str, run: str = "demo") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.root / "results" / run / rule / "manifest.json").read_text()
        )
        return found


def make_project(root: Path) -> Project:
    """A project with stub steps in a new directory, in which nothing has run."""
    package = root / "llava_steps"
    skip = shutil.ignore_patterns("__pycache__")
    for room in ROOMS:
        shutil.copytree(ROOT / "llava_steps" / room, package / room, ignore=skip)
    shutil.copy(ROOT / "llava_steps/__init__.py", package)
    (package / "stub.py").write_text(STUB)
    for module, (path, name) in MODULES.items():
        settings, _, config = path.rpartition(".")
        stub = STEP.format(settings=settings, config=config, name=name)
        (package / f"{module}.py").write_text(stub)
    for folder in ("workflow", "config"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    for link in ("slurm", "local"):
        (root / link).symlink_to((ROOT / link).readlink())
    return Project(root)
