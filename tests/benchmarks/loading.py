"""Part of make bench-data: how fast the loader is, how full its rows are, how soon it resumes.

    python -m tests.benchmarks.loading

Prints one JSON line for each of

* images: pixels of 640 x 480 JPEG, WebP and PNG files at 336 pixels through the loader with one
  worker process, against a bare loop of Pillow's decoder and the HF processor; images per second of
  CPU time, the worker's and this process's together, median of alternating rounds; whether the
  pixels are equal; a line for each format, PNG last
* packing: share of positions that belong to samples, padding of every kind counted, on a mix of
  texts of lognormal(5.3, 0.8) tokens clipped to 32..1472 with 576 image tokens each; what planning
  costs a sample
* resume: seconds from opening the loader in the middle of 1,000,000 samples to its first step; the
  server that workers are forked from is there, as in a training, which starts it before it builds
  its model; `server_s` is what its imports take
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_steps.data.loader.feed import Feed
from llava_steps.data.loader.packing import pack
from llava_steps.data.loader.workers import start_server
from llava_steps.data.samples.processor import load_processor
from tests.helpers.data_fixtures import make_hf_dir, members, train_loader, write_tar

ROUNDS, STEPS, BATCH = 5, 4, 16
MIX, CAPACITY, GLOBAL = 1024, 4096, 256
ENDLESS = 1_000_000


def prepare(root: Path, tars: dict[str, int], image: str = "jpg") -> Path:
    """Let energon prepare the tars in `root`; all of them are for training."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    BaseWebdatasetFactory.prepare_dataset(
        root, list(tars), split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1
    )
    (root / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: VQASample\n"
        f"field_map:\n  image: {image}\n  context: json[question]\n  answers: txt\n"
    )
    return root


def sample(number: int, image: bytes, answer: str, part: str = "jpg") -> dict[str, bytes]:
    """Parts of a sample with one image."""
    meta = {"question": "What is in the picture?", "id": f"id-{number}"}
    return {part: image, "txt": answer.encode(), "json": json.dumps(meta).encode()}


def photo(seed: int, size: tuple[int, int], form: str = "JPEG") -> bytes:
    """A file with structure at several scales, as JPEG about 100 kB at 640 x 480."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((4, 90), (16, 60), (64, 40), (160, 30)):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        scaled = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        total += weight / 220 * np.asarray(scaled)
    out = io.BytesIO()
    options = {"quality": 90} if form == "JPEG" else {}
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(out, form, **options)
    return out.getvalue()


def cpu_of(process: int) -> float:
    """Seconds of CPU time of another process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_images(root: Path, hf_dir: Path, form: str) -> dict[str, Any]:
    count = STEPS * BATCH
    images = [photo(number, (640, 480), form) for number in range(count)]
    data = root / form
    data.mkdir()
    part = {"JPEG": "jpg"}.get(form, form.lower())
    parts = {f"{n:06d}": sample(n, image, f"It is {n}.", part) for n, image in enumerate(images)}
    write_tar(data / "000000.tar", members(parts))
    prepare(data, {"000000.tar": count}, part)
    processor = load_processor(hf_dir).image_processor
    expected: dict[str, torch.Tensor] = {}

    def bare() -> float:
        start = time.process_time()
        for number, image in enumerate(images):
            decoded = Image.open(io.BytesIO(image)).convert("RGB")
            pixels = processor(decoded, return_tensors="pt")["pixel_values"]
            expected[f"id-{number}"] = pixels[0]
        return count / (time.process_time() - start)

    feeds: list[Feed] = []
    start_feed: Callable[[Feed], None] = Feed.start
    Feed.start = lambda feed: (feeds.append(feed), start_feed(feed))[1]  # type: ignore
    loader = train_loader(
        data, hf_dir, seq_length=1024, global_batch_size=BATCH, seed=5, num_workers=1
    )
    steps = iter(loader)
    next(steps)
    worker = feeds[0]._workers.workers[0].process.pid
    equal = True

    def loaded() -> float:
        nonlocal equal
        # Steps that are ready before the clock starts are made up for by those made meanwhile.
        begun, own = cpu_of(worker), time.process_time()
        rows = [row for step in itertools.islice(steps, STEPS) for row in step]
        seconds = cpu_of(worker) - begun + time.process_time() - own
        equal &= all(torch.equal(r.pixel_values[0], expected[r.sample_ids[0]]) for r in rows)
        return len(rows) / seconds

    bare()
    loaded()
    pairs = [(bare(), loaded()) for _ in range(ROUNDS)]
    steps.close()  # type: ignore[attr-defined]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "what": f"images, {form}", "bare_images_per_cpu_s": round(theirs, 1),
        "loader_images_per_cpu_s": round(ours, 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 2), "pixels_equal": equal,
    }  # fmt: skip


