"""Sharding by several jobs gives the bytes of one job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.shard_tars import STEP
from llava_steps.store import store
from llava_steps.store.lease import Lease
from llava_steps.store.run import execute
from tests.helpers.data_fixtures import jpeg


def make(folder: Path, bad: tuple[int, ...]) -> None:
    records: list[Any] = []
    for number in range(17):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "" if number in bad else str(number)},
        ]
        record = {"id": f"s{number % 9}", "image": f"{number}.jpg", "conversations": turns}
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))


def call(*flags: str, source: str = "train.json") -> int:
    always = [f"--source={source}", "--samples-per-shard=3", "--quarantine-limit=0.5"]
    return execute(STEP, [*always, *flags])


def value(shown: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Payload and metrics."""
    manifest = store.read_manifest(shown)
    assert manifest is not None
    store.check(store.entry_of(shown, manifest), manifest)
    return {f["path"]: (shown / f["path"]).read_bytes() for f in manifest["files"]}, manifest[
        "metrics"
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bad", [(), (0, 4, 5, 6, 16)])
def test_shares_put_together_are_the_undivided_value(here: Path, bad: tuple[int, ...]) -> None:
    make(here, bad)
    for number, share in enumerate(("3/3", "1/3", "2/3")):
        workers = f"--workers={1 + number % 2}"
        name = share[0]
        assert call(f"--part={share}", f"--save-dir=parts/{name}", workers) == 0
    assert call("--parts=parts", "--save-dir=together") == 0
    assert call("--save-dir=alone", "--store=other") == 0
    assert value(here / "together") == value(here / "alone")
    metrics = [value(here / "parts" / name)[1] for name in "123"]
    assert sum(m["samples_in"] for m in metrics) == 17
    assert sum(m["samples_quarantined"] for m in metrics) == len(bad)
    # The shares are still whole, and the same call finds its value again.
    assert call("--save-dir=again") == 0
    assert (here / "again/000000.tar").resolve() == (here / "together/000000.tar").resolve()


def test_shares_are_removed_once_the_whole_is_there(here: Path) -> None:
    make(here, (0,))
    assert call("--part=1/2", "--save-dir=parts/1") == 0
    assert call("--parts=parts", "--remove-parts", "--save-dir=all") == InputError.exit_code
    assert call("--part=2/2", "--save-dir=parts/2") == 0
    assert call("--part=1/3", "--save-dir=parts/other", "--quarantine-limit=0") == 0
    (here / "parts/2/mine.txt").write_text("a file of the user")
    (other,) = (here / "parts/other").glob("part-000000000.tar")
    with Lease(other.resolve().parent / store.WORK):
        assert call("--parts=parts", "--remove-parts", "--save-dir=all") == 0
    assert sorted(path.name for path in (here / "parts").iterdir()) == ["2", "other"]
    assert [path.name for path in (here / "parts/2").iterdir()] == ["mine.txt"]
    assert value(here / "parts/other") and len(list((here / "store/tar_shards").iterdir())) == 2
    # A share of it shows the whole, and that is not removed with the shares.
    assert call("--part=2/2", "--save-dir=parts/again") == 0
    assert value(here / "parts/again") == value(here / "all")
    assert call("--parts=parts", "--remove-parts", "--save-dir=all") == 0
    assert [path.name for path in (here / "store/tar_shards").iterdir()] == [
        (here / "all/shards.json").resolve().parent.name
    ]
    assert value(here / "all")


def test_shares_that_do_not_belong_together_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(here, ())
    assert call("--part=1/2", "--save-dir=parts/1") == 0
    assert call("--parts=parts", "--save-dir=out") == InputError.exit_code
    assert "no share with the records from 3 on" in capsys.readouterr().err
    assert call("--part=2/2", "--save-dir=parts/2", "--max-pixels=9999") == 0
    assert call("--parts=parts", "--save-dir=out") == InputError.exit_code
    assert "max_pixels differ" in capsys.readouterr().err
    shutil.copy("train.json", "other.json")
    assert call("--part=2/2", "--save-dir=parts/2", source="other.json") == 0
    assert call("--parts=parts", "--save-dir=out") == InputError.exit_code
    assert "the data differ" in capsys.readouterr().err
    assert call("--part=2/2", "--save-dir=parts/2") == 0
    tar = (here / "parts/2/part-000000003.tar").resolve()
    whole = tar.read_bytes()
    tar.chmod(0o644)
    tar.write_bytes(whole[:-1] + b"x")
    assert call("--parts=parts", "--save-dir=out") == IntegrityError.exit_code
    tar.write_bytes(whole)
    assert call("--parts=parts", "--save-dir=out") == 0


def test_impossible_shares_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(here, ())
    assert call("--part=7/7", "--save-dir=x") == InputError.exit_code
    assert "too few records for 7 shares" in capsys.readouterr().err
    assert call("--part=3/2", "--save-dir=x") == 2
    assert call("--parts=nowhere", "--save-dir=x") == InputError.exit_code
