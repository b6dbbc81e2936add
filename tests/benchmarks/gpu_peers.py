"""One timed training of transformers' LlavaForConditionalGeneration: python -m ... SPEC.json.

The batch is sorted by length and cut into microbatches, each padded to its longest sample; SDPA,
bf16 weights and moments, fused AdamW, clipping. With `compile` every decoder layer is compiled for
any length (the regional compilation that transformers recommends: compiling the whole language
model takes minutes, and gains nothing but the launches of a few norms). Batches are made by our own
loader and wait in memory before the clock starts. The largest microbatch that fits is taken.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def batches(spec: dict[str, Any], count: int) -> list[list[Any]]:
    """`count` global batches of single samples."""
    from tests.helpers.data_fixtures import train_loader

    loader = train_loader(
        Path(spec["dataset"]),
        Path(spec["hf_dir"]),
        seq_length=2048 + 128,
        global_batch_size=spec["batch"],
        num_workers=spec["workers"],
    )
    steps = iter(loader)
    found = list(itertools.islice(steps, count))
    steps.close()  # type: ignore[attr-defined]
    return found


def join(rows: list[Any], multiple: int, pad: int, device: Any) -> dict[str, Any]:
    """Right-padded model inputs of single samples; labels in HF's unshifted form."""
    import torch

    longest = -(-max(row.tokens.shape[1] for row in rows) // multiple) * multiple
    shape = (len(rows), longest)
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for i, row in enumerate(rows):
        n = row.tokens.shape[1]
        ids[i, :n], mask[i, :n] = row.tokens[0], 1
        labels[i, 1:n] = row.labels[0, : n - 1]
    pixels = torch.cat([row.pixel_values for row in rows]).to(torch.bfloat16)
    parts = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
    return {k: (v.pin_memory() if device.type == "cuda" else v) for k, v in parts.items()}


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from llava_steps.geometry.costs import Work

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    data = batches(spec, spec["warm"] + spec["measured"])
    config = LlavaConfig.from_pretrained(spec["hf_dir"])
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if spec["stage"] == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if spec["compile"] == "layers":
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True, backend="inductor" if cuda else "aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05, fused=cuda)

    def step(rows: list[Any], size: int) -> None:
        rows = sorted(rows, key=lambda row: -row.tokens.shape[1])
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        for chunk in chunks:
            inputs = join(chunk, spec["multiple"], config.text_config.pad_token_id, device)
            inputs = {k: v.to(device, non_blocking=True) for k, v in inputs.items()}
            (model(**inputs, use_cache=False).loss / len(chunks)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=cuda)
        optimizer.step()
        optimizer.zero_grad()

    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size <= spec["micro"]]
    size = sizes[0]
    for number in range(spec["warm"]):
        while True:
            try:
                step(data[number], size)
                break
            except torch.OutOfMemoryError:
                if size == sizes[-1]:
                    raise
                size = sizes[sizes.index(size) + 1]
                optimizer.zero_grad()
            torch.cuda.empty_cache()
        if number == 0:
            if cuda:
                torch.cuda.synchronize()
            first = round(time.time() - spec["started"], 1)
    if cuda:
        torch.cuda.synchronize()
    began = time.time()
    for rows in data[spec["warm"] :]:
        step(rows, size)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.time() - began
    from torch._dynamo.utils import counters

    measured = [row for rows in data[spec["warm"] :] for row in rows]
    work = Work.of(
        [row.num_tokens for row in measured], sum(row.num_supervised for row in measured),
        sum(row.num_images for row in measured),
    )  # fmt: skip
    result = {
        "seconds": seconds, "first_step_s": first, "work": vars(work), "microbatch": size,
        "compilations": int(counters["stats"]["unique_graphs"]),
    }  # fmt: skip
    if cuda:
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    Path(spec["out"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
