"""Tiny CLIP towers and Llamas as Hugging Face directories, every weight random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_steps.demo.text import corpus, train_tokenizer

SIDE, PATCH = 24, 8
TOKENS = (SIDE // PATCH) ** 2
STRING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""Takes a content as text only, as the templates of most language models do."""
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% for c in m['content'] %}"
    "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""Takes a content as parts only and leaves <s> to the tokenizer, as LLaVA-1.5's does."""


def randomize(model: Any, seed: int) -> None:
    """Every parameter random, biases and norms too, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = (noise + (1 if parameter.dim() == 1 else 0)).to(parameter.dtype)


def make_tower(path: Path, side: int = SIDE, seed: int = 1, crop: int | None = None) -> Path:
    """A CLIPVisionModel directory with its image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=side,
            patch_size=PATCH,
        )
    )
    randomize(model, seed)
    model.save_pretrained(path)
    crop = crop or side
    CLIPImageProcessorPil(
        size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop}
    ).save_pretrained(path)
    return path


def make_siglip(path: Path, side: int = SIDE) -> Path:
    """A full SiglipModel directory, as SigLIP and fixed-resolution SigLIP2 checkpoints are."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vision = {**sizes, "image_size": side, "patch_size": PATCH}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**sizes, "vocab_size": 50}))
    randomize(model, 3)
    model.save_pretrained(path)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(path)
    return path


def make_tokenizer(template: str | None = None) -> Any:
    """A fast tokenizer of the demo's kind; `template` replaces its chat template."""
    texts = [m["content"] for talk in corpus(80, 0) for m in talk]
    tokenizer = train_tokenizer(texts, 300)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def make_text(
    path: Path, tokenizer: Any, seed: int = 2, family: str = "llama", **config: Any
) -> Path:
    """A language model of `family` with GQA and the tokenizer; `config` overrides its config."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    dtype = config.pop("dtype", torch.float32)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **config,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).to(dtype)
    randomize(model, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
