"""Make the demo's data and models: handwritten digits, questions about them, two tiny models.

    llava-steps demo_assets --save-dir results/demo/demo_assets

Writes raw/train.json, raw/heldout.json and raw/images/*.jpg (real scans that scikit-learn ships,
questions in English and Japanese), vision_tower/ (a CLIP tower, briefly pretrained against
captions) and text_model/ (a Llama with its tokenizer, briefly pretrained on text about digits).
Neither model has seen a held-out scan, and the language model has seen no image at all. The same
settings give the same bytes. A run with your own data and models does not need this step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.settings.demo_assets import DemoAssets
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step


def run(ctx: Context, cfg: DemoAssets) -> Mapping[str, Any]:
    """Write raw data and both model directories; metrics count samples and parameters."""
    import numpy as np

    from llava_steps.demo import questions, scans

    data = scans.load_scans()
    train, heldout = scans.split(data.digits, cfg.heldout_scans, cfg.seed)
    pixels = np.stack([scans.enlarge(scan, cfg.image_size) for scan in data.pixels])
    raw = ctx.entry / "raw"
    (raw / "images").mkdir(parents=True)
    for number, rgb in enumerate(pixels):
        (raw / questions.image_name(number)).write_bytes(scans.jpeg(rgb))
    digits = data.digits.tolist()
    files = {
        "train": questions.training_samples(train, digits, cfg.seed),
        "heldout": questions.heldout_samples(heldout, digits, cfg.seed),
    }
    for name, samples in files.items():
        filesystem.write_json(raw / f"{name}.json", samples)
    ctx.log.info("%d training scans, %d held out", len(train), len(heldout))
    return {
        "train_samples": len(files["train"]),
        "heldout_samples": len(files["heldout"]),
        "heldout_scans": heldout,
        "vision_parameters": _vision(ctx, cfg, pixels[train], data.digits[train]),
        "text_parameters": _text(ctx, cfg, ctx.entry / "text_model"),
    }


def _vision(ctx: Context, cfg: DemoAssets, pixels: Any, digits: Any) -> int:
    """Pretrain and save the tower on these scans only; returns its number of parameters."""
    from transformers.utils import logging

    from llava_steps.demo import schedule, vision

    logging.disable_progress_bar()
    with schedule.seeded(cfg.seed):
        tower = vision.build_tower(
            cfg.image_size, cfg.patch_size, cfg.vision_hidden_size, cfg.vision_layers
        )
    with ctx.progress("pretraining the tower", cfg.pretrain_vision_steps) as bar:
        vision.pretrain_tower(
            tower, pixels, digits, cfg.pretrain_vision_steps, cfg.seed,
            lambda loss: bar.advance(1, f"loss {loss:.3f}"),
        )  # fmt: skip
    out = ctx.entry / "vision_tower"
    tower.save_pretrained(out)
    vision.save_image_processor(cfg.image_size, out)
    return int(tower.num_parameters())


def _text(ctx: Context, cfg: DemoAssets, out: Path) -> int:
    """Train the tokenizer, pretrain and save the Llama; returns its number of parameters."""
    from llava_steps.demo import schedule, text

    talks = text.corpus(text.CORPUS_SIZE, cfg.seed)
    tokenizer = text.train_tokenizer([m["content"] for t in talks for m in t], cfg.vocab_size)
    with schedule.seeded(cfg.seed):
        model = text.build_llama(
            tokenizer, cfg.text_hidden_size, cfg.text_layers, cfg.text_heads, cfg.text_kv_heads
        )
    with ctx.progress("pretraining the language model", cfg.pretrain_text_steps) as bar:
        text.pretrain_llama(
            model, tokenizer, talks, cfg.pretrain_text_steps, cfg.seed,
            lambda loss: bar.advance(1, f"loss {loss:.3f}"),
        )  # fmt: skip
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return int(model.num_parameters())


STEP = Step(name="demo_assets", config=DemoAssets, run=run, doc=__doc__)

if __name__ == "__main__":
    main(STEP)
