"""`prepare_energon` against `energon prepare` and energon's readers, and tars it misreads."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from llava_steps import prepare_energon, shard_tars
from llava_steps.core.errors import ConfigError, InputError, IntegrityError, StepError
from llava_steps.data.energon import metadata
from llava_steps.data.energon.reader import SampleReader
from llava_steps.data.energon.split import split
from llava_steps.prepare_energon import run
from llava_steps.settings.dataset import EnergonDataset, TarShards
from llava_steps.shard_tars import run as shard
from llava_steps.store import store
from llava_steps.store.run import execute
from tests.helpers.data_fixtures import fake_context, jpeg, members, sample_parts, write_tar

FIELDS = {"image": "jpg", "context": "json[question]", "answers": "txt"}


def energon(*arguments: str) -> str:
    """What energon's command line prints; it must end well."""
    from click.testing import CliRunner
    from megatron.energon.cli.main import main

    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return str(done.output)


def plain(number: int) -> dict[str, bytes]:
    """A sample in the seed's layout."""
    return {
        "jpg": jpeg(number),
        "json": json.dumps({"question": f"What is {number}?"}).encode(),
        "txt": f"It is {number}.".encode(),
    }


def users_tars(root: Path, tars: int, samples: int = 3) -> Path:
    root.mkdir(parents=True)
    for t in range(tars):
        numbers = range(t * samples, (t + 1) * samples)
        write_tar(root / f"{t:06d}.tar", members({f"{n:06d}": plain(n) for n in numbers}))
    return root


def our_tars(folder: Path, samples: int, per_tar: int) -> Path:
    """Tars with shards.json, from our own `shard_tars`."""
    folder.mkdir()
    records = []
    for number in range(samples):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        records.append(
            {
                "id": f"s{number}",
                "image": f"{number}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is {number}?"},
                    {"from": "gpt", "value": f"It is {number}."},
                ],
            }
        )
    source = folder / "train.json"
    source.write_text(json.dumps(records))
    out = folder / "tars"
    out.mkdir()
    config = TarShards(source=str(source), samples_per_shard=per_tar, workers=1)
    shard(fake_context(out, source=source), config)
    return out


def prepare(tars: Path, entry: Path, **options: Any) -> dict[str, Any]:
    entry.mkdir(exist_ok=True)
    config = EnergonDataset(tar_dir=str(tars), **({"workers": 1} | options))
    return dict(run(fake_context(entry, tar_dir=tars), config))


def rows(path: Path) -> list[list[tuple[Any, ...]]]:
    with sqlite3.connect(path) as db:
        return [
            sorted(db.execute("select * from samples")),
            sorted(db.execute("select * from sample_parts")),
            sorted(db.execute("select type, name, sql from sqlite_master")),
        ]


@pytest.mark.parametrize("ours", [True, False])
def test_everything_energon_writes_is_the_same(tmp_path: Path, ours: bool) -> None:
    """`energon prepare` on ten tars, 8,1,1, where its rounding is right too."""
    tars = our_tars(tmp_path / "raw", 30, 3) if ours else users_tars(tmp_path / "tars", 10)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in tars.glob("*.tar"):
        shutil.copy(path, theirs)
    energon(
        "prepare", str(theirs), "--non-interactive", "--no-progress", "--split-ratio", "8,1,1",
        "--sample-type", "VQASample", "--field-map", json.dumps(FIELDS), "--num-workers", "1",
    )  # fmt: skip
    metrics = prepare(tars, tmp_path / "ours", split=[8, 1, 1], workers=2)
    own = tmp_path / "ours"
    assert {p.name for p in theirs.rglob("*")} | {"shards.json"} == {p.name for p in own.rglob("*")}
    for path in theirs.rglob("*"):
        mine = own / path.relative_to(theirs)
        if path.name == "index.sqlite":
            assert rows(mine) == rows(path)
        elif path.is_file() and path.name != "index.uuid":
            assert mine.read_bytes() == path.read_bytes(), path.name
    assert metrics["samples"] == {"train": 24, "val": 3, "test": 3}
    for path in tars.glob("*.tar"):
        assert os.path.samefile(path, own / path.name)


