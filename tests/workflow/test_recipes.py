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
from tests.workflow.project import ROOT, Project

SHIPPED = ROOT / "config/config.yaml"
PLACE = ROOT / "config/recipes"
RECIPES = sorted(p.name for p in PLACE.glob("*.yaml") if "x8" not in p.name)
NODES = ("2x8.yaml", "8x8.yaml")

OF_RUN = ["hf_model", "megatron_checkpoint", "hf_export", "evaluation", "report"]
OF_DATASET = ["tar_shards", "energon_dataset"]
TWO_STAGES = [
    "stage1_audit",
    "stage2_audit",
    "stage1_checkpoint",
    "stage1_export",
    "stage2_checkpoint",
]
OF_STAGES = dict.fromkeys(
    ["llava-1.5-7b", "llava-jp-1.3b", "llm-jp-3-1.8b", "llm-jp-3-13b"], TWO_STAGES
) | {
    "llm-jp-4-8b": ["instruct_blend", "instruct_audit", "instruct_checkpoint"],
    "onevision-7b": [
        "knowledge_blend", "several_images_blend",
        *(f"{stage}_{kind}" for kind in ("audit", "checkpoint")
          for stage in ("alignment", "knowledge", "single_image", "several_images")),
        "knowledge_export", "single_image_export",
    ],
}  # fmt: skip
"""Rules of each recipe, by hand."""


def planned(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(ROOT)
    given = plan.parser().parse_args(["--json"])
    (line,) = plan.lines(config, given)
    found: dict[str, object] = json.loads(line)
    return found


def sources(config: Config) -> list[str]:
    """Keys of the files that a recipe needs, with their paths."""
    data = {f"datasets.{name}.source": each.source for name, each in config.datasets.items()}
    return [
        f"{key}: {path}"
        for key, path in {**data, "evaluation.data": config.evaluation.data}.items()
    ]


def test_there_is_a_recipe_for_each_model_that_is_promised() -> None:
    assert {*RECIPES} == {
        "llava-1.5-7b.yaml", "llava-jp-1.3b.yaml", "llm-jp-3-1.8b.yaml", "llm-jp-3-13b.yaml",
        "llm-jp-4-8b.yaml", "onevision-7b.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole_fits_and_plans(
    name: str, fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load([SHIPPED, PLACE / name])
    assert config == load([PLACE / name]), "it takes nothing from the demo"
    for stage in planned(config, monkeypatch)["stages"]:  # type: ignore[attr-defined]
        assert stage["fits"] and stage["hours"] > 0.1
    assert len({stage.lang for stage in config.stages.values()} - {""}) == 1
    assert not any(stage.data_path for stage in config.stages.values())
    needed = sources(config)
    text = fresh.snakemake("-n", "--configfile", f"config/recipes/{name}", code=1)
    head, *lines = text.partition("Error: ")[2].splitlines()
    assert head == f"{len(needed)} paths of the configuration are missing:"
    for line, source in zip(lines, needed, strict=True):
        assert line.startswith(
            f"  {source} does not exist in {fresh.root}; bring it, or give another path: "
        )
    for source in needed:
        path = fresh.root / source.partition(": ")[2]
        path.parent.mkdir(exist_ok=True)
        path.write_text("[]")
    rules = fresh.planned("--configfile", f"config/recipes/{name}")
    of_datasets = [f"{d}_{kind}" for d in config.datasets for kind in OF_DATASET]
    assert rules == sorted([*OF_RUN, *of_datasets, *OF_STAGES[name.removesuffix(".yaml")]])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("nodes", NODES)
def test_a_recipe_on_more_nodes(name: str, nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([SHIPPED, PLACE / name, PLACE / nodes])
    assert {stage.world_size for stage in config.stages.values()} == {8 * int(nodes[0])}
    assert [*config.stages] == [*load([PLACE / name]).stages]
    for stage in planned(config, monkeypatch)["stages"]:  # type: ignore[attr-defined]
        assert stage["fits"]


def test_language_models_have_the_sizes_of_their_model_cards() -> None:
    """Non-embedding parameters and embeddings (both of them) that the cards of llm-jp print."""
    for name, rest, embeddings in (
        ("llm-jp-3-1.8b.yaml", 1_459_718_144, 407_896_064),
        ("llm-jp-3-13b.yaml", 12_688_184_320, 1_019_740_160),
        ("llm-jp-4-8b.yaml", 7_784_894_464, 805_306_368),
    ):
        config = load([PLACE / name])
        geometry = model_of(config, shapes=PLACE / "models").geometry
        shape = PLACE / f"models/{config.hf_model.text_model.replace('/', '--')}.json"
        vocab = json.loads(shape.read_text())["vocab_size"]
        p = parameters(geometry)
        assert p.layers + p.final_norm == rest
        assert (p.embedding + p.head) * vocab == embeddings * geometry.vocab


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
