"""Values from the configuration reach the steps as they are, and never a shell."""

from __future__ import annotations

import json

import yaml

from tests.workflow.project import Project
from tests.workflow.values import VALUES


def test_values_reach_the_step_as_they_are(fresh: Project) -> None:
    names = {f"name{index} '$(touch canary)": text for index, text in enumerate(VALUES)}
    overlay = fresh.overlay(
        yaml.safe_dump({"energon_dataset": {"field_map": names}}, allow_unicode=True)
    )
    fresh.snakemake("energon_dataset", "--cores", "2", "--configfile", overlay)
    (call,) = (c for c in fresh.calls() if c["step"] == "energon_dataset")
    assert call["field_map"].items() >= names.items()
    assert fresh.manifest("energon_dataset")["config"]["field_map"].items() >= names.items()
    assert not list(fresh.root.rglob("canary*"))


def test_labels_and_paths_too(fresh: Project) -> None:
    nasty = "x '\"$(touch canary)`touch canary`;touch canary\\ {a} {{b}} *?[] #日本 \n%s"
    data = f"{nasty}.json".replace("{", "").replace("}", "")
    (fresh.root / data).write_text("[]")
    settings = {
        "results": "res '\"$(touch canary);`touch canary` 日本",
        "store": f"store {nasty}",
        "demo_assets": None,
        "tar_shards": {"source": data},
        "hf_model": {"vision_tower": data, "text_model": data},
        "evaluation": {"data": data},
        "stage1": {"name": nasty, "wandb_project": nasty, "master_addr": nasty},
    }
    fresh.snakemake(
        "--cores", "2", "--configfile", fresh.overlay(yaml.safe_dump(settings, allow_unicode=True))
    )
    calls = {call["step"]: call for call in fresh.calls()}
    assert calls["tar_shards"]["source"] == data
    assert calls["evaluation"]["data"] == data
    for key in ("name", "wandb_project", "master_addr"):
        assert calls["stage1_checkpoint"][key] == nasty
    assert (fresh.root / settings["store"]).is_dir()
    manifest = fresh.root / settings["results"] / "demo/evaluation/manifest.json"
    assert json.loads(manifest.read_text())["step"] == "evaluation"
    assert not list(fresh.root.rglob("canary*"))


def test_what_cannot_be_carried_is_refused(fresh: Project) -> None:
    for key, text, reason in [
        ("results", "a{b}", "results: String should match pattern"),
        ("store", "a\0b", "store: contains a NUL"),
        ("image", "\ud800", "image: contains a NUL or half a surrogate"),
        ("tar_shards", {"source": "a{b}.json"}, "a{b}.json"),
        ("run", "$(touch canary)", "run: String should match pattern"),
    ]:
        (fresh.root / "overlay.json").write_text(json.dumps({key: text}))
        output = fresh.snakemake("-n", "--cores", "1", "--configfile", "overlay.json", code=1)
        assert reason in output, output
    assert not list(fresh.root.rglob("canary*"))