def test_the_result_is_deterministic(tmp_path: Path) -> None:
    tars = our_tars(tmp_path / "raw", 7, 2)
    results = []
    for name, workers in (("a", 1), ("b", 2)):
        prepare(tars, tmp_path / name, workers=workers)
        root = tmp_path / name
        results.append(
            {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        )
    assert results[0] == results[1]
    assert (
        SampleReader(tmp_path / "a", "train").digest == SampleReader(tmp_path / "b", "train").digest
    )


def test_energon_info_and_lint_accept_it(tmp_path: Path) -> None:
    prepare(our_tars(tmp_path / "raw", 8, 2), tmp_path / "ds", split=[1, 1, 0])
    text = energon("info", str(tmp_path / "ds"))
    assert "8 samples" in text and "VQASample" in text and "`train`: 50" in text
    assert "Skipping empty split part test" in energon("lint", str(tmp_path / "ds"))


def test_energon_trains_on_it(tmp_path: Path) -> None:
    """`get_train_dataset` reads question, answer and image of every sample."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_train_dataset
    from megatron.energon.savable_loader import SavableDataLoader

    prepare(our_tars(tmp_path / "raw", 6, 2), tmp_path / "ds", split=[1, 0, 0])
    dataset = get_train_dataset(
        tmp_path / "ds", batch_size=1, shuffle_buffer_size=None, max_samples_per_sequence=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=DefaultTaskEncoder(), repeat=False,
    )  # fmt: skip
    read = {
        (batch.context[0], str(batch.answers[0]), tuple(batch.image.shape[1:]))
        for batch in SavableDataLoader(dataset)
    }
    assert read == {(f"What is {n}?", f"It is {n}.", (3, 36, 40)) for n in range(6)}


def test_the_two_steps_give_a_sealed_dataset_that_energon_reads_where_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, without a prompt; `results/` shows links into the store."""
    from megatron.energon import DefaultTaskEncoder, VQASample, WorkerConfig, get_train_dataset
    from megatron.energon.savable_loader import SavableDataLoader

    monkeypatch.chdir(tmp_path)
    our_tars(tmp_path / "raw", 5, 2)
    monkeypatch.setattr(sys, "stdin", None)
    source = ["--source=raw/train.json", "--samples-per-shard=2", "--save-dir=r/tar_shards"]
    assert execute(shard_tars.STEP, source) == 0
    flags = ["--tar-dir=r/tar_shards", "--split=9,1,0", "--save-dir=r/energon_dataset"]
    assert execute(prepare_energon.STEP, flags) == 0
    shown = tmp_path / "r/energon_dataset"
    manifest = store.read_manifest(shown)
    assert manifest is not None
    store.check(shown, manifest)
    assert manifest["metrics"]["samples"] == {"train": 5, "val": 0, "test": 0}
    assert "5 samples" in energon("info", str(shown))
    assert "What is 0?" in energon("preview", str(shown), "--split-parts", "train")
    seen: list[VQASample] = []

    class Look(DefaultTaskEncoder):  # type: ignore[misc, type-arg, unused-ignore]
        def encode_sample(self, sample: VQASample) -> VQASample:
            seen.append(sample)
            return sample

    dataset = get_train_dataset(
        shown, batch_size=1, shuffle_buffer_size=None, max_samples_per_sequence=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Look(), repeat=False,
    )  # fmt: skip
    assert len(list(SavableDataLoader(dataset))) == 5
    assert {type(sample) for sample in seen} == {VQASample}
    assert {(s.context, s.answers) for s in seen} == {
        (f"What is {n}?", f"It is {n}.") for n in range(5)
    }


@pytest.mark.parametrize(
    ("tars", "ratio", "expected"),
    [
        (1, [9, 1, 0], [1, 0, 0]),
        (3, [9, 1, 0], [3, 0, 0]),
        (10, [9, 1, 0], [9, 1, 0]),
        (10, [7, 2, 1], [7, 2, 1]),
        (4, [1, 1, 0], [2, 2, 0]),
        (3, [1, 1, 1], [1, 1, 1]),
        (2, [1, 1, 1], [1, 1, 0]),
        (1, [1, 9, 0], [1, 0, 0]),
        (2, [1, 99, 0], [1, 1, 0]),
        (1000, [98, 1, 1], [980, 10, 10]),
    ],
)
def test_splits_assign_every_tar(tars: int, ratio: list[int], expected: list[int]) -> None:
    names = [f"{n}.tar" for n in range(tars)]
    parts = split(names, ratio)
    assert [len(parts[p]) for p in ("train", "val", "test")] == expected
    assert parts["train"] + parts["val"] + parts["test"] == names


@pytest.mark.parametrize("ratio", [[0, 0, 0], [0, 1, 0]])
def test_a_split_without_training_data_is_refused(ratio: list[int]) -> None:
    with pytest.raises(ConfigError, match="train above 0"):
        split(["a.tar"], ratio)


def edit(change: str, root: Path) -> None:
    """Damage the second of three user tars in a way that energon passes over in silence."""
    path = root / "000001.tar"
    samples = {f"{n:06d}": plain(n) for n in range(3, 6)}
    data = path.read_bytes()
    if change == "garbage header":
        with tarfile.open(path) as tar:
            offset = tar.getmembers()[4].offset
        path.write_bytes(data[:offset] + b"\x07" * 512 + data[offset + 512 :])
    elif change == "cut at a member":
        with tarfile.open(path) as tar:
            path.write_bytes(data[: tar.getmembers()[6].offset])
    elif change == "cut in a member":
        path.write_bytes(data[: len(data) // 2])
    elif change == "no samples":
        write_tar(path, [])
    else:
        if change == "dot in a key":
            samples = {f"v1.{n}": parts for n, parts in enumerate(samples.values())}
        elif change == "key in another tar":
            samples["000000"] = plain(0)
        elif change == "no txt":
            del samples["000004"]["txt"]
        elif change == "no question":
            samples["000004"]["json"] = b'{"answer": "x"}'
        elif change == "bad json":
            samples["000004"]["json"] = b'{"question": '
        elif change == "truncated image":
            samples["000004"]["jpg"] = samples["000004"]["jpg"][:300]
        elif change == "missing second image":
            samples["000004"]["2.jpg"] = jpeg(0)
        elements = members(samples)
        if change == "same key twice in a row":
            elements[3:3] = elements[:3]
        elif change == "parts apart":
            elements.append(elements.pop(0))
        elif change == "no key":
            elements.append(("README", b"x"))
        elif change == "path outside":
            elements.append(("../000009.txt", b"x"))
        write_tar(path, elements)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("garbage header", "no valid header"),
        ("cut at a member", "no end-of-archive mark"),
        ("cut in a member", "cut off"),
        ("no samples", "no samples"),
        ("dot in a key", "dot"),
        ("key in another tar", "'000000' is in another tar"),
        ("same key twice in a row", "twice in a row"),
        ("parts apart", "are not adjacent"),
        ("no key", "belongs to no sample"),
        ("path outside", "points outside"),
        ("no txt", "000004: missing answer"),
        ("no question", "000004: missing question"),
        ("bad json", "000004: not JSON"),
        ("truncated image", "000004: unreadable image"),
        ("missing second image", "000004: missing image"),
    ],
)
def test_tars_that_energon_misreads_are_refused(tmp_path: Path, change: str, reason: str) -> None:
    root = users_tars(tmp_path / "tars", 3)
    edit(change, root)
    workers = 2 if change == "bad json" else 1  # an error of a worker arrives with its type
    with pytest.raises(InputError, match=reason) as caught:
        prepare(root, tmp_path / "ds", workers=workers)
    assert "000001.tar" in str(caught.value)


@pytest.mark.parametrize("change", ["byte", "removed", "added", "list"])
def test_tars_that_differ_from_their_list_are_an_integrity_error(
    tmp_path: Path, change: str
) -> None:
    tars = our_tars(tmp_path / "raw", 6, 2)
    path = tars / "000001.tar"
    if change == "byte":
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    elif change == "removed":
        path.unlink()
    elif change == "added":
        write_tar(tars / "000003.tar", members({"9": plain(9)}))
    else:
        (tars / "shards.json").write_text('{"shards": [{}]}')
    with pytest.raises(IntegrityError, match=r"000001|000003|shards\.json"):
        prepare(tars, tmp_path / "ds")


def test_a_field_map_says_where_question_and_answer_are(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    meta = json.dumps({"q": {"en": "What?"}, "a": ["Seven."]}).encode()
    write_tar(tars / "0.tar", members({"1": {"png": jpeg(1), "json": meta}}))
    fields = {"image": "jpg,png", "context": "json[q][en]", "answers": "txt,json[a][0]"}
    prepare(tars, tmp_path / "ds", field_map=fields)
    sample = SampleReader(tmp_path / "ds", "train")[0]
    assert [t.content for t in sample.turns] == ["<image>\nWhat?", "Seven."]
    assert sample.images == (jpeg(1),) and sample.id == "1"
    for bad in ({"image": "jpg"}, {**fields, "image": "json[x]"}, {**fields, "context": "json[["}):
        with pytest.raises(ConfigError, match="field_map"):
            prepare(tars, tmp_path / "ds2", field_map=bad)


def test_leftovers_of_a_killed_attempt_do_no_harm(tmp_path: Path) -> None:
    tars = our_tars(tmp_path / "raw", 6, 2)
    prepare(tars, tmp_path / "clean")
    prepare(tars, tmp_path / "again")
    (tmp_path / "again" / ".nv-meta" / "evil.py").write_text("x")
    (tmp_path / "again" / ".tmp-000001.tar").write_bytes(b"x")
    prepare(tars, tmp_path / "again")
    for path in (tmp_path / "clean").rglob("*"):
        if path.is_file():
            other = tmp_path / "again" / path.relative_to(tmp_path / "clean")
            assert other.read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "clean").rglob("*"))) == len(list((tmp_path / "again").rglob("*")))


