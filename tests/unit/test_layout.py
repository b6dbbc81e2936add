"""How a model is cut into parallel parts, and which cuts are refused, without any process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_steps.core.errors import ConfigError
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.layout import check_layout, costs, even_split, pipeline_split
from llava_steps.settings.stage.stage import Stage
from tests.helpers.model_fixtures import TINY, config_of


@pytest.fixture(scope="module")
def llava() -> Geometry:
    """The sizes of LLaVA-1.5 7B over those of a tiny model."""
    tiny = Geometry.from_hf(config_of(TINY["untied-default"]).to_dict())
    return replace(
        tiny, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32128,
        vision_hidden=1024, vision_layers=24, feature_layer=-2, image_size=336, patch_size=14,
        tokens_per_image=576, vision_config={"intermediate_size": 4096},
    )  # fmt: skip


def stage(**values: object) -> Stage:
    settings = {"stage": 2, "gpus": 8, "global_batch_size": 64, "pipeline_model_parallel": 4}
    return Stage.model_validate({**settings, **values})


@pytest.mark.parametrize(
    ("layers", "chunks", "split"),
    [(32, 4, (8, 8, 8, 8)), (3, 2, (2, 1)), (5, 4, (2, 1, 1, 1)), (7, 1, (7,))],
)
def test_even(layers: int, chunks: int, split: tuple[int, ...]) -> None:
    assert even_split(layers, chunks) == split


def test_auto_relieves_the_ends(llava: Geometry) -> None:
    fewer = replace(llava, layers=30)
    assert pipeline_split(fewer, stage()) == (7, 8, 8, 7)
    assert pipeline_split(fewer, stage(pipeline_split="even")) == (8, 8, 7, 7)
    heavy = replace(fewer, vision_layers=96, vocab=256128)
    assert pipeline_split(heavy, stage(freeze_vision=False)) == (5, 9, 9, 7)
    assert pipeline_split(heavy, stage()) == (7, 8, 8, 7), "a frozen tower costs a third"
    assert pipeline_split(llava, stage(pipeline_split="even")) == (8, 8, 8, 8)
    assert pipeline_split(llava, stage(pipeline_split="2,10,10,10")) == (2, 10, 10, 10)
    assert pipeline_split(llava, stage(pipeline_model_parallel=1)) == (32,)
    assert len(pipeline_split(llava, stage(virtual_pipeline=2))) == 8


@pytest.mark.parametrize("values", [{}, {"freeze_vision": False}, {"stage": 1}, {"lora_rank": 8}])
def test_no_other_split_has_a_lighter_heaviest_chunk(
    llava: Geometry, values: dict[str, object]
) -> None:
    s = stage(pipeline_model_parallel=2, **values)
    layer, first, last = costs(llava, s)

    def heaviest(front: int) -> float:
        return max(front * layer + first, (32 - front) * layer + last)

    best = min(range(1, 32), key=heaviest)
    assert heaviest(pipeline_split(llava, s)[0]) == heaviest(best)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (
            {"tensor_model_parallel": 2, "pipeline_split": "8,8,8,7"},
            "gives 31 layers .* auto finds",
        ),
        ({"virtual_pipeline": 16}, "set virtual_pipeline to at most 8"),
        ({"gpus": 64, "pipeline_model_parallel": 64}, "exceeds the model's 32 layers"),
        (
            {"gpus": 12, "tensor_model_parallel": 3},
            "does not divide vocab_size 32128; set hf_model.tp to 3,",
        ),
        ({"gpus": 256, "tensor_model_parallel": 64}, "does not divide num_attention_heads 32"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_fix(
    llava: Geometry, values: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        pipeline_split(llava, stage(**values))


def test_key_value_heads_and_ffn_are_looked_at_too(llava: Geometry) -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads 4"):
        check_layout(replace(llava, kv_heads=4), 8, 1)
    with pytest.raises(ConfigError, match="intermediate_size 11010"):
        check_layout(replace(llava, ffn=11010), 8, 1)
