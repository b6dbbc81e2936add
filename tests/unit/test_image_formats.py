"""JPEG, PNG and WebP are ordinary images; what is transparent is composed; all limits hold."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil
from transformers.image_utils import load_image

from llava_steps import evaluate
from llava_steps.commands import chat
from llava_steps.core.errors import InputError
from llava_steps.data.samples import decode as decoding
from llava_steps.data.samples.decode import LARGEST, MAX_PIXELS, check_image, decode
from llava_steps.data.samples.images import ImageReader, ImageTransform
from llava_steps.data.samples.sample import SampleError
from llava_steps.evaluation import eval_mm_driver
from llava_steps.evaluation.ask import Model, Question
from llava_steps.settings.dataset import TarShards
from llava_steps.shard_tars import run
from tests.helpers.data_fixtures import fake_context, jpeg, members, write_tar

LINE = '[{"id": 1, "image": "NAME", "conversations": [{"from": "human", "value": "<image>\\n?"}, \
{"from": "gpt", "value": "x"}]}]'


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def drawing() -> Image.Image:
    """Black text on nothing."""
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((5, 10), "text", fill=(0, 0, 0, 255))
    return image


def png(depth: int, color: int, pixels: bytes, transparent: bytes) -> bytes:
    """Two pixels in a row, and a tRNS chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 2, 1, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    )  # fmt: skip


def shard(tmp_path: Path, name: str, data: bytes, **options: Any) -> dict[str, bytes]:
    """Parts of the one sample that the image gives."""
    (tmp_path / name).write_bytes(data)
    (tmp_path / "t.json").write_text(LINE.replace("NAME", name))
    return shard_file(tmp_path / "t.json", tmp_path / "out", **options)


def shard_file(source: Path, entry: Path, **options: Any) -> dict[str, bytes]:
    entry.mkdir()
    run(fake_context(entry, source=source), TarShards(source=str(source), workers=1, **options))
    with tarfile.open(entry / "000000.tar") as tar:
        files = {member.name.partition(".")[2]: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file is not None}


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.jpg", "x", "a.tar.jpg", "x.webp", "x.heic"])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_the_bytes_are_kept_whatever_the_file_is_called(
    tmp_path: Path, name: str, form: str
) -> None:
    data = encoded(Image.linear_gradient("L"), form)
    parts = shard(tmp_path, name, data)
    assert parts[{"PNG": "png", "WEBP": "webp", "JPEG": "jpg"}[form]] == data


@pytest.mark.parametrize("other_images", ["refuse", "jpeg"])
def test_a_drawing_on_nothing_is_seen_on_white(tmp_path: Path, other_images: str) -> None:
    """B3: its JPEG was wholly black."""
    parts = shard(tmp_path, "x.png", encoded(drawing()), other_images=other_images)
    low, high = decode(parts["png"]).convert("L").getextrema()
    assert low < 40 and high == 255  # type: ignore[operator]


