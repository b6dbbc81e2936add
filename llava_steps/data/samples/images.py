"""Encoded images to pixels, exactly as the image processor saved in the HF directory makes them.

The reference for opaque images is
`processor.image_processor(transformers.image_utils.load_image(file))`: decoded by Pillow, turned
upright by the EXIF orientation, made RGB, then the processor's own steps. For the CLIP and SigLIP
processors the same arithmetic runs here without the detours (one table look-up for rescale and
normalise); any other processor is called itself. Transparent pixels are composed onto white, as
the processor does with an image that still has them, or onto the colour saved with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.decode import MAX_PIXELS, WHITE, Color, decode
from llava_steps.data.samples.sample import SampleError

BACKGROUND = "transparency_background"
"""Key of the image processor that `hf_model.background` sets: red, green and blue."""
_KNOWN = ("CLIPImageProcessorPil", "SiglipImageProcessorPil")


class ImageReader:
    """Decodes images for an image processor of transformers, within one set of limits.

    An image costs what its pixels after the resize cost: a line of 3000 x 1 would become a million
    pixels wide where the processor resizes the shorter side.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.background = background(processor)

    def __call__(self, data: bytes) -> Image.Image:
        """Upright RGB image from a file's bytes.

        Raises:
            SampleError: it cannot be decoded, or is too large once it is resized.
        """
        return decode(data, self.background, self.check_size)

    def check_size(self, width: int, height: int) -> None:
        """Raise SampleError if an image of this size is too large once it is resized."""
        size = getattr(self._processor, "size", None)
        if not getattr(self._processor, "do_resize", False) or _size_kind(size) != "edge":
            return
        wide, high = _resized(size, width, height)
        if wide * high > MAX_PIXELS:
            raise SampleError(
                f"too many pixels after the resize (at most {MAX_PIXELS}): {width} x {height} "
                f"becomes {wide} x {high}; crop the image"
            )


class ImageTransform:
    """Turns encoded images into the model's pixel values.

    Args:
        processor: image processor of transformers with Pillow backend.

    Raises:
        ConfigError: the processor does not give all images the same size.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.read = ImageReader(processor)
        self.height, self.width = _output_size(processor)
        self._table = _table(processor) if _plain(processor) else None

    def __call__(self, images: Sequence[bytes]) -> torch.Tensor:
        """float32 [len(images), 3, height, width].

        Raises:
            SampleError: an image cannot be decoded; the message has its number.
        """
        out = self.empty(len(images))
        for number, data in enumerate(images):
            try:
                self.fill(out[number], data)
            except SampleError as error:
                raise SampleError(f"image {number}: {error}") from error
        return torch.from_numpy(out)

    def empty(self, images: int) -> npt.NDArray[np.float32]:
        """float32 [images, 3, height, width], undefined."""
        return np.empty((images, 3, self.height, self.width), dtype=np.float32)

    def fill(self, out: npt.NDArray[np.float32], data: bytes) -> None:
        """Write the pixel values of one encoded image to `out`, float32 [3, height, width].

        Raises:
            SampleError: it cannot be decoded.
        """
        self._fill(out, self.read(data))

    def _fill(self, out: npt.NDArray[np.float32], image: Image.Image) -> None:
        if self._table is None:
            out[...] = self._processor(image, return_tensors="np")["pixel_values"][0]
            return
        from transformers.image_transforms import center_crop

        processor = self._processor
        if processor.do_resize:
            size = _resized(processor.size, *image.size)
            image = image.resize(size, resample=processor.resample)
        pixels = np.moveaxis(np.asarray(image), -1, 0)
        if processor.do_center_crop:
            crop = (processor.crop_size.height, processor.crop_size.width)
            pixels = center_crop(
                pixels, size=crop, data_format="channels_first", input_data_format="channels_first"
            )
        for channel in range(3):
            np.take(self._table[channel], pixels[channel], out=out[channel])


def background(processor: Any) -> Color:
    """The colour that transparent pixels are composed onto.

    Raises:
        ConfigError: the key holds something else.
    """
    color = getattr(processor, BACKGROUND, WHITE)
    parts = color if isinstance(color, list | tuple) else ()
    if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
        raise ConfigError(
            f"the image processor's {BACKGROUND} is {ascii(color)[:60]}; give three numbers from 0 "
            "to 255, red, green and blue"
        )
    red, green, blue = parts
    return red, green, blue


def _plain(processor: Any) -> bool:
    """Whether the processor only resizes, crops, rescales and normalises as PilBackend does."""
    return (
        type(processor).__name__ in _KNOWN
        and bool(processor.do_convert_rgb and processor.do_rescale and processor.do_normalize)
        and not getattr(processor, "do_pad", None)
        and (not processor.do_resize or _size_kind(processor.size) is not None)
    )


def _size_kind(size: Any) -> str | None:
    if size is None:
        return None
    if size.shortest_edge and not size.longest_edge:
        return "edge"
    if size.height and size.width and not (size.max_height or size.shortest_edge):
        return "exact"
    return None


def _resized(size: Any, width: int, height: int) -> tuple[int, int]:
    """(width, height) after the processor's resize."""
    if _size_kind(size) == "exact":
        return size.width, size.height
    from transformers.image_transforms import get_resize_output_image_size

    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    high, wide = get_resize_output_image_size(
        shape, size=size.shortest_edge, default_to_square=False, input_data_format="channels_first"
    )
    return wide, high


def _table(processor: Any) -> npt.NDArray[np.float32]:
    """float32 [3, 256]: the normalised value of each byte, in the processor's own arithmetic."""
    levels = (np.arange(256).astype(np.float64) * processor.rescale_factor).astype(np.float32)
    mean = np.array(processor.image_mean, dtype=np.float32)[:, None]
    std = np.array(processor.image_std, dtype=np.float32)[:, None]
    table: npt.NDArray[np.float32] = (levels[None] - mean) / std
    return table


def _output_size(processor: Any) -> tuple[int, int]:
    """(height, width) that every image gets; found by asking the processor with odd shapes."""
    shapes = set()
    for size in ((64, 48), (31, 77)):
        pixels = processor(Image.new("RGB", size), return_tensors="np")["pixel_values"]
        shapes.add(np.asarray(pixels).shape[1:])
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ConfigError(
            f"the image processor {type(processor).__name__} gives images of different shapes "
            f"({sorted(shapes)}); a fixed size is needed: set size or crop_size in its config"
        )
    channels, height, width = next(iter(shapes))
    if channels != 3:
        raise ConfigError(f"the image processor gives {channels} channels, expected 3")
    return int(height), int(width)
