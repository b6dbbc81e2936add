"""Which steps update the weights: not those that were asked to be skipped, not those whose loss or
gradient is not finite.

Either way the step is over: schedule and sample stream go on, weights and optimizer stay untouched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from llava_steps.core.config import Stage
from llava_steps.core.errors import DivergedError
from llava_steps.data.batch import MicroBatch


@dataclass
class Counters:
    """What has been done so far; part of every checkpoint."""

    step: int = 0
    """Steps that are over, each one global batch further in the stream."""
    updates: int = 0
    """Steps that updated the weights."""
    rejected: int = 0
    """Steps whose loss or gradient was not finite."""


class Guard:
    """Decides, equally on every rank."""

    def __init__(self, stage: Stage, counters: Counters, log: logging.Logger) -> None:
        self._budget = stage.max_rejected_steps
        self._ranges = skip_ranges(stage.skip_train_iteration_range)
        self._counters = counters
        self._log = log

    def skips(self) -> bool:
        """Whether the settings ask to skip the coming step."""
        number = self._counters.step + 1
        return any(first <= number <= last for first, last in self._ranges)

    def accepts(
        self, loss: float, norm: float, batch: Sequence[MicroBatch], losses: Sequence[float]
    ) -> bool:
        """Whether the optimizer may run; a collective call if it may not.

        `loss` and `norm` are those of the global batch, the same on every rank; `losses` the sums
        of this rank's microbatches, empty where none are known. Raises DivergedError beyond the
        budget of rejected steps.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        c = self._counters
        c.rejected += 1
        message = (
            f"step {c.step}: loss {loss}, gradient norm {norm}; weights and optimizer stay as they "
            f"are; samples {self._suspects(batch, losses)}"
        )
        if c.rejected > self._budget:
            raise DivergedError(
                f"{message}; {c.rejected} rejected steps are more than max_rejected_steps "
                f"{self._budget}"
            )
        self._log.error("%s; rejected %d of at most %d", message, c.rejected, self._budget)
        return False

    @staticmethod
    def _suspects(batch: Sequence[MicroBatch], losses: Sequence[float]) -> list[str]:
        """Samples of the microbatches whose loss is not finite; of the whole batch if none is."""
        own = [i for m in batch for i in m.sample_ids]
        bad = [
            i
            for m, loss in zip(batch, losses, strict=False)
            if not math.isfinite(loss)
            for i in m.sample_ids
        ]
        gathered: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(gathered, (own, bad))
        suspects = {i for _, found in gathered for i in found}
        return sorted(suspects or {i for all_, _ in gathered for i in all_})


def skip_ranges(texts: Sequence[str]) -> list[tuple[int, int]]:
    """["100-110"] -> [(100, 110)]: steps counted from 1, both ends included."""
    return [(int(a), int(b)) for a, _, b in (text.partition("-") for text in texts)]
