"""Whether a GPU for FP8, and Transformer Engine, are there, asked before any process trains."""

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
"""Of the first GPUs with FP8 products (Ada); FP8 by blocks begins with Hopper, (9, 0)."""
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.3'"


def check(stage: Stage, geometry: Geometry) -> None:
    """ConfigError, with the fix, when `stage` asks for FP8 or Transformer Engine in vain."""
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
    """What else can be done when Transformer Engine is missing."""
    if stage.fp8 and not stage.no_fp8_of_torch():
        return f"or set layer_spec to local, whose FP8 needs torch alone, or leave {asked} out"
    return f"or leave {asked} out"


def refuse(stage: Stage, asked: str, found: dict[str, Any]) -> None:
    """ConfigError unless what was found on this machine can do what is asked for."""
    fix = f"leave {asked} out"
    if not found["gpus"]:
        why = f" ({found['error']})" if "error" in found else ""
        raise ConfigError(f"{asked} needs a GPU, and torch sees none here{why}; {fix}")
    if stage.transformer_engine:
        _refuse_engine(found, asked, without(stage, asked))
    weakest = tuple(min(found["gpus"]))
    wanted = (9, 0) if stage.fp8_recipe == "blockwise" else CAPABILITY
    if stage.fp8 and weakest < wanted:
        has, needs = (".".join(map(str, pair)) for pair in (weakest, wanted))
        raise ConfigError(
            f"fp8 with fp8_recipe {stage.fp8_recipe} needs GPUs of compute capability {needs} "
            f"(H100, H200 ...), and one here has {has}; {fix}"
        )


def _refuse_engine(found: dict[str, Any], asked: str, otherwise: str) -> None:
    if "error" in found:
        raise ConfigError(
            f"{asked} needs Transformer Engine, which is installed and cannot be imported: "
            f"{found['error']}; install it for this torch ({INSTALL}), {otherwise}"
        )
    if tuple(int(part) for part in found["version"].split(".")[:2]) < OLDEST:
        raise ConfigError(
            f"{asked} needs Transformer Engine 2.3 or later, and {found['version']} is installed: "
            f"{INSTALL}; {otherwise}"
        )
