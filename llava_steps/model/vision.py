"""The vision tower: the Hugging Face module itself, read at one hidden state.

No mapping has to follow transformers: the tower's parameters keep their names. So do the parts that
never run (layers after the one that is read, the last norm, a pooling head), so that the round trip
to safetensors is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_steps.conversion.tower import tower_config
from llava_steps.geometry.geometry import Geometry


def build_tower(geometry: Geometry, dtype: torch.dtype) -> Any:
    """The tower on the current device, its weights undefined until a checkpoint is loaded."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    with no_init_weights():
        tower = AutoModel.from_config(tower_config(geometry))
    tower = tower.to(device=torch.cuda.current_device(), dtype=dtype)
    # Parts after the hidden state that is read can never receive a gradient.
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(_is_read(name, geometry.feature_depth))
    return tower


def _is_read(name: str, depth: int) -> bool:
    if name.startswith(("embeddings.", "pre_layrnorm.")):
        return True
    if not name.startswith("encoder.layers."):
        return False
    return int(name.split(".")[2]) < depth


def plain_layer(layer: Any, hidden: Tensor) -> Tensor:
    """One layer of the tower, [n, positions, vision_hidden] -> the same."""
    out: Tensor = layer(hidden, None)
    return out


def image_features(
    tower: Any, pixels: Tensor, geometry: Geometry, run: Callable[..., Tensor] = plain_layer
) -> Tensor:
    """pixels [n, 3, H, W] -> features [n, tokens_per_image, vision_hidden], HF semantics.

    hidden_states[k] is the input of layer k (after CLIP's pre_layrnorm), so only the first k
    layers run; "default" drops the first position, whatever it is. `run` runs a layer.
    """
    first = next(tower.parameters())
    hidden: Tensor = tower.embeddings(pixels.to(device=first.device, dtype=first.dtype))
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[: geometry.feature_depth]:
        hidden = run(layer, hidden)
    return hidden[:, 1:] if geometry.select_strategy == "default" else hidden


@torch.no_grad()
def shared_image_features(
    tower: Any,
    pixels: Tensor,
    geometry: Geometry,
    group: dist.ProcessGroup,
    run: Callable[..., Tensor] = plain_layer,
) -> Tensor:
    """image_features of a frozen tower: each rank of `group` encodes its share, all get all.

    Every rank passes the same pixels. The last image is repeated for equal parts of the gather.
    """
    ranks, images = group.size(), pixels.shape[0]
    if ranks == 1:
        return image_features(tower, pixels, geometry, run)
    share = -(-images // ranks)
    mine = torch.arange(group.rank() * share, (group.rank() + 1) * share, device=pixels.device)
    some = pixels[mine.clamp_(max=images - 1)]
    local = image_features(tower, some, geometry, run).contiguous()
    gathered = local.new_empty(ranks * share, *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered[:images]
