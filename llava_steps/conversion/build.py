"""Joins a vision tower and a language model in one Hugging Face LLaVA directory.

The tower and the language model keep every weight. New are the projector (torch's Linear
initialisation, as in LLaVA, from the step's seed) and the embedding and head rows of new tokens:
the mean of the rows of the tokenizer's tokens. No other weight is random: a weight that the files
lack is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_steps.conversion.load import (
    IMAGE_TOKEN,
    check_configs,
    load_image_processor,
    load_text,
    load_tokenizer,
    load_tower,
    text_config,
    tower_config,
)
from llava_steps.core.errors import ConfigError, InputError, IntegrityError
from llava_steps.core.third_party import reported
from llava_steps.geometry.geometry import Geometry, padded
from llava_steps.geometry.hf_directory import llava_config
from llava_steps.settings.conversion import HfModel

BACKGROUND = "transparency_background"
"""Key of the image processor for the colour under transparent pixels, as red, green and blue."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Built:
    """A built model as the manifest describes it."""

    vocab: int
    image_token_id: int
    tokens_per_image: int
    class_tokens: int
    added_tokens: tuple[str, ...]
    new_rows: int
    dtype: str
    """Of the language model, the projector and config.json."""
    tower_dtype: str
    parameters: int


def build(
    tower_dir: Path, text_dir: Path, out: Path, cfg: HfModel, template: Path | None = None
) -> Built:
    """Write the LLaVA directory `out`: weights, config, processor, generation config.

    `template` is a Jinja file used instead of the tokenizer's chat template.

    Raises:
        ConfigError: a family, tokenizer or image processor that cannot be used.
        InputError: a directory that is not a model.
        IntegrityError: weights missing from the files, or a result that contradicts itself.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    described, tower_class, class_tokens = tower_config(tower_dir)
    planned = _planned(tower_dir, described, text_dir, text_config(text_dir), cfg)
    check_configs(tower_dir, text_dir)
    tokenizer, added = load_tokenizer(text_dir, template, planned.tokens_per_image)
    images = load_image_processor(tower_dir)
    set_background(images, cfg.background)
    tower, text = load_tower(tower_dir, tower_class), load_text(text_dir)
    known = len(tokenizer) - len(added)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    ids = 1 + max(tokenizer.get_vocab().values())
    rows = padded(max(text.config.vocab_size, ids), cfg.vocab_size_padding * cfg.tp)
    fresh = [int(i) for i in tokenizer.convert_tokens_to_ids(list(added))]
    fresh += range(text.config.vocab_size, rows)
    weights = language_weights(text, rows, sorted(set(fresh)), known)
    asked = DTYPES.get(cfg.dtype)
    dtype = asked or text.dtype

    text.config.vocab_size = rows
    text.config.tie_word_embeddings = _tied(text)
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    full = cfg.vision_feature_select_strategy == "full"
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=image_id,
        projector_hidden_act=cfg.projector_hidden_act,
        vision_feature_layer=cfg.vision_feature_layer,
        vision_feature_select_strategy=cfg.vision_feature_select_strategy,
        image_seq_length=patches + (class_tokens if full else class_tokens - 1),
        tie_word_embeddings=text.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    weights |= {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    weights |= projector_weights(config, cfg.seed, dtype)
    assign(model, {name: value.to(asked or value.dtype) for name, value in weights.items()})
    if text.can_generate():
        model.generation_config = text.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    # It would write the dtype of the first parameter, which is the tower's.
    model.config.dtype = dtype
    model.config.save_pretrained(out)
    save_processor(images, tokenizer, config, class_tokens, out)
    geometry = check(out)
    return Built(
        vocab=rows,
        image_token_id=image_id,
        tokens_per_image=geometry.tokens_per_image,
        class_tokens=class_tokens,
        added_tokens=added,
        new_rows=len(set(fresh)),
        dtype=str(dtype).removeprefix("torch."),
        tower_dtype=str(asked or tower.dtype).removeprefix("torch."),
        parameters=sum(value.numel() for value in weights.values()),
    )


def _planned(
    tower_dir: Path, vision: dict[str, Any], text_dir: Path, text: dict[str, Any], cfg: HfModel
) -> Geometry:
    """The model that will be built, before its weights are read, but for its vocabulary."""
    rows = text.get("vocab_size", 1)
    try:
        return Geometry.from_hf(llava_config(vision, text, rows, cfg))
    except InputError as error:
        raise InputError(f"{tower_dir}, {text_dir}: {error}") from error


def language_weights(text: Any, rows: int, fresh: list[int], known: int) -> dict[str, Tensor]:
    """Weights of the language model with `rows` embedding and head rows.

    Rows `fresh` become the mean of the first `known` rows, those of the tokenizer's own tokens.
    """
    embedding = text.get_input_embeddings().weight.data
    weights = {f"model.language_model.{k}": v for k, v in text.model.state_dict().items()}
    weights["model.language_model.embed_tokens.weight"] = grown(embedding, rows, fresh, known)
    if not _tied(text):
        head = text.get_output_embeddings().weight.data
        weights["lm_head.weight"] = grown(head, rows, fresh, known)
    return weights


def _tied(text: Any) -> bool:
    """Whether the head is the embedding: files with two different ones overrule config.json."""
    head, embedding = text.get_output_embeddings().weight, text.get_input_embeddings().weight
    return bool(head is embedding)


def grown(matrix: Tensor, rows: int, fresh: list[int], known: int) -> Tensor:
    """[n, hidden] -> [rows, hidden] with the mean of the first `known` rows in rows `fresh`."""
    out = matrix.new_empty(rows, matrix.shape[1])
    out[: len(matrix)] = matrix
    if fresh:
        out[fresh] = matrix[: min(known, len(matrix))].double().mean(0).to(matrix.dtype)
    return out


def projector_weights(config: Any, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The new projector, from `seed` only: drawn in float32, then rounded to `dtype`."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    drawn = projector.state_dict()
    return {f"model.multi_modal_projector.{k}": v.to(dtype) for k, v in drawn.items()}


def assign(model: Any, weights: dict[str, Tensor]) -> None:
    """Assign the weights of a model without storage; IntegrityError unless they match exactly."""
    result = model.load_state_dict(weights, strict=False, assign=True)
    missing = set(result.missing_keys)
    if model.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
        model.tie_weights()
    if missing or result.unexpected_keys:
        raise IntegrityError(
            f"weights of vision_tower and text_model do not form a LLaVA model: missing "
            f"{sorted(missing)}, unexpected {sorted(result.unexpected_keys)}"
        )


def set_background(images: Any, color: str) -> None:
    """Save the colour under transparent pixels with an image processor.

    White is what processors of transformers compose onto; data/samples/images.py reads the rest.
    """
    named = {"white": "#ffffff", "black": "#000000"}
    if color != "white" or hasattr(images, BACKGROUND):
        setattr(images, BACKGROUND, list(bytes.fromhex(named.get(color, color)[1:])))


def save_processor(images: Any, tokenizer: Any, config: Any, class_tokens: int, out: Path) -> None:
    """Image processor of the tower and tokenizer of the text model as one LLaVA processor."""
    from transformers import LlavaProcessor

    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=class_tokens,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    ).save_pretrained(out)


def check(out: Path) -> Geometry:
    """Read the written directory back: its structure, and one image token per feature."""
    from PIL import Image
    from transformers import AutoProcessor

    geometry = Geometry.load(out)
    processor = AutoProcessor.from_pretrained(out, backend="pil", local_files_only=True)
    with reported(
        f"{out}: the processor cannot prepare an image",
        "check the tower's preprocessor_config.json and the language model's tokenizer",
    ):
        inputs = processor(
            text=IMAGE_TOKEN, images=[Image.new("RGB", (50, 30))], add_special_tokens=False
        )
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"][0]
    side = geometry.image_size
    if tuple(pixels.shape) != (3, side, side):
        raise ConfigError(
            f"hf_model.vision_tower: its image processor makes images of {tuple(pixels.shape)}, "
            f"the tower takes (3, {side}, {side}); correct preprocessor_config.json"
        )
    if list(ids) != [geometry.image_token_id] * geometry.tokens_per_image:
        raise IntegrityError(
            f"{out}: the processor writes {len(ids)} tokens per image, the model has "
            f"{geometry.tokens_per_image} features"
        )
    return geometry
