"""Odd ways to save a model: built with the same logits and features, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

from llava_steps import build_hf
from llava_steps.core.errors import ConfigError, InputError, IntegrityError, StepError
from llava_steps.settings.conversion import HfModel
from tests.helpers import odd_saves as saves
from tests.helpers.data_fixtures import fake_context
from tests.helpers.hf_fixtures import (
    SIDE,
    TOKENS,
    make_siglip,
    make_text,
    make_tokenizer,
    make_tower,
)
from tests.helpers.needs import SENTENCEPIECE

KNOWN = 300
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain directories by name: `text`, `tied`, `qwen2`, `tower`, `clip`, `siglip`."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    make_text(root / "text", tokenizer)
    make_text(root / "tied", tokenizer, tie_word_embeddings=True)
    make_text(root / "qwen2", tokenizer, family="qwen2")
    make_tower(root / "tower")
    saves.make_clip(root / "clip", root / "tower")
    make_siglip(root / "siglip")
    return root


def build(text: Path, tower: Path, out: Path) -> dict[str, Any]:
    """Run the step into `out`; its metrics."""
    out.mkdir()
    settings = HfModel(vision_tower=str(tower), text_model=str(text))
    context = fake_context(out, vision_tower=tower, text_model=text)
    return dict(build_hf.run(context, settings))


def changed(source: Path, to: Path, change: Change) -> Path:
    shutil.copytree(source, to)
    change(to)
    return to


def config(*drop: str, **keys: Any) -> Change:
    return lambda path: saves.edit(path / "config.json", drop, **keys)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TEXTS: dict[str, tuple[str, Change]] = {
    "sharded": ("text", saves.sharded),
    "one shard": ("text", saves.one_shard),
    "pickled": ("text", saves.pickled),
    "sharded pickles": ("text", saves.sharded_pickles),
    "pickled as before torch 1.6": ("text", saves.before_zip),
    "fp16": ("text", saves.cast(torch.float16)),
    "bf16": ("text", saves.cast(torch.bfloat16)),
    "mixed": ("text", saves.mixed),
    "fp16 under a config of fp32": (
        "text",
        lambda path: saves.rewrite(path, lambda t: {k: v.half() for k, v in t.items()}),
    ),
    "config of transformers 4.30": ("text", saves.older_config),
    "buffers of transformers 4.30": ("text", saves.with_buffers),
    "rope_scaling with yarn": (
        "text",
        config(
            "rope_parameters",
            rope_theta=1e4,
            rope_scaling={
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ),
    "auto_map of a supported family": (
        "text",
        config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
    ),
    "a pickle beside safetensors": (
        "text",
        lambda path: (path / "pytorch_model.bin").write_bytes(b"never read"),
    ),
    "qwen2 without architectures": ("qwen2", config("architectures", "head_dim")),
    "tied": ("tied", lambda path: None),
    "tied, both saved": (
        "tied",
        lambda path: saves.rewrite(path, lambda t: t | {HEAD: t[EMBEDDING].clone()}),
    ),
    "tied by the config, both saved and different": (
        "tied",
        lambda path: saves.rewrite(path, lambda t: t | {HEAD: t[EMBEDDING] + 1}),
    ),
    "tied, only the head saved": (
        "tied",
        saves.renamed(lambda name: HEAD if name == EMBEDDING else name),
    ),
    "tied, saved as a base model": ("tied", saves.renamed(lambda n: n.removeprefix("model."))),
    "untied, without the prefix": ("text", saves.renamed(lambda n: n.removeprefix("model."))),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_models_keep_their_logits(tmp_path: Path, root: Path, name: str) -> None:
    plain, change = TEXTS[name]
    text = changed(root / plain, tmp_path / "text", change)
    build(text, root / "tower", tmp_path / "out")
    built, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    reference = AutoModelForCausalLM.from_pretrained(text, dtype="auto")
    ids = torch.tensor([[0, 40, 50, 60, 299]])
    with torch.inference_mode():
        expected = reference(input_ids=ids).logits
        assert torch.equal(built(input_ids=ids).logits[..., :KNOWN], expected)


TOWERS: dict[str, tuple[str, Change]] = {
    "sharded": ("tower", saves.sharded),
    "one shard": ("tower", saves.one_shard),
    "pickled": ("tower", saves.pickled),
    "sharded pickles": ("tower", saves.sharded_pickles),
    "fp16": ("tower", saves.cast(torch.float16)),
    "mixed": ("tower", saves.mixed),
    "names of transformers 4": ("tower", saves.renamed(lambda name: f"vision_model.{name}")),
    "position ids of transformers 4.30": (
        "tower",
        lambda path: saves.rewrite(
            path, lambda t: t | {"embeddings.position_ids": torch.arange(TOKENS + 1)[None]}
        ),
    ),
    "whole clip": ("clip", lambda path: None),
    "whole clip, pickled": ("clip", saves.pickled),
    "whole clip, sharded": ("clip", saves.sharded),
    "whole clip with vision_config_dict": ("clip", saves.section_of_4_25),
    "whole siglip": ("siglip", lambda path: None),
    "image processor of transformers 4.20": (
        "tower",
        lambda path: saves.edit(
            path / "preprocessor_config.json",
            ("image_processor_type",),
            feature_extractor_type="CLIPFeatureExtractor",
            size=SIDE,
            crop_size=SIDE,
        ),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_keep_their_features(tmp_path: Path, root: Path, name: str) -> None:
    plain, change = TOWERS[name]
    tower = changed(root / plain, tmp_path / "tower", change)
    build(root / "text", tower, tmp_path / "out")
    built = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kind = SiglipVisionModel if plain == "siglip" else CLIPVisionModel
    reference = kind.from_pretrained(tower, dtype=torch.float32)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
        states = built.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(states[-2], expected)


def gap(path: Path) -> None:
    """The last token of the vocabulary far behind the others."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[next(token for token, number in vocab.items() if number == KNOWN - 1)] = 450
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def tokenizer_json_only(path: Path) -> None:
    """No names of special tokens, which the template therefore writes itself."""
    (path / "tokenizer_config.json").unlink()
    template = path / "chat_template.jinja"
    text = template.read_text().replace("bos_token", "'<s>'").replace("eos_token", "'</s>'")
    template.write_text(text)


