"""Checks for a GPU with FP8, and for Transformer Engine, before any process trains."""

from __future__ import annotations

import importlib.util
from typing import Any

from llava_steps.core.errors import ConfigError
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.layout import check_fp8
from llava_steps.launch.gpus import probe
from llava_steps.settings.stage.stage import Stage

OLDEST = (2, 3)
"""The first Transformer Engine with both recipes."""
CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 products (Ada); blockwise needs Hopper, (9, 0)."""
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.3'"


def check(stage: Stage, geometry: Geometry) -> None:
    """ConfigError, with the fix, when FP8 or Transformer Engine of `stage` cannot run here."""
    engine = stage.transformer_engine
    if not (stage.fp8 or engine):
        return
    asked = "fp8" if stage.fp8 else "layer_spec te"
    if stage.fp8:
        check_fp8(geometry, stage.tensor_model_parallel, stage.fp8_recipe)
    if engine and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"{asked} needs Transformer Engine, and the package is not installed: {INSTALL}; "
            f"{without(stage, asked)}"
        )
    refuse(stage, asked, probe(stage.gpu_ids, engine))


def without(stage: Stage, asked: str) -> str:
    """The alternative to Transformer Engine."""
    if stage.fp8 and not stage.no_fp8_of_torch():
        return f"or set layer_spec to local, whose FP8 needs only torch, or leave {asked} out"
    return f"or leave {asked} out"


def refuse(stage: Stage, asked: str, probed: dict[str, Any]) -> None:
    """ConfigError unless the probed GPUs and packages support the stage."""
    fix = f"leave {asked} out"
    if not probed["gpus"]:
        why = f" ({probed['error']})" if "error" in probed else ""
        raise ConfigError(f"{asked} needs a GPU, but torch sees none here{why}; {fix}")
    if stage.transformer_engine:
        _refuse_engine(probed, asked, without(stage, asked))
    weakest = tuple(min(probed["gpus"]))
    wanted = (9, 0) if stage.fp8_recipe == "blockwise" else CAPABILITY
    if stage.fp8 and weakest < wanted:
        has, needs = (".".join(map(str, pair)) for pair in (weakest, wanted))
        raise ConfigError(
            f"fp8 with fp8_recipe {stage.fp8_recipe} needs GPUs of compute capability {needs} "
            f"(H100, H200 ...), but one here has {has}; {fix}"
        )


def _refuse_engine(probed: dict[str, Any], asked: str, otherwise: str) -> None:
    if "error" in probed:
        raise ConfigError(
            f"{asked} needs Transformer Engine, which is installed but cannot be imported: "
            f"{probed['error']}; install it for this torch ({INSTALL}), {otherwise}"
        )
    if tuple(int(part) for part in probed["version"].split(".")[:2]) < OLDEST:
        raise ConfigError(
            f"{asked} needs Transformer Engine 2.3 or later, but {probed['version']} is installed: "
            f"{INSTALL}; {otherwise}"
        )
