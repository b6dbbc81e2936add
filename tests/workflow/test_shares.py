"""`cluster.jobs`: sharding in several jobs. The step is the real one, here, and its data are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.workflow.project import ROOT, Project

RECORDS = 17
OVERLAY: dict[str, Any] = {
    "demo_assets": None,
    "tar_shards": {
        "source": "data/mine.json", "samples_per_shard": 3, "quarantine_limit": 0.5, "workers": 1,
    },
    "hf_model": {"vision_tower": "hub/tower", "text_model": "hub/model"},
    "evaluation": {"data": "data/mine.json"},
}  # fmt: skip
TARGET = ("energon_dataset", "--cores", "2")


def write_data(folder: Path, bad: tuple[int, ...] = (4, 5)) -> None:
    folder.mkdir(exist_ok=True)
    records = []
    for number in range(RECORDS):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.jpg")
        answer = "" if number in bad else str(number)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(records))


class Shared:
    """A project that makes its shards in so many jobs."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.root = project.root

    def options(self, jobs: int, **settings: Any) -> tuple[str, ...]:
        text = OVERLAY | {"cluster": {"jobs": {"tar_shards": jobs}}}
        text["tar_shards"] = OVERLAY["tar_shards"] | settings
        return ("--configfile", self.project.overlay(yaml.safe_dump(text), f"jobs-{jobs}.yaml"))

    def run(self, *options: str, code: int = 0) -> str:
        return self.project.snakemake(*TARGET, *options, code=code)

    def value(self) -> tuple[dict[str, bytes], str]:
        """What the run shows: its files by name, and when it was made."""
        manifest = self.project.manifest("tar_shards")
        shown = self.root / "results/demo/tar_shards"
        files = {file["path"]: (shown / file["path"]).read_bytes() for file in manifest["files"]}
        return files, manifest["created"] + str(manifest["wall_s"])

    def entries(self) -> list[Path]:
        return sorted((self.root / "store/tar_shards").iterdir())

    def left(self) -> list[Path]:
        """What shares leave behind in the results of the run."""
        return [*(self.root / "results/demo").rglob("*parts*")]


@pytest.fixture
def shared(fresh: Project) -> Shared:
    for name in ("data", "shard_tars.py"):
        copy = shutil.copytree if (ROOT / "llava_steps" / name).is_dir() else shutil.copy
        copy(ROOT / "llava_steps" / name, fresh.root / "llava_steps" / name)
    write_data(fresh.root / "data")
    return Shared(fresh)


def parts(text: str) -> list[str]:
    """Shares that a run or dry run calls the step for."""
    return sorted(re.findall(r"shard_tars .*--part=(\S+)", text))


def test_jobs_share_the_work_and_leave_the_bytes_of_one(shared: Shared) -> None:
    dry = shared.run("-n", *shared.options(3))
    assert parts(dry) == ["1/3", "2/3", "3/3"] and "tar_shards_part" in dry
    assert not (shared.root / "store").exists()
    text = shared.run(*shared.options(3))
    assert parts(text) == ["1/3", "2/3", "3/3"]
    made, when = shared.value()
    assert len(shared.entries()) == 1 and not shared.left(), "the shares are gone"
    assert not list((shared.root / "store/tar_shards").rglob("part-*"))

    for jobs in (5, 1, 3):
        options = shared.options(jobs, workers=2)
        assert "Nothing to be done" in shared.run(*options), "how many jobs changes no value"

    shutil.rmtree(shared.root / "store")
    shutil.rmtree(shared.root / "results")
    assert parts(shared.run(*shared.options(1))) == []
    alone, later = shared.value()
    assert alone == made and later != when


def test_what_the_store_knows_is_computed_by_no_share(shared: Shared) -> None:
    shared.run(*shared.options(1))
    before = shared.value()
    text = shared.run(*shared.options(2, decode_images=True))
    assert parts(text) == ["1/2", "2/2"] and len(shared.entries()) == 2
    text = shared.run(*shared.options(2))
    assert text.count("the whole value, is up to date; no share of it is needed") == 2
    assert shared.value() == before and len(shared.entries()) == 2 and not shared.left()


def test_forced_shards_are_made_by_all_jobs_again(shared: Shared) -> None:
    shared.run(*shared.options(2))
    made, when = shared.value()
    for rule in ("tar_shards", "tar_shards_part"):
        text = shared.run(*shared.options(2), "--forcerun", rule)
        assert parts(text) == ["1/2", "2/2"] and "no share of it is needed" not in text
        again, later = shared.value()
        assert again == made and later != when and not shared.left()
        when = later
    assert [entry.name.partition(".")[2] for entry in shared.entries()] == [
        "", "replaced-1", "replaced-2",
    ]  # fmt: skip
    assert "Nothing to be done" in shared.run(*shared.options(2))


def test_other_data_are_shared_again(shared: Shared) -> None:
    shared.run(*shared.options(2))
    write_data(shared.root / "data", bad=())
    assert parts(shared.run(*shared.options(2))) == ["1/2", "2/2"]
    assert len(shared.value()[0]["shards.json"]) and not shared.left()
    assert "Nothing to be done" in shared.run(*shared.options(2))


def test_too_many_refused_samples_end_the_run_and_the_shares_are_of_use(shared: Shared) -> None:
    text = shared.run(*shared.options(2, quarantine_limit=0.1), code=1)
    assert re.search(r"2 of 17 samples", text) and "quarantine" in text and "Traceback" not in text
    assert len(list((shared.root / "results/demo/tar_shards_parts").iterdir())) == 2
    text = shared.run(*shared.options(2, quarantine_limit=0.2))
    assert text.count("is up to date; nothing to compute") == 2
    assert len(shared.entries()) == 2 and not shared.left(), "the try that failed, and the value"


def test_a_share_that_fails_ends_the_run_and_other_shares_do_no_harm(shared: Shared) -> None:
    text = shared.run(*shared.options(7), code=1)
    assert "too few records for 7 shares of whole shards; take fewer shares" in text
    assert "Traceback" not in text
    text = shared.run(*shared.options(4))
    assert parts(text) == ["1/4", "2/4", "3/4", "4/4"]
    assert not shared.left(), "also what the first try left"
    assert not list((shared.root / "store/tar_shards").rglob("part-*"))


def test_only_sharding_can_be_shared(shared: Shared) -> None:
    overlay = shared.project.overlay("cluster: {jobs: {stage1_checkpoint: 2}}\n")
    text = shared.project.snakemake("-n", "--cores", "1", "--configfile", overlay, code=1)
    assert "overlay.yaml:1: cluster.jobs" in text and "stage1_checkpoint is one job" in text
    text = shared.run("-n", *shared.options(2, parts="mine"), code=1)
    assert "leave them out" in text and "Traceback" not in text
