"""How fast `shard_tars` writes, beside `tar` packing the very files that stand in the shards.

    python -m tests.benchmarks.sharding --samples 12000 --directory .

JPEG files of 640 x 480 (noise on smooth colours, 130 kB), a conversation of two rounds each. Both
are timed until the bytes are on the disk: reading, checks, digests and books included on our side,
`tar cf` and fsync on the other, files in the page cache, in turns. The best of the rounds is
taken: whatever else the machine does only adds. One line of JSON each for one worker against tar
and for two workers against one.

What the machine itself allows stands beside the second: how much two processes that only compute
digests do together of what one does (less than 2 where two processors share a core), and how fast
`cp` brings the same bytes to the disk, against two workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.data import sources
from llava_steps.data.shards import writer

SIZE = (640, 480)
REST = 3.0
"""Seconds before each measurement: disks of virtual machines take more after a rest than for long,
and nobody shall pay for what another one wrote.
"""
DISTINCT = 100
"""Images that are really made; the others are copies, files of their own."""


def make(folder: Path, samples: int) -> Path:
    """Images and train.json."""
    import numpy as np  # not by the workers, which import this file
    from PIL import Image

    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(samples):
        path = folder / f"images/{number}.jpg"
        if number < DISTINCT:
            colours = random.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(colours).resize(SIZE, Image.Resampling.BICUBIC))
            noisy = smooth + random.normal(0, 8, (SIZE[1], SIZE[0], 1))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            shutil.copyfile(folder / f"images/{number % DISTINCT}.jpg", path)
        turns = [
            {"from": ("human", "gpt")[n % 2], "value": "<image>\n" * (n == 0) + "A dog? " * 12}
            for n in range(4)
        ]
        name = f"images/{number}.jpg"
        records.append({"id": str(number), "image": name, "conversations": turns})
    source = folder / "train.json"
    source.write_text(json.dumps(records))
    return source


def shard(source: Path, entry: Path, workers: int) -> None:
    entry.mkdir()
    settings = writer.Settings(sources.open_source(source), entry, 500)
    writer.write_shards(settings, workers, 0.0)
    filesystem.fsync_tree(entry)


def tar(files: Path, target: Path) -> None:
    subprocess.run(["tar", "-c", "-f", str(target), "-C", str(files), "."], check=True)
    filesystem.fsync_path(target)


def copy(writer: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(writer), str(target)], check=True)
    filesystem.fsync_tree(target)


def digests(file: Path, processes: int) -> None:
    """sha256 of a file in the page cache, in each of some processes."""
    started = [
        subprocess.Popen(["sha256sum", str(file)], stdout=subprocess.DEVNULL)
        for _ in range(processes)
    ]
    assert not any(process.wait() for process in started)


def seconds(work: Callable[[], None], *results: Path) -> float:
    """What `work` takes on a rested disk where none of its results is there yet."""
    for path in results:
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    os.sync()
    time.sleep(REST)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("."), help="a place on the disk")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.directory) as temporary:
        root = Path(temporary)
        source, out, files = make(root / "raw", given.samples), root / "out", root / "files"
        shard(source, out, 1)
        files.mkdir()
        for path in sorted(out.glob("*.tar")):
            subprocess.run(["tar", "-x", "-f", str(path), "-C", str(files)], check=True)
        size = sum(path.stat().st_size for path in out.glob("*.tar"))
        packed, copied = root / "files.tar", root / "copied"
        works: dict[str, tuple[Callable[[], None], *tuple[Path, ...]]] = {
            "tar": (lambda: tar(files, packed), packed),
            "one": (lambda: shard(source, out, 1), out),
            "two": (lambda: shard(source, out, 2), out),
            "cp": (lambda: copy(out, copied), copied),
            "sha256": (lambda: digests(packed, 1),),
            "two sha256": (lambda: digests(packed, 2),),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(given.rounds):
            for name, work in works.items():
                times[name].append(seconds(*work))
    took = {name: min(found) for name, found in times.items()}
    rates = {name: round(given.samples / took[name]) for name in ("tar", "one", "two", "cp")}
    print(f"{given.samples} samples, {size / 1e9:.2f} GB; samples/s: {rates}", file=sys.stderr)
    ratios = {
        "sharding_one_worker_over_tar": (took["tar"] / took["one"], 0.8),
        "sharding_two_workers_over_one": (took["one"] / took["two"], 1.6),
    }
    machine = {
        "two_sha256_over_one": round(2 * took["sha256"] / took["two sha256"], 2),
        "cp_over_two": round(took["two"] / took["cp"], 2),
    }
    for name, (found, wanted) in ratios.items():
        beside = machine if "two" in name else {}
        line = {"benchmark": name, "value": round(found, 3), "at_least": wanted, **beside}
        print(json.dumps(line))
    return 0 if all(found >= wanted for found, wanted in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
