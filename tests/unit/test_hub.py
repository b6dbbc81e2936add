"""Hub ids of models and datasets, against a server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from llava_steps.core.errors import InputError
from llava_steps.settings.hub_id import parse_dataset, parse_model
from llava_steps.store.hub import Hub, model_files
from tests.helpers.data_fixtures import jpeg
from tests.helpers.hf_fixtures import make_text, make_tokenizer, make_tower
from tests.helpers.hub_server import HubServer, hub_server
from tests.helpers.patience import PATIENCE


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of this test, and an empty cache, for huggingface_hub in this process."""
    with hub_server() as server:
        url = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        monkeypatch.chdir(tmp_path)
        yield server
        huggingface_hub.close_session()


def files(root: Path, **content: str) -> Path:
    """A directory with files; `__` in a name is a slash, `_` before the ending a dot."""
    for name, text in content.items():
        path = root / name.replace("__", "/")
        stem, _, ending = path.name.rpartition("_")
        path = path.with_name(f"{stem}.{ending}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_the_commit_that_was_taken_is_used_until_update(tmp_path: Path, hub: HubServer) -> None:
    repository = hub.model("org/model")
    first = repository.commit(files(tmp_path / "1", config_json="1"), "v1")
    store = tmp_path / "store"
    store.mkdir()
    asked = Hub(store)
    assert (asked.model("org/model") / "config.json").read_text() == "1"
    assert asked.taken == {"org/model": first}
    second = repository.commit(files(tmp_path / "2", config_json="2"))
    assert Hub(store).model("org/model").name == first
    assert Hub(store).model("org/model@v1").name == first
    assert Hub(store).model(f"org/model@{second}").name == second
    assert Hub(store, fetch=False).model("org/model").name == first
    assert Hub(store, update=True).model("org/model").name == second
    assert Hub(store).model("org/model").name == second
    repository.names["v1"] = second
    assert Hub(store).model("org/model@v1").name == first
    assert Hub(tmp_path / "store", update=True).model("org/model@v1").name == second
    record = {path.stem: path.read_text().strip() for path in (store / "hub").glob("*.commit")}
    assert record == {"model-org%2Fmodel": second, "model-org%2Fmodel@v1": second}


def test_models_come_with_one_form_of_their_weights(tmp_path: Path, hub: HubServer) -> None:
    made = files(
        tmp_path / "1", config_json="{}", pytorch_model_bin="b", model_safetensors="s",
        consolidated_safetensors="c", onnx__model_json="o", tokenizer_model="t",
    )  # fmt: skip
    hub.model("org/both").commit(made)
    (tmp_path / "store").mkdir()
    found = Hub(tmp_path / "store").model("org/both")
    assert names(found) == ["config.json", "model.safetensors", "tokenizer.model"]
    pickled = ["config.json", "pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json"]
    assert model_files([*pickled, "optimizer.bin"]) == [pickled[0], pickled[2], pickled[1]]
    shards = ["a-1.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    assert model_files(shards) == [shards[1], shards[0]]


def test_names_that_the_hub_does_not_know(tmp_path: Path, hub: HubServer) -> None:
    hub.model("org/model").commit(files(tmp_path / "1", config_json="1"))
    hub.model("org/gated").gated = True
    (tmp_path / "store").mkdir()
    found = Hub(tmp_path / "store")
    for text, words in {
        "org/other": "the hub has no model org/other; check the name",
        "org/model@v9": "the model org/model has no revision v9",
        "org/model@refs/pr/1": "has no revision refs/pr/1",
        "org/gated": "is gated on the hub: accept its terms",
        "no/such/directory": "neither a directory nor a hub id",
    }.items():
        with pytest.raises(InputError, match=words):
            found.model(text)
    with pytest.raises(InputError, match="the hub has no dataset org/model"):
        found.dataset("org/model")


def test_without_a_network_what_was_downloaded_is_used(tmp_path: Path, hub: HubServer) -> None:
    made = files(tmp_path / "1", a_jsonl="{}", image__1_jpg="x")
    hub.dataset("org/data").commit(made)
    store = tmp_path / "store"
    store.mkdir()
    root = Hub(store).dataset("org/data")
    for offline in (Hub(store, fetch=False), unreachable(store)):
        assert offline.dataset("org/data") == root
    snapshot = next((tmp_path / "cache").glob("datasets--*/snapshots/*"))
    (snapshot / "image/1.jpg").unlink()
    with pytest.raises(InputError, match="downloaded only in part"):
        Hub(store, fetch=False).dataset("org/data")
    with pytest.raises(InputError, match="could not be downloaded from the hub: it was never"):
        Hub(store, fetch=False).dataset("org/other")
    with pytest.raises(InputError, match="could not be downloaded from the hub"):
        unreachable(store).model("org/other")


def test_shares_link_a_dataset_at_the_same_time(tmp_path: Path, hub: HubServer) -> None:
    content = {f"images__{number}_jpg": "x" for number in range(60)}
    hub.dataset("org/data").commit(files(tmp_path / "1", a_jsonl="{}", **content))
    store = tmp_path / "store"
    store.mkdir()
    root = Hub(store).dataset("org/data").parent
    shutil.rmtree(root)
    with ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(lambda _: Hub(store).dataset("org/data").parent, range(8)))
    assert set(roots) == {root} and len(names(root)) == 61
    moved = (tmp_path / "cache").rename(tmp_path / "moved")
    assert names(root) == [] and moved.is_dir()
    assert len(names(Hub(store).dataset("org/data").parent)) == 61


def unreachable(store: Path) -> Hub:
    """A hub that may be asked but cannot be reached."""
    constants.ENDPOINT = "http://127.0.0.1:9"
    huggingface_hub.close_session()
    return Hub(store)


def test_datasets_give_the_files_of_one_form_and_split(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "store").mkdir()
    found = Hub(tmp_path / "store")

    def commit(**content: str) -> None:
        hub.repositories.pop("datasets/org/data", None)
        folder = tmp_path / f"commit-{len(list(tmp_path.glob('commit-*')))}"
        hub.dataset("org/data").commit(files(folder, **content))
        for record in tmp_path.glob("store/hub/*.commit"):
            record.unlink()

    commit(README_md="#", dataset_infos_json="{}", **{"data__train-0_parquet": "p"})
    assert names(found.dataset("org/data")) == ["data/train-0.parquet"]
    commit(**{"data__train-0_parquet": "p", "data__test-0_parquet": "q"})
    assert names(found.dataset("org/data")) == ["data/train-0.parquet"]
    assert found.dataset("org/data@main/data/test-0.parquet").name == "test-0.parquet"
    commit(**{"data__val-0_parquet": "p", "data__test-0_parquet": "q"})
    with pytest.raises(InputError, match="holds several splits: test, val; name the files of one"):
        found.dataset("org/data")
    commit(a__x_parquet="p", b__y_parquet="q")
    assert names(found.dataset("org/data")) == ["a/x.parquet", "b/y.parquet"]
    assert names(found.dataset("org/data@main/a")) == ["x.parquet"]
    commit(train_json="[]", test_json="[]", images__1_jpg="x")
    assert found.dataset("org/data").name == "train.json"
    assert names(found.dataset("org/data").parent) == ["images/1.jpg", "train.json"]
    table = found.dataset("org/data@main/test.json")
    assert names(table.parent) == ["images/1.jpg", "test.json"]
    commit(README_md="#", images__1_jpg="x")
    with pytest.raises(InputError, match="org/data holds no data"):
        found.dataset("org/data")


def test_paths_are_not_taken_for_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    for path in (
        "data/raw",
        "data/missing",
        "x/train.json",
        "/a/b",
        "~/b",
        "./b",
        "b",
        "a b/c",
        "",
    ):
        assert parse_dataset(path) is None, path
    for text in ("org/name", "org/name@v1", "org/name@main/sub/train.json", "org/a.b@refs/pr/1/x"):
        assert parse_dataset(text) is not None, text
    assert parse_model("a/b/c") is None and parse_model("../b") is None


def step(module: str, cwd: Path, hub: HubServer, *flags: str, code: int = 0) -> str:
    """A step in its own process, as a user runs it; what it says."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    line = [sys.executable, "-m", f"llava_steps.{module}", *flags]
    ended = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == code, ended.stderr
    return ended.stderr


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())


def test_build_hf_records_the_commit(tmp_path: Path) -> None:
    tower = make_tower(tmp_path / "tower")
    texts = [make_text(tmp_path / f"text{n}", make_tokenizer(), seed=n) for n in (1, 2)]
    with hub_server() as hub:
        hub.model("org/tower").commit(tower)
        first = hub.model("org/text").commit(texts[0])
        flags = ("--vision-tower=org/tower", "--text-model=org/text", "--save-dir=out")
        step("build_hf", tmp_path, hub, *flags)
        made = manifest(tmp_path / "out")
        assert made["inputs"]["text_model"]["revision"] == first
        assert made["inputs"]["text_model"]["path"] == "org/text"
        second = hub.model("org/text").commit(texts[1])
        assert "up to date" in step("build_hf", tmp_path, hub, *flags)
        assert manifest(tmp_path / "out") == made
        step("build_hf", tmp_path, hub, *flags, "--update")
        renewed = manifest(tmp_path / "out")
        assert renewed["inputs"]["text_model"]["revision"] == second
        assert renewed["fingerprint"] != made["fingerprint"]
        pinned = (flags[0], f"--text-model=org/text@{first}", flags[2])
        assert "up to date" in step("build_hf", tmp_path, hub, *pinned)
        assert manifest(tmp_path / "out")["fingerprint"] == made["fingerprint"]


def test_shard_tars_reads_a_dataset_of_the_hub(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    records = []
    for number in range(3):
        (source / f"images/{number}.jpg").write_bytes(jpeg(number))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        records.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": turns})
    (source / "train.json").write_text(json.dumps(records))
    (source / "README.md").write_text("# data")
    with hub_server() as hub:
        commit = hub.dataset("org/data").commit(source)
        step("shard_tars", tmp_path, hub, "--source=org/data", "--save-dir=remote", "--workers=1")
        step("shard_tars", tmp_path, hub, "--source=source/train.json", "--save-dir=local")
        message = step("shard_tars", tmp_path, hub, "--source=org/no", "--save-dir=x", code=3)
    remote, local = manifest(tmp_path / "remote"), manifest(tmp_path / "local")
    assert remote["inputs"]["source"]["revision"] == commit
    assert remote["metrics"]["samples_written"] == 3
    assert remote["content"] == local["content"]
    assert "the hub has no dataset org/no" in message and "Traceback" not in message
