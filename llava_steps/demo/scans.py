"""Scans of handwritten digits that scikit-learn ships, and their fixed held-out split."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llava_steps.core.apportion import largest_remainder
from llava_steps.core.errors import ConfigError

DIGITS = range(10)
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Scans:
    """`pixels` uint8 (n, 8, 8), dark ink (0) on white paper (255); `digits` int64 (n,) in 0..9."""

    pixels: NDArray[np.uint8]
    digits: NDArray[np.int64]


def load_scans() -> Scans:
    """All 1,797 scans in scikit-learn's order (UCI optical digits, real handwriting, 17 greys)."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    ink = np.rint(np.asarray(raw.images, dtype=np.float64) * (255 / 16)).astype(np.uint8)
    return Scans(pixels=255 - ink, digits=np.asarray(raw.target, dtype=np.int64))


def split(digits: NDArray[np.int64], heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices (training, held-out), each sorted; both have the same shares of the digits.

    Raises ConfigError if `heldout` leaves a digit without training or without held-out scans.
    """
    total = len(digits)
    if not len(DIGITS) <= heldout <= total - len(DIGITS):
        raise ConfigError(
            f"demo_assets.heldout_scans is {heldout}; choose {len(DIGITS)} to {total - len(DIGITS)}"
        )
    counts = [Fraction(int((digits == digit).sum())) for digit in DIGITS]
    shares = largest_remainder(counts, heldout)
    rng = np.random.default_rng(seed)
    held: set[int] = set()
    for digit in DIGITS:
        held.update(
            int(i) for i in rng.permutation(np.flatnonzero(digits == digit))[: shares[digit]]
        )
    return [i for i in range(total) if i not in held], sorted(held)


def enlarge(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """One scan (8, 8) to RGB (side, side, 3) by bicubic interpolation, uint8."""
    from PIL import Image

    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def jpeg(rgb: NDArray[np.uint8]) -> bytes:
    """RGB (h, w, 3) uint8 to JPEG bytes: the same bytes for the same pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
