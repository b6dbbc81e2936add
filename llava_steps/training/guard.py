"""Decides which steps update the weights: not those that are configured to be skipped, nor those
whose loss or gradient is not finite, or jumps.

Such a step is over all the same: schedule and sample stream continue, weights and optimizer do not
change. If it happens too often the training rolls back (see `start.roll_back`), and finally ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch.distributed as dist

from llava_steps.core.errors import DivergedError
from llava_steps.data.loader.batch import MicroBatch, sample_names
from llava_steps.settings.stage.stage import Stage

WINDOW = 64
"""Number of updates in the running medians."""
ENOUGH = 8
"""Number of updates before a spike can be detected."""


@dataclass
class Counters:
    """What has been done so far; part of every checkpoint."""

    step: int = 0
    """Steps that are over, each one global batch further in the stream."""
    updates: int = 0
    """Steps that updated the weights as they are now; those rolled back do not count."""
    rejected: int = 0
    """Rejected steps since the last rollback."""
    rollbacks: int = 0
    recent: list[list[float]] = field(default_factory=list)
    """[loss, gradient norm] of the last updates, the newest last; all finite."""


class Guard:
    """Decides, equally on every rank."""

    def __init__(self, stage: Stage, counters: Counters, log: logging.Logger) -> None:
        self._stage = stage
        self._ranges = skip_ranges(stage.skip_train_iteration_range)
        self._counters = counters
        self._log = log
        self.reason = ""
        """Why the last step was rejected."""

    def skips(self) -> bool:
        """Whether the settings skip the coming step."""
        number = self._counters.step + 1
        return any(first <= number <= last for first, last in self._ranges)

    def accepts(
        self, loss: float, norm: float, batch: Sequence[MicroBatch], losses: Sequence[float]
    ) -> bool:
        """Whether the optimizer may run; a collective call if it may not.

        `loss` and `norm` are those of the global batch, the same on every rank; `losses` the sums
        of this rank's microbatches, empty where none are known.
        """
        c, factor = self._counters, self._stage.spike_factor
        finite = math.isfinite(loss) and math.isfinite(norm)
        highest = math.inf
        if factor and len(c.recent) >= ENOUGH:
            highest = factor * median(row[0] for row in c.recent)
            highest_norm = factor * median(row[1] for row in c.recent)
            spike = loss > highest or norm > highest_norm
        else:
            spike = False
        if finite and not spike:
            c.recent = [*c.recent, [loss, norm]][-WINDOW:]
            return True
        self.reason = "spike" if finite else "not finite"
        c.rejected += 1

        def bad(batch: MicroBatch, total: float) -> bool:
            return not math.isfinite(total) or total > highest * max(1, batch.num_supervised)

        self._log.error(
            "step %d: %s: loss %s, gradient norm %s; weights and optimizer do not change; "
            "samples %s; rejected %d of at most %d",
            c.step, self.reason, loss, norm, suspects(batch, losses, bad), c.rejected,
            self._stage.max_rejected_steps,
        )  # fmt: skip
        return False

    @property
    def must_roll_back(self) -> bool:
        """Whether too many steps were rejected; raises DivergedError if no rollback is left."""
        c, s = self._counters, self._stage
        if c.rejected <= s.max_rejected_steps:
            return False
        if c.rollbacks >= s.max_rollbacks:
            raise DivergedError(
                f"step {c.step}: {c.rejected} rejected steps are more than max_rejected_steps "
                f"{s.max_rejected_steps}, after {c.rollbacks} rollbacks of at most "
                f"{s.max_rollbacks}; the log names the samples of each"
            )
        return True


def suspects(
    batch: Sequence[MicroBatch],
    losses: Sequence[float],
    bad: Callable[[MicroBatch, float], bool],
) -> list[str]:
    """Samples of the bad microbatches of all ranks; of the whole batch if none is. Collective."""
    own = [name for m in batch for name in sample_names(m)]
    bad_names = [
        name
        for m, loss in zip(batch, losses, strict=False)
        if bad(m, loss)
        for name in sample_names(m)
    ]
    gathered: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, bad_names))
    named = {i for _, part in gathered for i in part}
    return sorted(named or {i for part, _ in gathered for i in part})


def skip_ranges(texts: Sequence[str]) -> list[tuple[int, int]]:
    """["100-110"] -> [(100, 110)]: steps counted from 1, both ends included."""
    return [(int(a), int(b)) for a, _, b in (text.partition("-") for text in texts)]
