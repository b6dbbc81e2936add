"""Blends: exact epochs, exact proportions, one sequence for every layout, and nothing executed."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_steps.core.apportion import largest_remainder
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.loader.corpus import Corpus
from llava_steps.data.loader.loader import TrainLoader
from llava_steps.data.loader.order import EpochOrder, SampleOrder, WeightedOrder
from llava_steps.settings.blend import read_blend
from llava_steps.settings.stage.stage import Stage
from tests.helpers.data_fixtures import TEMPLATE, make_energon, make_hf_dir, train_loader

HEAD = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
SIZES = {"one": 12, "two": 20, "three": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets side by side."""
    root = tmp_path_factory.mktemp("blend")
    for name, size in SIZES.items():
        make_energon(root / name, size, 7)
    return root


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


def write(root: Path, name: str, train: dict[str, Any], **head: Any) -> Path:
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**HEAD, "splits": {"train": train}, **head}))
    return path


def epochs(root: Path, **repetitions: int) -> Path:
    items = [{"path": name, "repetitions": count} for name, count in repetitions.items()]
    return write(
        root, "epochs-" + "-".join(map(str, repetitions.values())), {"blend_epochized": items}
    )


@pytest.mark.parametrize(("dp", "workers"), [*itertools.product((1, 2, 4), (0, 2))])
@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_of_three_datasets_has_each_sample_as_often_as_asked(
    root: Path, hf_dir: Path, dp: int, workers: int, packing: bool
) -> None:
    path = epochs(root, one=2, two=1, three=1)
    size = 8
    steps = (2 * 12 + 20 + 8) // size + 1
    given: list[dict[int, tuple[str, str]]] = [{} for _ in range(steps)]
    for rank in range(dp):
        loader = train_loader(
            path,
            hf_dir,
            global_batch_size=size,
            dp_rank=rank,
            dp_size=dp,
            seed=3,
            num_workers=workers,
            need_pixels=False,
            packing=packing,
        )
        for step, rows in zip(given, loader, strict=False):
            for row in rows:
                for at, name, key in zip(row.slots, row.datasets, row.sample_ids, strict=True):
                    assert at not in step
                    step[at] = (name, key)
    assert all(sorted(step) == list(range(size)) for step in given)
    seen = [step[at] for step in given for at in range(size)]
    assert Counter(seen[:52]) == {
        (name, f"id-{n}"): 2 if name == "one" else 1 for name in SIZES for n in range(SIZES[name])
    }
    corpus = Corpus(path, "train", 3)
    places = [corpus[n] for n in range(size * steps)]
    assert seen == [(list(SIZES)[p.dataset], f"id-{p.index}") for p in places]


def test_one_dataset_keeps_the_order_it_has_alone(root: Path) -> None:
    alone, corpus = SampleOrder(12, 5, "d"), EpochOrder([12], [1], 5, "d")
    assert [corpus[n] for n in range(40)] == [(0, alone[n]) for n in range(40)]
    single = write(root, "single", {"path": "one"})
    assert Corpus(single, "train", 5).digest == Corpus(root / "one", "train", 5).digest


def test_weights_hold_exactly_in_every_block_and_each_dataset_has_its_own_epochs() -> None:
    order = WeightedOrder([7, 50, 3], [0.2, 3, 0.8], 1, "digest", block=40)
    assert order.counts == [2, 30, 8]
    given = [order[n] for n in range(40 * 50)]
    for start in range(0, len(given), 40):
        assert Counter(d for d, _ in given[start : start + 40]) == {0: 2, 1: 30, 2: 8}
    for dataset, size in enumerate((7, 50, 3)):
        own = [index for d, index in given if d == dataset]
        counts = Counter(own)
        assert max(counts.values()) - min(counts[i] for i in range(size)) <= 1
    assert given[:40] != given[40:80], "blocks are permuted anew"
    assert [
        WeightedOrder([7, 50, 3], [0.2, 3, 0.8], 2, "digest", 40)[n] for n in range(40)
    ] != given[:40]


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.1, 0.7], [5], [1e-3, 2, 3, 9.5], [3, 3, 2, 2]])
@pytest.mark.parametrize("total", [1, 7, 100, 10_000])
def test_largest_remainder(weights: list[float], total: int) -> None:
    counts = largest_remainder(weights, total)
    assert sum(counts) == total
    whole = sum(map(Fraction, weights))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(weight) / whole * total) < 1


