"""make bench-convert: a random bf16 model of 7B shape both ways, against cp + sha256sum.

    python -m tests.benchmarks.convert [--layers 32] [--directory /somewhere/with/room]

Both conversions run as the steps a user would run, in processes of their own, whose largest
resident memory the kernel reports. The last line is JSON: {"to_megatron_ratio", "to_hf_ratio",
"peak_rss_gib", "identical"}; ratios are wall time by that of cp plus sha256sum of the HF files.
Exit code 1 if a limit is passed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.helpers.chain import environment

SHARD = 4 << 30
CORES = 2
MAX_RATIO, MAX_RSS_GIB = 2.5, 3.0


def llava_7b(layers: int) -> dict[str, object]:
    """config.json of CLIP ViT-L/14-336 and a Llama of 7B shape with `layers` layers."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    text = {
        "model_type": "llama",
        "vocab_size": 32128,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": vision,
        "text_config": text,
        "image_token_index": 32000,
        "dtype": "bfloat16",
    }


def write_model(directory: Path, layers: int) -> int:
    """A random model in shards of at most SHARD bytes; returns the bytes of its tensors."""
    from llava_steps.conversion.mapping import entries
    from llava_steps.conversion.tower import tower_shapes
    from llava_steps.geometry.geometry import Geometry

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(llava_7b(layers)))
    geometry = Geometry.load(directory)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for entry in entries(geometry, tower_shapes(geometry)):
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
            size = 2 * int(np.prod(shape))
            if filled and filled + size > SHARD:
                shards.append({})
                filled = 0
            shards[-1][name] = shape
            filled += size
    weight_map, total, rng = {}, 0, np.random.Generator(np.random.SFC64(0))
    for place, shard in enumerate(shards):
        name = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in shard.items():
            start, end = end, end + 2 * int(np.prod(shape))
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for block in random_bytes(rng, end):
                file.write(block)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_bytes(rng: np.random.Generator, size: int) -> Iterator[memoryview]:
    """`size` bytes that are finite bf16 numbers: the top bit of the exponent is never set."""
    block = 64 << 20
    for start in range(0, size, block):
        count = min(block, size - start)
        values = rng.integers(0, 1 << 64, -(-count // 8), dtype=np.uint64)
        values &= np.uint64(0xBFFFBFFFBFFFBFFF)
        yield memoryview(values).cast("B")[:count]


def timed(line: list[str], cwd: Path) -> tuple[float, float]:
    """Wall seconds and peak GiB of a command on CORES cores; its output when it fails."""
    threads = {"OMP_NUM_THREADS": str(CORES)}
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            line, cwd=cwd, env=environment() | threads, stdout=log, stderr=subprocess.STDOUT
        )
        cores = sorted(os.sched_getaffinity(0))[:CORES]
        os.sched_setaffinity(process.pid, cores)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(line)}: exit code {process.returncode}\n{log.read()}")
    return wall, usage.ru_maxrss / (1 << 20)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of the weight files and their index."""
    found = {}
    for path in sorted(directory.glob("model*")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def run(root: Path, layers: int) -> dict[str, object]:
    """Convert both ways below `root`; the last line's object."""
    size = write_model(root / "hf", layers)
    os.sync()
    print(f"{size / 1e9:.1f} GB in {layers} layers, on {CORES} cores", flush=True)
    copy, _ = timed(["cp", "-r", "hf", "copy"], root)
    digest, _ = timed(["bash", "-c", "sha256sum copy/*"], root)
    shutil.rmtree(root / "copy")
    os.sync()
    print(f"cp {copy:.1f} s, sha256sum {digest:.1f} s", flush=True)
    python = [sys.executable, "-m"]
    there, rss = timed(
        [*python, "llava_steps.hf_to_megatron", "--hf-dir=hf", "--save-dir=megatron"], root
    )
    print(f"to Megatron {there:.1f} s, {rss:.2f} GiB", flush=True)
    os.sync()
    back, rss_back = timed(
        [*python, "llava_steps.megatron_to_hf", "--megatron-dir=megatron", "--tokenizer-dir=hf",
         "--save-dir=export"], root,
    )  # fmt: skip
    print(f"to HF {back:.1f} s, {rss_back:.2f} GiB", flush=True)
    return {
        "to_megatron_ratio": round(there / (copy + digest), 2),
        "to_hf_ratio": round(back / (copy + digest), 2),
        "peak_rss_gib": round(max(rss, rss_back), 2),
        "identical": digests(root / "hf") == digests(root / "export"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=32, help="32 are 7B (13.5 GB)")
    parser.add_argument("--directory", type=Path, help="where 4 times the model has room")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="bench-convert-") as root:
        found = run(Path(root), args.layers)
    print(json.dumps(found))
    fine = found["identical"] and float(str(found["peak_rss_gib"])) <= MAX_RSS_GIB
    ratios = (found["to_megatron_ratio"], found["to_hf_ratio"])
    return 0 if fine and all(float(str(ratio)) <= MAX_RATIO for ratio in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
