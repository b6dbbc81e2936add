"""A run as its steps leave it, made without running any: manifests, curves, answers, images.

Texts of the data are hostile: markup, control characters, long words, right-to-left text.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_steps.core import filesystem
from llava_steps.store import store

HOSTILE = (
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">',
    "</style></mark><h1>big</h1>{{ 7 * 7 }}{% raw %}",
    "\u202eright to left\u202c \x00\x07\ud800 שלום",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 6,
    "javascript:alert(1) &amp; &lt;b&gt; ]]>",
)
MODELS = ("before", "after_stage1", "after_stage2")
GROUPS = ("what_digit/en", "what_digit/ja", "odd_even/en", "compare/en")


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> bytes:
    """A JPEG of coloured noise, smoothed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, "JPEG")
    return out.getvalue()


def answers(number: int) -> dict[str, str]:
    """What the fixture says in the place of a question, its reference and an answer."""
    text = HOSTILE[number % len(HOSTILE)]
    return {"question": f"<image>\n{text}", "reference": text, "answer": f"{text} no"}


def make_run(root: Path) -> dict[str, Path]:
    """All results of a run below `root`, sealed in a store and published; by the rules' names."""
    made: dict[str, Path] = {}

    def seal(name: str, metrics: dict[str, Any], wall: float, **config: Any) -> None:
        entry = root / "store" / name / "0"
        store.seal(
            entry,
            {
                "step": "hf_export" if name == "stage1_export" else name,  # one step makes both
                "fingerprint": f"{len(made):032x}",
                "config": {"seed": 1234, **config},
                "code": "0123456789abcdef",
                "image": "",
                "inputs": {"source": {"path": HOSTILE[0], "digest": "ab" * 32}},
                "metrics": metrics,
                "attempts": 1 + len(made) % 2,
                "wall_s": wall,
            },
        )
        made[name] = root / "results" / name
        store.publish(entry, made[name])

    def put(name: str, file: str, data: bytes | str) -> None:
        path = root / "store" / name / "0" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        filesystem.write_bytes(path, data if isinstance(data, bytes) else data.encode())

    put("tar_shards", "000000.tar", b"tar")
    reasons = {"unreadable image": 31, HOSTILE[0]: 4}
    seal(
        "tar_shards",
        {"samples_in": 12345, "samples_written": 12310, "samples_quarantined": 35, "shards": 13,
         "bytes": 5_000_000, "quarantine_reasons": reasons, "duplicate_ids": 0},
        93.2,
    )  # fmt: skip
    put("energon_dataset", "000000.tar", b"tar")
    samples = {"train": 12000, "val": 310, "test": 0}
    seal("energon_dataset", {"bytes": 5_000_000, "samples": samples, "shards": samples}, 34.1)
    put("hf_model", "model.safetensors", b"weights")
    seal("hf_model", {"parameters": 1_812_345_678, "tokens_per_image": 576}, 61.0)
    counts = {"bytes": 3_600_000_000, "chunks": 86, "hf_tensors": 498, "megatron_tensors": 368}
    for name in ("megatron_checkpoint", "stage1_export", "hf_export"):
        put(name, "model.safetensors", b"weights")
    forward = {"layer_0": 0.0, "layer_23": 0.0}
    seal("megatron_checkpoint", {"certificate": counts, "forward": forward}, 120.0, tp=1, pp=1)
    for stage in (1, 2):
        _audit(stage, put)
        seal(f"stage{stage}_audit", audit_report(), 12.0, stage=stage)
    for stage, steps in ((1, 150), (2, 2400)):
        name = f"stage{stage}_checkpoint"
        put(name, "metrics.jsonl", "".join(_lines(steps)))
        seal(
            name,
            {"first_loss": 4.2, "last_loss": 0.0418, "samples": steps * 64, "steps": steps,
             "tokens": steps * 2600, "updates": steps - 1},
            5400.0 * stage, stage=stage, gpus=8, nodes=stage, train_steps=steps, lr=1e-3,
            global_batch_size=64, freeze_vision=True, freeze_projector=False,
            freeze_lm=stage == 1, lr_schedule="cosine", precision="bf16",
        )  # fmt: skip
        if stage == 1:
            seal("stage1_export", {"certificate": counts, "forward": {"layer_0": 3.1e-7}}, 50.0)
    seal("hf_export", {"certificate": counts, "forward": forward}, 50.0)
    results = _evaluation(put)
    seal("evaluation", {"questions": 800, "results": results}, 210.0)
    rows = [
        {"task": HOSTILE[0], "metric": "exact_match", "value": 0.31419, "stderr": 0.0123},
        {"task": "japanese-heron-bench", "metric": HOSTILE[4], "value": 61.803, "stderr": None},
    ]
    for name in ("lmms_eval", "llm_jp_eval_mm"):
        told = {"harness": name, "version": "0.7.3", "scores": rows}
        put(name, "scores.json", json.dumps(told))
        seal(name, told, 900.0)
    return made


