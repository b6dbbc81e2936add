"""Packing: rows against their definition, packed microbatches against unpacked ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_steps.data.loader.batch import image_share
from llava_steps.data.loader.corpus import Corpus
from llava_steps.data.loader.packing import pack
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.settings.stage.stage import Stage
from tests.helpers.data_fixtures import jpeg, make_energon, make_hf_dir, train_loader

CAPACITY = 120


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    capacity = draw(st.integers(1, 60))
    ranks = draw(st.integers(1, 5))
    count = ranks * draw(st.integers(1, 12))
    return draw(st.lists(st.integers(1, capacity), min_size=count, max_size=count)), capacity, ranks


@settings(max_examples=300, deadline=None)
@given(batches())
def test_rows_hold_every_sample_once_within_the_budget(batch: tuple[list[int], int, int]) -> None:
    lengths, capacity, ranks = batch
    rows = pack(lengths, capacity, ranks)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(rows) and len(rows) % ranks == 0 and rows == sorted(rows)
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert all(row == sorted(row) for row in rows) and max(loads) <= capacity
    # Johnson's bound for best fit decreasing, 11/9 of the optimum and at most one more bin.
    needed = -(-sum(lengths) // capacity)
    large = sum(2 * length > capacity for length in lengths)
    assert len(rows) < 2 * max(needed, large) + ranks + 1
    assert pack(lengths, capacity, ranks) == rows


def test_what_cannot_be_packed_is_refused() -> None:
    for lengths, capacity, ranks in (([3, 4], 3, 1), ([0, 1], 3, 1), ([1] * 3, 3, 2), ([], 3, 1)):
        with pytest.raises(ValueError, match=r"lengths from|cannot be shared"):
            pack(lengths, capacity, ranks)


def test_a_plan_worked_out_by_hand() -> None:
    """9, 8, 7 and 4 open four rows; 4 goes to the 4, 3 to the 7, 2 to the 8, 1 to the 4 + 4."""
    assert pack([7, 3, 9, 4, 4, 2, 8, 1], 12, 2) == [[0, 1], [2], [3, 4, 7], [5, 6]]
    # Emptiest first would end with a row of 5 + 3 + 3; fullest first fills three to the brim.
    assert pack([5, 5, 4, 4, 3, 3, 3], 9, 1) == [[0, 2], [1, 3], [4, 5, 6]]


@pytest.mark.parametrize(("images", "parts"), [(0, 2), (1, 2), (5, 2), (6, 4), (2, 4), (7, 1)])
def test_parts_of_the_images_are_all_of_them_in_order(images: int, parts: int) -> None:
    shares = [image_share(images, part, parts) for part in range(parts)]
    assert list(itertools.chain(*shares)) == list(range(images))
    size = -(-images // parts)
    assert all(share.start == min(n * size, images) for n, share in enumerate(shares))


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_energon(tmp_path_factory.mktemp("ds") / "energon", 24, 7)


def steps(dataset: Path, hf_dir: Path, count: int = 3, **options: Any) -> list[list[Any]]:
    loader = train_loader(dataset, hf_dir, **({"seq_length": CAPACITY} | options))
    return list(itertools.islice(loader, count))


def test_lengths_are_those_of_the_encoded_samples(dataset: Path, hf_dir: Path) -> None:
    corpus, encoder = Corpus(dataset, "train", 7), ConversationEncoder(hf_dir, 512)
    for position in range(24):
        place = corpus[position]
        whole = corpus.parse(place, corpus.raw(place))
        text = corpus.parse(place, corpus.raw(place, images=False))
        assert whole.turns == text.turns and len(whole.images) == len(text.images)
        assert not any(text.images), "no byte of an image was read"
        assert encoder.length(text.turns) == len(encoder.encode(whole.turns).tokens)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dp", [1, 2])
def test_packed_rows_hold_the_samples_of_unpacked_ones(
    dataset: Path, hf_dir: Path, dp: int, workers: int
) -> None:
    """Tokens, labels, positions and pixels of each sample are the same in either form."""
    singles = [{b.sample_ids[0]: b for b in step} for step in steps(dataset, hf_dir)]
    ranks = [
        steps(dataset, hf_dir, packing=True, dp_rank=r, dp_size=dp, num_workers=workers)
        for r in range(dp)
    ]
    for number, single in enumerate(singles):
        rows = [row for rank in ranks for row in rank[number]]
        assert len({len(rank[number]) for rank in ranks}) == 1
        assert len(rows) < len(single), "several samples share a row"
        order = {p: i for row in rows for p, i in zip(row.slots, row.sample_ids, strict=True)}
        assert [order[p] for p in range(8)] == list(single), "the places are those of the batch"
        for row in rows:
            borders = row.cu_seqlens.tolist()
            assert borders[-1] == row.tokens.shape[1] == row.num_tokens <= CAPACITY
            assert row.max_seqlen == max(row.cu_seqlens.diff().tolist())
            images = 0
            for sample, (start, end) in zip(
                row.sample_ids, itertools.pairwise(borders), strict=True
            ):
                one = single[sample]
                assert torch.equal(row.tokens[:, start:end], one.tokens)
                assert torch.equal(row.labels[:, start:end], one.labels)
                assert torch.equal(row.position_ids[:, start:end], one.position_ids)
                if one.num_images:
                    part = row.pixel_values[images : images + one.num_images]
                    assert torch.equal(part, one.pixel_values)
                images += one.num_images
            assert row.num_images == images
            assert row.num_supervised == sum(single[i].num_supervised for i in row.sample_ids)
            assert row.datasets == ["energon"] * len(row.sample_ids)


def two_rounds(number: int) -> dict[str, bytes]:
    """Two questions with an image each."""
    turns = [
        {"role": "user", "content": "<image>\nWhat digit is this?"},
        {"role": "assistant", "content": f"It is a {number}."},
        {"role": "user", "content": "<image>\nAnd this?"},
        {"role": "assistant", "content": f"Another {number}."},
    ]
    meta = {"question": "What digit is this?", "conversations": turns}
    return {
        "jpg": jpeg(number), "1.jpg": jpeg(100 + number), "txt": b"It is.",
        "json": json.dumps(meta).encode(),
    }  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_images_of_rounds_that_are_cut_are_cut_too(
    hf_dir: Path, tmp_path: Path, packing: bool
) -> None:
    root = make_energon(tmp_path / "set", 8, 8, two_rounds)
    options: dict[str, Any] = {"packing": packing, "pack_length": 3 * CAPACITY * packing}
    whole = [row for step in steps(root, hf_dir, 1, **options) for row in step]
    cut = [
        row for s in steps(root, hf_dir, 1, seq_length=60, truncate=True, **options) for row in s
    ]
    assert [sum(row.num_images for row in rows) for rows in (whole, cut)] == [16, 8]
    pixels = [torch.cat([row.pixel_values for row in rows]) for rows in (whole, cut)]
    firsts = {image.numpy().tobytes() for image in pixels[0]}
    assert len(pixels[1]) == 8 and all(p.numpy().tobytes() in firsts for p in pixels[1])
    assert all(max(row.cu_seqlens.diff().tolist()) <= 60 for row in cut)
    assert sum((row.labels != -100).sum() for row in cut) == sum(row.num_supervised for row in cut)


def test_budget_padding_gives_rows_of_one_length(dataset: Path, hf_dir: Path) -> None:
    for step in steps(dataset, hf_dir, packing=True, pad_to="budget", pack_length=130,
                      pad_to_multiple=8):  # fmt: skip
        assert {row.tokens.shape[1] for row in step} == {136}
        assert all(row.cu_seqlens[-1] == 136 for row in step)


def test_each_rank_decodes_its_part_of_the_images(dataset: Path, hf_dir: Path) -> None:
    whole = steps(dataset, hf_dir, packing=True)
    parts = [
        steps(dataset, hf_dir, packing=True, image_part=n, image_parts=2, num_workers=n)
        for n in range(2)
    ]
    for rows in zip(*(itertools.chain(*s) for s in (whole, *parts)), strict=True):
        assert len({row.num_images for row in rows}) == 1
        if not rows[0].num_images:
            assert all(row.pixel_values is None for row in rows)
            continue
        together = torch.cat([row.pixel_values for row in rows[1:]])
        assert torch.equal(together, rows[0].pixel_values)
        assert len(rows[1].pixel_values) == -(-rows[0].num_images // 2)


def test_invalid_combinations_are_refused() -> None:
    base = {"global_batch_size": 2, "packing": True}
    Stage.model_validate(base)
    for change, words in (
        ({"micro_batch_size": 2}, "packing fills each microbatch.*micro_batch_size to 1, not 2"),
        ({"pack_length": 119, "seq_length": 120}, "pack_length 119 is below seq_length 120"),
        ({"packing": False, "pack_length": 4096}, "pack_length and pad_to need packing"),
        ({"packing": False, "pad_to": "budget"}, "pack_length and pad_to need packing"),
    ):
        with pytest.raises(ValueError, match=words):
            Stage.model_validate(base | change)
    json.dumps(base)
