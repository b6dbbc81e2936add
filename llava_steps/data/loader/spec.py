"""What the loaders of one rank give out, and how they prepare it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LoaderSpec:
    """One rank's share of a split, as `TrainLoader` and `ValidationSet` read it.

    The settings of a stage have been checked: sizes and packing fit each other.
    """

    dataset: Path
    """Prepared energon dataset, or the YAML file of a blend (settings/blend.py)."""
    split: str
    hf_dir: Path
    """HF directory with tokenizer, chat template and image processor."""
    seq_length: int
    """Longest accepted sample in tokens."""
    global_batch_size: int
    """Samples of one step over all data parallel ranks."""
    micro_batch_size: int
    """Samples of one row; 1 with packing."""
    seed: int
    """Of the sample order."""
    need_pixels: bool
    """Decode images; otherwise `pixel_values` is None everywhere."""
    dp_rank: int = 0
    dp_size: int = 1
    """The data parallel ranks, of which this is `dp_rank`."""
    image_part: int = 0
    image_parts: int = 1
    """Decode only part `image_part` of each row's images (`batch.image_share`)."""
    truncate: bool = False
    """Cut samples that are longer than seq_length; otherwise they are an error."""
    packing: bool = False
    """Put as many samples into a row as fit; the number of rows varies between steps."""
    pack_length: int = 0
    """Longest packed row in tokens; 0: seq_length."""
    rows_multiple: int = 1
    """The number of packed rows of a rank is a multiple of this."""
    pad_to: Literal["row", "budget"] = "row"
    """`row` pads a row no further than the two below need, `budget` to pack_length."""
    pad_to_multiple: int = 1
    """Every row's length is a multiple of this."""
    equal_lengths: bool = False
    """All rows of a step get the same length (pipeline parallelism)."""
    num_workers: int = 0
    """Worker processes; 0 prepares batches in this process."""
    patience: float = 600.0
    """Seconds after which a worker that begins no further sample is an error."""
    scratch: Path | None = None
    """Directory of this attempt that the processes of a node share."""

    @property
    def capacity(self) -> int:
        """Tokens of a packed row."""
        return self.pack_length or self.seq_length

    @property
    def fixed_length(self) -> int:
        """What every row is padded to at least."""
        return self.capacity if self.packing and self.pad_to == "budget" else 0

    @property
    def shift(self) -> float:
        """Where in a global batch this rank begins to find out lengths, in [0, 1)."""
        part = self.dp_rank * self.image_parts + self.image_part
        return part / (self.dp_size * self.image_parts)
