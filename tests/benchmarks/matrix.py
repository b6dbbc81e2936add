"""make matrix: towers x language models x layouts, tiny and random, against transformers.

    python -m tests.benchmarks.matrix [--only siglip:qwen3]

Of every combination: HF -> Megatron -> loaded and saved in the layout -> HF is the same file by
sha256; fp32 logits differ by at most 1e-4; the most likely token in bf16 is that of transformers in
bf16 at 99.9 % of the positions or more. Left out of that share are the positions that bf16 cannot
decide: where the two best tokens of transformers' own fp32 run are nearer to each other than twice
the error of its own bf16 run. A row is printed for each, with the share of all positions too; the
last line is JSON, {"combinations", "passed", "max_logit_delta"}. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.dist_helpers import model_parallel, spawn
from tests.helpers.model_fixtures import (
    LLAMA3,
    VOCAB,
    Batch,
    Sample,
    Tiny,
    hf_model,
    pack_samples,
    reference,
    samples,
    save_hf,
)
from tests.helpers.model_workers import Job, Layout, build, run_schedule

LOGITS, AGREEMENT = 1e-4, 0.999
LENGTH = 176
"""Tokens of a packed row; two samples of text alone fill what the images leave."""

VISION: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    # name: (siglip?, vision_config, settings of the LLaVA model)
    "clip": (False, {}, {}),
    "siglip": (True, {}, {"vision_feature_select_strategy": "full"}),
    # SigLIP2 of fixed resolution: SigLIP's architecture in SigLIP2's manner, other patches.
    "siglip2": (
        True,
        {"patch_size": 4, "num_attention_heads": 2, "num_hidden_layers": 4},
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
}
THETA = {"rope_type": "default", "rope_theta": 1e6}
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-theta": ("llama", {"rope_parameters": THETA}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llm-jp-3": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"sliding_window": None, "rope_parameters": THETA}),
    "qwen2": ("qwen2", {"rope_parameters": THETA}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": THETA}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
LAYOUTS = tuple(Layout(tp=tp, pp=pp) for tp in (1, 2) for pp in (1, 2))


@dataclass(frozen=True)
class Expected:
    """transformers' logits of the packed row, fp32 and bf16 (as fp32), and the row."""

    batch: Batch
    fp32: Tensor
    bf16: Tensor


def tiny(vision: str, text: str) -> Tiny:
    """The model of one cell."""
    siglip, tower, top = VISION[vision]
    family, settings = TEXT[text]
    sizes = {"max_position_embeddings": 512, **settings}
    return Tiny(f"{vision}:{text}", sizes, tower, top, siglip=siglip, family=family)


def prepare(model: Tiny, root: Path) -> Expected:
    """HF directory, Megatron checkpoint, and what transformers computes."""
    from llava_steps.conversion.convert import hf_to_dcp
    from llava_steps.conversion.tensors import TensorDirectory
    from llava_steps.geometry.geometry import Geometry

    hf = save_hf(model, root / "hf")
    geometry = Geometry.load(root / "hf")
    with TensorDirectory(root / "hf") as tensors:
        hf_to_dcp(geometry, tensors, root / "weights")
    rows = samples(geometry.tokens_per_image)
    generator = torch.Generator().manual_seed(3)
    left = LENGTH - sum(len(row.tokens) for row in rows)
    for count in (left // 2, left - left // 2):
        tokens = torch.randint(6, VOCAB, (count,), generator=generator)
        rows.append(Sample(tokens, torch.full_like(tokens, -100), None))
    with torch.no_grad():
        fp32 = torch.cat(reference(hf, rows)[0])
        bf16 = torch.cat(reference(hf_model(model, torch.bfloat16), rows)[0])
    return Expected(pack_samples(rows, tuple(range(len(rows))), LENGTH), fp32, bf16)


def cells(rank: int, jobs: list[Job]) -> list[tuple[Tensor, Tensor]]:
    """For each job the logits in fp32 and bf16 on the last stage; saves the weights."""
    from llava_steps.model.weights import save_weights

    found: dict[int, tuple[Tensor, Tensor]] = {}
    torch.set_grad_enabled(False)
    for layout in LAYOUTS:
        with model_parallel(layout.tp, layout.pp):
            for place, job in enumerate(jobs):
                if job.layout == layout:
                    model = build(job)
                    exact = run_schedule(model, job.batches, with_labels=False)
                    save_weights(model, job.out / "weights")
                    half = build(replace(job, layout=replace(layout, precision="bf16")))
                    rounded = run_schedule(half, job.batches, with_labels=False)
                    found[place] = (exact[0], rounded[0]) if exact else (Tensor(), Tensor())
    return [found[place] for place in range(len(jobs))]


def judge(job: Job, expected: Expected, logits: tuple[Tensor, Tensor]) -> tuple[bool, float, str]:
    """Whether a combination passes, its fp32 difference, and its row."""
    from llava_steps.conversion.convert import dcp_to_hf
    from llava_steps.conversion.tensors import TensorDirectory
    from llava_steps.geometry.geometry import Geometry

    exact, rounded = logits
    delta = (exact - expected.fp32).abs().max().item()
    same = rounded.argmax(-1) == expected.bf16.argmax(-1)
    best = expected.fp32.topk(2, dim=-1).values
    error = (expected.bf16 - expected.fp32).abs().amax(-1)
    decided = best[:, 0] - best[:, 1] > 2 * error
    share = same[decided].double().mean().item()
    with TensorDirectory(job.hf) as template:
        dcp_to_hf(Geometry.load(job.hf), job.out / "weights", template, job.out)
    name = "model.safetensors"
    identical = sha256(job.out / name) == sha256(job.hf / name)
    passed = (
        identical and delta <= LOGITS and share >= AGREEMENT and bool(decided.double().mean() > 0.5)
    )
    row = (
        f"{job.hf.parent.name:24} tp{job.layout.tp} pp{job.layout.pp}  round trip "
        f"{'identical' if identical else 'DIFFERS'}  fp32 {delta:.1e}  bf16 top-1 {share:.2%} of "
        f"{int(decided.sum())}, {same.double().mean().item():.1%} of all  "
        f"{'ok' if passed else 'FAILED'}"
    )
    return passed, delta, row


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(root: Path, only: str = "") -> dict[str, Any]:
    """Print a row for each combination whose name contains `only`; the last line's object."""
    jobs, expected = [], []
    for model in (tiny(vision, text) for vision in VISION for text in TEXT):
        if only not in model.name:
            continue
        folder = root / model.name
        folder.mkdir()
        wanted = prepare(model, folder)
        for layout in LAYOUTS:
            out = folder / str(layout)
            out.mkdir()
            jobs.append(Job(folder / "hf", folder / "weights", layout, True, (wanted.batch,), out))
            expected.append(wanted)
    ranks = spawn("tests.benchmarks.matrix:cells", 4, root, jobs)
    passed, worst = 0, 0.0
    for job, wanted, logits in zip(jobs, expected, ranks[3], strict=True):
        fine, delta, row = judge(job, wanted, logits)
        print(row, flush=True)
        passed, worst = passed + fine, max(worst, delta)
    return {"combinations": len(jobs), "passed": passed, "max_logit_delta": worst}


def main() -> int:
    parser = argparse.ArgumentParser(description="towers x language models x layouts")
    parser.add_argument("--only", default="", help="part of a name, as siglip:qwen3")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="matrix-") as root:
        found = run(Path(root), parser.parse_args().only)
    print(json.dumps(found))
    return 0 if found["passed"] == found["combinations"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
