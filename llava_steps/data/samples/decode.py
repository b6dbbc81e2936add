"""Reading encoded images: the one decoder of sharding, training, evaluation and chat. Pillow only.

JPEG, PNG and WebP are ordinary images. Other formats that Pillow reads are decoded too; sharding
takes them only where it is asked to convert them. Every message is in our own words: Pillow's hold
addresses of objects, and quarantine lists have to be the same in each run.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps

from llava_steps.data.samples import formats, jpeg
from llava_steps.data.samples.sample import SampleError

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
MAX_PIXELS = 25_000_000
"""Default of `tar_shards.max_pixels`, and most pixels that an image may have after a resize."""
LARGEST = 178_956_970
"""Most pixels that are decoded at all; Pillow takes more for an attack."""
_QUALITY = 95
_STRIP = 1_000_000
"""Pixels that are composed at a time."""
_DECODERS = {"JPEG": ("JPEG", "MPO"), "PNG": ("PNG",), "WebP": ("WEBP",)}
"""Pillow's names of the formats that are kept. An MPO is a JPEG with further pictures after it."""


def decode(
    data: bytes,
    background: Color = WHITE,
    check_size: Callable[[int, int], None] = lambda width, height: None,
) -> Image.Image:
    """Upright RGB image from a file's bytes, its transparent pixels composed onto `background`.

    An opaque image is as `transformers.image_utils.load_image` gives it. `check_size` is called
    with width and height before anything is decoded, and may raise SampleError.

    Raises:
        SampleError: not an image, animated, too large, broken, or of more than 8 bits a channel.
    """
    with _opened(data, None) as image:
        check_size(*image.size)
        return _rgb(image, background)


def check_image(data: bytes, max_pixels: int | None = None, full: bool = False) -> None:
    """Raise SampleError unless `decode` will give an image of at most `max_pixels`.

    The header is read before anything is decoded. A plain JPEG is followed by its structure to
    its end (jpeg.py); other JPEG files are decoded at an eighth of the size where that is cheap.
    Files of other formats are decoded.

    Args:
        data: the file's bytes.
        max_pixels: most pixels that are accepted; None: all that can be decoded.
        full: decode every image, at its full size.

    Raises:
        SampleError: as `decode`.
    """
    size = None if full else jpeg.simple(data)
    if size is not None:
        _check_size(*size, max_pixels)
        return
    with _opened(data, max_pixels) as image:
        if not full:
            image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        _rgb(image.crop((0, 0, 1, 1)), WHITE)  # not every mode can be converted


def header_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) by the beginning of a file; None if it is too short, or broken."""
    if (size := formats.size(head) or formats.jpeg_size(head)) is not None:
        return size
    try:
        with _opened(head, None) as image:
            return image.size
    except SampleError:
        return None


def convert(data: bytes, max_pixels: int) -> bytes:
    """An image of another format as a JPEG of quality 95 without chroma subsampling.

    One with transparent pixels becomes a PNG, because JPEG would lose them.

    Raises:
        SampleError: as `decode`, or a side is longer than 65,500 pixels.
    """
    out = io.BytesIO()
    with _opened(data, max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if not _opaque(image):
            image.convert("RGBA").save(out, "PNG")
            return out.getvalue()
        opaque = image.convert("RGB")
    try:
        opaque.save(out, "JPEG", quality=_QUALITY, subsampling=0)
    except OSError as error:
        size = f"{opaque.width} x {opaque.height}"
        raise SampleError(f"too long for JPEG: {size}; a side has at most 65500 pixels") from error
    return out.getvalue()


def not_kept(data: bytes) -> str | None:
    """Why a file is not one of the formats that are kept; None if it is."""
    kind = formats.kind(data)
    if kind in formats.KEPT:
        return None
    if not data:
        return "unreadable image: the file is empty"
    with _opened(data, None) as image:
        return f"not a JPEG, PNG or WebP: the file is {kind or image.format}"


@contextmanager
def _opened(data: bytes, max_pixels: int | None) -> Iterator[Image.Image]:
    """The image, its size and kind checked, not decoded yet; errors within become SampleErrors."""
    kind = formats.kind(data)
    if not data:
        raise SampleError("unreadable image: the file is empty")
    if kind and kind not in formats.KEPT and kind not in formats.FURTHER_IMAGES:
        # Pillow would have PostScript run by another program.
        raise SampleError(_unreadable(data, kind, ""))
    if (size := formats.size(data)) is not None:
        _check_size(*size, max_pixels)
    opened = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are measured here
            with Image.open(io.BytesIO(data), formats=_DECODERS.get(kind)) as image:
                opened = kind or str(image.format)
                _check_size(*image.size, max_pixels)
                if kind != "JPEG":
                    _check_still(image, opened)
                if kind == "PNG":
                    _correct_key(image, data[24])
                yield image
    except (SampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(_too_many("", max_pixels)) from error
    except Exception as error:  # a broken file can make the decoders raise anything
        raise SampleError(_unreadable(data, kind, opened)) from error


def _unreadable(data: bytes, kind: str, opened: str) -> str:
    if opened or kind in formats.KEPT:
        return f"unreadable image: the {opened or kind} file is damaged or cut off"
    if kind in formats.FURTHER_IMAGES:
        return f"unreadable image: the file is {kind}; save it as JPEG, PNG or WebP"
    if kind:
        hint = "; run git lfs pull" if kind == formats.LFS else ""
        return f"unreadable image: the file is {kind}, not an image{hint}"
    return f"unreadable image: unknown format, the file begins with {data[:8].hex(' ')}"


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if width * height > min(max_pixels or LARGEST, LARGEST):
        raise SampleError(_too_many(f": {width} x {height}", max_pixels))


def _too_many(size: str, max_pixels: int | None) -> str:
    if max_pixels is None or max_pixels >= LARGEST:
        return f"too many pixels (at most {LARGEST}){size}"
    return f"too many pixels (max_pixels is {max_pixels}){size}"


def _check_still(image: Image.Image, kind: str) -> None:
    if getattr(image, "is_animated", False):
        raise SampleError(f"animated image: {kind}; save one frame as PNG or JPEG")
    if image.mode.startswith(("I", "F")):
        # Pillow makes 8 bits of more by clipping: a picture of 16 bits would come out white.
        low, high = image.getextrema()
        if float(low) < 0 or float(high) > 255:  # type: ignore[arg-type]
            raise SampleError(
                f"more than 8 bits: values from {low} to {high} (mode {image.mode}); scale them to "
                "0 to 255 and save as 8 bits"
            )


def _rgb(image: Image.Image, background: Color) -> Image.Image:
    """Upright RGB copy of an image, which it turns upright itself."""
    ImageOps.exif_transpose(image, in_place=True)
    if _opaque(image):
        opaque = image.convert("RGB")
        # A transparent colour that no pixel has; processors would look for it again.
        opaque.info.pop("transparency", None)
        return opaque
    composed = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)  # in strips, for the sake of memory
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        ground = Image.new("RGBA", strip.size, (*background, 255))
        composed.paste(Image.alpha_composite(ground, strip).convert("RGB"), (0, top))
    return composed


def _opaque(image: Image.Image) -> bool:
    """Whether no pixel lets the ground show through; False also where that takes a conversion."""
    if "A" not in image.getbands():
        return not image.has_transparency_data
    lowest, _ = image.getchannel("A").getextrema()
    return lowest == 255


def _correct_key(image: Image.Image, depth: int) -> None:
    """Scale the transparent colour of a PNG to 8 bits, which Pillow does with the pixels only."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and depth < 8:
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
