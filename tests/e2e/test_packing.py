"""A sample's loss does not depend on what shares its row; a stage trains on a packed blend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from llava_steps.core.errors import IntegrityError
from llava_steps.data.loader.corpus import Corpus
from tests.helpers.chain import Chain, run_step, sample_ids
from tests.helpers.dist_helpers import spawn
from tests.helpers.packing_worker import BATCH, LENGTH, STEPS


def test_200_samples_have_the_same_losses_packed_and_alone(chain: Chain, tmp_path: Path) -> None:
    arguments = (chain.hf, chain.dataset, chain.checkpoint)
    ((alone, packed),) = spawn("tests.helpers.packing_worker:losses", 1, tmp_path, *arguments)
    (one_by_one, singles, tokens), (together, rows, same_tokens) = alone, packed
    assert singles == len(one_by_one) == STEPS * BATCH == 200 and tokens == same_tokens
    assert [s[:2] for s in one_by_one] == [s[:2] for s in together], "the same samples, in order"
    assert tokens / LENGTH <= rows < singles / 2, "rows really hold several samples"
    worst = max(abs(a[2] - b[2]) for a, b in zip(one_by_one, together, strict=True))
    print(f"{singles} samples in {rows} packed rows: largest difference of a loss {worst:.2e}")
    assert worst <= 1e-5
    assert len({round(s[2], 4) for s in one_by_one}) > 100, "the losses tell samples apart"


def test_a_stage_trains_on_a_packed_blend_with_workers(chain: Chain, tmp_path: Path) -> None:
    """Through the step's command line; the manifest's input is the blend and what it names."""
    path = tmp_path / "blend.yaml"
    item = {"path": str(chain.dataset), "split_part": "train"}
    once = {**item, "weight": 3, "subflavors": {"name": "digits", "max_turns": 1}}
    table = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": [once, {**item, "subflavors": {"name": "again"}}]}},
    }
    path.write_text(yaml.safe_dump(table))
    flags = (
        "--stage=2", "--packing", "--pack-length=512", "--train-steps=3", "--global-batch-size=8",
        f"--data-path={path}", "--num-workers=2", "--gpus=2",
    )  # fmt: skip
    out = chain.train("blended", *flags)
    ids = sample_ids(out)
    assert [len(batch) for batch in ids] == [8, 8, 8]
    corpus = Corpus(path, "train", 1234)
    expected = []
    for place in (corpus[n] for n in range(24)):
        expected.append(corpus.parse(place, corpus.raw(place)).id)
    assert [i for batch in ids for i in batch] == expected
    before = json.loads((out / "manifest.json").read_bytes())["inputs"]["data_path"]["digest"]
    table["splits"]["train"]["blend"].pop()
    path.write_text(yaml.safe_dump(table))
    again = chain.train("blended", *flags)
    after = json.loads((again / "manifest.json").read_bytes())["inputs"]["data_path"]["digest"]
    assert after != before


def test_a_blend_of_a_damaged_dataset_is_refused(chain: Chain, tmp_path: Path) -> None:
    dataset = tmp_path / "energon_dataset"
    shutil.copytree(chain.dataset, dataset)
    manifest = json.loads((dataset / "manifest.json").read_bytes())
    name = next(f["path"] for f in manifest["files"] if f["path"].endswith(".tar"))
    data = bytearray((dataset / name).read_bytes())
    data[-2000] ^= 1
    (dataset / name).write_bytes(data)
    path = tmp_path / "blend.yaml"
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
    path.write_text(head + "splits: {train: {path: energon_dataset}}\n")
    log = run_step(
        "train", *chain.train_flags("damaged"), f"--data-path={path}", cwd=chain.root, check=False
    )
    assert log.returncode == IntegrityError.exit_code and name in log.stderr, log.stderr
