"""Join a vision tower and a language model into one Hugging Face LLaVA directory.

    llava-steps build_hf --vision-tower openai/clip-vit-large-patch14-336 \\
        --text-model path/to/llama --save-dir results/x/hf_model

Both are local directories or hub ids; org/name@revision pins one. Without a revision the commit
that was taken first is used until `--update`, and the manifest names it. All weights are kept. The
projector is new, and so are the rows of tokens that the tokenizer did not have (`<image>`, and
`<pad>` if it has none); they start as the mean of the others. The result loads with plain
transformers (LlavaForConditionalGeneration, AutoProcessor).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError
from llava_steps.settings.conversion import HfModel
from llava_steps.store.hub import Hub
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

TEMPLATES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")


def run(ctx: Context, cfg: HfModel) -> Mapping[str, Any]:
    """Build the model in `ctx.entry`; metrics count what was added."""
    from llava_steps.conversion.build import build
    from llava_steps.data.samples import saved_prompts

    tower, text = ctx.inputs["vision_tower"].path, ctx.inputs["text_model"].path
    template = ctx.inputs["chat_template"].path if cfg.chat_template else None
    date = datetime.date.fromisoformat(cfg.template_date) if cfg.template_date else None
    if date is None:
        check_clock(text, template)
    built = build(tower, text, ctx.entry, cfg, template)
    saved_prompts.rewrite(ctx.entry, date)
    try:
        saved_prompts.check(ctx.entry)
    except ConfigError as error:
        ctx.log.warning("nothing can be trained with this model: %s", error)
    if not built.class_tokens and cfg.vision_feature_select_strategy == "default":
        ctx.log.warning(
            "%s has no class token, so vision_feature_select_strategy 'default' drops the first "
            "patch of every image; 'full' keeps it",
            tower,
        )
    ctx.log.info(
        "%d parameters, vocabulary %d (%d new rows), %d tokens per image",
        built.parameters,
        built.vocab,
        built.new_rows,
        built.tokens_per_image,
    )
    return asdict(built) | {"added_tokens": list(built.added_tokens)}


def check_clock(text_model: Path, template: Path | None) -> None:
    """ConfigError if the chat template asks for the date; before the weights are read."""
    from llava_steps.conversion.load import load_tokenizer
    from llava_steps.data.samples.template_text import CLOCK, changing, refuse_changing

    files = [template] if template else [text_model / name for name in TEMPLATES]
    if not any(file.is_file() and CLOCK.encode() in file.read_bytes() for file in files):
        return
    text = load_tokenizer(text_model, template, 1)[0].chat_template
    text = text.get("default", "") if isinstance(text, dict) else text
    if CLOCK in changing(text):
        refuse_changing(text)


def local(text: str, hub: Hub) -> Path:
    """The directory, or the files of a hub id, downloaded if they are missing."""
    return Path(text) if Path(text).exists() else hub.model(text)


STEP = Step(
    name="hf_model",
    config=HfModel,
    run=run,
    doc=__doc__,
    resolve={"vision_tower": local, "text_model": local},
)

if __name__ == "__main__":
    main(STEP)
