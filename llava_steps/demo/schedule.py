"""Shared by both short pretrainings: a separate random stream, and AdamW with its schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

THREADS = 1
"""Fixed, because the order of summation, and so the last bits, depend on the number of threads."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A random stream from `seed` and a fixed number of threads; restores those of the caller."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def adamw(
    parameters: Iterable[torch.nn.Parameter], lr: float, steps: int
) -> tuple[AdamW, LambdaLR]:
    """AdamW and its schedule: warm-up over a twentieth of `steps`, then cosine to nearly zero."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    optimizer = AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return optimizer, LambdaLR(optimizer, factor)


def descend(loss: torch.Tensor, optimizer: AdamW, schedule: LambdaLR) -> None:
    """One step of both."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    schedule.step()
