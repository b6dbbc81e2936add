"""Perplexity of the references: exp of the mean negative log-likelihood per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llava_steps.core.errors import InputError
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.encoded import IGNORED
from llava_steps.data.samples.sample import SampleError, Turn
from llava_steps.evaluation.ask import Model, Question

_NO_LIMIT = 1 << 30


def surprise(
    model: Model,
    questions: Sequence[Question],
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, tokens) of each question's reference, end token included.

    Tokens, labels and pixels are those of training; only the last answer counts.

    Raises:
        InputError: a question and its reference cannot be tokenized as in training.
    """
    encoder = ConversationEncoder(model.directory, _NO_LIMIT)
    rows = [_encode(encoder, question) for question in questions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    surprises = [(0.0, 0)] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        images = [image for i in chosen for image in questions[i].images]
        pixels = encoder.images(images) if images else None
        batch = _batch(model, [rows[i] for i in chosen], pixels, encoder.pad_id)
        for i, one in zip(chosen, batch, strict=True):
            surprises[i] = one
        advance(len(chosen))
    return surprises


def _encode(encoder: ConversationEncoder, question: Question) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [tokens], and int64 [tokens] labels at the last answer only."""
    turns = [Turn(t["role"], t["content"]) for t in question.turns]
    try:
        encoded = encoder.encode([*turns, Turn("assistant", question.reference)])
    except SampleError as error:
        raise InputError(f"sample {question.id}: {error}") from error
    labels = encoded.shifted_labels.clone()
    silent = (labels == IGNORED).nonzero().flatten()
    last = int((labels != IGNORED).nonzero().max())
    before = silent[silent < last]
    if len(before):
        labels[: int(before.max()) + 1] = IGNORED
    return encoded.tokens, labels


@torch.inference_mode()
def _batch(
    model: Model,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    pixels: torch.Tensor | None,
    pad_id: int,
) -> list[tuple[float, int]]:
    network: Any = model.network
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([row[0] for row in rows], batch_first=True, padding_value=pad_id)
    labels = pad([row[1] for row in rows], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row[0]) for row in rows])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    images = {} if pixels is None else {"pixel_values": pixels.to(model.device, network.dtype)}
    with model.threads():
        hidden = network.model(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), **images
        ).last_hidden_state
        # Logits at the references only: at all positions they would not fit for large models.
        surprises = []
        for state, label in zip(hidden, labels.to(model.device), strict=True):
            wanted = label != IGNORED
            logits = network.lm_head(state[wanted]).float()
            total = cross_entropy(logits, label[wanted], reduction="sum")
            surprises.append((float(total), int(wanted.sum())))
    return surprises
