"""The demo's data and models: right answers, a clean split, and the same bytes each time."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_steps import build_hf, demo_assets
from llava_steps.core.errors import ConfigError
from llava_steps.core.filesystem import files_below, sha256_file
from llava_steps.demo import questions, scans, text
from llava_steps.settings.conversion import HfModel
from llava_steps.settings.demo_assets import DemoAssets
from tests.helpers.chain import environment
from tests.helpers.data_fixtures import fake_context

BRIEF = {"pretrain_vision_steps": 3, "pretrain_text_steps": 3, "text_layers": 1, "vision_layers": 2}


def make(out: Path, **settings: Any) -> Path:
    out.mkdir()
    demo_assets.run(fake_context(out), DemoAssets(**{**BRIEF, **settings}))
    return out


def digests(root: Path, below: str = "") -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): sha256_file(path) for path in files_below(root / below)
    }


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("demo") / "assets")


def samples(assets: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((assets / "raw" / f"{name}.json").read_text())
    return found


def images_of(sample: dict[str, Any]) -> list[str]:
    found = sample.get("image", [])
    return [found] if isinstance(found, str) else found


@functools.cache
def labels() -> list[int]:
    from sklearn.datasets import load_digits

    return [int(digit) for digit in load_digits().target]


def digits_of(sample: dict[str, Any]) -> list[int]:
    """What the scans of a sample show, by scikit-learn's labels."""
    return [labels()[int(Path(name).stem)] for name in images_of(sample)]


