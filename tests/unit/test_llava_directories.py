"""LLaVA directories of older versions and of other hands, at every step that reads one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from llava_steps import hf_to_megatron
from llava_steps.conversion.build import build
from llava_steps.conversion.export_format import complete_processor
from llava_steps.core.errors import ConfigError, InputError, IntegrityError, StepError
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.evaluation import ask, same_prompts
from llava_steps.settings.conversion import HfModel, MegatronCheckpoint
from tests.helpers import odd_saves as saves
from tests.helpers.data_fixtures import fake_context, jpeg
from tests.helpers.hf_fixtures import TOKENS, make_siglip, make_text, make_tokenizer, make_tower

SETTINGS = "processor_config.json"
NUMBERS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaVA directories: with CLIP, and with SigLIP and all its patches."""
    root = tmp_path_factory.mktemp("llava")
    text = make_text(root / "text", make_tokenizer())
    clip, siglip = make_tower(root / "tower"), make_siglip(root / "siglip")
    for name in ("clip", "full"):
        (root / f"llava-{name}").mkdir()
    build(clip, text, root / "llava-clip", HfModel(vision_tower="v", text_model="t"))
    full = HfModel(vision_tower="v", text_model="t", vision_feature_select_strategy="full")
    build(siglip, text, root / "llava-full", full)
    return {"clip": root / "llava-clip", "siglip": root / "llava-full"}


def changed(source: Path, to: Path, change: Change) -> Path:
    shutil.copytree(source, to)
    change(to)
    return to


