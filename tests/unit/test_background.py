"""The colour under transparent pixels is a setting of the model, the same for all who read it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from llava_steps.conversion.build import build
from llava_steps.conversion.export_format import rewrite_companions
from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.processor import load_processor
from llava_steps.evaluation.ask import Model, Question
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.conversion import HfModel
from llava_steps.settings.fields import values
from tests.helpers.hf_fixtures import make_text, make_tokenizer, make_tower


def drawing() -> bytes:
    out = io.BytesIO()
    image = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 40, 80))
    image.save(out, "PNG")
    return out.getvalue()


def make(root: Path, **settings: Any) -> Path:
    out = root / "model"
    text = make_text(root / "text", make_tokenizer())
    build(
        make_tower(root / "tower"), text, out, HfModel(vision_tower="", text_model="", **settings)
    )
    return out


def colour(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """RGB under the drawing in training, and in evaluation and chat."""
    images = load_processor(model).image_processor
    mean, deviation = np.array(images.image_mean), np.array(images.image_std)
    trained = ConversationEncoder(model, 99).images([drawing()]).numpy()[0]
    asked = Model(model)._images(Question("", "", (), (drawing(),), ""))[0]
    pixel = trained[:, 2, trained.shape[2] - 3] * deviation + mean
    return (255 * pixel).round().astype(int), np.array(asked.getpixel((79, 2)))


@pytest.mark.parametrize(
    ("name", "expected"), [("white", (255,) * 3), ("black", (0,) * 3), ("#10aFf0", (16, 175, 240))]
)
def test_training_and_asking_see_the_same_ground(
    tmp_path: Path, name: str, expected: tuple[int, ...]
) -> None:
    model = make(tmp_path, background=name)
    for seen in colour(model):
        assert tuple(seen) == expected
    saved = json.loads((model / "processor_config.json").read_text())["image_processor"]
    assert ("transparency_background" in saved) is (name != "white")
    # As megatron_to_hf with export_format transformers-4 writes it.
    rewrite_companions(model, Geometry.load(model))
    for seen in colour(model):
        assert tuple(seen) == expected


def test_it_is_a_value_of_the_model_and_checked() -> None:
    assert "background" in values(HfModel(vision_tower="a", text_model="b"))
    for wrong in ("red-ish", "#12", "", "#gggggg"):
        with pytest.raises(ValidationError, match="background"):
            HfModel(vision_tower="a", text_model="b", background=wrong)


@pytest.mark.parametrize("value", ["white", [1, 2], [1, 2, 300], [1, 2, True], None, 7])
def test_another_value_in_the_file_is_refused(tmp_path: Path, value: Any) -> None:
    model = make(tmp_path, background="black")
    path = model / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["transparency_background"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"transparency_background is .*three numbers"):
        ConversationEncoder(model, 99)
