"""make soak-data: stop the loader at random steps and go on in another layout.

    python -m tests.benchmarks.soak_data --stops 50 --seed 1

A stream of packed global batches from a blend of three datasets is read once without a stop, in one
process, and once with stops: at each one all that is kept is the state, as JSON; the loaders of the
next stretch have another data parallel size (1, 2, 4, 1, ...) and another number of worker
processes (0, 2, 1, ...). Every second soak is without packing. The last line is JSON, {"stops",
"identical"}: a stop counts as identical if the ordered sample ids of every global batch up to the
next one are those of the uninterrupted stream. Exit code 1 unless all are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llava_steps.data.loader.loader import TrainLoader
from tests.helpers.data_fixtures import make_energon, make_hf_dir, train_loader

BATCH = 8
LAYOUTS = ((1, 0), (2, 2), (4, 1), (1, 0), (2, 1), (4, 0), (1, 2), (2, 0), (4, 2))
"""(data parallel size, workers): 1, 2, 4, 1, ... beside 0, 2, 1, 0, ... and all other pairs."""
LONGEST = 5
"""Steps of a stretch."""


def make_blend(root: Path) -> Path:
    """Three datasets of 40 samples in all, and the YAML that blends them by epochs."""
    items = []
    for name, size, times in (("one", 12, 2), ("two", 20, 1), ("three", 8, 1)):
        make_energon(root / name, size, 7)
        items.append({"path": name, "repetitions": times})
    path = root / "blend.yaml"
    head = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    path.write_text(yaml.safe_dump({**head, "splits": {"train": {"blend_epochized": items}}}))
    return path


def loaders(
    path: Path, hf_dir: Path, dp: int, workers: int, start: int, packing: bool
) -> list[TrainLoader]:
    """One loader a data parallel rank, all in this process."""
    return [
        train_loader(
            path, hf_dir, start, global_batch_size=BATCH, dp_rank=rank, dp_size=dp, seed=17,
            num_workers=workers, need_pixels=False, packing=packing,
        )
        for rank in range(dp)
    ]  # fmt: skip


def stretch(ranks: list[TrainLoader], steps: int) -> Iterator[list[tuple[str, str]]]:
    """(dataset, id) of each place of the next global batches, put together from all ranks."""
    streams = [iter(rank) for rank in ranks]
    for _ in range(steps):
        found: dict[int, tuple[str, str]] = {}
        for stream in streams:
            for row in next(stream):
                for item in zip(row.slots, row.datasets, row.sample_ids, strict=True):
                    assert item[0] not in found, "a place of the global batch was given twice"
                    found[item[0]] = item[1:]
        yield [found[place] for place in range(len(found))]
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def soak(root: Path, stops: int, seed: int, packing: bool) -> int:
    """How many of `stops` stops are followed by the uninterrupted stream."""
    path, hf_dir = root / "blend.yaml", root / "hf"
    chooser = random.Random(seed)
    lengths = [chooser.randint(1, LONGEST) for _ in range(stops + 1)]
    whole = list(stretch(loaders(path, hf_dir, 1, 0, 0, packing), sum(lengths)))
    assert len({item for batch in whole for item in batch}) == min(40, 8 * len(whole)) or stops < 4
    identical, step = 0, 0
    kept: dict[str, Any] | None = None
    for number, length in enumerate(lengths):
        dp, workers = LAYOUTS[number % len(LAYOUTS)]
        start = kept["consumed_samples"] if kept else 0
        ranks = loaders(path, hf_dir, dp, workers, start, packing)
        for rank in ranks:
            if kept:
                rank.check_state(kept)
        same = list(stretch(ranks, length)) == whole[step : step + length]
        states = [json.dumps(rank.state(), sort_keys=True) for rank in ranks]
        assert len(set(states)) == 1, "every rank keeps the same state"
        kept = json.loads(states[0])
        step += length
        identical += same and number > 0
        how = "identical" if same else "ANOTHER STREAM"
        print(f"stretch {number}: dp {dp}, {workers} workers, to step {step}: {how}", flush=True)
    return identical


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    identical = 0
    with tempfile.TemporaryDirectory(prefix="llava-steps-soak-") as name:
        root = Path(name)
        make_blend(root)
        make_hf_dir(root / "hf")
        parts = [given.stops - given.stops // 2, given.stops // 2]
        for (number, stops), packing in zip(enumerate(parts), itertools.cycle((True, False))):
            identical += soak(root, stops, given.seed + number, packing) if stops else 0
    print(json.dumps({"stops": given.stops, "identical": identical}))
    return 0 if identical == given.stops else 1


if __name__ == "__main__":
    sys.exit(main())
