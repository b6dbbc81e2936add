"""Training, evaluation and the saved processor make the same pixels and ids of any image file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.decode import check_image, decode
from llava_steps.data.samples.images import ImageReader
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.sample import Turn
from tests.helpers.data_fixtures import make_hf_dir

SIZES = {"square": (40, 40), "wide": (200, 31), "tall": (29, 170), "tiny": (5, 3)}
MODES = {
    "grey": "L", "cmyk": "CMYK", "palette": "P", "transparent": "RGBA", "grey-alpha": "LA",
    "bilevel": "1",
}  # fmt: skip
FILES = [
    *SIZES, *MODES, "palette-transparent", "16-bit", "webp", "webp-lossless", "webp-transparent",
    *(f"exif-{n}" for n in range(2, 9)),
]  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    """A picture without symmetry."""
    random = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(random.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write(path: Path, name: str) -> Path:
    """The file that `name` speaks of."""
    options: dict[str, Any] = {}
    image, form = picture(*SIZES.get(name, (61, 45))), "PNG"
    if name in SIZES or name in ("grey", "cmyk") or name.startswith("exif"):
        form = "JPEG"
    if name in MODES:
        image = image.convert(MODES[name])
    if name in ("transparent", "grey-alpha"):
        image.putalpha(picture(*image.size).convert("L"))
    if name.startswith("webp"):
        form, options = "WEBP", {"lossless": name != "webp"}
    if name == "webp-transparent":
        image.putalpha(picture(*image.size).convert("L"))
    if name == "palette-transparent":
        image, options = image.convert("P"), {"transparency": 3}
    if name == "16-bit":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16))
    if name.startswith("exif"):
        exif = Image.Exif()
        exif[0x0112] = int(name[-1])
        options = {"exif": exif}
    image.save(path, form, **options)
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Processor directories: CLIP (resize, crop) and SigLIP (squeeze, no class token)."""
    from transformers import LlavaProcessor, SiglipImageProcessorPil

    clip = make_hf_dir(tmp_path_factory.mktemp("clip"))
    siglip = tmp_path_factory.mktemp("siglip")
    saved = load_processor(clip)
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=saved.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=saved.chat_template,
    ).save_pretrained(siglip)
    return {"clip": clip, "siglip": siglip}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_pixels_and_ids_are_those_of_the_saved_processor(
    tower: str, name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    path = write(tmp_path / "image", name)
    data = path.read_bytes()
    check_image(data)
    directory = directories[tower]
    processor, encoder = load_processor(directory), ConversationEncoder(directory, 99)
    parts = [{"type": "image"}, {"type": "text", "text": "What digit is this?"}]
    talk = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    # The processor composes what is transparent onto white; load_image would onto black.
    loaded = Image.open(path) if "transparent" in name or "alpha" in name else load_image(str(path))
    expected = processor(text=prompt, images=[loaded], **options)

    pixels = encoder.images([data])
    assert (pixels - expected["pixel_values"]).abs().max() <= 1e-6
    assert pixels.std() > 0.05, "an empty picture would prove nothing"
    ids = expected["input_ids"][0]
    turns = (Turn("user", "<image>\nWhat digit is this?"), Turn("assistant", "It is a seven."))
    assert torch.equal(encoder.encode(turns).tokens[: len(ids)], ids)
    # Evaluation and chat.
    asked = processor(text=prompt, images=[ImageReader(processor.image_processor)(data)], **options)
    assert torch.equal(asked["input_ids"], expected["input_ids"])
    assert (asked["pixel_values"] - expected["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize("number", range(2, 9))
def test_rotated_files_come_upright(number: int, tmp_path: Path) -> None:
    """All orientations of one scene are one picture; compression leaves small differences."""
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    upright = picture(61, 45)
    exif = Image.Exif()
    exif[0x0112] = number
    out = io.BytesIO()
    upright.transpose(turned[number]).save(out, "JPEG", quality=98, subsampling=0, exif=exif)
    difference = np.asarray(decode(out.getvalue()), float) - np.asarray(upright, float)
    assert np.abs(difference).mean() < 3
