"""Settings of `demo_assets`."""

from __future__ import annotations

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt

from llava_steps.settings.fields import StepConfig, value


class DemoAssets(StepConfig):
    """Real handwritten digits, questions about them, a tiny CLIP tower and a tiny Llama."""

    image_size: PositiveInt = value(32, "side of the square scans and of the tower's input, pixels")
    patch_size: PositiveInt = value(8, "side of a patch of the tower, pixels")
    heldout_scans: PositiveInt = value(297, "scans for evaluation, not used in training")
    vision_hidden_size: PositiveInt = value(64, "width of the vision tower")
    vision_layers: PositiveInt = value(3, "layers of the vision tower")
    text_hidden_size: PositiveInt = value(128, "width of the language model")
    text_layers: PositiveInt = value(2, "layers of the language model")
    text_heads: PositiveInt = value(4, "attention heads of the language model")
    text_kv_heads: PositiveInt = value(2, "key/value heads of the language model (GQA)")
    vocab_size: PositiveInt = value(512, "upper limit of the tokenizer's vocabulary")
    pretrain_vision_steps: Count = value(800, "contrastive steps of the tower on training scans")
    pretrain_text_steps: Count = value(600, "steps of the language model on answers to text")
