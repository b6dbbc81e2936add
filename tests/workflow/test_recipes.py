"""Every recipe, alone and on more nodes: checked, planned and dry-run, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_steps.commands import plan
from llava_steps.core.errors import ConfigError
from llava_steps.geometry.costs import parameters
from llava_steps.planning.models import model_of
from llava_steps.settings.config import Config
from llava_steps.settings.load import load
from tests.workflow.project import ROOT, RULES, Project

SHIPPED = ROOT / "config/config.yaml"
PLACE = ROOT / "config/recipes"
RECIPES = sorted(p.name for p in PLACE.glob("*.yaml") if "x8" not in p.name)
NODES = ("2x8.yaml", "8x8.yaml")


def planned(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(ROOT)
    given = plan.parser().parse_args(["--json"])
    (line,) = plan.lines(config, given)
    found: dict[str, object] = json.loads(line)
    return found


def test_there_is_a_recipe_for_each_model_that_is_promised() -> None:
    assert RECIPES == [
        "llava-1.5-7b.yaml", "llava-jp-1.3b.yaml", "llm-jp-3-1.8b.yaml", "llm-jp-3-13b.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_fits_and_plans(
    name: str, fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load([SHIPPED, PLACE / name])
    assert config == load([PLACE / name]), "it takes nothing from the demo"
    for stage in planned(config, monkeypatch)["stages"]:  # type: ignore[attr-defined]
        assert stage["fits"] and stage["hours"] > 0.1
    assert config.stages["stage1"].lang == config.stages["stage2"].lang != ""
    for path in (config.tar_shards.source, config.evaluation.data):
        (fresh.root / path).parent.mkdir(exist_ok=True)
        (fresh.root / path).write_text("[]")
    if data := config.stage1.data_path:  # the recipe says how to make it first
        text = fresh.snakemake("-n", "--configfile", f"config/recipes/{name}", code=1)
        assert f"stage1.data_path: {data} does not exist" in text
        (fresh.root / data).mkdir(parents=True)
    rules = fresh.planned("--configfile", f"config/recipes/{name}")
    assert rules == sorted(name for name in RULES if name != "demo_assets")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("nodes", NODES)
def test_a_recipe_on_more_nodes(name: str, nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        config = load([SHIPPED, PLACE / name, PLACE / nodes])
    except ConfigError as error:
        assert "over several nodes is not there yet" in str(error)
        pytest.skip("training over several nodes is refused")
    assert config.stages["stage2"].world_size == 8 * int(nodes[0])
    for stage in planned(config, monkeypatch)["stages"]:  # type: ignore[attr-defined]
        assert stage["fits"]


def test_language_models_have_the_sizes_of_their_model_cards() -> None:
    """Non-embedding parameters and embeddings (both of them) that the cards of llm-jp-3 print."""
    for name, rest, embeddings in (
        ("llm-jp-3-1.8b.yaml", 1_459_718_144, 407_896_064),
        ("llm-jp-3-13b.yaml", 12_688_184_320, 1_019_740_160),
    ):
        geometry = model_of(load([PLACE / name]), shapes=PLACE / "models").geometry
        p = parameters(geometry)
        assert p.layers + p.final_norm == rest
        assert (p.embedding + p.head) * 99_584 == embeddings * geometry.vocab


def test_the_vocabulary_is_padded_for_the_tensor_parallel_size_that_building_is_told() -> None:
    config = load([PLACE / "llm-jp-3-1.8b.yaml"])
    hf = config.hf_model.model_copy(update={"vocab_size_padding": 128, "tp": 3})
    padded = config.model_copy(update={"hf_model": hf})
    assert model_of(padded, shapes=PLACE / "models").geometry.vocab == 99_840


def test_the_image_counts_in_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([PLACE / RECIPES[0]])
    seen: list[str] = []
    monkeypatch.setattr(plan.outlook, "states", lambda rules, root, image: seen.append(image) or ())
    pinned = config.model_copy(update={"image": "docker://somewhere/llava@sha256:abc"})
    planned(pinned, monkeypatch)
    assert seen == ["sha256:abc"]
    with pytest.raises(ConfigError, match="neither a file nor pinned"):
        planned(config.model_copy(update={"image": "no.sif"}), monkeypatch)


@pytest.mark.parametrize("template", ["en", "jp"])
def test_templates_render_turns_and_end_answers(template: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = (PLACE / f"templates/{template}.jinja").read_text(encoding="utf-8")
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    talk = [
        {"role": "user", "content": "<image>\nQ1"}, {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"},
    ]  # fmt: skip
    rendered = ImmutableSandboxedEnvironment().from_string(text)
    whole = rendered.render(messages=talk, **ends)
    asked = rendered.render(messages=talk[:3], add_generation_prompt=True, **ends)
    assert whole.startswith("<s>") and whole.count("<s>") == 1
    assert whole.startswith(asked) and whole[len(asked) :].strip() == "A2</s>"
    assert "A1</s>" in asked and asked.count("<image>") == 1


def test_shapes_name_their_source() -> None:
    used = {
        str(getattr(load([PLACE / name]).hf_model, key))
        for name in RECIPES
        for key in ("vision_tower", "text_model")
    }
    files = {p.stem.replace("--", "/"): p for p in (PLACE / "models").glob("*.json")}
    assert used == set(files)
    for name, path in files.items():
        assert f"huggingface.co/{name}" in json.loads(Path(path).read_text())["from"]


def test_a_plan_of_unknown_models_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.main(["--configfile", "config/template.yaml"]) == 3