TRANSPARENT = {
    "RGBA": encoded(drawing()), "LA": encoded(drawing().convert("LA")),
    "palette": encoded(drawing().quantize(8)), "webp": encoded(drawing(), "WEBP", lossless=True),
    "webp lossy": encoded(drawing(), "WEBP"), "gif": encoded(drawing(), "GIF"),
    "tiff": encoded(drawing(), "TIFF"),
    "1 bit": png(1, 0, b"\x40", b"\0\0"), "2 bits": png(2, 0, b"\x10", b"\0\1"),
    "4 bits": png(4, 0, b"\x05", b"\0\5"), "8 bits": png(8, 0, b"\0\x07", b"\0\x07"),
    "RGB": png(8, 2, b"\0\0\0\1\2\3", b"\0\1\0\2\0\3"),
    "RGB of 16 bits": png(16, 2, bytes(6) + b"\1\0\2\0\3\0", b"\1\0\2\0\3\0"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("ground", [(255, 255, 255), (0, 200, 100)])
def test_what_is_transparent_is_composed(name: str, ground: tuple[int, int, int]) -> None:
    image = decode(TRANSPARENT[name], ground)
    corner = (0, 0) if name in ("1 bit",) else (image.width - 1, 0)
    assert image.mode == "RGB" and image.getpixel(corner) == ground
    assert min(image.convert("L").getextrema()) < 40 or name == "1 bit"
    assert "transparency" not in image.info


def test_half_transparent_pixels_are_as_the_processor_mixes_them() -> None:
    image = Image.merge("RGBA", [Image.linear_gradient("L").rotate(90 * n) for n in range(4)])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert (ImageTransform(processor)([encoded(image)]) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_opaque_pixels_are_those_of_transformers(tmp_path: Path, form: str, mode: str) -> None:
    image = Image.merge("RGB", [Image.radial_gradient("L").rotate(90 * n) for n in range(3)])
    data = encoded(image.convert("RGB" if form == "JPEG" and mode == "RGBA" else mode), form)
    (tmp_path / "x").write_bytes(data)
    loaded = load_image(str(tmp_path / "x"))
    assert decode(data).tobytes() == loaded.tobytes()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(loaded, return_tensors="pt")["pixel_values"]
    assert (ImageTransform(processor)([data]) - expected).abs().max() <= 1e-6


def test_pixels_of_jpeg_files_have_not_changed() -> None:
    data = jpeg(3, (120, 90))
    with Image.open(io.BytesIO(data)) as image:
        assert decode(data).tobytes() == image.convert("RGB").tobytes()


def deep() -> bytes:
    return encoded(Image.fromarray(np.full((20, 30), 3000, np.uint16)))


UNUSABLE = {
    "empty": (b"", "unreadable image: the file is empty"),
    "html": (b"<html>no</html>", "unreadable image: the file is HTML"),
    "svg": (b'<?xml version="1.0"?><svg/>', "unreadable image: the file is SVG"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "unreadable image: the file is HEIC"),
    "video": (b"\0\0\0\x18ftypisom" + bytes(40), "unreadable image: the file is MP4"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unreadable image: the file is PostScript"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not an image"),
    "noise": (b"\1\2\3\4 no picture", "unknown format, the file begins with 01 02 03 04"),
    "cut png": (encoded(drawing())[:90], "the PNG file is damaged or cut off"),
    "cut webp": (encoded(drawing(), "WEBP")[:90], "the WebP file is damaged or cut off"),
    "cut jpeg": (jpeg(1)[:400], "the JPEG file is damaged or cut off"),
    "apng": (
        encoded(Image.new("L", (9, 9)), save_all=True, append_images=[Image.new("L", (9, 9), 9)]),
        "animated image: PNG",
    ),
    "moving webp": (
        encoded(drawing(), "WEBP", save_all=True, append_images=[drawing().rotate(9)]),
        "animated image: WebP",
    ),
    "16 bits": (deep(), "more than 8 bits: values from 3000 to 3000"),
    "bomb": (encoded(Image.new("1", (13_400, 13_400))), "too many pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_training_sharding_and_asking_refuse_the_same_in_our_own_words(
    tmp_path: Path, name: str
) -> None:
    data, reason = UNUSABLE[name]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    reader = object.__new__(Model)
    reader._read = ImageReader(processor)
    question = Question("q7", "", (), (data,), "")
    for attempt, where in (
        (lambda: check_image(data), ""), (lambda: decode(data), ""),
        (lambda: ImageTransform(processor)([data]), "image 0: "),
        (lambda: reader._images(question), "question q7, image 0: "),
    ):  # fmt: skip
        with pytest.raises(SampleError) as caught:
            attempt()
        text = str(caught.value)
        assert text.startswith(where) and reason in text, text
        assert not any(word in text for word in ("0x", "BytesIO", "Error", str(tmp_path)))
    with pytest.raises(InputError):
        shard(tmp_path, "x.png", data)
    assert reason in (tmp_path / "out/quarantine.jsonl").read_text()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_max_pixels_counts_and_is_named(tmp_path: Path, form: str) -> None:
    data = encoded(Image.new("RGB", (120, 100)), form)
    for limit in (11_999, 12_000):
        if limit == 12_000:
            check_image(data, limit)
            continue
        with pytest.raises(SampleError, match=r"^too many pixels \(max_pixels is 11999\): 120 x"):
            check_image(data, limit)
    assert TarShards(source="x").max_pixels == MAX_PIXELS


SIZED = {
    "jpeg": jpeg(1), "progressive": jpeg(1, (70, 30), progressive=True),
    "fill bytes": jpeg(1)[:2] + b"\xff\xff" + jpeg(1)[2:], "grey": encoded(drawing().convert("L")),
    "webp": encoded(drawing(), "WEBP"), "webp lossless": TRANSPARENT["webp"],
    "webp plain": encoded(drawing().convert("RGB"), "WEBP"),
    "bmp": encoded(drawing().convert("RGB"), "BMP"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_sizes_of_headers_are_those_of_the_images(name: str) -> None:
    data = SIZED[name]
    expected = decode(data).size
    sizes = {decoding.header_size(data[:length]) for length in range(0, len(data), 7)}
    assert sizes == {None, expected} and decoding.header_size(data) == expected


def webp_header(width: int, height: int) -> bytes:
    """The beginning of a lossless WebP of that size."""
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + struct.pack("<I", 100) + b"\x2f" + bits.to_bytes(4, "little") + bytes(99)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def test_bombs_are_refused_before_a_decoder_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*args: object, **options: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(decoding.Image, "open", unwanted)
    for data in (webp_header(16_000, 16_000), UNUSABLE["bomb"][0]):
        with pytest.raises(SampleError, match=rf"too many pixels \(at most {LARGEST}\): 1"):
            decode(data)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (12_000, 1)])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_image_is_refused_by_what_its_resize_would_make_of_it(
    size: tuple[int, int], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B8: 14 s and 3.5 GiB for a file of 1.4 kB."""
    data = encoded(Image.new("RGB", size), form)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    monkeypatch.setattr(decoding, "_rgb", lambda *_: pytest.fail("decoded"))
    for attempt in (ImageTransform(processor), lambda images: ImageReader(processor)(images[0])):
        with pytest.raises(SampleError, match=r"too many pixels after the resize .*becomes"):
            attempt([data])


def test_what_the_resize_makes_smaller_is_used() -> None:
    data = encoded(Image.new("RGB", (4000, 60), "red"))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    assert ImageTransform(processor)([data]).shape == (1, 3, 336, 336)


class Task:
    """As much of a task of eval_mm as a question needs."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    def doc_to_visual(self, doc: object) -> list[Image.Image]:
        return [self._image]

    def doc_to_text(self, doc: object) -> str:
        return "?"

    def doc_to_id(self, doc: object) -> int:
        return 7


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "CMYK"])
def test_pictures_of_a_harness_are_asked_as_files_are(mode: str) -> None:
    image = drawing().convert(mode)
    (data,) = eval_mm_driver.question(Task(image), "t", None).images
    ground = "white" if mode in ("RGBA", "LA") else "black"
    assert decode(data).getpixel((59, 0)) == ((255,) * 3 if ground == "white" else (0, 0, 0))


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_pictures_of_a_harness_with_more_than_8_bits_are_refused(mode: str) -> None:
    image = Image.fromarray(np.full((20, 30), 3000, np.int32)).convert(mode)
    (data,) = eval_mm_driver.question(Task(image), "t", None).images
    with pytest.raises(SampleError, match="more than 8 bits"):
        decode(data)


@pytest.mark.parametrize("part", ["png", "PNG", "webp", "jpg", "jpeg", "JPG"])
def test_tars_of_others_keep_their_bytes(tmp_path: Path, part: str) -> None:
    data = encoded(drawing(), "WEBP" if part == "webp" else "PNG")
    sample = {part: data, "txt": b"x", "json": b'{"question": "?"}'}
    write_tar(tmp_path / "x.tar", members({"k": sample}))
    parts = shard_file(tmp_path / "x.tar", tmp_path / "out")
    assert parts["webp" if part == "webp" else "png"] == data


@pytest.mark.parametrize("name", TRANSPARENT)
def test_composing_in_strips_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a picture that is turned upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(drawing(), "PNG", exif=exif)
    whole = decode(TRANSPARENT[name]), decode(turned)
    monkeypatch.setattr(decoding, "_STRIP", 70)
    strips = decode(TRANSPARENT[name]), decode(turned)
    assert [image.tobytes() for image in whole] == [image.tobytes() for image in strips]
    assert strips[1].size == (40, 60)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_parquet_evaluation_data_and_chat_take_them_too(tmp_path: Path, form: str) -> None:
    """P2, U4: evaluation refused PNG, with advice that evaluation could not follow."""
    data = encoded(drawing(), form)
    row = {"image": {"bytes": data, "path": "x.jpg"}, "question": "?", "answer": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    assert shard_file(tmp_path / "t.parquet", tmp_path / "parquet")[form.lower()] == data
    (tmp_path / "x.jpg").write_bytes(data)
    (tmp_path / "t.json").write_text(LINE.replace("NAME", "x.jpg"))
    (question,) = evaluate.read_questions(tmp_path / "t.json")
    asked = chat.as_question([tmp_path / "x.jpg"], "?")
    assert question.images == asked.images == (data,)
    (tmp_path / "x.jpg").write_bytes(encoded(drawing().convert("RGB"), "BMP"))
    with pytest.raises(InputError, match="the file is BMP; save it as PNG") as caught:
        evaluate.read_questions(tmp_path / "t.json")
    assert "other_images" not in str(caught.value)
