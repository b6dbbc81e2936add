"""What a stage trains on: one dataset or a blend, as one endless sequence of samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError
from llava_steps.data.energon.reader import RawSample, SampleReader
from llava_steps.data.loader.order import EpochOrder, Order, WeightedOrder
from llava_steps.data.samples.sample import PLACEHOLDER, Sample
from llava_steps.settings.blend import Blend, Member, read_blend


@dataclass(frozen=True)
class SampleRef:
    """Names one sample of the corpus."""

    dataset: int
    index: int
    """In its dataset."""


class Corpus:
    """The samples of a split in training order.

    Files are opened at the first read, so that an instance can be sent to another process.

    Args:
        path: prepared dataset directory, or the YAML file of a blend (settings/blend.py).
        split: such as `train`.
        seed: of the order.

    Raises:
        ConfigError: a blend that is not supported, or a split that is missing.
        InputError: a dataset that cannot be read.
    """

    def __init__(self, path: Path, split: str, seed: int) -> None:
        blend = read_blend(path, split)
        self.members: tuple[Member, ...] = blend.members
        self.readers = [SampleReader(member.path, member.split) for member in self.members]
        self.sizes = [len(reader) for reader in self.readers]
        self.digest = self._digest(blend)
        self._order = self._make_order(blend, seed, path)

    def _digest(self, blend: Blend) -> str:
        """Identifies the datasets and the order of their samples; independent of where they are."""
        digests = [reader.digest for reader in self.readers]
        if len(digests) == 1 and blend.members[0].repetitions == 1:
            return digests[0]
        shares = [m.weight if blend.by == "weights" else m.repetitions for m in blend.members]
        return filesystem.sha256_json([blend.by, shares, digests])

    def _make_order(self, blend: Blend, seed: int, path: Path) -> Order:
        if blend.by == "epochs":
            repetitions = [member.repetitions for member in blend.members]
            return EpochOrder(self.sizes, repetitions, seed, self.digest)
        try:
            weights = [member.weight for member in blend.members]
            return WeightedOrder(self.sizes, weights, seed, self.digest)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None

    def __len__(self) -> int:
        """Samples of all datasets, each counted once."""
        return sum(self.sizes)

    def __getitem__(self, position: int) -> SampleRef:
        """The sample at `position` >= 0 of the endless sequence."""
        return SampleRef(*self._order[position])

    def number(self, ref: SampleRef) -> int:
        """A number in [0, len(self)) for each sample."""
        return sum(self.sizes[: ref.dataset]) + ref.index

    def raw(self, ref: SampleRef, images: bool = True) -> RawSample:
        """The parts of a sample; without `images` their parts are empty and need no reading.

        Raises:
            InputError: the tar or its index cannot be read there.
        """
        return self.readers[ref.dataset].raw(ref.index, images)

    def parse(self, ref: SampleRef, raw: RawSample) -> Sample:
        """The sample in `raw`, cut to its dataset's max_turns.

        Raises:
            SampleError: unusable; the message does not say where it is.
        """
        sample = self.readers[ref.dataset].parse(raw)
        rounds = self.members[ref.dataset].max_turns
        system = len(sample.turns) % 2  # a system turn goes before the rounds
        if rounds is None or len(sample.turns) <= 2 * rounds + system:
            return sample
        turns = sample.turns[: 2 * rounds + system]
        images = sum(turn.content.count(PLACEHOLDER) for turn in turns)
        return Sample(sample.id, turns, sample.images[:images], sample.extra)

    def where(self, ref: SampleRef, raw: RawSample) -> str:
        """Tar and key, for messages."""
        return str(self.readers[ref.dataset].root / raw.where)