def expected(question: str, digits: list[int], lang: str) -> str:
    """The right answer, derived from the question's words alone."""
    named = [int(n) for n in re.findall(r"(?<!に)\d+", question)] or digits
    english = lang == "en"
    if re.search(r"larger|大きい", question):
        first = named[0] > named[1]
        return (
            ("The first one." if first else "The second one.")
            if english
            else ("1枚目です。" if first else "2枚目です。")
        )
    if re.search(r"odd|奇数", question):
        odd = named[0] % 2
        return (
            ("It is odd." if odd else "It is even.")
            if english
            else ("奇数です。" if odd else "偶数です。")
        )
    if re.search(r"follows|next|Add one|次|足して", question):
        return f"{named[0] + 1} follows." if english else f"次は{named[0] + 1}です。"
    return f"It is {named[0]}." if english else f"{named[0]}です。"


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_answer_is_right(assets: Path, name: str) -> None:
    for sample in samples(assets, name):
        digits, turns = digits_of(sample), sample["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].count("<image>") == len(digits)
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            question = asked["value"].replace("<image>\n", "")
            assert "<image>" not in question
            assert answered["value"] == expected(question, digits, sample["lang"]), sample


def test_the_training_file_holds_all_that_the_demo_shows(assets: Path) -> None:
    found = samples(assets, "train")
    kinds = Counter((s["kind"], s["lang"]) for s in found)
    every = (*questions.ABOUT_ONE_SCAN, "multi_turn", questions.TWO_SCANS, questions.TEXT_ONLY)
    assert set(kinds) == {(kind, lang) for kind in every for lang in ("en", "ja")}
    assert min(kinds.values()) >= 70
    asked = {t["value"].replace("<image>\n", "") for s in found for t in s["conversations"][::2]}
    assert asked >= {w for wordings in questions.QUESTIONS.values() for w in wordings}
    assert {len(s["conversations"]) for s in found} == {2, 6}
    assert {len(images_of(s)) for s in found} == {0, 1, 2}
    assert len({s["id"] for s in found}) == len(found) == 3650


def test_heldout_scans_are_in_no_training_sample(assets: Path) -> None:
    train = {name for s in samples(assets, "train") for name in images_of(s)}
    heldout = {name for s in samples(assets, "heldout") for name in images_of(s)}
    assert len(train) == 1500 and len(heldout) == 297 and not train & heldout
    for lang in ("en", "ja"):
        for kind in questions.ABOUT_ONE_SCAN:
            group = [
                s for s in samples(assets, "heldout") if (s["kind"], s["lang"]) == (kind, lang)
            ]
            assert {name for s in group for name in images_of(s)} == heldout
            assert len(group) == 297


def test_the_split_is_fixed_and_has_every_digit_in_both_parts() -> None:
    labels = scans.load_scans().digits
    assert len(labels) == 1797
    train, heldout = scans.split(labels, 297, 1234)
    assert sorted(train + heldout) == list(range(1797)) and len(heldout) == 297
    for digit in range(10):
        share = np.mean(labels[heldout] == digit) / np.mean(labels == digit)
        assert 0.95 < share < 1.05
    assert scans.split(labels, 297, 1234) == (train, heldout)
    assert scans.split(labels, 297, 1)[1] != heldout
    for wrong in (9, 1788):
        with pytest.raises(ConfigError, match=f"heldout_scans is {wrong}; choose 10 to 1787"):
            scans.split(labels, wrong, 1234)


def test_images_are_the_scans(assets: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits().images
    names = sorted((assets / "raw/images").iterdir())
    assert [n.name for n in names] == [f"{i:04d}.jpg" for i in range(1797)]
    for number in (0, 900, 1796):
        image = Image.open(names[number])
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255
        assert np.corrcoef(small.ravel(), 1 - raw[number].ravel() / 16)[0, 1] > 0.97


def test_heldout_scans_do_not_touch_the_models(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other held-out pixels change the held-out images and nothing else."""
    data = scans.load_scans()
    heldout = scans.split(data.digits, 297, 1234)[1]
    pixels = data.pixels.copy()
    pixels[heldout] = 255 - pixels[heldout]
    monkeypatch.setattr(scans, "load_scans", lambda: dataclasses.replace(data, pixels=pixels))
    before, after = digests(assets), digests(make(tmp_path / "other"))
    changed = {name for name in before if before[name] != after[name]}
    assert set(before) == set(after)
    assert changed == {f"raw/images/{n:04d}.jpg" for n in heldout}


def test_the_language_model_sees_no_scan(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scans.load_scans()
    noise = np.random.default_rng(0).integers(0, 256, data.pixels.shape, dtype=np.uint8)
    monkeypatch.setattr(scans, "load_scans", lambda: dataclasses.replace(data, pixels=noise))
    other = make(tmp_path / "other")
    assert digests(assets, "text_model") == digests(other, "text_model")
    weights = "vision_tower/model.safetensors"
    assert digests(assets, "vision_tower")[weights] != digests(other, "vision_tower")[weights]


def test_equal_settings_give_equal_bytes_in_another_process(assets: Path, tmp_path: Path) -> None:
    """Whatever the number of threads and the order of Python's sets."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in BRIEF.items()]
    changes = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "llava_steps.demo_assets", "--save-dir=out", *flags],
        cwd=tmp_path,
        env=os.environ | environment() | changes,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {f["path"]: f["sha256"] for f in manifest["files"]} == digests(assets)
    assert manifest["metrics"]["train_samples"] == 3650
    assert manifest["metrics"]["heldout_samples"] == 2120
    assert len(manifest["metrics"]["heldout_scans"]) == 297


def test_another_seed_is_another_split_and_other_models(assets: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=5, pretrain_vision_steps=0, pretrain_text_steps=0)
    for name in ("raw/train.json", "raw/heldout.json", "vision_tower/model.safetensors"):
        assert sha256_file(assets / name) != sha256_file(other / name)
    assert sha256_file(assets / "raw/images/0005.jpg") == sha256_file(other / "raw/images/0005.jpg")


def test_the_directories_are_ordinary_models(assets: Path) -> None:
    from transformers import (
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPVisionModel,
        GenerationConfig,
    )

    for kind, name in ((CLIPVisionModel, "vision_tower"), (AutoModelForCausalLM, "text_model")):
        model, report = kind.from_pretrained(assets / name, output_loading_info=True)
        assert not any(report.values()), report
    config = model.config
    assert config.model_type == "llama" and not config.tie_word_embeddings
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    processor = AutoImageProcessor.from_pretrained(assets / "vision_tower", backend="pil")
    assert processor.crop_size.height == 32
    tokenizer = AutoTokenizer.from_pretrained(assets / "text_model")
    generation = GenerationConfig.from_pretrained(assets / "text_model")
    assert tokenizer.is_fast and len(tokenizer) == config.vocab_size <= 512
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_the_tokenizer_keeps_every_text_and_every_digit(assets: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "text_model")
    texts = {t["value"] for s in samples(assets, "train") for t in s["conversations"]}
    for value in {*texts, "ñ 漢字 🙂 <tag>"}:
        ids = tokenizer.encode(value, add_special_tokens=False)
        assert tokenizer.decode(ids) == value
    digits = {tokenizer.decode([i]) for i in tokenizer.encode("0123456789")[1:]}
    assert digits == set("0123456789")
    assert tokenizer.encode("ab")[0] == tokenizer.bos_token_id
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said = tokenizer.apply_chat_template(talk, tokenize=False)
    assert said == "<s><|user|>a<|assistant|>b</s>"
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert said.startswith(asked) and asked.endswith("<|assistant|>")
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert asked == "<s><|user|><image>\na"
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "a"}], tokenize=False)