def measure_packing(root: Path, hf_dir: Path) -> dict[str, Any]:
    rng = random.Random(0)
    image = photo(1, (40, 36))
    data = root / "mix"
    data.mkdir()
    parts = {}
    for number in range(MIX):
        tokens = min(1472, max(32, round(rng.lognormvariate(5.3, 0.8))))
        answer = "".join(rng.choices("bcdfghjklmnpqrtvwxz", k=max(1, tokens - 16)))
        parts[f"{number:06d}"] = sample(number, image, answer)
    write_tar(data / "000000.tar", members(parts))
    prepare(data, {"000000.tar": MIX})

    def rows(rank: int, **options: Any) -> Iterator[list[Any]]:
        loader = train_loader(
            data,
            hf_dir,
            seq_length=CAPACITY,
            global_batch_size=GLOBAL,
            dp_rank=rank,
            dp_size=8,
            seed=3,
            need_pixels=False,
            packing=True,
            scratch=root,
            **options,
        )
        return itertools.islice(loader, MIX // GLOBAL)

    fills, lengths = {}, []
    for name, options in (
        ("fill", {"pad_to_multiple": 8}),
        ("fill_equal_lengths", {"pad_to_multiple": 8, "equal_lengths": True}),
        ("fill_budget", {"pad_to": "budget"}),
    ):
        useful = positions = 0
        for row in (row for rank in range(8) for step in rows(rank, **options) for row in step):
            useful += row.num_tokens
            positions += row.tokens.shape[1]
            if name == "fill":
                lengths += row.cu_seqlens.diff()[: len(row.sample_ids)].tolist()
        fills[name] = round(useful / positions, 4)
    assert len(lengths) == MIX
    start = time.process_time()
    for begin in range(0, MIX, GLOBAL):
        pack(lengths[begin : begin + GLOBAL], CAPACITY, 8)
    planning = (time.process_time() - start) / MIX
    loader = train_loader(
        data,
        hf_dir,
        seq_length=CAPACITY,
        global_batch_size=GLOBAL,
        seed=3,
        need_pixels=False,
        packing=True,
    )
    start = time.process_time()
    loader._builder.lengths(range(MIX))
    measuring = (time.process_time() - start) / MIX
    return {
        "what": "packing", **fills, "mean_tokens": round(statistics.mean(lengths), 1),
        "plan_us_per_sample": round(1e6 * planning, 2),
        "lengths_us_per_sample": round(1e6 * measuring, 1),
    }  # fmt: skip


def measure_resume(root: Path, hf_dir: Path) -> dict[str, Any]:
    """A thousand links to one tar of a thousand samples."""
    data, each = root / "million", 1000
    data.mkdir()
    image = photo(2, (40, 36))
    write_tar(
        data / "000000.tar",
        members({f"{n:06d}": sample(n, image, f"It is {n}.") for n in range(each)}),
    )
    prepare(data, {"000000.tar": each})
    names = [f"{number:06d}.tar" for number in range(ENDLESS // each)]
    for name in names[1:]:
        os.link(data / names[0], data / name)
        os.link(data / f"{names[0]}.idx", data / f"{name}.idx")
    info = {"energon_version": "7.4.1", "shard_counts": dict.fromkeys(names, each)}
    (data / ".nv-meta" / ".info.json").write_text(json.dumps(info))
    split = {"split_parts": {"train": [f"{{{names[0][:6]}..{names[-1][:6]}}}.tar"]}, "exclude": []}
    (data / ".nv-meta" / "split.yaml").write_text(json.dumps(split))
    start = time.monotonic()
    start_server()
    first_process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    first_process.start()
    first_process.join()
    found = {"server_s": round(time.monotonic() - start, 2)}
    for workers in (0, 2):
        first = 7 * ENDLESS // 2 // GLOBAL * GLOBAL
        start = time.monotonic()
        loader = train_loader(
            data,
            hf_dir,
            seq_length=CAPACITY,
            global_batch_size=GLOBAL,
            dp_size=8,
            seed=3,
            num_workers=workers,
            start_samples=first,
            packing=True,
        )
        state = loader.state()
        loader.check_state(state)
        steps = iter(loader)
        next(steps)
        found[f"resume_s_{workers}_workers"] = round(time.monotonic() - start, 2)
        steps.close()  # type: ignore[attr-defined]
        assert state["samples_in_split"] == ENDLESS
    return {"what": "resume", "samples": ENDLESS, "first_sample": first, **found}


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="llava-steps-bench-") as name:
        root = Path(name)
        hf_dir = make_hf_dir(root / "hf", size=336, patch=14)
        resume = measure_resume(root, hf_dir)  # first: it starts the fork server
        images = [measure_images(root, hf_dir, form) for form in ("JPEG", "WEBP", "PNG")]
        packing = measure_packing(root, hf_dir)
    for line in (packing, resume, *images):
        print(json.dumps(line))
    good = (
        all(line["ratio"] >= 1.0 and line["pixels_equal"] for line in images)
        and packing["fill"] >= 0.97
        and resume["resume_s_2_workers"] <= 5
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