def test_tars_are_copied_where_links_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    tars = our_tars(tmp_path / "raw", 4, 2)
    prepare(tars, tmp_path / "ds")
    for path in tars.glob("*.tar"):
        assert (tmp_path / "ds" / path.name).read_bytes() == path.read_bytes()
        assert not os.path.samefile(path, tmp_path / "ds" / path.name)


MANY = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 30))
"""Few lines of YAML, 8 ** 29 leaves: each line names the one before eight times."""


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("dataset.yaml", "__module__: os\n__function__: system\n", "__module__"),
        ("dataset.yaml", "__module__: megatron.energon\n__class__: WorkerConfig\n", "__class__"),
        ("dataset.yaml", "sample_loader: sample_loader.py:sample_loader\n", "sample_loader"),
        ("dataset.yaml", "a: [{b: {__function__: system}}]\n", r"a\[0\]\.b\.__function__"),
        ("dataset.yaml", "a: !!python/object/apply:os.system ['x']\n", "cannot be read"),
        ("split.yaml", "__module__: x\nsplit_parts: {train: [000000.tar]}\n", "__module__"),
        ("sample_loader.py", "import os\n", "Python code"),
        ("LOADER.PY", "import os\n", "Python code"),
        ("dataset.yaml", f"a0: &a0 [x]\n{MANY}__module__: *a29\n", "__module__"),
        ("dataset.yaml", "a: &a [*a, {__function__: system}]\n", r"a\[1\]\.__function__"),
        ("dataset.yaml", "__class__: [VQASample]\n", "__class__"),
        ("dataset.yaml", "- a\n", "keys and values"),
        ("dataset.yaml", "field_map: [a]\n", "field_map"),
        ("dataset.yaml", "field_map: {image: 5}\n", "field_map"),
        ("split.yaml", "split_parts: {train: [1]}\n", "list of names"),
        ("split.yaml", "split_parts: {train: 000000.tar}\n", "list of names"),
        ("split.yaml", "split_parts: {train: ['{1..9999999}.tar']}\n", "more than"),
        ("split.yaml", f"split_parts: {{train: ['{'{a,b}' * 40}.tar']}}\n", "more than"),
        ("split.yaml", "split_parts: {train: ['{a.tar']}\n", "nbalanced"),
        ("split.yaml", "split_parts: {train: [000000.tar]}\nexclude: 5\n", "exclude"),
        (".info.json", '{"shard_counts": {"../../x.tar": 1}}', "outside the dataset"),
        (".info.json", '{"shard_counts": {"/x.tar": 1}}', "outside the dataset"),
        (".info.json", '{"shard_counts": {"9.tar": 1}}', "missing"),
        (".info.json", '{"shard_counts": []}', "shard_counts"),
        (".info.json", "{", "cannot be read"),
        ("split.yaml", "split_parts: {train: [7.tar]}\n", "unknown tars"),
        ("split.yaml", "split_parts: {train: [000000.tar, '00000{0,0}.tar']}\n", "more than once"),
        ("split.yaml", "split_parts: {train: []}\n", "empty"),
        ("split.yaml", "split_parts: {val: [000000.tar]}\n", "no split 'train'"),
        ("split.yaml", "split_parts: {train: [000000.tar]}\nexclude: [000000.tar/1]\n", "single"),
    ],
)
def test_hostile_or_broken_metadata_is_refused_and_never_run(
    tmp_path: Path, file: str, text: str, reason: str
) -> None:
    prepare(our_tars(tmp_path / "raw", 2, 2), tmp_path / "ds")
    SampleReader(tmp_path / "ds", "train")
    (tmp_path / "ds" / ".nv-meta" / file).write_text(text)
    with pytest.raises(StepError, match=reason):
        SampleReader(tmp_path / "ds", "train")


