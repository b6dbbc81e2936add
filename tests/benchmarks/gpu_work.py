"""The work of train_gpu.py: model shapes as HF directories without weights, and a dataset."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.benchmarks.loading import photo, prepare, sample
from tests.helpers.data_fixtures import make_hf_dir, members, write_tar


def _text(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip


CLIP, SMALL_CLIP = _text(1024, 4096, 24, 16), _text(64, 128, 3, 2)
SHAPES = {
    # llm-jp-3-1.8b and -3.7b
    "1.8b": _text(2048, 7168, 24, 16),
    "3.7b": _text(3072, 8192, 28, 24),
    # for comparisons of losses, and for a machine without a GPU
    "mid": _text(512, 1536, 4, 4),
    "tiny": _text(64, 96, 2, 2),
}
LARGE = ("1.8b", "3.7b")
IMAGES = 256
"""Different images; more samples than that share them, and each is decoded anew."""


def hf_dir(root: Path, shape: str) -> Path:
    """A directory with config, tokenizer and processor of a shape, if not there yet."""
    path = root / f"hf-{shape}"
    if (path / "config.json").exists():
        return path
    size = 336 if shape != "tiny" else 56
    make_hf_dir(path, size=size, patch=14)
    tokens = json.loads((path / "tokenizer.json").read_text())
    added = {row["content"]: row["id"] for row in tokens["added_tokens"]}
    text = {
        "model_type": "llama", "vocab_size": 99584 if shape in LARGE else 1024,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": added["<s>"], "eos_token_id": added["</s>"],
        "pad_token_id": added["<pad>"], **SHAPES[shape],
    }  # fmt: skip
    text["num_key_value_heads"] = text["num_attention_heads"]
    vision = {
        "model_type": "clip_vision_model", "image_size": size, "patch_size": 14,
        "projection_dim": 768, **(CLIP if shape in LARGE else SMALL_CLIP),
    }  # fmt: skip
    config = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text, "vision_config": vision, "image_token_index": added["<image>"],
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "dtype": "bfloat16",
        "vision_feature_select_strategy": "default", "image_seq_length": (size // 14) ** 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def _picture(number: int) -> bytes:
    return photo(number, (640, 480))


def dataset(root: Path, samples: int, processes: int) -> Path:
    """`samples` samples of one image each, text tokens lognormal(5.3, 0.8) clipped to 32..1472."""
    path = root / "dataset"
    if (path / ".nv-meta" / "dataset.yaml").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    count = min(IMAGES, samples)
    with ProcessPoolExecutor(processes) as pool:
        pictures = list(pool.map(_picture, range(count), chunksize=8))
    rng = random.Random(0)
    parts = {}
    for number in range(samples):
        tokens = min(1472, max(32, round(rng.lognormvariate(5.3, 0.8))))
        # Consonants without order: one token a letter.
        answer = "".join(rng.choices("bcdfghjklmnpqrtvwxz", k=max(1, tokens - 16)))
        parts[f"{number:06d}"] = sample(number, pictures[number % count], answer)
    write_tar(path / "000000.tar", members(parts))
    return prepare(path, {"000000.tar": samples})
