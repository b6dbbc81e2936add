"""A training worker in which every second step meets something that is not finite, or a spike.

Each case is one kind of poison on one rank in one microbatch. The weights and the optimizer's state
are hashed when a poisoned step begins and when it is over; the verdicts go to verdict_RANK.jsonl.
With POISONED_STEPS in the environment only these steps (counted from 0) are poisoned, by NaN.
Batches are fetched ahead, as beside a GPU.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from llava_steps.training import worker

KINDS = ("nan loss", "inf loss", "-inf loss", "100x loss", "nan gradient", "nan weight")
MICRO = 3
CASES = list(itertools.product(KINDS, (0, 1), range(MICRO)))
FACTORS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "100x": 100.0}
PLAN = {2 * number + 1: case for number, case in enumerate(CASES)}
if text := os.environ.get("POISONED_STEPS"):
    PLAN = {int(step): ("nan loss", 0, 0) for step in text.split(",")}


def digest(wrapped: Any, optimizer: Any) -> str:
    """sha256 of all weights and all optimizer tensors of this rank."""
    import torch

    total = hashlib.sha256()
    inner = optimizer._inner.optimizer
    moments = [v for s in inner.state.values() for _, v in sorted(s.items())]
    masters = [p for group in inner.param_groups for p in group["params"]]
    for tensor in [*wrapped[0].parameters(), *masters, *moments]:
        if isinstance(tensor, torch.Tensor):
            total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def poison(loop: Any, gradients: Any) -> None:
    """Put the cases into the functions that the training loop calls."""
    rank = int(os.environ["RANK"])
    verdicts = Path(sys.argv[1]).with_name(f"verdict_{rank}.jsonl").open("w")
    whole, one = loop.forward_backward, gradients.forward_step
    now: dict[str, Any] = {"step": -1, "micro": 0, "case": None, "restore": None, "before": ""}

    def forward_backward(wrapped: Any, optimizer: Any, batch: Any, *more: Any) -> Any:
        if now["case"] is not None:
            same = digest(wrapped, optimizer) == now["before"]
            verdicts.write(json.dumps({"case": now["case"], "same": same}) + "\n")
            verdicts.flush()
        if now["restore"]:
            now["restore"]()
        now.update(step=now["step"] + 1, micro=0, case=None, restore=None)
        now["case"] = PLAN.get(now["step"])
        kind, where, _ = now["case"] or ("", -1, -1)
        if kind == "nan weight" and rank == where:
            weight = next(p for p in wrapped[0].parameters() if p.requires_grad)
            before = weight.data.clone()
            weight.data.view(-1)[0] = float("nan")
            now["restore"] = lambda: weight.data.copy_(before)
        now["before"] = digest(wrapped, optimizer)
        sums = whole(wrapped, optimizer, batch, *more)
        if kind.endswith("gradient") and rank == where:
            # After the reduction: only this rank sees it until the norm is agreed on.
            wrapped[0].buffers[0].grad_data.fill_(FACTORS[kind.split()[0]])
        return sums

    def forward_step(batches: Any, wrapped: Any, **more: Any) -> Any:
        output, loss_sum = one(batches, wrapped, **more)
        kind, where, micro = now["case"] or ("", -1, -1)
        number = now["micro"]
        now["micro"] += 1
        if not (kind.endswith("loss") and rank == where and number == micro):
            return output, loss_sum
        value = FACTORS[kind.split()[0]]
        return output, lambda losses: loss_sum(losses * value)

    loop.forward_backward, gradients.forward_step = forward_backward, forward_step


def fetch_ahead(prefetch: Any) -> None:
    """Have batches fetched while the step before is under way."""
    event = types.SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 0.0
    )
    cuda = types.SimpleNamespace(is_available=lambda: True)
    prefetch.torch = types.SimpleNamespace(cuda=cuda)
    prefetch._event, prefetch._pinned = lambda: event, lambda row: row


if __name__ == "__main__":
    from llava_steps.training import gradients, loop, prefetch

    poison(loop, gradients)
    fetch_ahead(prefetch)
    code = worker.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
