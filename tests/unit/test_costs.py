"""Predicted parameters and operations against those of the built model, counted by torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from llava_steps.conversion.tower import tower_shapes
from llava_steps.geometry.costs import Trained, Work, flops, parameters, trained_parameters
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.stage.stage import Stage
from tests.helpers.cost_workers import Case, Counted
from tests.helpers.dist_helpers import spawn
from tests.helpers.model_fixtures import TINY, config_of, pack_samples, samples

TRAINED = tuple(Trained(*each) for each in product((False, True), repeat=3) if any(each))
CASES = (
    *(("untied-default", trained) for trained in TRAINED),
    *(("tied-full", trained) for trained in (Trained(), Trained(vision=True))),
    *((name, Trained(vision=True)) for name in ("biases-uneven", "siglip-mha", "qwen3")),
    *((name, Trained(language_model=False)) for name in ("siglip-mha", "mistral", "qwen2-tied")),
)
ROWS, TEXT = (0, 2, 3), 1
"""Samples with images; a row of text alone still sends one blank through the projector."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, Geometry, Counted]]:
    directory = tmp_path_factory.mktemp("costs")
    cases = []
    for name, trained in CASES:
        if not (hf := directory / name).exists():
            config_of(TINY[name]).save_pretrained(hf)
        all_samples = samples(Geometry.load(hf).tokens_per_image)
        rows = tuple(pack_samples(all_samples, (i,), len(all_samples[i].tokens)) for i in ROWS)
        text = pack_samples(all_samples, (TEXT,), len(all_samples[TEXT].tokens))
        cases.append(Case(hf, trained, rows, text))
    results = spawn("tests.helpers.cost_workers:count", 1, directory, cases)[0]
    return [(c, Geometry.load(c.hf), r) for c, r in zip(cases, results, strict=True)]


def part(name: str, geometry: Geometry) -> str:
    if name.startswith("vision_tower.encoder.layers."):
        return "vision_rest" if int(name.split(".")[3]) >= geometry.feature_depth else "vision_read"
    places = {
        "vision_tower.embeddings": "vision_read",
        "vision_tower.pre_layrnorm": "vision_read",
        "vision_tower.": "vision_rest",
        "mm_projector.": "projector",
        "language_model.embedding.": "embedding",
        "language_model.decoder.layers.": "layers",
        "language_model.decoder.final_layernorm.": "final_norm",
        "language_model.output_layer.": "head",
    }
    return next(value for prefix, value in places.items() if name.startswith(prefix))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{n}")
def test_parameters_are_those_of_the_built_model(
    counted: list[tuple[Case, Geometry, Counted]], number: int
) -> None:
    case, geometry, found = counted[number]
    everything = dict.fromkeys(parameters(geometry).parts(), 0)
    trained = dict(everything)
    for name, (size, is_trained) in found.parameters.items():
        everything[part(name, geometry)] += size
        trained[part(name, geometry)] += is_trained * size
    assert parameters(geometry).parts() == everything
    assert trained_parameters(geometry, case.trained).parts() == trained
    assert parameters(geometry).total == sum(everything.values())


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{n}")
def test_operations_are_those_that_torch_counts(
    counted: list[tuple[Case, Geometry, Counted]], number: int
) -> None:
    case, g, found = counted[number]
    work = Work()
    for row in case.rows:
        images = 0 if row.pixel_values is None else len(row.pixel_values)
        length = row.tokens.shape[1]
        work += Work.of([length], int((row.labels != -100).sum()), images)
    predicted = flops(g, case.trained, work, head="supervised")
    # torch multiplies whole squares here, of which a causal model looks at one half.
    assert found.operations == predicted.total + predicted.attention


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{n}")
def test_rows_with_and_without_images_ask_for_weights_in_one_order(
    counted: list[tuple[Case, Geometry, Counted]], number: int
) -> None:
    """With overlap_param_gather each module fetches its weights as it is called, from all ranks: if
    one has a row of text alone and calls them in another order, the ranks mix weights up.
    """
    case, _, found = counted[number]
    assert case.text.pixel_values is None
    with_image, text = found.orders
    assert text and text == with_image


@pytest.mark.parametrize("name", ["untied-default", "siglip-mha"])
def test_a_tower_without_a_pooling_head_and_of_one_channel(name: str, tmp_path: Path) -> None:
    config = config_of(TINY[name])
    config.vision_config.vision_use_head = False
    config.vision_config.num_channels = 1
    config.save_pretrained(tmp_path)
    geometry = Geometry.load(tmp_path)
    p = parameters(geometry)
    sizes = [torch.Size(shape).numel() for shape in tower_shapes(geometry).values()]
    assert p.vision_read + p.vision_rest == sum(sizes)


def test_known_models_have_their_published_sizes() -> None:
    """LLaVA-1.5-7B: 7,063,427,072 parameters by its safetensors index (llava-hf, 4.37)."""
    geometry = Geometry.from_hf(
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {"model_type": "llama", "vocab_size": 32064},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "image_size": 336,
                "patch_size": 14,
            },
        }
    )
    p = parameters(geometry)
    assert p.total == 7_063_427_072
    assert p.embedding + p.layers + p.final_norm + p.head == 6_738_939_904
    # 576 image tokens and 100 of text, all of them trained: 6 per weight and token, and attention.
    work = Work.of([676], supervised=100, images=1)
    all_heads = flops(geometry, Trained(), work, head="tokens")
    weights = p.layers + p.head
    assert all_heads.layers + all_heads.head == pytest.approx(6 * weights * 676, rel=1e-4)
    supervised = flops(geometry, Trained(), work, head="supervised")
    assert all_heads.total - supervised.total == 6 * p.head * 576


def test_stages_say_what_they_train() -> None:
    stage = Stage(stage=1)
    assert Trained.by(stage) == Trained(vision=False, projector=True, language_model=False)
    assert Trained.by(Stage(stage=2)) == Trained()
    assert replace(Trained.by(stage), vision=True).vision
