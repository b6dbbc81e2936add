"""Reading encoded images: the one decoder of sharding, preparing and training. Pillow only."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from llava_steps.data.samples import SampleError


def decode(data: bytes) -> Image.Image:
    """Upright RGB image from a file's bytes, as `transformers.image_utils.load_image` gives it.

    Raises:
        SampleError: not an image, or a truncated one.
    """
    return _decode(data, max_pixels=None, quick=False)


def check_jpeg(data: bytes, max_pixels: int) -> None:
    """Raise SampleError unless `decode` will give an image of at most `max_pixels` from a JPEG.

    The header is looked at before anything is decoded. Decoding goes through all data, at an
    eighth of the size, where that is cheap.

    Raises:
        SampleError: not a JPEG (the message says how to convert it), too large, or broken.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        raise SampleError(_not_jpeg(data))
    _decode(data, max_pixels, quick=True)


def check_image(data: bytes, max_pixels: int | None = None) -> None:
    """Raise SampleError unless `decode` will give an image; any format that Pillow reads."""
    _decode(data, max_pixels, quick=True)


def _decode(data: bytes, max_pixels: int | None, quick: bool) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are measured here
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise SampleError(f"too many pixels: {width} x {height}")
                if quick:
                    image.draft(image.mode, (max(1, width // 8), max(1, height // 8)))
                return ImageOps.exif_transpose(image).convert("RGB")
    except (SampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(f"too many pixels: {error}") from error
    except Exception as error:  # a broken file can make the decoders raise anything
        raise SampleError(f"unreadable image: {type(error).__name__}: {error}") from error


def _not_jpeg(data: bytes) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                name, moving = image.format, getattr(image, "is_animated", False)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        return f"unreadable image: {type(error).__name__}: {error}"
    if moving:
        return f"animated image: {name}; save one frame as JPEG"
    return (
        f"not a JPEG: the file is {name}; convert it, with Pillow: "
        'Image.open(old).convert("RGB").save(new, "JPEG", quality=95)'
    )