def older(path: Path, *drop: str) -> None:
    """The image processor in its own file, as transformers 4 saves it, and fewer settings."""
    settings = json.loads((path / SETTINGS).read_text())
    images = settings.pop("image_processor") | {"processor_class": "LlavaProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    kept = {key: value for key, value in settings.items() if key not in drop}
    (path / SETTINGS).write_text(json.dumps(kept))


OLDER: dict[str, Change] = {
    "without patch_size": lambda path: older(path, "patch_size"),
    "without any number": lambda path: older(path, *NUMBERS),
    "without the class token": lambda path: older(path, "num_additional_image_tokens"),
    "patch_size is null": lambda path: saves.edit(path / SETTINGS, patch_size=None),
    "without processor_config.json": lambda path: (older(path), (path / SETTINGS).unlink()),
    "truncation": lambda path: saves.truncated(path, TOKENS + 1),
    "max_length": lambda path: saves.edit(path / "tokenizer_config.json", max_length=TOKENS),
}


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("name", OLDER)
def test_older_directories_are_completed(
    tmp_path: Path, built: dict[str, Path], name: str, family: str
) -> None:
    directory = changed(built[family], tmp_path / "older", OLDER[name])
    whole, found = ConversationEncoder(built[family], 99), ConversationEncoder(directory, 99)
    assert found.tokens_per_image == whole.tokens_per_image == TOKENS
    turns = ({"role": "user", "content": "<image>\nWhat?"},)
    question = ask.Question("", "", turns, (jpeg(3),), "")
    expected, asked = ask.Model(built[family]), ask.Model(directory)
    ids = asked.inputs([question])["input_ids"]
    assert ids.tolist() == expected.inputs([question])["input_ids"].tolist()
    same_prompts.directory(directory, tmp_path / "prompts")


@pytest.mark.parametrize("name", ["without any number", "without processor_config.json"])
def test_an_export_of_an_older_directory_is_whole(
    tmp_path: Path, built: dict[str, Path], name: str
) -> None:
    directory = changed(built["siglip"], tmp_path / "older", OLDER[name])
    complete_processor(directory)
    written = AutoProcessor.from_pretrained(directory, backend="pil")
    assert all(getattr(written, key) is not None for key in NUMBERS)
    picture = Image.new("RGB", (50, 30))
    pixels = written.image_processor(picture, return_tensors="np")
    assert written.replace_image_token(pixels, 0).count("<image>") == TOKENS


def test_an_export_of_a_whole_directory_keeps_its_bytes(
    tmp_path: Path, built: dict[str, Path]
) -> None:
    directory = changed(built["clip"], tmp_path / "copy", lambda path: None)
    before = (directory / SETTINGS).read_bytes()
    complete_processor(directory)
    assert (directory / SETTINGS).read_bytes() == before


def settings(**keys: Any) -> Change:
    return lambda path: saves.edit(path / SETTINGS, **keys)


def config(*drop: str, **keys: Any) -> Change:
    return lambda path: saves.edit(path / "config.json", drop, **keys)


def without_patch(path: Path) -> None:
    older(path, "patch_size")
    saves.edit(path / "config.json", vision_config={"model_type": "of next year"})


REFUSED: dict[str, tuple[Change, type[StepError], str]] = {
    "patch_size nowhere": (without_patch, ConfigError, "patch_size is None, and vision_config"),
    "other patch_size": (
        settings(patch_size=4),
        InputError,
        f"writes 36 tokens for an image, but the model of config.json has {TOKENS}",
    ),
    "no class token": (settings(num_additional_image_tokens=0), InputError, "writes 8 tokens"),
    "patch_size as text": (settings(patch_size="8"), ConfigError, "patch_size is '8'"),
    "class token as text": (
        settings(num_additional_image_tokens="1"),
        InputError,
        "num_additional_image_tokens is '1'",
    ),
    "cut settings": (
        lambda path: (path / SETTINGS).write_text("{"),
        InputError,
        f"{SETTINGS} cannot be read as JSON",
    ),
    "other image token": (
        config(image_token_index=7),
        InputError,
        "'<image>' is 7 in config.json, but the tokenizer has it as 300",
    ),
    "quantized": (
        config(quantization_config={"quant_method": "awq"}),
        ConfigError,
        "the weights are quantized .quantization_config: awq.",
    ),
    "quantized text": (
        lambda path: saves.edit(
            path / "config.json",
            text_config=json.loads((path / "config.json").read_text())["text_config"]
            | {"quantization_config": {"quant_method": "gptq"}},
        ),
        ConfigError,
        "the weights are quantized .text_config.quantization_config: gptq.",
    ),
    "truncation": (
        lambda path: saves.truncated(path, TOKENS - 1),
        ConfigError,
        f"cuts texts after {TOKENS - 1} tokens, but an image has {TOKENS}",
    ),
    "processor with code": (
        settings(auto_map={"AutoProcessor": "own.Own"}, processor_class="Own"),
        InputError,
        "needs separate code .auto_map., which is not run",
    ),
    "no image processor": (
        lambda path: (older(path), (path / "preprocessor_config.json").unlink()),
        InputError,
        "no processor can be loaded from it",
    ),
    "no tokenizer": (
        lambda path: [file.unlink() for file in path.glob("tokenizer*")],
        InputError,
        "no processor can be loaded from it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_directories_are_refused_by_name(
    tmp_path: Path, built: dict[str, Path], name: str
) -> None:
    change, error, words = REFUSED[name]
    directory = changed(built["clip"], tmp_path / "other", change)
    readers: list[Callable[[], Any]] = [
        lambda: ConversationEncoder(directory, 99),
        lambda: ask.Model(directory),
        lambda: same_prompts.directory(directory, tmp_path / "prompts"),
    ]
    for read in readers:
        with pytest.raises(error, match=words) as caught:
            read()
        assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
        assert "trust_remote_code" not in str(caught.value)


WEIGHTS: dict[str, tuple[Change, type[StepError], str]] = {
    "missing": (lambda path: (path / "model.safetensors").unlink(), InputError, "model.safetens"),
    "empty": (
        lambda path: (path / "model.safetensors").write_bytes(b""), IntegrityError, "",
    ),
    "shard": (
        lambda path: (saves.sharded(path), (path / "model-00003-of-00003.safetensors").unlink()),
        InputError, "00003-of-00003.safetensors is missing",
    ),
    "sizes": (
        lambda path: saves.edit(
            path / "config.json",
            text_config=json.loads((path / "config.json").read_text())["text_config"]
            | {"intermediate_size": 96},
        ),
        StepError, "mlp.*weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, built: dict[str, Path], name: str
) -> None:
    change, error, words = WEIGHTS[name]
    directory = changed(built["clip"], tmp_path / "other", change)
    context = fake_context(tmp_path / "out", hf_dir=directory)
    readers: list[Callable[[], Any]] = [
        lambda: ask.Model(directory),
        lambda: hf_to_megatron.run(context, MegatronCheckpoint()),
    ]
    for read in readers:
        with pytest.raises(error, match=words) as caught:
            read()
        assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def test_a_quantized_directory_is_not_converted(tmp_path: Path, built: dict[str, Path]) -> None:
    change = config(quantization_config={"quant_method": "fp8"})
    directory = changed(built["clip"], tmp_path / "other", change)
    with pytest.raises(InputError, match=r"config.json: the weights are quantized"):
        hf_to_megatron.run(fake_context(tmp_path / "out", hf_dir=directory), MegatronCheckpoint())
