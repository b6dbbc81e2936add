"""The built LLaVA directory, compared with its parts as transformers runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from llava_steps import build_hf
from llava_steps.conversion.hf_names import canonical
from llava_steps.conversion.mapping import check_hf, entries
from llava_steps.conversion.tower import tower_shapes
from llava_steps.core.errors import ConfigError, InputError, IntegrityError, StepError
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.conversion import HfModel
from llava_steps.store.hub import Hub
from tests.helpers.chain import run_step
from tests.helpers.data_fixtures import fake_context
from tests.helpers.hf_fixtures import (
    SIDE,
    STRING_TEMPLATE,
    TOKENS,
    make_text,
    make_tokenizer,
    make_tower,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), tokenizer)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tower: Path, text: Path) -> Path:
    return build(tmp_path_factory.mktemp("built"), tower, text)[0]


def build(out: Path, tower: Path, text: Path, **settings: Any) -> tuple[Path, dict[str, Any]]:
    """Run the step into `out`; the directory and the metrics."""
    out.mkdir(exist_ok=True)
    cfg = HfModel(vision_tower=str(tower), text_model=str(text), **settings)
    context = fake_context(out, vision_tower=tower, text_model=text)
    return out, dict(build_hf.run(context, cfg))


def load(path: Path) -> Any:
    model, report = LlavaForConditionalGeneration.from_pretrained(
        path, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_every_weight_comes_from_its_source(
    built: Path, tower: Path, text: Path, tokenizer: Any
) -> None:
    model = load(built).state_dict()
    source = LlamaForCausalLM.from_pretrained(text).state_dict()
    known = len(tokenizer)
    for name, expected in source.items():
        name = "lm_head.weight" if name == "lm_head.weight" else f"model.language_{name}"
        found = model.pop(name)
        if found.shape != expected.shape:  # embedding and head: tokens, <image>, padding
            assert found.shape[0] == 384 and known == 300
            mean = expected.double().mean(0).float().expand(384 - known, -1)
            torch.testing.assert_close(found[known:], mean)
        assert torch.equal(found[:known] if len(found) > known else found, expected)
    for name, expected in CLIPVisionModel.from_pretrained(tower).state_dict().items():
        assert torch.equal(model.pop(f"model.vision_tower.{name}"), expected)
    assert sorted(model) == [
        f"model.multi_modal_projector.linear_{n}.{kind}"
        for n in "12"
        for kind in ("bias", "weight")
    ]
    assert all(value.abs().max() > 0 for value in model.values())


def test_it_computes_what_its_parts_compute(built: Path, tower: Path, text: Path) -> None:
    model, ids = load(built), torch.tensor([[0, 40, 50, 60, 299]])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(text)(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits[..., :300], expected)
        states = CLIPVisionModel.from_pretrained(tower)(pixels, output_hidden_states=True)
        features = model.model.multi_modal_projector(states.hidden_states[-2][:, 1:])
        found = model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(torch.cat(list(found)), features[0])


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_processor_writes_as_many_tokens_as_there_are_features(
    tmp_path: Path, tower: Path, text: Path, strategy: str
) -> None:
    out, metrics = build(tmp_path, tower, text, vision_feature_select_strategy=strategy)
    processor, model = AutoProcessor.from_pretrained(out, backend="pil"), load(out)
    inputs = processor(
        text="<image>\nWhat digit is this?<image>",
        images=[Image.new("RGB", (50, 30)), Image.new("L", (8, 90))],
        return_tensors="pt",
    )
    image_id = model.config.image_token_id
    count = int((inputs["input_ids"] == image_id).sum())
    assert count == 2 * (TOKENS + (strategy == "full")) == 2 * metrics["tokens_per_image"]
    assert model.config.image_seq_length == Geometry.load(out).tokens_per_image == count // 2
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)  # refuses a mismatch
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_the_directory_is_complete(built: Path, tokenizer: Any) -> None:
    processor = AutoProcessor.from_pretrained(built, backend="pil")
    assert processor.chat_template == processor.tokenizer.chat_template == tokenizer.chat_template
    assert (built / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert processor.image_token == "<image>" and processor.tokenizer.is_fast  # noqa: S105
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert processor.tokenizer.encode("a<image>b", add_special_tokens=False).count(image_id) == 1
    assert "<image>" in processor.tokenizer.all_special_tokens
    for token in ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"):
        assert processor.tokenizer.convert_tokens_to_ids(token) == tokenizer.convert_tokens_to_ids(
            token
        )
    config = json.loads((built / "config.json").read_text())
    assert config["image_token_index"] == image_id == 300
    assert config["text_config"]["vocab_size"] == 384 and not config["tie_word_embeddings"]
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == processor.vision_feature_select_strategy
    assert config["vision_config"]["patch_size"] == processor.patch_size == 8
    generation = json.loads((built / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert generation["bos_token_id"] == tokenizer.bos_token_id


def test_the_generation_config_is_the_language_models(
    tmp_path: Path, tower: Path, text: Path
) -> None:
    other = copy(text, tmp_path / "text")
    set_key(other / "generation_config.json", eos_token_id=[1, 5], repetition_penalty=1.25)
    out, _ = build(tmp_path / "out", tower, other)
    found = json.loads((out / "generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 5] and found["repetition_penalty"] == 1.25
    assert found["pad_token_id"] == Geometry.load(out).pad_token_id


def test_the_mapping_table_knows_every_weight(built: Path) -> None:
    found = {canonical(name): tuple(value.shape) for name, value in weights(built).items()}
    geometry = Geometry.load(built)
    check_hf(entries(geometry, tower_shapes(geometry)), found, str(built))


def test_equal_settings_give_equal_bytes_and_the_seed_is_the_projectors(
    tmp_path: Path, tower: Path, text: Path, built: Path
) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = build(tmp_path / "again", tower, text)[0]
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(p.name for p in built.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    for name in names:
        assert (again / name).read_bytes() == (built / name).read_bytes(), name
    other = weights(build(tmp_path / "other", tower, text, seed=7)[0])
    changed = {n for n, value in weights(built).items() if not torch.equal(value, other[n])}
    assert changed == {n for n in other if n.startswith("multi_modal_projector.")}
    assert len(changed) == 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("asked", "stored"),
    [("source", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_dtype_and_tying(
    tmp_path: Path, tower: Path, tokenizer: Any, tied: bool, asked: str, stored: torch.dtype
) -> None:
    text = make_text(tmp_path / "text", tokenizer, tie_word_embeddings=tied, dtype=torch.bfloat16)
    out, metrics = build(tmp_path / "out", tower, text, dtype=asked, vocab_size_padding=0)
    found = weights(out)
    # The tower of these tests is stored in float32.
    towers = {value.dtype for name, value in found.items() if "vision_tower" in name}
    others = {value.dtype for name, value in found.items() if "vision_tower" not in name}
    assert towers == {torch.float32 if asked == "source" else stored} and others == {stored}
    assert metrics["tower_dtype"] == str(towers.pop()).removeprefix("torch.")
    assert metrics["dtype"] == str(stored).removeprefix("torch.") == Geometry.load(out).dtype
    assert Geometry.load(out).tied is tied and Geometry.load(out).vocab == 301
    assert any("lm_head" in name for name in found) is not tied
    model = load(out)
    embedding = model.get_input_embeddings().weight
    assert (model.lm_head.weight.data_ptr() == embedding.data_ptr()) is tied


def test_tokenizers_with_image_token_without_pad_token_and_with_spare_rows(
    tmp_path: Path, tower: Path
) -> None:
    tokenizer = make_tokenizer(STRING_TEMPLATE)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False
    )
    size = len(tokenizer)
    text = make_text(tmp_path / "text", tokenizer, vocab_size=size + 20)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (text / name).exists():
            described = json.loads((text / name).read_text())
            described.pop("pad_token", None)
            (text / name).write_text(json.dumps(described))
    out, metrics = build(tmp_path / "out", tower, text, vocab_size_padding=64)
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    assert metrics["image_token_id"] == size - 1 == processor.image_token_id
    assert list(metrics["added_tokens"]) == [] and processor.tokenizer.pad_token == "<pad>"  # noqa: S105
    source = LlamaForCausalLM.from_pretrained(text).state_dict()["lm_head.weight"]
    head = weights(out)["language_model.lm_head.weight"]
    assert head.shape[0] == metrics["vocab"] == 384 and len(source) == size + 20 == 321
    assert torch.equal(head[:321], source)
    torch.testing.assert_close(head[321], source[:size].double().mean(0).float())


def test_a_padding_token_is_added_where_there_is_none(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_steps.demo.text.PAD", "<fill>")
    text = make_text(tmp_path / "text", make_tokenizer(), vocab_size=320)
    described = json.loads((text / "tokenizer_config.json").read_text())
    assert described.pop("pad_token") == "<fill>"
    (text / "tokenizer_config.json").write_text(json.dumps(described))
    out, metrics = build(tmp_path / "out", tower, text, vocab_size_padding=0)
    assert list(metrics["added_tokens"]) == ["<image>", "<pad>"] and metrics["new_rows"] == 2
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    assert processor.tokenizer.pad_token_id == Geometry.load(out).pad_token_id == 301
    source = LlamaForCausalLM.from_pretrained(text).state_dict()["lm_head.weight"]
    head = weights(out)["language_model.lm_head.weight"]
    torch.testing.assert_close(head[300:302], source[:300].mean(0).expand(2, -1))
    assert torch.equal(head[302:], source[302:]) and torch.equal(head[:300], source[:300])


def test_remains_of_a_killed_attempt_do_not_stay(tmp_path: Path, tower: Path, text: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half")
    build(tmp_path, tower, text)
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def set_key(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def drop_weight(path: Path, part: str) -> None:
    kept = {n: v for n, v in load_file(path / "model.safetensors").items() if part not in n}
    save_file(kept, path / "model.safetensors", {"format": "pt"})


def refuse(error: type[StepError], words: str, *directories: Path, **settings: Any) -> None:
    with pytest.raises(error, match=words):
        build(directories[0].parent / "out", directories[0], directories[1], **settings)


def test_families_are_refused_by_name(tmp_path: Path, tower: Path, text: Path) -> None:
    other = copy(text, tmp_path / "text")
    set_key(other / "config.json", model_type="gpt2")
    refuse(ConfigError, r"text_model: .*'gpt2'; supported: .*llama", tower, other)
    changed = copy(tower, tmp_path / "tower")
    set_key(changed / "config.json", model_type="vit")
    refuse(ConfigError, r"vision_tower: .*'vit'; supported: clip", changed, text)
    (changed / "config.json").unlink()
    refuse(InputError, "vision_tower: .* is not a Hugging Face model directory", changed, text)
    (changed / "config.json").write_text("[1]")
    refuse(InputError, "vision_tower: .* does not hold a JSON object", changed, text)


@pytest.mark.parametrize("part", ["lm_head", "layers.1.self_attn.q_proj.weight"])
def test_a_missing_text_weight_is_an_error(
    tmp_path: Path, tower: Path, text: Path, part: str
) -> None:
    other = copy(text, tmp_path / "text")
    drop_weight(other, part)
    refuse(IntegrityError, f"{other}: weights are missing.*{part}", tower, other)


def test_a_missing_tower_weight_is_an_error(tmp_path: Path, tower: Path, text: Path) -> None:
    other = copy(tower, tmp_path / "tower")
    drop_weight(other, "layers.0.mlp.fc1.bias")
    refuse(IntegrityError, f"{other}: weights are missing.*fc1.bias", other, text)


def test_a_weight_without_a_place_is_an_error(tmp_path: Path, tower: Path, text: Path) -> None:
    other = copy(text, tmp_path / "text")
    found = load_file(other / "model.safetensors") | {"model.layers.0.adapter": torch.ones(2)}
    save_file(found, other / "model.safetensors", {"format": "pt"})
    refuse(IntegrityError, "not part of the model.*adapter", tower, other)


def test_tokenizer_template_and_image_processor_are_needed(
    tmp_path: Path, tower: Path, text: Path
) -> None:
    plain = copy(text, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    refuse(ConfigError, "no chat template.*chat_template.jinja", tower, plain)
    bare = copy(tower, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    refuse(InputError, "preprocessor_config.json", bare, text)
    wrong = make_tower(tmp_path / "wrong", crop=SIDE + 8)
    refuse(ConfigError, r"makes images of \(3, 32, 32\).*takes \(3, 24, 24\)", wrong, text)
    refuse(InputError, "vision_feature_layer -9", tower, text, vision_feature_layer=-9)


def test_names_that_are_neither_directory_nor_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="could not be downloaded from the hub"):
        build_hf.local("nobody/no-such-model", Hub(tmp_path))
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        build_hf.local("no/such/directory", Hub(tmp_path))


def test_on_the_command_line(tmp_path: Path, tower: Path, text: Path) -> None:
    flags = ("--save-dir=out", "--tp=3", "--vocab-size-padding")
    models = (f"--vision-tower={tower}", f"--text-model={text}")
    run_step("build_hf", *flags, *models, cwd=tmp_path)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["metrics"]["vocab"] == 384
    assert manifest["metrics"]["added_tokens"] == ["<image>"]
    parameters = sum(value.numel() for value in weights(tmp_path / "out").values())
    assert manifest["metrics"]["parameters"] == parameters
