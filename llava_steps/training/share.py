"""The part of a job's data that this rank reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron.core import parallel_state as ps

from llava_steps.data.loader.spec import LoaderSpec
from llava_steps.launch.job import Job
from llava_steps.training import parallel
from llava_steps.training.forward import row_multiple


def loader_spec(job: Job, split: str) -> LoaderSpec:
    """This rank's share of a split, prepared as configured."""
    stage = job.stage
    return LoaderSpec(
        dataset=job.dataset,
        split=split,
        hf_dir=job.hf_dir,
        seq_length=stage.seq_length,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        seed=stage.seed,
        need_pixels=parallel.is_first_stage(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        image_part=ps.get_tensor_model_parallel_rank(),
        image_parts=stage.tensor_model_parallel,
        truncate=stage.too_long == "truncate",
        packing=stage.packing,
        pack_length=stage.pack_length,
        rows_multiple=stage.pipeline_model_parallel if stage.virtual_pipeline > 1 else 1,
        pad_to=stage.pad_to,
        pad_to_multiple=row_multiple(stage),
        equal_lengths=stage.pipeline_model_parallel > 1,
        num_workers=stage.num_workers,
        patience=stage.loader_timeout,
        scratch=Path(tempfile.gettempdir()),  # the launcher's
    )
