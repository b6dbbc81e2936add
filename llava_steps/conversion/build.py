"""Joins a vision tower and a language model in one Hugging Face LLaVA directory.

The tower and the language model keep every weight. New are the projector (torch's Linear
initialisation, as in LLaVA, from the step's seed) and the embedding and head rows of new tokens:
the mean of the rows of the tokenizer's tokens. No other weight is random: a weight that the files
lack is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_steps.core.errors import ConfigError, InputError, IntegrityError
from llava_steps.geometry.families import TEXT_FAMILIES
from llava_steps.geometry.geometry import Geometry, padded
from llava_steps.settings.conversion import HfModel

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOWERS = {
    # model_type -> (class of the tower in transformers, positions beside the patches)
    "clip": ("CLIPVisionModel", 1),
    "clip_vision_model": ("CLIPVisionModel", 1),
    "siglip": ("SiglipVisionModel", 0),
    "siglip_vision_model": ("SiglipVisionModel", 0),
}
"""A full clip or siglip model gives only its vision part. SigLIP2 checkpoints of fixed resolution
call themselves siglip; those of variable resolution (NaFlex, siglip2) do not fit LLaVA."""


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
    tower, class_tokens = load_tower(tower_dir)
    text = load_text(text_dir)
    tokenizer, added = load_tokenizer(text_dir, template)
    known = len(tokenizer) - len(added)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    rows = padded(max(text.config.vocab_size, len(tokenizer)), cfg.vocab_size_padding * cfg.tp)
    fresh = [int(i) for i in tokenizer.convert_tokens_to_ids(list(added))]
    fresh += range(text.config.vocab_size, rows)
    weights = language_weights(text, rows, sorted(set(fresh)), known)
    asked = DTYPES.get(cfg.dtype)
    dtype = asked or text.dtype

    text_config = text.config
    text_config.vocab_size = rows
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    full = cfg.vision_feature_select_strategy == "full"
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_id,
        projector_hidden_act=cfg.projector_hidden_act,
        vision_feature_layer=cfg.vision_feature_layer,
        vision_feature_select_strategy=cfg.vision_feature_select_strategy,
        image_seq_length=patches + (class_tokens if full else class_tokens - 1),
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
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
    save_processor(tower_dir, tokenizer, config, class_tokens, out)
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


def load_tower(path: Path) -> tuple[Any, int]:
    """The vision tower of a directory, and its number of positions beside the patches."""
    import transformers

    kind = model_type(path, TOWERS, "hf_model.vision_tower")
    name, class_tokens = TOWERS[kind]
    tower, report = getattr(transformers, name).from_pretrained(
        path, local_files_only=True, dtype="auto", output_loading_info=True
    )
    stop_if_missing(report, path)
    return tower, class_tokens


def load_text(path: Path) -> Any:
    """The language model of a directory, with its head."""
    from transformers import AutoModelForCausalLM

    model_type(path, TEXT_FAMILIES, "hf_model.text_model")
    model, report = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, dtype="auto", output_loading_info=True
    )
    stop_if_missing(report, path)
    if report["unexpected_keys"]:
        raise IntegrityError(
            f"{path}: these weights are not part of the model: {report['unexpected_keys']}"
        )
    return model


def model_type(path: Path, known: Any, key: str) -> str:
    """model_type of a directory's config.json; ConfigError if it is not supported."""
    try:
        family = json.loads((path / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {path} is not a Hugging Face model directory: {error}") from None
    if family not in known:
        raise ConfigError(
            f"{key}: {path} is of the family {family!r}; supported: {', '.join(sorted(known))}"
        )
    return str(family)


def stop_if_missing(report: dict[str, Any], path: Path) -> None:
    """IntegrityError if weights are missing: transformers would fill them with random numbers."""
    wrong = {k: report.get(k) for k in ("missing_keys", "mismatched_keys") if report.get(k)}
    if wrong:
        raise IntegrityError(f"{path}: weights are missing from the files: {wrong}")


def load_tokenizer(path: Path, template: Path | None = None) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer with `<image>` and a padding token, and the tokens that were added to it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise InputError(f"hf_model.text_model: {path} has no usable tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"hf_model.text_model: {path} has no fast tokenizer (tokenizer.json)")
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"hf_model.chat_template: {template}: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"hf_model.text_model: the tokenizer of {path} has no chat template; write one into "
            "chat_template.jinja beside tokenizer.json or give hf_model.chat_template"
        )
    before = set(tokenizer.get_vocab())
    if IMAGE_TOKEN not in before:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.image_token = IMAGE_TOKEN
    added = sorted(set(tokenizer.get_vocab()) - before, key=tokenizer.convert_tokens_to_ids)
    return tokenizer, tuple(added)


def language_weights(text: Any, rows: int, fresh: list[int], known: int) -> dict[str, Tensor]:
    """Weights of the language model with `rows` embedding and head rows.

    Rows `fresh` become the mean of the first `known` rows, those of the tokenizer's own tokens.
    """
    embedding = text.get_input_embeddings().weight.data
    tied = bool(text.config.tie_word_embeddings)
    weights = {f"model.language_model.{k}": v for k, v in text.model.state_dict().items()}
    weights["model.language_model.embed_tokens.weight"] = grown(embedding, rows, fresh, known)
    if not tied:
        head = text.get_output_embeddings().weight.data
        weights["lm_head.weight"] = grown(head, rows, fresh, known)
    return weights


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


def save_processor(
    tower_dir: Path, tokenizer: Any, config: Any, class_tokens: int, out: Path
) -> None:
    """Image processor of the tower and tokenizer of the text model as one LLaVA processor."""
    from transformers import AutoImageProcessor, LlavaProcessor

    try:
        images = AutoImageProcessor.from_pretrained(tower_dir, backend="pil", local_files_only=True)
    except Exception as error:
        raise InputError(
            f"hf_model.vision_tower: {tower_dir} has no image processor "
            f"(preprocessor_config.json): {error}"
        ) from error
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
