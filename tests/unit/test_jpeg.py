"""The look at a JPEG's structure against Pillow's decoder."""

from __future__ import annotations

import random

import pytest

from llava_steps.data.samples import jpeg
from llava_steps.data.samples.decode import decode
from llava_steps.data.samples.sample import SampleError
from tests.benchmarks.fuzz_data import damaged, picture

PLAIN = {
    "usual": picture(), "grey": picture(mode="L"), "own tables": picture(optimize=True),
    "restarts": picture(restart_marker_rows=1), "4:2:0": picture(subsampling=2),
    "4:4:4": picture(subsampling=0), "long": picture(size=(17, 301)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_need_no_decoder(name: str) -> None:
    assert jpeg.simple(PLAIN[name]) == decode(PLAIN[name]).size


def test_what_is_not_plain_is_left_to_the_decoder() -> None:
    others = (
        picture(progressive=True), picture(mode="CMYK"), picture(exif=b"Exif\0\0MM"),
        picture("PNG"), b"", b"\xff\xd8", PLAIN["usual"] + b"\0", PLAIN["usual"][:-1],
    )  # fmt: skip
    assert [jpeg.simple(data) for data in others] == [None] * len(others)


@pytest.mark.parametrize("where", ["headers", "anywhere"])
def test_what_is_accepted_can_be_decoded(where: str) -> None:
    chance, accepted = random.Random(3), 0
    for _ in range(1500):
        data = chance.choice(list(PLAIN.values()))
        body = data.index(b"\xff\xda") + 14 if where == "headers" else len(data)
        data = damaged(data[:body], chance) + data[body:]
        size = jpeg.simple(data)
        if size is not None:
            accepted += 1
            assert decode(data).size == size
    assert accepted > 100


def test_sides_that_the_decoder_does_not_take() -> None:
    data = PLAIN["usual"]
    place = data.index(b"\xff\xc0") + 7
    for side, taken in ((65_500, True), (65_501, False)):
        changed = data[:place] + side.to_bytes(2) + data[place + 2 :]
        assert (jpeg.simple(changed) is not None) is taken
    with pytest.raises(SampleError):
        decode(changed)
