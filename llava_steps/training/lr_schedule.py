"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from llava_steps.settings.stage.stage import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """Rate of optimizer step `step`, counted from 0.

    Linear warm-up over `warmup_steps`, in which the first step already has lr / warmup_steps, then
    a decay that reaches `min_lr` at the last step.
    """
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    if stage.lr_schedule == "wsd":
        left = stage.train_steps - step  # the last step still learns, at min_lr
        share = min(1.0, (left - 1) / stage.decay_steps)
        return stage.min_lr + (stage.lr - stage.min_lr) * share
    last = stage.train_steps - 1 - stage.warmup_steps
    done = (step - stage.warmup_steps) / last if last > 0 else 0.0
    if stage.lr_schedule == "constant":
        share = 1.0
    elif stage.lr_schedule == "linear":
        share = 1.0 - done
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.min_lr + (stage.lr - stage.min_lr) * share