def _lines(steps: int) -> list[str]:
    rows = []
    for step in range(steps):
        noise = math.sin(step * 12.9898) * 0.12
        share = step / steps
        rows.append(
            json.dumps(
                {
                    "step": step,
                    "loss": float("nan") if step == 7 else 4.2 * math.exp(-6 * share) + noise + 0.2,
                    "lr": 1e-3 * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * share)) / 2,
                    "grad_norm": 1.5 + noise * 4,
                    "tokens_per_s": 51_000 + 6_000 * noise,
                }
            )
            + "\n"
        )
    return rows


def audit_report() -> dict[str, Any]:
    """report.json of an audit."""
    edges = [40, 120, 200, 280, 360, 440, 520]
    counts = [12, 180, 420, 250, 90, 48]
    rows = [
        {"from": a, "to": b, "samples": n}
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    return {
        "samples": 1000, "usable": 1000, "refused": 0, "broken": 0, "truncated": 0,
        "answers": 1700, "images": 1031, "samples_in_split": 12000, "tokens": 260_000,
        "supervised_tokens": 54_000, "supervised_share": 0.2077, "seq_length": 2048,
        "lengths": {"min": 40, "p50": 231, "p90": 402, "p99": 500, "max": 519, "histogram": rows},
    }  # fmt: skip


def _audit(stage: int, put: Any) -> None:
    for file, data in audit_files(audit_report()).items():
        put(f"stage{stage}_audit", file, data if isinstance(data, bytes) else json.dumps(data))


def audit_files(report: dict[str, Any]) -> dict[str, Any]:
    """The files of an audit with that report: bytes of images, and values of JSON files."""
    files: dict[str, Any] = {"report.json": report}
    for number in range(12):
        files[f"thumbnails/{number:03d}.jpg"] = picture(number)
    thumbnails = [
        {"image": f"thumbnails/{n:03d}.jpg", "sample": f"/a/b/000000.tar/{n:06d}"}
        for n in range(12)
    ]
    examples = [
        {
            "sample": f"/a/b/000001.tar/00000{n}",
            "tokens": 231,
            "supervised": 40,
            "pieces": [["<s> <image> x 576 " + HOSTILE[n], False], [HOSTILE[n + 2], True]],
            "images": ["thumbnails/000.jpg"] * n,
        }
        for n in range(3)
    ]
    files["examples.json"] = {"examples": examples, "thumbnails": thumbnails}
    return files


def _evaluation(put: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for place, model in enumerate(MODELS):
        results[model] = {
            group: {
                "accuracy": min(1.0, 0.08 + 0.42 * place + 0.03 * number),
                "questions": 800 if group == "all" else 200,
                "rouge_l": 0.2 + 0.3 * place,
                "perplexity": 90.0 / (1 + 20 * place),
            }
            for number, group in enumerate(("all", *GROUPS))
        }
        samples[model] = [
            {
                "id": f"sample {number} {HOSTILE[1]}",
                "group": group,
                **answers(number + turn),
                "right": place == 2 or number == turn,
                "images": [f"images/{(number + k) % 4:03d}.jpg" for k in range(number % 3)],
            }
            for number, group in enumerate(GROUPS)
            for turn in range(3)
        ]
    for number in range(4):
        put("evaluation", f"images/{number:03d}.jpg", picture(100 + number, (90, 120)))
    prompts = [
        {
            "prompt": f"<image>\n{HOSTILE[5]}",
            "images": ["images/000.jpg"],
            "answers": {model: HOSTILE[place] for place, model in enumerate(MODELS)},
        }
    ]
    put("evaluation", "results.json", json.dumps(results))
    put("evaluation", "samples.json", json.dumps(samples))
    put("evaluation", "generations.json", json.dumps(prompts))
    return results
