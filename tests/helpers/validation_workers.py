"""What the ranks of tests/unit/test_validation.py do. Run through dist_helpers.spawn."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as ps

from llava_steps.launch.job import Job
from llava_steps.settings.stage.stage import Stage
from llava_steps.training import checkpoints, parallel, start
from llava_steps.training.answers import Answers
from llava_steps.training.optimizer import wrap
from llava_steps.training.validation import Validation


def look(rank: int, paths: dict[str, Path], layouts: list[dict[str, Any]]) -> list[Any]:
    """(figures, answers, rows of this rank) of an untrained model in each layout."""
    os.environ["LOCAL_RANK"] = str(rank)
    found = []
    for layout in layouts:
        stage = Stage.model_validate(
            {
                "stage": 2, "gpus": dist.get_world_size(), "precision": "fp32", "seq_length": 256,
                "global_batch_size": 24, "micro_batch_size": 2, "eval_samples": 13,
                "eval_answers": 2, "eval_new_tokens": 5, "num_workers": 0, **layout,
            }
        )  # fmt: skip
        place = paths["entry"]
        job = Job(stage, place, place, paths["checkpoint"], paths["hf"], paths["dataset"], "f")
        parallel.lay_out(stage)
        model = start.build(job, logging.getLogger("validation"))
        start.load_weights(model, start.latest(job) / checkpoints.WEIGHTS)
        wrapped = wrap(stage, model)
        validation = Validation(job)
        rows = len(validation._data._rows)
        figures = validation(wrapped, lambda: None)
        assert figures == validation(wrapped, lambda: None), "deterministic"
        answers = Answers(job)(wrapped, lambda: None)
        found.append((figures, answers, rows, ps.get_data_parallel_rank()))
        ps.destroy_model_parallel()
    return found
