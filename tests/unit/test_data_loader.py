"""The loader against independent readings: energon's own loader, tarfile, brute force."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_steps.core.errors import ConfigError, InputError, StepError
from llava_steps.data.energon.reader import SampleReader
from llava_steps.data.loader.loader import TrainLoader
from llava_steps.data.loader.order import SampleOrder
from tests.helpers.data_fixtures import (
    make_energon,
    make_hf_dir,
    sample_parts,
    train_loader,
    write_tar,
)

SAMPLES = 24


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_energon(tmp_path_factory.mktemp("ds") / "energon", SAMPLES, 7)


def ids(steps: list[list[Any]]) -> list[list[list[str]]]:
    return [[batch.sample_ids for batch in step] for step in steps]


def take(loader: TrainLoader, count: int) -> list[list[Any]]:
    return list(itertools.islice(loader, count))


def global_ids(
    dataset: Path, hf_dir: Path, dp: int, workers: int, steps: int, **options: Any
) -> list[list[str]]:
    """Ordered ids of each global batch, put together from all ranks by the documented rule."""
    ranks = []
    for rank in range(dp):
        one = train_loader(
            dataset, hf_dir, dp_rank=rank, dp_size=dp, num_workers=workers, **options
        )
        ranks.append(ids(take(one, steps)))
    merged = []
    for step in range(steps):
        micros = zip(*(rank[step] for rank in ranks), strict=True)
        merged.append([i for micro in micros for part in micro for i in part])
    return merged


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_each_epoch_is_a_permutation_and_epochs_differ(size: int) -> None:
    order = SampleOrder(size, 3, "digest")
    epochs = [[order[e * size + i] for i in range(size)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 3:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [SampleOrder(size, 4, "digest")[i] for i in range(size)]
        assert epochs[0] != [SampleOrder(size, 3, "other")[i] for i in range(size)]


def test_the_order_looks_random() -> None:
    """Every sample comes to every place about equally often (chi-square, 24 places)."""
    order, rounds = SampleOrder(24, 0, "x"), 2000
    counts = torch.zeros(24, 24)
    for epoch in range(rounds):
        for place in range(24):
            counts[place, order[epoch * 24 + place]] += 1
    expected = rounds / 24
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert 400 < chi2 < 680  # 529 degrees of freedom, standard deviation 33


def test_the_order_never_changes_between_versions() -> None:
    """A checkpoint of today must resume with the code of tomorrow."""
    assert [SampleOrder(10, 1234, "abc")[i] for i in range(12)] == FROZEN_ORDER


FROZEN_ORDER = [2, 6, 9, 0, 4, 8, 5, 3, 7, 1, 2, 9]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_one_epoch_has_every_sample_exactly_once(
    dataset: Path, hf_dir: Path, dp: int, workers: int
) -> None:
    steps = global_ids(dataset, hf_dir, dp, workers, SAMPLES // 8)
    assert sorted(i for step in steps for i in step) == sorted(f"id-{n}" for n in range(SAMPLES))
    assert steps == global_ids(dataset, hf_dir, 1, 0, SAMPLES // 8)


def test_energons_own_loader_reads_the_same_samples(dataset: Path) -> None:
    """Same keys and bytes as energon gives for the split, in its deterministic order."""
    from megatron.energon import WorkerConfig, get_savable_loader
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.crude import CrudeWebdataset

    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    factory = CrudeWebdataset(
        EPath(dataset), split_part="train", training=False, worker_config=config, decoder=None
    )
    theirs = {item["__key__"]: item for item in get_savable_loader(factory.build())}
    reader = SampleReader(dataset, "train")
    ours = {raw.key: raw.parts for raw in map(reader.raw, range(len(reader)))}
    assert set(theirs) == set(ours) == {f"{n:06d}" for n in range(SAMPLES)}
    for key, parts in ours.items():
        their_parts = {k: v for k, v in theirs[key].items() if not k.startswith("__")}
        assert parts == their_parts == sample_parts(int(key))


def test_indices_follow_tars_and_members(dataset: Path) -> None:
    expected = []
    for path in sorted(dataset.glob("*.tar")):
        with tarfile.open(path) as tar:
            expected += [m.name.split(".")[0] for m in tar if m.name.endswith(".json")]
    reader = SampleReader(dataset, "train")
    assert [reader.raw(i).key for i in range(len(reader))] == expected


@pytest.mark.parametrize(
    ("start", "dp", "workers"), [(8, 1, 0), (16, 2, 2), (40, 4, 1), (72, 1, 2)]
)
def test_resuming_anywhere_in_any_layout_continues_exactly(
    dataset: Path, hf_dir: Path, start: int, dp: int, workers: int
) -> None:
    whole = global_ids(dataset, hf_dir, 1, 0, start // 8 + 2)
    rest = global_ids(dataset, hf_dir, dp, workers, 2, start_samples=start)
    assert rest == whole[start // 8 :]


def test_state_counts_given_steps_and_a_second_iteration_goes_on(
    dataset: Path, hf_dir: Path
) -> None:
    one = train_loader(dataset, hf_dir)
    first = take(one, 2)
    assert one.state()["consumed_samples"] == 16
    json.dumps(one.state())
    second = take(one, 2)
    assert ids(first + second) == ids(take(train_loader(dataset, hf_dir), 4))


@pytest.mark.parametrize(
    ("change", "error"),
    [({"seed": 8}, ConfigError), ({"global_batch_size": 4}, ConfigError)],
)
def test_a_state_of_another_training_is_refused(
    dataset: Path, hf_dir: Path, change: dict[str, Any], error: type[StepError]
) -> None:
    state = train_loader(dataset, hf_dir).state()
    train_loader(dataset, hf_dir).check_state(state)
    with pytest.raises(error, match=next(iter(change))):
        train_loader(dataset, hf_dir, **change).check_state(state)


def test_a_state_of_another_dataset_is_refused(dataset: Path, hf_dir: Path, tmp_path: Path) -> None:
    other = make_energon(tmp_path / "other", SAMPLES, 8)
    with pytest.raises(InputError, match="dataset"):
        train_loader(other, hf_dir).check_state(train_loader(dataset, hf_dir).state())
    with pytest.raises(InputError, match="lacks"):
        train_loader(dataset, hf_dir).check_state({"seed": 7})


def test_microbatches_hold_their_samples_and_padding_apart(dataset: Path, hf_dir: Path) -> None:
    options: dict[str, Any] = {"micro_batch_size": 2, "num_workers": 2}
    plain = take(train_loader(dataset, hf_dir, **options), 3)
    padded = take(
        train_loader(dataset, hf_dir, pad_to_multiple=16, equal_lengths=True, **options), 3
    )
    single = take(train_loader(dataset, hf_dir), 3)
    image_token, pad_id = 3, 2
    for step, filled, ones in zip(plain, padded, single, strict=True):
        assert len({batch.tokens.shape[1] for batch in filled}) == 1
        assert [i for b in step for i in b.sample_ids] == [i for b in ones for i in b.sample_ids]
        for number, (batch, full) in enumerate(zip(step, filled, strict=True)):
            pair = ones[2 * number : 2 * number + 2]
            assert torch.equal(batch.tokens, torch.cat([b.tokens for b in pair], 1))
            assert torch.equal(batch.labels, torch.cat([b.labels for b in pair], 1))
            assert torch.equal(batch.position_ids, torch.cat([b.position_ids for b in pair], 1))
            lengths = [b.tokens.shape[1] for b in pair]
            assert batch.cu_seqlens.tolist() == [0, lengths[0], sum(lengths)]
            assert batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == max(lengths)
            assert batch.num_tokens == full.num_tokens == sum(lengths)
            assert batch.num_supervised == int((batch.labels != -100).sum())
            assert (batch.tokens == image_token).sum() == 16 * batch.num_images
            pixels = [b.pixel_values for b in pair if b.pixel_values is not None]
            assert (
                batch.pixel_values is None
                if not pixels
                else torch.equal(batch.pixel_values, torch.cat(pixels))
            )
            length = full.tokens.shape[1]
            assert length % 16 == 0 and full.cu_seqlens[-1] == length
            assert torch.equal(full.tokens[:, : sum(lengths)], batch.tokens)
            assert (full.tokens[:, sum(lengths) :] == pad_id).all()
            assert (full.labels[:, sum(lengths) :] == -100).all()
            gaps = full.cu_seqlens.diff().tolist()
            assert gaps[:2] == lengths and full.max_seqlen == max(gaps)
            assert full.position_ids.tolist()[0] == [i for g in gaps for i in range(g)]


def test_without_pixels_everything_else_is_the_same(dataset: Path, hf_dir: Path) -> None:
    for step, blind in zip(
        take(train_loader(dataset, hf_dir), 3),
        take(train_loader(dataset, hf_dir, need_pixels=False), 3),
        strict=True,
    ):  # fmt: skip
        for batch, other in zip(step, blind, strict=True):
            assert torch.equal(batch.tokens, other.tokens)
            assert batch.num_images == other.num_images and other.pixel_values is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_an_error_that_names_it(hf_dir: Path, tmp_path: Path, workers: int) -> None:
    from megatron.energon.flavors import BaseWebdatasetFactory

    samples = {f"{n:06d}": sample_parts(n) for n in range(3)}
    samples["000001"]["jpg"] = samples["000001"]["jpg"][:300]
    write_tar(
        tmp_path / "000000.tar",
        [(f"{k}.{part}", data) for k, parts in samples.items() for part, data in parts.items()],
    )
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path, ["000000.tar"], split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1
    )
    with pytest.raises(InputError, match=r"000000\.tar/000001.*image 0"):
        take(train_loader(tmp_path, hf_dir, global_batch_size=3, num_workers=workers), 1)


def test_too_long_a_sample_is_refused_by_name(dataset: Path, hf_dir: Path) -> None:
    with pytest.raises(InputError, match=r"\.tar/0000.*more than seq_length 20"):
        take(train_loader(dataset, hf_dir, seq_length=20), 3)
