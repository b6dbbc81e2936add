"""A model's weights over megatron-core's distributed checkpointing, for training.

The stored tensors are those of mapping.py, whatever tp, pp and dp they are saved from or loaded to.
Collective: every rank of the world calls these with its own chunks.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from llava_steps.conversion import torch_dist_write
from llava_steps.conversion.lora import PREFIX, Lora, check_same
from llava_steps.conversion.lora import stored_shapes as adapter_shapes
from llava_steps.conversion.mapping import Shape, check_shapes, entries, stored_shapes
from llava_steps.conversion.tower import tower_shapes
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry
from llava_steps.model.llava import Llava

DAMAGE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)
"""What torch raises for damaged files besides its CheckpointException."""
Chunks = torch.nn.Module | Sequence[torch.nn.Module]


def megatron_shapes(geometry: Geometry, lora: Lora | None = None) -> dict[str, Shape]:
    """Name -> whole shape of every tensor of a model checkpoint."""
    shapes = stored_shapes(entries(geometry, tower_shapes(geometry)))
    return shapes | (adapter_shapes(geometry, lora) if lora else {})


def sharding_metadata() -> dict[str, Any]:
    """Metadata for sharded_state_dict, the same for all savers."""
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _models(chunks: Chunks) -> list[Llava]:
    modules = [chunks] if isinstance(chunks, torch.nn.Module) else list(chunks)
    return [unwrap_model(module) for module in modules]


def sharded_weights(chunks: Chunks) -> dict[str, Any]:
    """megatron-core's sharded state dicts of this rank's chunks, by their numbers.

    The names of layers in a chunk count from its first layer; names and offsets in the checkpoint
    do not.
    """
    metadata = sharding_metadata()
    return {
        str(number): model.sharded_state_dict(metadata=metadata)
        for number, model in enumerate(_models(chunks))
    }


def save_weights(chunks: Chunks, weights: str | Path) -> None:
    """Save the weights into the directory `weights`, which must not hold a checkpoint.

    Equal weights give equal bytes. IntegrityError unless the ranks' parts cover this model's
    tensors exactly once.
    """
    model = _models(chunks)[0]
    save_sharded(sharded_weights(chunks), weights)
    lora = model.options.lora
    if lora and dist.get_rank() == 0:
        lora.write(Path(weights))
    shapes = megatron_shapes(model.geometry, lora)
    check_shapes(shapes, torch_dist_write.Reader(weights).shapes(), str(weights), "this model")


def save_sharded(state: dict[Any, Any], directory: str | Path) -> None:
    """Save the sharded tensors of all ranks' `state` into `directory`, which must not hold any.

    megatron-core's format, written in this process: its own writer forks, which takes longer
    than writing here, leaves a process running and puts a random id into the metadata.
    IntegrityError unless the ranks' parts cover each tensor exactly once.
    """
    apply_factories(state)
    values: dict[tuple[str, Shape], Tensor] = {}
    parts: list[torch_dist_write.Chunk] = []
    for shard in nested_values(state):
        if is_main_replica(shard.replica_id):
            offsets = tuple(shard.global_offset)
            shape = (*(1,) * shard.prepend_axis_num, *shard.local_shape)
            whole = tuple(shard.global_shape)
            values[shard.key, offsets] = shard.data.detach()
            parts.append(torch_dist_write.Chunk(shard.key, whole, offsets, shape, shard.dtype))
    torch_dist_write.write(
        Path(directory), parts, lambda part: values[part.name, part.offsets], collective=True
    )


def load_weights(chunks: Chunks, weights: str | Path) -> None:
    """Load the weights in place, cast to the parameters' dtype.

    IntegrityError unless the checkpoint holds exactly the tensors of this model in its shapes. Only
    LoRA adapters may be missing, all of them: then they keep their initial values. InputError when
    it has others.
    An optimizer built before must reload them (`reload_model_params`).
    """
    models = _models(chunks)
    lora = models[0].options.lora
    adapted = check_same(lora, Path(weights))
    # megatron-core accepts embeddings of another size, so the shapes are compared here.
    shapes = megatron_shapes(models[0].geometry, lora if adapted else None)
    check_shapes(shapes, torch_dist_write.Reader(weights).shapes(), str(weights), "this model")
    wanted = sharded_weights(models)
    if lora and not adapted:
        wanted = {
            number: {name: part for name, part in state.items() if not name.startswith(PREFIX)}
            for number, state in wanted.items()
        }
    try:
        loaded = dist_checkpointing.load(wanted, str(weights))
    except (*DAMAGE, CheckpointingException, CheckpointException) as error:
        raise IntegrityError(f"{weights}: {error}") from error
    for number, model in enumerate(models):
        result = model.load_state_dict(loaded[str(number)], strict=False)
        missing = [
            name
            for name in result.missing_keys
            if not name.endswith("_extra_state") and (adapted or not name.startswith(PREFIX))
        ]
        if missing or result.unexpected_keys:
            raise IntegrityError(
                f"{weights}: missing {missing[:3]}, unexpected {list(result.unexpected_keys)[:3]}"
            )
