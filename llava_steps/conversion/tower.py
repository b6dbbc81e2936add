"""The vision tower as transformers describes it: its configuration, names and shapes."""

from __future__ import annotations

import torch

from llava_steps.geometry.geometry import Geometry


def tower_config(geometry: Geometry) -> object:
    """The configuration that `AutoModel.from_config` builds the tower from."""
    from transformers import CONFIG_MAPPING

    # Reproducible steps use no dropout; towers ship with 0 anyway.
    settings = {**geometry.vision_config, "attention_dropout": 0.0}
    settings.pop("model_type")
    return CONFIG_MAPPING[geometry.vision_family](**settings)


def tower_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the tower, without allocating it."""
    from transformers import AutoModel

    with torch.device("meta"):
        tower = AutoModel.from_config(tower_config(geometry))
    return {name: tuple(value.shape) for name, value in tower.state_dict().items()}