@pytest.mark.parametrize(
    "pattern",
    ["a.tar", "{0..9}.tar", "{09..100}", "{b..e}{,x}", "{a{1..3},b,c{x,{y,z}}}.tar", r"{a\,b,c}",
     "{a}", "{}", "a,b", "{3..-2}", "{1..2}{1..3}/{a,b}.tar"],
)  # fmt: skip
def test_patterns_are_counted_before_they_are_written_out(pattern: str) -> None:
    from braceexpand import braceexpand

    assert metadata.count_names(pattern) == len(list(braceexpand(pattern)))


def test_broken_lists_of_tars_and_missing_indices_are_input_errors(tmp_path: Path) -> None:
    prepare(our_tars(tmp_path / "raw", 2, 2), tmp_path / "ds")
    for text in ("[]", "{", '{"shards": [5]}', '{"shards": [{"name": "000000.tar"}]}'):
        (tmp_path / "ds" / "shards.json").write_text(text)
        with pytest.raises(InputError, match=r"shards\.json cannot be read"):
            _ = SampleReader(tmp_path / "ds", "train").digest
    (tmp_path / "ds" / "shards.json").unlink()
    (tmp_path / "ds" / "000000.tar.idx").unlink()
    with pytest.raises(InputError, match="prepare the dataset again"):
        _ = SampleReader(tmp_path / "ds", "train").digest