def test_the_text_of_pretraining_has_no_image(assets: Path) -> None:
    talks = text.corpus(400, 3)
    assert not any("<image>" in m["content"] for talk in talks for m in talk)
    assert talks == text.corpus(400, 3) != text.corpus(400, 4)


def test_the_language_model_is_trained_on_answers() -> None:
    """Prompts have no share in its loss, their end markers neither; end tokens of answers do."""
    import torch

    talks = text.corpus(64, 3)
    tokenizer = text.train_tokenizer([m["content"] for t in talks for m in t], 400)
    assistant, end = tokenizer.convert_tokens_to_ids([text.ASSISTANT, text.EOS])
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True).input_ids
        padded = torch.nn.functional.pad(ids, (0, 3), value=tokenizer.pad_token_id)
        answered = text._answers(padded, assistant, end)
        answers = [m["content"] + text.EOS for m in talk if m["role"] == "assistant"]
        assert tokenizer.decode(padded[answered]) == "".join(answers)


def test_four_tenths_of_the_text_compare_two_digits() -> None:
    talks = text.corpus(2000, 3)
    compared = [t for t in talks if re.search(r"larger|大きい", t[0]["content"])]
    assert 0.35 < len(compared) / len(talks) < 0.45


def test_pretraining_learns(tmp_path: Path) -> None:
    """The losses that the models are pretrained with go down from where chance is."""
    import torch

    from llava_steps.demo import schedule, vision

    data = scans.load_scans()
    pixels = np.stack([scans.enlarge(p, 32) for p in data.pixels[:400]])
    losses: list[float] = []
    with schedule.seeded(0):
        tower = vision.build_tower(32, 8, 64, 1)
    state = torch.get_rng_state()
    vision.pretrain_tower(tower, pixels, data.digits[:400], 120, 0, losses.append)
    assert len(losses) == 120 and losses[0] > 4 and np.mean(losses[-5:]) < 3.7
    tokenizer = text.train_tokenizer([m["content"] for t in text.corpus(200, 0) for m in t], 400)
    with schedule.seeded(0):
        model = text.build_llama(tokenizer, 32, 1, 4, 2)
    losses.clear()
    text.pretrain_llama(model, tokenizer, text.corpus(200, 0), 40, 0, losses.append)
    assert losses[0] > 5.5 and np.mean(losses[-5:]) < 4.5
    assert torch.equal(torch.get_rng_state(), state)


def test_remains_of_a_killed_attempt_do_not_stay(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "raw/images").mkdir(parents=True)
    (out / "raw/images/9999.jpg").write_bytes(b"half")
    (out / ".work").mkdir()
    demo_assets.run(fake_context(out), DemoAssets(**BRIEF))
    assert (out / ".work").is_dir()
    (out / ".work").rmdir()
    assert digests(out) == digests(assets)


def test_they_become_a_model_that_training_takes(assets: Path, tmp_path: Path) -> None:
    """Every sample of the demo is encoded within the demo's seq_length, answers supervised."""
    from llava_steps.data.samples.conversation import ConversationEncoder
    from llava_steps.data.samples.sample import parse_turns

    parts = {"vision_tower": assets / "vision_tower", "text_model": assets / "text_model"}
    config = HfModel(**{name: str(path) for name, path in parts.items()})
    build_hf.run(fake_context(tmp_path, **parts), config)
    encoder = ConversationEncoder(tmp_path, 256)
    for sample in samples(assets, "train")[:300]:
        turns = parse_turns(sample["conversations"])
        encoded = encoder.encode(turns)
        images = int((encoded.tokens == encoder.image_token_id).sum())
        assert images == 16 * len(images_of(sample))
        answers = [t.content for t in turns[1::2]]
        labels = encoded.shifted_labels[encoded.shifted_labels >= 0]
        assert len(labels) >= 2 * len(answers)
