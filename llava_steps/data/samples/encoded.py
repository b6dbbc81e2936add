"""A conversation in tokens, with the labels that training learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -100
"""Label of positions that are not supervised."""


@dataclass(frozen=True)
class Encoded:
    """One conversation in tokens."""

    tokens: torch.Tensor
    """int64 [T]"""
    shifted_labels: torch.Tensor
    """int64 [T]: the id that position t has to predict, that is tokens[t + 1], where that one is
    part of an answer or its end token; -100 elsewhere, always at T - 1."""
    images: int
    """Images whose tokens are in it: the first ones, all of them unless it is cut."""
    answers: int
    """Supervised answers that are whole."""
    open_answers: int = 0
    """Of these, how many have no end token: earlier ones, which the chat template ends
    differently."""
    context_answers: int = 0
    """Earlier answers that are not supervised: the prompt for them, or what the chat template
    keeps of them, is not as it would be asked and answered."""
    cut: bool = False
    """Longer than seq_length, and cut."""

    @property
    def supervised(self) -> int:
        """Number of supervised positions."""
        return int((self.shifted_labels != IGNORED).sum())