def test_a_directory_that_is_no_dataset_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prepare_energon"):
        SampleReader(tmp_path, "train")
    with pytest.raises(InputError, match=r"no \.tar files"):
        prepare(tmp_path, tmp_path / "ds")


def test_an_index_that_disagrees_with_its_tar_is_an_input_error(tmp_path: Path) -> None:
    prepare(our_tars(tmp_path / "raw", 3, 3), tmp_path / "ds")
    index = tmp_path / "ds" / "000000.tar.idx"
    data = index.read_bytes()
    for wrong in (data[:-8], data[8:] + data[:8], bytes(len(data))):
        index.write_bytes(wrong)
        reader = SampleReader(tmp_path / "ds", "train")
        for number in range(3):
            with pytest.raises(InputError, match="cannot be read"):
                reader.raw(number)


def test_datasets_prepared_by_energon_itself_can_be_read(tmp_path: Path) -> None:
    """Mixed samples of other tests, read back as they were written."""
    from tests.helpers.data_fixtures import make_energon

    reader = SampleReader(make_energon(tmp_path / "ds", 10, 4), "train")
    assert [reader[n].id for n in range(10)] == [f"id-{n}" for n in range(10)]
    assert all(reader.raw(n).parts == sample_parts(n) for n in range(10))


def test_a_prepared_dataset_is_used_in_place_and_not_touched(tmp_path: Path) -> None:
    """Made by energon itself, without shards.json, on a read-only file system for all we know."""
    from tests.helpers.data_fixtures import make_energon

    root = make_energon(tmp_path / "ds", 6, 3)

    def state() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in (root, *root.rglob("*"))
        }

    before = state()
    reader = SampleReader(root, "train")
    assert len([reader[n] for n in range(6)]) == 6 and reader.digest
    assert state() == before
