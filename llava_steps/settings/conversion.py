"""Settings of the model steps: `build_hf`, `hf_to_megatron` and `megatron_to_hf`."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, field_validator

from llava_steps.settings.fields import StepConfig, source, value


class HfModel(StepConfig):
    """Vision tower, language model and a new projector to one Hugging Face LLaVA directory."""

    vision_tower: str = source(
        help="vision tower, directory or hub id (org/name or org/name@revision): CLIP, SigLIP or "
        "SigLIP2 of fixed resolution; a full model with both towers gives its vision tower",
        flag="--vision-tower",
        hub="model",
    )
    text_model: str = source(
        help="language model, directory or hub id (org/name or org/name@revision): Llama, "
        "Mistral, Qwen2 or Qwen3",
        flag="--text-model",
        hub="model",
    )
    chat_template: str = source(
        "", "Jinja file that replaces the text model's chat template", optional=True, is_data=True
    )
    template_date: str = value(
        "",
        "date (2026-01-31) that a chat template writes which asks for today's; empty: such a "
        "template is refused",
        pattern=r"^(\d{4}-\d{2}-\d{2})?$",
    )
    vision_feature_layer: int = value(-2, "hidden state of the tower that the projector reads")
    vision_feature_select_strategy: Literal["default", "full"] = value(
        "default", "'default' drops the class token, 'full' keeps it"
    )
    background: str = value(
        "white",
        "colour that transparent pixels are composed onto, in training, evaluation and chat: "
        "white, black or #rrggbb",
        pattern=r"^(white|black|#[0-9a-fA-F]{6})$",
    )
    projector_hidden_act: Literal["gelu"] = value("gelu", "activation between the projector layers")
    vocab_size_padding: Count = value(
        128,
        "pads embedding rows to a multiple of this times tp; 0 pads nothing",
        flag="--vocab-size-padding",
        bare=128,
    )
    tp: PositiveInt = value(
        1, "tensor parallel size that the rows are padded for; any divisor of them can train"
    )
    dtype: Literal["fp32", "bf16", "source"] = value(
        "source",
        "dtype of the saved weights; 'source' keeps those of tower and language model, and "
        "saves the projector in that of the language model",
    )

    @field_validator("template_date")
    @classmethod
    def _date(cls, text: str) -> str:
        if text:
            datetime.date.fromisoformat(text)
        return text


class MegatronCheckpoint(StepConfig):
    """HF safetensors to a Megatron checkpoint (torch_dist), which loads in any layout."""

    hf_dir: str = source("", "HF LLaVA directory", flag="--hf-dir")
    tp: PositiveInt = value(
        1, "tensor parallel size that the files are split for; they load in any layout"
    )
    pp: PositiveInt = value(
        1, "pipeline parallel size that the files are split for; they load in any layout"
    )


class HfExport(StepConfig):
    """Megatron checkpoint to HF safetensors."""

    megatron_dir: str = source("", "Megatron checkpoint directory", flag="--megatron-dir")
    tokenizer_dir: str = source("", "HF directory that gives config, tokenizer and processor")
    export_format: Literal["transformers-5", "transformers-4"] = value(
        "transformers-5",
        "versions of transformers that read the result: 5 (files as in tokenizer_dir), or "
        "4.45 to 4.57 and 5",
    )
    tp: PositiveInt = value(1, "accepted and recorded; checkpoints of any layout can be read")
    pp: PositiveInt = value(1, "accepted and recorded; checkpoints of any layout can be read")
