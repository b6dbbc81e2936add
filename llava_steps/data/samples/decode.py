"""Reading encoded images: the one decoder of sharding, preparing and training. Pillow only."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from llava_steps.data.samples import jpeg
from llava_steps.data.samples.sample import SampleError

_QUALITY = 95


def decode(data: bytes) -> Image.Image:
    """Upright RGB image from a file's bytes, as `transformers.image_utils.load_image` gives it.

    Raises:
        SampleError: not an image, or a truncated one.
    """
    return _decode(data, max_pixels=None, quick=False)


def check_jpeg(data: bytes, max_pixels: int, full: bool = False) -> None:
    """Raise SampleError unless `decode` will give an image of at most `max_pixels` from a JPEG.

    The header is read before anything is decoded. A plain JPEG is followed by its structure to
    its end (jpeg.py); any other is decoded, at an eighth of the size, where that is cheap.

    Args:
        data: the file's bytes.
        max_pixels: most pixels that are accepted.
        full: decode every image, at its full size.

    Raises:
        SampleError: not a JPEG (the message says how to convert it), too large, or broken.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        raise SampleError(_not_jpeg(data))
    _check(data, max_pixels, full)


def check_image(data: bytes, max_pixels: int | None = None) -> None:
    """Raise SampleError unless `decode` will give an image; any format that Pillow reads."""
    _check(data, max_pixels, full=False)


def to_jpeg(data: bytes, max_pixels: int) -> bytes:
    """An image of another format as a JPEG of quality 95 without chroma subsampling.

    Raises:
        SampleError: not an image, animated, too large, broken, or of more than 8 bits a channel.
    """
    image = _decode(data, max_pixels, quick=False, still=True)
    out = io.BytesIO()
    try:
        image.save(out, "JPEG", quality=_QUALITY, subsampling=0)
    except OSError as error:  # a side longer than 65,500 pixels
        raise SampleError(f"no JPEG: {error}") from error
    return out.getvalue()


def _check(data: bytes, max_pixels: int | None, full: bool) -> None:
    size = None if full else jpeg.simple(data)
    if size is None:
        _decode(data, max_pixels, quick=not full)
    elif max_pixels is not None and size[0] * size[1] > max_pixels:
        raise SampleError(f"too many pixels: {size[0]} x {size[1]}")


def _decode(data: bytes, max_pixels: int | None, quick: bool, still: bool = False) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are measured here
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise SampleError(f"too many pixels: {width} x {height}")
                if still and getattr(image, "is_animated", False):
                    raise SampleError(_animated(image.format))
                if still and image.mode.startswith(("I", "F")):
                    _stop_if_clipped(image)
                if quick:
                    image.draft(image.mode, (max(1, width // 8), max(1, height // 8)))
                return ImageOps.exif_transpose(image).convert("RGB")
    except (SampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(f"too many pixels: {error}") from error
    except Exception as error:  # a broken file can make the decoders raise anything
        raise SampleError(f"unreadable image: {type(error).__name__}: {error}") from error


def _stop_if_clipped(image: Image.Image) -> None:
    """Pillow makes 8 bits of more by clipping: a picture of 16 bits would come out white."""
    low, high = image.getextrema()
    if float(low) < 0 or float(high) > 255:  # type: ignore[arg-type]
        raise SampleError(
            f"more than 8 bits: values from {low} to {high} (mode {image.mode}); scale them to 0 "
            "to 255 and save as 8 bits"
        )


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
        return _animated(name)
    return (
        f"not a JPEG: the file is {name}; `other_images: jpeg` turns such files into JPEG of "
        f"quality {_QUALITY}"
    )


def _animated(name: str | None) -> str:
    return f"animated image: {name}; save one frame as JPEG"
