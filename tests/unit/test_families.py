"""Text and vision families: their defaults are transformers', what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaForConditionalGeneration,
)

from llava_steps.conversion.build import build
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.geometry.families import TEXT_FAMILIES, VISION_FAMILIES
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.conversion import HfModel
from tests.helpers.hf_fixtures import (
    PATCH,
    SIDE,
    TOKENS,
    make_siglip,
    make_text,
    make_tokenizer,
    make_tower,
    randomize,
)
from tests.helpers.model_fixtures import TINY, config_of

FAMILIES = {
    "llama": "untied-default",
    "mistral": "mistral",
    "qwen2": "qwen2-tied",
    "qwen3": "qwen3",
}


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_defaults_are_those_of_transformers(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    for key, value in TEXT_FAMILIES[family].defaults.items():
        if family.startswith("qwen") and key == "sliding_window":
            continue  # transformers shows null while use_sliding_window is off
        assert getattr(config, key) == value, key
    row = TEXT_FAMILIES[family]
    for source in (row.qkv_bias, row.output_bias, row.mlp_bias):
        assert isinstance(source, bool) or source in row.defaults


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_defaults_are_those_of_transformers(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    for key, value in VISION_FAMILIES[family].defaults.items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_config_of_defaults_only_is_read_as_transformers_reads_it(family: str) -> None:
    """config.json of an older transformers leaves defaults out."""
    full = config_of(TINY["untied-default"]).to_dict()
    full["text_config"] = {"model_type": family, "sliding_window": None}
    geometry, config = Geometry.from_hf(full), CONFIG_MAPPING[family]()
    assert geometry.kv_heads == config.num_key_value_heads
    assert geometry.head_dim == (getattr(config, "head_dim", None) or 4096 // 32)
    assert geometry.rope.theta == config.rope_parameters["rope_theta"]


WINDOWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "mistral, shorter": ("mistral", {"sliding_window": 127}, True),
    "mistral, as long": ("mistral", {"sliding_window": 128}, False),
    "mistral, none": ("mistral", {"sliding_window": None}, False),
    "qwen2, off": ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, False),
    "qwen2, from layer 1": (
        "qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
        True,
    ),
    "qwen2, from layer 2 of 2": (
        "qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
        False,
    ),
    "qwen3, by type": (
        "qwen3",
        {
            "sliding_window": 16,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        True,
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_sliding_window_that_matters_is_refused(name: str) -> None:
    family, settings, refused = WINDOWS[name]
    config = config_of(TINY[FAMILIES[family]]).to_dict()
    for key in ("layer_types", "sliding_window"):
        config["text_config"].pop(key, None)
    config["text_config"].update(settings)
    if refused:
        with pytest.raises(InputError, match=r"sliding_window.*max_position_embeddings"):
            Geometry.from_hf(config)
    else:
        assert Geometry.from_hf(config).family == family


def test_other_families_are_refused_with_the_list() -> None:
    config = config_of(TINY["untied-default"]).to_dict()
    config["text_config"]["model_type"] = "gemma2"
    with pytest.raises(InputError, match="'gemma2' is not supported; supported: llama, mistral"):
        Geometry.from_hf(config)
    config = config_of(TINY["untied-default"]).to_dict()
    config["vision_config"]["model_type"] = "siglip2_vision_model"
    with pytest.raises(InputError, match="'siglip2_vision_model' is not supported; supported: "):
        Geometry.from_hf(config)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_vision_part_of_a_full_siglip_with_each_family(
    family: str, tied: bool, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {"tie_word_embeddings": tied}
    if family == "mistral":
        settings["sliding_window"] = None
    tower = make_siglip(tmp_path / "siglip")
    text = make_text(tmp_path / "text", tokenizer, family=family, **settings)
    cfg = HfModel(
        vision_tower=str(tower), text_model=str(text), vision_feature_select_strategy="full"
    )
    out = tmp_path / "out"
    built = build(tower, text, out, cfg)
    assert built.tokens_per_image == 9 and Geometry.load(out).tied is tied
    assert Geometry.load(out).family == family
    model, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    source = load_file(tower / "model.safetensors")
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, source["vision_model." + name]), name
    ids = torch.tensor([[0, 40, 50, 60]])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(text)(input_ids=ids).logits
        found = model(input_ids=ids).logits[..., : expected.shape[-1]]
    assert torch.equal(found, expected)
    kind = AutoProcessor.from_pretrained(out, backend="pil").image_processor
    assert type(kind).__name__ == "SiglipImageProcessorPil"


def test_the_vision_part_of_a_full_clip_of_an_older_transformers(tmp_path: Path) -> None:
    """As on the hub: text weights, position ids, and a config.json without what is default."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(
        vision_config={**sizes, "image_size": SIDE, "patch_size": PATCH},
        text_config={**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
    )
    model = CLIPModel(config)
    randomize(model, 3)
    tower = tmp_path / "clip"
    model.save_pretrained(tower)
    make_tower(tmp_path / "other")
    shutil.copy(tmp_path / "other/preprocessor_config.json", tower)
    source = load_file(tower / "model.safetensors")
    assert any(name.startswith("vision_model.encoder.") for name in source)
    ids = torch.arange(10)[None]
    save_file({**source, "vision_model.embeddings.position_ids": ids}, tower / "model.safetensors")
    found = json.loads((tower / "config.json").read_text())
    vision = {**sizes, "image_size": SIDE, "patch_size": PATCH}
    (tower / "config.json").write_text(json.dumps({**found, "vision_config": vision}))
    text = make_text(tmp_path / "text", make_tokenizer())
    out = tmp_path / "out"
    built = build(tower, text, out, HfModel(vision_tower=str(tower), text_model=str(text)))
    assert built.tokens_per_image == TOKENS and built.class_tokens == 1
    loaded = LlavaForConditionalGeneration.from_pretrained(out).model.vision_tower.state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, source["vision_model." + name]), name


def test_a_naflex_tower_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower/config.json").write_text('{"model_type": "siglip2"}')
    cfg = HfModel(vision_tower=str(tmp_path / "tower"), text_model="x")
    with pytest.raises(ConfigError, match=r"'siglip2'; supported: clip, .*siglip_vision_model"):
        build(tmp_path / "tower", tmp_path, tmp_path / "out", cfg)


def test_the_query_norm_is_part_of_the_geometry() -> None:
    geometry = Geometry.from_hf(config_of(TINY["qwen3"]).to_dict())
    assert geometry.qk_norm and geometry.qkv_bias and geometry.output_bias
    assert replace(geometry, qk_norm=False) != geometry
