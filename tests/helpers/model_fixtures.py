"""Tiny random LLaVA models as HF directories, and what HF computes on a few samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGE = 5
VOCAB = 96


@dataclass(frozen=True)
class Tiny:
    """What to vary; everything else is one small CLIP tower and one small GQA Llama."""

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    top: dict[str, Any]
    freeze_vision: bool = True
    siglip: bool = False
    family: str = "llama"


def _tiny(
    name: str,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    freeze_vision: bool = True,
    siglip: bool = False,
    family: str = "llama",
    **top: Any,
) -> Tiny:
    return Tiny(name, text or {}, vision or {}, top, freeze_vision, siglip, family)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TINY: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        _tiny("untied-default", text={"rms_norm_eps": 1e-3}),
        _tiny(
            "tied-full",
            text={
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
            },
            freeze_vision=False,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        # Every bias, a head_dim that is not hidden / heads, layers that two stages do not divide.
        _tiny(
            "biases-uneven",
            text={
                "attention_bias": True,
                "mlp_bias": True,
                "head_dim": 16,
                "num_hidden_layers": 3,
                "rope_parameters": LLAMA3,
            },
            freeze_vision=False,
            projector_hidden_act="gelu_pytorch_tanh",
        ),
        # As many key as query heads, and a tower without class token.
        _tiny(
            "siglip-mha",
            text={"num_key_value_heads": 4},
            siglip=True,
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
        ),
        _tiny("mistral", text={"head_dim": 8, "sliding_window": 128}, family="mistral"),
        _tiny("qwen2-tied", text={"tie_word_embeddings": True}, family="qwen2"),
        _tiny("qwen3", text={"head_dim": 16, "attention_bias": True}, family="qwen3"),
    )
}


def config_of(tiny: Tiny) -> Any:
    """The LlavaConfig of a tiny model."""
    from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

    text = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **tiny.text,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        **tiny.vision,
    }
    top = {"image_token_index": IMAGE, **tiny.top}
    tower = (SiglipVisionConfig if tiny.siglip else CLIPVisionConfig)(**vision)
    language = CONFIG_MAPPING[tiny.family](**text)
    # Where transformers looks for it differs by version; a tied model says it in both places.
    top.setdefault("tie_word_embeddings", language.tie_word_embeddings)
    return LlavaConfig(vision_config=tower, text_config=language, **top)


def hf_model(tiny: Tiny, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model with every parameter random (biases and norms too, so that a mix-up shows)."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config_of(tiny)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    return model.to(dtype)


def save_hf(
    tiny: Tiny,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    seed: int = 0,
) -> Any:
    """Save a tiny model as an HF directory; returns the model."""
    model = hf_model(tiny, dtype, seed)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


@dataclass(frozen=True)
class Sample:
    """tokens int64 [n], targets int64 [n] (already shifted, -100 for none), pixels or None."""

    tokens: Tensor
    targets: Tensor
    pixels: Tensor | None


def samples(tokens_per_image: int) -> list[Sample]:
    """One image, text only, two images, and a sample that is not supervised at all."""
    generator = torch.Generator().manual_seed(7)
    image = [IMAGE] * tokens_per_image
    rows = (
        [1, *image, 17, 8, 9, 40, 2],
        [1, 10, 11, 12, 13, 2],
        [1, *image, 20, *image, 21, 22, 2],
    )
    found = []
    for row in (*rows, [1, *image, 30, 31]):
        tokens = torch.tensor(row)
        targets = torch.cat((tokens[1:], torch.tensor([-100])))
        supervised = torch.rand(len(row), generator=generator) < 0.7
        supervised &= (targets != IMAGE) & (targets > 0) & (len(found) < 3)
        count = row.count(IMAGE) // tokens_per_image
        pixels = torch.randn(count, 3, 16, 16, generator=generator) if count else None
        found.append(Sample(tokens, torch.where(supervised, targets, -100), pixels))
    return found


@dataclass(frozen=True)
class Batch:
    """The arguments of Llava.forward for one packed row; `rows` are the samples' places in it."""

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pixel_values: Tensor | None
    labels: Tensor
    samples: tuple[int, ...]


def pack_samples(all_samples: list[Sample], chosen: tuple[int, ...], length: int) -> Batch:
    """The chosen samples back to back, padded to `length` by a sample of its own."""
    parts = [all_samples[i] for i in chosen]
    lengths = [len(part.tokens) for part in parts]
    pad = length - sum(lengths)
    if pad:
        lengths.append(pad)
    filler = [torch.zeros(pad, dtype=torch.int64)]
    pixels = [part.pixels for part in parts if part.pixels is not None]
    return Batch(
        torch.cat([part.tokens for part in parts] + filler)[None],
        torch.cat([torch.arange(n) for n in lengths])[None],
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        max(lengths),
        torch.cat(pixels) if pixels else None,
        torch.cat([part.targets for part in parts] + [torch.full((pad,), -100)])[None],
        chosen,
    )


def reference(model: Any, all_samples: list[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """HF's logits [n, vocab] and losses [targets] of each sample, run one by one."""
    logits, losses = [], []
    for sample in all_samples:
        pixels = None if sample.pixels is None else sample.pixels.to(model.dtype)
        out = model(input_ids=sample.tokens[None], pixel_values=pixels).logits[0].float()
        kept = sample.targets != -100
        logits.append(out)
        losses.append(
            torch.nn.functional.cross_entropy(out[kept], sample.targets[kept], reduction="none")
        )
    return logits, losses