def test_weights_are_floats_of_yaml_1_2(root: Path) -> None:
    items = [{"path": "one", "weight": 25.0}, {"path": "two", "weight": 2.0}]
    path = write(root, "floats", {"blend": items})
    path.write_text(path.read_text().replace("25.0", "2.5e1").replace("2.0", "2e-5"))
    assert [member.weight for member in read_blend(path, "train").members] == [25.0, 2e-5]


def test_energon_reads_the_same_file(root: Path) -> None:
    """What we accept is energon's own form: it finds the same datasets, splits and options."""
    from megatron.energon.dataset_config import load_config
    from megatron.energon.epathlib import EPath
    from megatron.energon.metadataset.metadataset_v2 import MetadatasetV2

    items = [
        {"path": "one", "weight": 2.5, "subflavors": {"name": "first", "max_turns": 2}},
        {"path": str(root / "two"), "weight": 1, "split_part": "train"},
    ]
    path = write(root, "energon", {"blend": items})
    theirs = load_config(
        EPath(path), default_type=MetadatasetV2, default_kwargs={"path": EPath(path)}
    )
    found = theirs.traverse(split_part="train")
    ours = read_blend(path, "train")
    assert ours.by == "weights" and [m.weight for m in ours.members] == [2.5, 1.0]
    assert [str(f.path) for f in found] == [str(m.path) for m in ours.members]
    assert [f.split_part for f in found] == [m.split for m in ours.members]
    assert found[0].subflavors == {"name": "first", "max_turns": 2}
    assert ours.members[0].name == "first" and ours.members[0].max_turns == 2
    assert ours.members[1].name == str(root / "two")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"__class__": "Metadataset"}, "__class__ is 'Metadataset'"),
    "code": ({"__module__": "os"}, "__module__ is 'os'"),
    "another key": ({"aux": {}}, "aux is not supported"),
    "no train": ({"splits": {"val": {"path": "one"}}}, "splits has no 'train'"),
    "join": ({"splits": {"train": {"join": []}}}, r"splits\.train\.join is not supported"),
    "both": (
        {"splits": {"train": {"blend": [{"path": "one"}], "blend_epochized": []}}},
        r"splits\.train\.blend_epochized is not supported",
    ),
    "empty": ({"splits": {"train": {"blend": []}}}, "must be a list of datasets"),
}
ITEMS: dict[str, tuple[dict[str, Any], str]] = {
    "function": ({"__function__": "system"}, r"blend\[0\]\.__function__ is not supported"),
    "subset": ({"subset": {"range": ["0%", "50%"]}}, r"blend\[0\]\.subset is not supported"),
    "repetitions": ({"repetitions": 2}, r"blend\[0\]\.repetitions is not supported"),
    "weight 0": ({"weight": 0}, r"weight is 0; expected a number above 0"),
    "weight nan": ({"weight": float("nan")}, "weight is nan"),
    "weight text": ({"weight": "1"}, "weight is '1'"),
    "weight true": ({"weight": True}, "weight is True"),
    "tiny": ({"weight": 1e-9}, "gets none of 10000 samples"),
    "missing": ({"path": "nowhere"}, "is not a directory"),
    "nested": ({"path": "other.yaml"}, "is not a directory; blends of blends"),
    "no path": ({"path": None}, "path is None; expected text"),
    "flavor": ({"subflavors": {"crop": True}}, r"subflavors\.crop is not supported"),
    "augment": ({"subflavors": {"augment": True}}, r"subflavors\.augment is True; expected false"),
    "long path": ({"path": "x" * 5000}, "is not a directory"),
    "turns": ({"subflavors": {"max_turns": 0}}, "max_turns is 0; expected a whole number above 0"),
    "template": ({"subflavors": {"chat_template": "no.jinja"}}, "no.jinja is not a file"),
    "twice": ({"path": "two"}, r"\['two'\] given twice"),
    "split": ({"split_part": "dev"}, "has no split 'dev'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(root: Path, case: str) -> None:
    change, words = REFUSED[case]
    path = write(root, f"refused-{case}", {"path": "one"}, **change)
    with pytest.raises(ConfigError, match=words) as caught:
        read_blend(path, "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", ITEMS)
def test_an_entry_that_is_not_understood_is_refused_by_name(root: Path, case: str) -> None:
    change, words = ITEMS[case]
    items = [{"path": "one", "weight": 1.0, **change}, {"path": "two"}]
    path = write(root, f"item-{case}", {"blend": items})
    with pytest.raises(ConfigError, match=words):
        Corpus(path, "train", 1)


def test_a_file_that_is_no_yaml_or_wants_objects_is_refused(root: Path) -> None:
    path = root / "broken.yaml"
    for text in ("splits: [", "!!python/object/apply:os.system ['true']", "\x00"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"broken\.yaml cannot be read"):
            read_blend(path, "train")
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="the top level must be keys"):
        read_blend(path, "train")


def test_options_of_a_dataset(root: Path, hf_dir: Path) -> None:
    (root / "short.jinja").write_text(
        TEMPLATE.replace("<|{{ m.role }}|>", "{{ m.role }}:").replace("<|assistant|>", "assistant:")
    )
    own = {"name": "cut", "max_turns": 1, "chat_template": "short.jinja"}
    both = [{"path": "one", "repetitions": 1},
            {"path": "one", "repetitions": 1, "subflavors": own}]  # fmt: skip
    path = write(root, "options", {"blend_epochized": both})
    loader = train_loader(path, hf_dir, global_batch_size=24, seed=3)
    rows = {(r.datasets[0], r.sample_ids[0]): r for r in next(iter(loader))}
    assert len(rows) == 24
    for number in range(12):
        plain, cut = rows["one", f"id-{number}"], rows["cut", f"id-{number}"]
        assert 4 in plain.tokens and 4 not in cut.tokens, "<|user|> is in one template only"
        assert plain.num_images == cut.num_images
        two_rounds = number % 5 == 4
        ends = (int((row.labels == 1).sum()) for row in (plain, cut))
        assert list(ends) == [2 if two_rounds else 1, 1]


def test_the_state_of_another_blend_is_refused(root: Path, hf_dir: Path) -> None:
    def loader(path: Path) -> TrainLoader:
        return train_loader(path, hf_dir, global_batch_size=4, seed=3, need_pixels=False)

    state = loader(epochs(root, one=1, two=1)).state()
    json.dumps(state)
    loader(epochs(root, one=1, two=1)).check_state(state)
    for other in (epochs(root, one=2, two=1), epochs(root, two=1, one=1), root / "one"):
        with pytest.raises(InputError, match="dataset"):
            loader(other).check_state(state)


def test_the_content_of_a_blend_is_its_file_and_its_datasets(root: Path, tmp_path: Path) -> None:
    """Inputs of a step: another sample anywhere is another input, another place is not."""
    from llava_steps.store.digest import Digests
    from llava_steps.store.identity import _digest
    from llava_steps.train import STEP

    def digest(base: Path) -> str:
        items = [{"path": "one"}, {"path": "two"}]
        path = write(base, "content", {"blend": items})
        return _digest(STEP, Stage(), "data_path", path, Digests(tmp_path))

    copies = [tmp_path / "a", tmp_path / "b"]
    for copy in copies:
        for name in ("one", "two"):
            shutil.copytree(root / name, copy / name)
    first = digest(copies[0])
    assert first == digest(copies[1]) == digest(root)
    tar = copies[1] / "two" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert digest(copies[1]) != first
    (copies[0] / "content.yaml").write_text((copies[0] / "content.yaml").read_text() + "#\n")
    path = copies[0] / "content.yaml"
    assert _digest(STEP, Stage(), "data_path", path, Digests(tmp_path)) != first


def test_the_workflow_watches_the_file_and_what_it_names(root: Path) -> None:
    from llava_steps.pipeline.rules import chain
    from llava_steps.settings import load

    config = load.load([Path(__file__).parents[2] / "config" / "config.yaml"])
    (root / "watched.jinja").write_text(TEMPLATE)
    item = {"path": "one", "subflavors": {"chat_template": "watched.jinja"}}
    path = write(root, "watched", {"blend": [item, {"path": "two"}]})
    stage = config.stages["stage1"].model_copy(update={"data_path": str(path)})
    rules = chain(config.model_copy(update={"stages": config.stages | {"stage1": stage}}))
    files = set(rules["stage1_checkpoint"].files)
    assert {str(path), str(root / "one"), str(root / "two"), str(root / "watched.jinja")} <= files
    assert "energon_dataset" not in rules["stage1_checkpoint"].upstream
