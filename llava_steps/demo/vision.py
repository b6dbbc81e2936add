"""A tiny CLIP vision tower, briefly pretrained against captions like CLIP itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llava_steps.demo.schedule import adamw, descend, seeded

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

BATCH = 64
LEARNING_RATE = 2e-3
EMBEDDING = 32
MAX_SHIFT = 0.15
"""Largest shift of a training scan in each direction, as a share of half the side."""
CAPTIONS = (
    "a handwritten {0}",
    "the digit {0}",
    "a scan of the number {0}",
    "手書きの{0}",
    "数字の{0}",
)


class CaptionEncoder(nn.Module):
    """Bag of characters to an embedding: the text side of the contrastive pair, not saved."""

    def __init__(self, captions: list[str], width: int) -> None:
        super().__init__()
        letters = sorted({letter for caption in captions for letter in caption})
        counts = [[float(caption.count(letter)) for letter in letters] for caption in captions]
        self.register_buffer("counts", torch.tensor(counts))
        self.layers = nn.Sequential(
            nn.Linear(len(letters), width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, which: Tensor) -> Tensor:
        """Caption numbers int64 (n,) to unit vectors float32 (n, width)."""
        counts: Tensor = self.get_buffer("counts")[which]
        return nn.functional.normalize(self.layers(counts), dim=-1)


def build_tower(image_size: int, patch_size: int, hidden: int, layers: int) -> CLIPVisionModel:
    """A randomly initialised CLIPVisionModel (float32) with heads of 16 channels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        projection_dim=EMBEDDING,
    )
    return CLIPVisionModel(config)


def save_image_processor(image_size: int, out: Path) -> None:
    """Write the CLIP preprocessing of the tower (bicubic, CLIP's mean and std) to `out`."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    ).save_pretrained(out)


def pretrain_tower(
    tower: CLIPVisionModel,
    scans: NDArray[np.uint8],
    digits: NDArray[np.int64],
    steps: int,
    seed: int,
    advance: Callable[[float], None],
) -> None:
    """Contrastive training in place: each scan against captions of its digit.

    `scans` uint8 (n, side, side, 3), `digits` int64 (n,). Captions of the same digit in a batch are
    all positives. `advance(loss)` is called after each step.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    with seeded(seed):
        captions = [text.format(digit) for digit in range(10) for text in CAPTIONS]
        texts = CaptionEncoder(captions, EMBEDDING)
        head = nn.Linear(tower.config.hidden_size, EMBEDDING, bias=False)
        scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        everything = [*tower.parameters(), *texts.parameters(), *head.parameters(), scale]
        optimizer, schedule = adamw(everything, LEARNING_RATE, steps)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = (torch.from_numpy(scans).permute(0, 3, 1, 2) / 255 - mean) / std
        labels = torch.from_numpy(digits)
        tower.train()
        for _ in range(steps):
            chosen = torch.randint(len(labels), (BATCH,))
            which = labels[chosen] * len(CAPTIONS) + torch.randint(len(CAPTIONS), (BATCH,))
            image = head(tower(pixel_values=_moved(pixels[chosen])).pooler_output)
            image = nn.functional.normalize(image, dim=-1)
            logits = scale.exp() * image @ texts(which).T
            same = (labels[chosen, None] == labels[None, chosen]).float()
            target = same / same.sum(1, keepdim=True)
            loss = (
                nn.functional.cross_entropy(logits, target)
                + nn.functional.cross_entropy(logits.T, target)
            ) / 2
            descend(loss, optimizer, schedule)
            advance(loss.item())
        tower.eval()


def _moved(pixels: Tensor) -> Tensor:
    """Each image of (n, 3, h, w) shifted by its own fraction of pixels; edges are repeated."""
    shift = (torch.rand(len(pixels), 2, 1) * 2 - 1) * MAX_SHIFT
    grid = nn.functional.affine_grid(
        torch.cat([torch.eye(2).expand(len(pixels), 2, 2), shift], dim=2),
        list(pixels.shape),
        align_corners=False,
    )
    return nn.functional.grid_sample(
        pixels, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
