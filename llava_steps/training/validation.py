"""Loss and token accuracy on held-out samples: measured without changing the model.

Each data-parallel replica runs its share of the rows through its pipeline, possibly none, and no
collective call spans two replicas before all are done; so shares may differ. The figures are sums
over tokens and therefore the same in every layout, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_steps.data.loader.batch import MicroBatch
from llava_steps.data.loader.validation_set import ValidationSet
from llava_steps.launch.job import Job
from llava_steps.training import forward, parallel
from llava_steps.training.share import loader_spec


class Validation:
    """The val split of a job, at most `eval_samples` of it.

    Raises ConfigError or InputError when there is no such split, or a sample of it is unusable.
    """

    def __init__(self, job: Job) -> None:
        stage = job.stage
        self._group = stage.pipeline_model_parallel
        self._multiple = forward.row_multiple(stage)
        self._data = ValidationSet(loader_spec(job, "val"), stage.eval_samples)
        self.samples = self._data.samples

    def __call__(self, wrapped: Sequence[Any], beat: Callable[[], None]) -> dict[str, float]:
        """{"val_loss", "val_accuracy"} per supervised token, the same on every rank."""
        totals = torch.zeros(3, dtype=torch.float64, device=parallel.device())
        for group in self._data.groups(self._group, self._multiple, full=True):
            totals += forward_only(wrapped, group, score_step)
            beat()
        loss, right, count = parallel.total(totals).tolist()
        return {"val_loss": loss / count, "val_accuracy": right / count}


@torch.no_grad()
def forward_only(wrapped: Sequence[Any], batch: Sequence[MicroBatch], step: forward.Step) -> Tensor:
    """Rows of one length through the pipeline, forward only; the sum of what `step` makes of them.

    Zero before the last stage. A collective call of the ranks of one replica.
    """
    for chunk in wrapped:
        chunk.eval()
    outputs = forward.run(step, wrapped, batch, forward_only=True)
    for chunk in wrapped:
        chunk.train()
    return torch.stack(outputs).sum(dim=0) if outputs else torch.zeros((), device=parallel.device())


def score_step(batches: Iterator[MicroBatch], wrapped: Any) -> tuple[Tensor, Any]:
    """One row through this stage; at its end float64 [3]: loss, right answers, targets."""

    def totals(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, right = scores.double()
        count = forward.count(losses, losses.numel())
        return losses.sum(), count, torch.stack([losses.sum(), right.sum(), count.double()])

    return forward.through(next(batches), wrapped, "score"), totals
