"""Exchange between the ranks of one data-parallel replica."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.model.attention import upload
from llava_steps.training import parallel


def whole_images(batch: MicroBatch) -> Tensor | None:
    """float32 [num_images, 3, H, W] of a row, on this rank's device; None off the first stage.

    Each tensor-parallel rank has decoded its part (`data.batch.image_share`); here every rank of
    the first stage gets all. A collective call of theirs, unless the row has no image.
    """
    own = batch.pixel_values
    if own is None:
        return None
    own = upload(own, parallel.device())
    parts = ps.get_tensor_model_parallel_world_size()
    if parts == 1:
        return own
    share = -(-batch.num_images // parts)
    padded = own.new_zeros(share, *own.shape[1:])
    padded[: len(own)] = own
    everything = own.new_empty(parts * share, *own.shape[1:])
    dist.all_gather_into_tensor(everything, padded, group=ps.get_tensor_model_parallel_group())
    return everything[: batch.num_images]
