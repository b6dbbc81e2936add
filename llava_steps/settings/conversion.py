"""Settings of the model's way: `build_hf`, `hf_to_megatron` and `megatron_to_hf`."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt

from llava_steps.settings.fields import StepConfig, source, value


class HfModel(StepConfig):
    """Vision tower + language model + a new projector to one Hugging Face LLaVA directory."""

    vision_tower: str = source(help="CLIP directory or hub id", flag="--vision-tower")
    text_model: str = source(help="language model directory or hub id", flag="--text-model")
    chat_template: str = source(
        "", "Jinja file instead of the text model's own chat template", optional=True
    )
    vision_feature_layer: int = value(-2, "hidden state of the tower that the projector reads")
    vision_feature_select_strategy: Literal["default", "full"] = value(
        "default", "'default' drops the class token, 'full' keeps it"
    )
    projector_hidden_act: Literal["gelu"] = value("gelu", "activation between the projector layers")
    vocab_size_padding: Count = value(
        128,
        "embedding rows are padded to a multiple of this times tp, if they are not one; 0 pads "
        "nothing",
        flag="--vocab-size-padding",
        bare=128,
    )
    tp: PositiveInt = value(
        1, "tensor parallel size that the rows are padded for; any that divides them can train"
    )
    dtype: Literal["fp32", "bf16", "source"] = value(
        "source",
        "dtype of the saved weights; 'source' keeps the tower's and the language model's own, "
        "the projector gets the language model's",
    )


class MegatronCheckpoint(StepConfig):
    """HF safetensors to a Megatron checkpoint (torch_dist), layout-free."""

    hf_dir: str = source("", "HF LLaVA directory", flag="--hf-dir")
    tp: PositiveInt = value(
        1, "the files are cut for this tensor parallel size; they load in any layout"
    )
    pp: PositiveInt = value(
        1, "the files are cut for this pipeline parallel size; they load in any layout"
    )


class HfExport(StepConfig):
    """Megatron checkpoint to HF safetensors."""

    megatron_dir: str = source("", "Megatron checkpoint directory", flag="--megatron-dir")
    tokenizer_dir: str = source("", "HF directory that gives config, tokenizer and processor")
    export_format: Literal["transformers-5", "transformers-4"] = value(
        "transformers-5",
        "versions of transformers that read the result: 5 (files laid out as in tokenizer_dir), or "
        "4.45 to 4.57 and 5",
    )
    tp: PositiveInt = value(1, "recorded for readers of old scripts; any layout can be read")
    pp: PositiveInt = value(1, "recorded for readers of old scripts; any layout can be read")
