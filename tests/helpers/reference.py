"""An independent trainer: plain PyTorch over the HF model, samples read with `tarfile`.

Nothing of llava_steps is imported here. One sample at a time, no packing, no padding.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


def read_samples(dataset: Path) -> dict[str, tuple[list[dict[str, str]], list[Image.Image]]]:
    """All samples of a directory of tars: id -> (conversation, images)."""
    parts: dict[str, dict[str, bytes]] = {}
    for path in sorted(dataset.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                parts.setdefault(f"{path.name}/{key}", {})[kind] = file.read()
    samples = {}
    for part in parts.values():
        info = json.loads(part["json"])
        names = sorted((n for n in part if n.endswith("jpg")), key=lambda n: (len(n), n))
        images = [Image.open(io.BytesIO(part[n])).convert("RGB") for n in names]
        samples[str(info["id"])] = (info["conversations"], images)
    return samples


def encode(
    processor: Any, turns: Sequence[dict[str, str]], images: list[Image.Image]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs of one conversation, and labels that hold the answers and their end only."""

    def tokens(messages: Sequence[dict[str, str]], prompt: bool) -> dict[str, torch.Tensor]:
        text = processor.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
        count = text.count("<image>")
        seen = images[:count] or None
        return dict(
            processor(text=text, images=seen, return_tensors="pt", add_special_tokens=False)
        )

    inputs = tokens(turns, False)
    ids = inputs["input_ids"][0]
    labels = torch.full_like(ids, -100)
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            start = tokens(turns[:i], True)["input_ids"].shape[1]
            end = tokens(turns[: i + 1], False)["input_ids"].shape[1]
            labels[start:end] = ids[start:end]
    return inputs, labels


def rate(step: int, steps: int, lr: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero at the last step."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - 1 - warmup)))


def train(
    hf_dir: Path,
    dataset: Path,
    batches: Iterable[Sequence[str]],
    *,
    trained: Sequence[str],
    steps: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    clip: float,
    prepare: Callable[[Any], None] = lambda model: None,
    constant: bool = False,
    factors: Mapping[str, float] = {},
) -> list[float]:
    """Losses (token mean over the global batch) of AdamW steps over `batches` of sample ids.

    `trained`: substrings of the names of parameters that are trained. `prepare`: what is done to
    the model before, such as adding parameters. `constant`: the rate never falls. `factors`:
    substring of the name of a parameter -> its rate as a multiple of `lr`.
    """
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(hf_dir, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(hf_dir, dtype=torch.float32)
    model.train()
    prepare(model)
    samples = read_samples(dataset)
    parameters, groups = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(t in name for t in trained))
        if parameter.requires_grad:
            parameters.append(parameter)
            decay = weight_decay if parameter.dim() > 1 else 0.0
            factor = next((f for part, f in factors.items() if part in name), 1.0)
            groups.append({"params": [parameter], "weight_decay": decay, "factor": factor})
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step, ids in enumerate(batches):
        encoded = [encode(processor, *samples[i]) for i in ids]
        count = sum(int((labels[1:] != -100).sum()) for _, labels in encoded)
        total = 0.0
        optimizer.zero_grad()
        for inputs, labels in encoded:
            logits = model(**inputs).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            if loss.requires_grad:  # a text-only sample says nothing about the projector
                (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        for group in optimizer.param_groups:
            now = lr if constant and step >= warmup else rate(step, steps, lr, warmup)
            group["lr"] = now * group["factor"]
        optimizer.step()
        losses.append(total / count)
    return losses