TOKENIZERS: dict[str, Change] = {
    "tokenizer.json only": tokenizer_json_only,
    "vocab and merges": saves.vocab_and_merges("Qwen2Tokenizer"),
    "vocab and merges of gpt2": saves.vocab_and_merges("GPT2Tokenizer"),
    "template in the config": lambda path: saves.template_in_config(path, lambda text: text),
    "list of templates": lambda path: saves.template_in_config(
        path,
        lambda text: [
            {"name": "default", "template": text},
            {"name": "tool_use", "template": "no"},
        ],
    ),
    "class that transformers does not have": lambda path: saves.edit(
        path / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer"
    ),
    "class of another kind": lambda path: saves.edit(
        path / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"
    ),
    "harmless truncation": lambda path: saves.truncated(path, TOKENS),
    "harmless max_length": lambda path: saves.edit(
        path / "tokenizer_config.json", max_length=TOKENS, truncation_strategy="longest_first"
    ),
    "truncation asked for": lambda path: saves.edit(
        path / "tokenizer_config.json", truncation=True, model_max_length=TOKENS
    ),
    "ids with a gap": gap,
}
TEXT = "What digit is this? <s>これ</s> <|user|> x  y\n"


def check_tokenizer(text: Path, tower: Path, out: Path) -> None:
    """Build, and compare ids, template and rows with the source."""
    metrics = build(text, tower, out)
    built, source = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(text)
    assert built.encode(TEXT * 20) == source.encode(TEXT * 20, truncation=False)
    template = source.chat_template
    assert built.chat_template == (template["default"] if isinstance(template, dict) else template)
    vocab = built.get_vocab()
    assert len(set(vocab.values())) == len(vocab) and max(vocab.values()) < metrics["vocab"]
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    image = Image.new("RGB", (50, 30))
    inputs = processor(text=["<image>" + TEXT], images=[image], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == TOKENS - 1 + len(built.encode("<image>" + TEXT))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_keep_their_ids(tmp_path: Path, root: Path, name: str) -> None:
    plain = "qwen2" if name == "vocab and merges" else "text"
    text = changed(root / plain, tmp_path / "text", TOKENIZERS[name])
    check_tokenizer(text, root / "tower", tmp_path / "out")


@SENTENCEPIECE
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("described", [True, False])
def test_tokenizer_model_only(tmp_path: Path, root: Path, kind: str, described: bool) -> None:
    text = make_text(tmp_path / "text", make_tokenizer(), vocab_size=450)
    saves.sentencepiece_only(text, kind, described)
    check_tokenizer(text, root / "tower", tmp_path / "out")


def test_without_sentencepiece_its_name_is_reported(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = changed(root / "text", tmp_path / "text", lambda p: (p / "tokenizer.json").unlink())
    (text / "tokenizer.model").write_bytes(b"junk")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"sentencepiece, which is not installed; pip install s"):
        build(text, root / "tower", tmp_path / "out")


class Touch:
    """A pickle that runs a command when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def harmful(path: Path) -> None:
    torch.save({"model.norm.weight": Touch(path / "harm")}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def lose(function: Change, name: str) -> Change:
    return lambda path: (function(path), (path / name).unlink())


def holding(name: str, content: bytes) -> Change:
    return lambda path: (path / name).write_bytes(content)


def separate_code(name: str, key: str, **keys: Any) -> Change:
    return lambda path: saves.edit(path / name, auto_map={key: "own.Own"}, **keys)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
QUANTIZED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_8bit": True},
    *({"quant_method": name} for name in ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors")),
    {"quant_method": "of next year"},
]
REFUSED_TEXTS: dict[str, tuple[Change, type[StepError], str]] = {
    "vocab_size": (
        config(vocab_size=KNOWN + 200),
        IntegrityError,
        r"\[300, 48\] in the files, but \[500, 48\] by config.json; set vocab_size to 300",
    ),
    "hidden_size": (config(hidden_size=64), IntegrityError, "lm_head.weight is .300, 48."),
    "kv heads": (config("num_key_value_heads"), IntegrityError, "k_proj.weight is .24, 48."),
    "too few layers": (config(num_hidden_layers=1), IntegrityError, "not part of the model"),
    "too many layers": (config(num_hidden_layers=3), IntegrityError, "missing from the files"),
    "size as text": (config(hidden_size="48"), InputError, "hidden_size is '48'; expected one"),
    "size of heads": (
        config("head_dim", num_attention_heads=5, num_key_value_heads=5),
        InputError,
        "hidden_size 48 is not a multiple of 5 attention heads",
    ),
    "number of kv heads as text": (
        config(num_key_value_heads="2"),
        InputError,
        "num_key_value_heads is '2'; expected one",
    ),
    "rope": (
        config(rope_parameters={"rope_type": "weird", "rope_theta": 1.0}),
        InputError,
        "rope_type 'weird' is not supported",
    ),
    "norm": (config(rms_norm_eps="small"), InputError, "rms_norm_eps is 'small'"),
    "theta": (config("rope_parameters", rope_theta="far"), InputError, "rope_theta is 'far'"),
    "activation": (config(hidden_act="gelu"), InputError, "hidden_act 'gelu' is not supported"),
    "config is a list": (holding("config.json", b"[]"), InputError, "not hold a JSON object"),
    "config is cut": (holding("config.json", b"{"), InputError, "cannot be read as JSON"),
    "generation config": (
        holding("generation_config.json", b"[]"),
        InputError,
        "generation_config.json does not hold a JSON object",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        InputError,
        "has no weights: none of model.safetensors",
    ),
    "empty weights": (holding("model.safetensors", b""), IntegrityError, "is empty"),
    "pointer": (holding("model.safetensors", LFS), InputError, "pointer of Git LFS.*git lfs pull"),
    "cut weights": (
        holding("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
        IntegrityError,
        "not a complete safetensors file",
    ),
    "missing shard": (
        lose(saves.sharded, "model-00002-of-00003.safetensors"),
        InputError,
        "00002-of-00003.safetensors is missing, but model.safetensors.index.json names it",
    ),
    "missing pickled shard": (
        lose(saves.sharded_pickles, "pytorch_model-00002-of-00003.bin"),
        InputError,
        "00002-of-00003.bin is missing, but pytorch_model.bin.index.json names it",
    ),
    "index without map": (
        lambda path: (saves.sharded(path), holding("model.safetensors.index.json", b"{}")(path)),
        IntegrityError,
        "has no weight_map",
    ),
    "harmful pickle": (harmful, InputError, "or holds more than tensors, which is not loaded"),
    "damaged pickle": (
        lambda path: (saves.pickled(path), holding("pytorch_model.bin", b"junk" * 9)(path)),
        InputError,
        "pytorch_model.bin is damaged",
    ),
    "head missing": (
        lambda path: saves.rewrite(path, lambda t: {k: v for k, v in t.items() if k != HEAD}),
        IntegrityError,
        "set tie_word_embeddings to true",
    ),
    "packed weights without a config": (
        lambda path: saves.rewrite(
            path,
            lambda t: {
                k.replace("q_proj.weight", "q_proj.qweight"): v.int() if "q_proj" in k else v
                for k, v in t.items()
            },
        ),
        ConfigError,
        r"weights are quantized \(model.layers.0.self_attn.q_proj.qweight is int32\)",
    ),
    "fp8 weights without a config": (
        lambda path: saves.rewrite(
            path, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}
        ),
        InputError,
        "has dtype F8_E4M3; the weights are quantized, give plain ones",
    ),
    "model with code": (
        separate_code("config.json", "AutoConfig", model_type="own"),
        ConfigError,
        "of the family 'own'; supported",
    ),
    "tokenizer with code": (
        separate_code("tokenizer_config.json", "AutoTokenizer", tokenizer_class="Own"),
        InputError,
        "needs separate code .auto_map., which is not run",
    ),
    "truncation": (
        lambda path: saves.truncated(path, TOKENS - 1),
        ConfigError,
        f"cuts texts after {TOKENS - 1} tokens, but an image has {TOKENS}",
    ),
    "max_length": (
        lambda path: saves.edit(path / "tokenizer_config.json", max_length=TOKENS - 1),
        ConfigError,
        f"cuts texts after {TOKENS - 1} tokens, but an image has {TOKENS}",
    ),
    "tokenizer.json": (holding("tokenizer.json", b"{}"), InputError, "no usable tokenizer"),
    "no tokenizer": (
        lambda path: [file.unlink() for file in path.glob("tokenizer*")],
        InputError,
        "it holds none of tokenizer.json, tokenizer.model",
    ),
}


@pytest.mark.parametrize("name", REFUSED_TEXTS)
def test_text_models_are_refused_by_name(tmp_path: Path, root: Path, name: str) -> None:
    change, error, words = REFUSED_TEXTS[name]
    text = changed(root / "text", tmp_path / "text", change)
    with pytest.raises(error, match=words) as caught:
        build(text, root / "tower", tmp_path / "out")
    assert str(text) in str(caught.value) and "\n" not in str(caught.value)
    assert "trust_remote_code" not in str(caught.value) and not (text / "harm").exists()


@pytest.mark.parametrize("described", QUANTIZED, ids=str)
@pytest.mark.parametrize("part", ["text", "tower"])
def test_quantized_models_are_refused_by_name(
    tmp_path: Path, root: Path, described: dict[str, Any], part: str
) -> None:
    given = {"text": root / "text", "tower": root / "tower"}
    given[part] = changed(root / part, tmp_path / part, config(quantization_config=described))
    with pytest.raises(ConfigError, match=r"weights are quantized.*give the model that it"):
        build(given["text"], given["tower"], tmp_path / "out")


REFUSED_TOWERS: dict[str, tuple[str, Change, type[StepError], str]] = {
    "image_size": ("tower", config(image_size=32), IntegrityError, "position_embedding.weight is"),
    "patch_size": ("tower", config(patch_size=4), IntegrityError, "patch_embedding.weight is"),
    "too few layers": (
        "tower", config(num_hidden_layers=2), IntegrityError, "not part of the model.*layers.2",
    ),
    "layers of a whole clip": (
        "clip", saves.fewer_vision_layers, IntegrityError, "not part of the model.*layers.2",
    ),
    "two sides": ("tower", config(image_size=[24, 24]), InputError, "image_size is .24, 24."),
    "section": ("clip", config(vision_config=[]), InputError, "vision_config is not a section"),
    "no section": ("clip", config("vision_config"), IntegrityError, "class_embedding is .32."),
    "missing shard": (
        "tower",
        lose(saves.sharded, "model-00002-of-00003.safetensors"),
        InputError,
        "00002-of-00003.safetensors is missing",
    ),
    "image processor": (
        "tower", holding("preprocessor_config.json", b"{}"), InputError, "no image_processor_type",
    ),
    "cut image processor": (
        "tower", holding("preprocessor_config.json", b"{"), InputError, "cannot be read as JSON",
    ),
    "image processor with code": (
        "tower",
        separate_code("preprocessor_config.json", "AutoImageProcessor", image_processor_type="O"),
        InputError,
        "preprocessor_config.json needs separate code",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TOWERS)
def test_towers_are_refused_by_name(tmp_path: Path, root: Path, name: str) -> None:
    plain, change, error, words = REFUSED_TOWERS[name]
    tower = changed(root / plain, tmp_path / "tower", change)
    with pytest.raises(error, match=words) as caught:
        build(root / "text", tower, tmp_path / "out")
    assert str(tower) in str(caught.value) and "\n" not in str(caught.value)
