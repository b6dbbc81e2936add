"""Predicted memory against the tensors of real trainings, the demo's among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_steps.geometry.costs import Trained
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.memory import Layout, Memory, Row, memory, of_stage
from llava_steps.planning.models import model_of
from llava_steps.settings.load import load
from llava_steps.settings.stage.stage import Stage
from tests.benchmarks import gpu_work
from tests.helpers.cost_workers import Kept, Training
from tests.helpers.dist_helpers import spawn
from tests.helpers.model_fixtures import Batch

ROOT = Path(__file__).parents[2]
DEMO = load([ROOT / "config/config.yaml"])
DEEP = load([ROOT / "config/config.yaml"], ["demo_assets={text_hidden_size: 64, text_layers: 4}"])
"""For the other layouts: with two layers a pipeline of two has one layer a process."""
TEXT, SUPERVISED = 24, 8
STAGES = {
    "demo, stage 1": DEMO.stages["stage1"].settings,
    "demo, stage 2": DEMO.stages["stage2"].settings,
    "pipeline": {"pipeline_model_parallel": 2, "micro_batch_size": 8, "global_batch_size": 32},
    "sequence parallel": {"tensor_model_parallel": 2, "sequence_parallel": True,
                          "micro_batch_size": 8, "global_batch_size": 8},
    "recompute core attention": {"tensor_model_parallel": 2, "recompute": "core_attn",
                                 "micro_batch_size": 8, "global_batch_size": 8},
    "recompute all": {"micro_batch_size": 8, "global_batch_size": 16, "recompute": "full"},
    "one long sample": {"micro_batch_size": 1, "global_batch_size": 2},
    "compiled": {"micro_batch_size": 8, "global_batch_size": 16, "compile": "layers"},
    "compiled, stage 1": {"stage": 1, "micro_batch_size": 8, "global_batch_size": 16,
                          "compile": "layers"},
    "compiled pipeline, recompute all": {"micro_batch_size": 8, "global_batch_size": 32,
                                         "compile": "layers", "pipeline_model_parallel": 2,
                                         "recompute": "full"},
    "bf16": {"micro_batch_size": 8, "global_batch_size": 16, "precision": "bf16"},
}  # fmt: skip


def stage_of(name: str) -> Stage:
    given = STAGES[name]
    common = {"stage": 2, "gpus": 2, "seq_length": 256, "precision": "fp32"}
    return given if isinstance(given, Stage) else Stage(**{**common, **given})


def row_of(geometry: Geometry, samples: int) -> Batch:
    """Samples of one image and TEXT tokens; one alone is eight times as long."""
    text = TEXT if samples > 1 else 8 * TEXT
    one = [geometry.image_token_id] * geometry.tokens_per_image + [7] * text
    labels = [-100] * (len(one) - SUPERVISED) + [7] * SUPERVISED
    return Batch(
        torch.tensor([one * samples]),
        torch.arange(len(one)).repeat(samples)[None],
        torch.arange(samples + 1, dtype=torch.int32) * len(one),
        len(one),
        torch.randn(samples, 3, geometry.image_size, geometry.image_size),
        torch.tensor([labels * samples]),
        tuple(range(samples)),
    )


def hf_config(geometry: Geometry) -> LlavaConfig:
    g = geometry
    text = LlamaConfig(
        vocab_size=g.vocab, hidden_size=g.hidden, intermediate_size=g.ffn, pad_token_id=2,
        num_hidden_layers=g.layers, num_attention_heads=g.heads, num_key_value_heads=g.kv_heads,
    )  # fmt: skip
    vision = CLIPVisionConfig(**{**g.vision_config, "num_attention_heads": 4})
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=g.image_token_id,
        vision_feature_layer=g.feature_layer,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Geometry, list[Kept]]]:
    directory = tmp_path_factory.mktemp("memory")
    geometries, trainings = {}, []
    for name in STAGES:
        stage, model = stage_of(name), "demo" if name.startswith("demo") else "deep"
        geometries[name] = geometry = model_of(DEMO if model == "demo" else DEEP).geometry
        hf_config(geometry).save_pretrained(directory / model)
        micro = stage.global_batch_size // (stage.micro_batch_size * stage.data_parallel)
        row = row_of(geometry, stage.micro_batch_size)
        trainings.append(
            Training(directory / model, stage, ((row,) * micro,) * stage.data_parallel)
        )
    ranks = spawn("tests.helpers.cost_workers:keep", 2, directory, trainings)
    return {
        name: (geometries[name], [rank[number] for rank in ranks])
        for number, name in enumerate(STAGES)
    }


@pytest.mark.parametrize("name", STAGES)
def test_every_part_is_what_the_training_keeps(
    measured: dict[str, tuple[Geometry, list[Kept]]], name: str
) -> None:
    geometry, ranks = measured[name]
    stage = stage_of(name)
    layout = Layout.by(geometry, stage, cuda=False)
    n, text = stage.micro_batch_size, TEXT if stage.micro_batch_size > 1 else 8 * TEXT
    longest = geometry.tokens_per_image + text
    row = Row(n * longest, n, longest, n, n * SUPERVISED)
    micro = stage.global_batch_size // (n * stage.data_parallel)
    for number, kept in enumerate(ranks):
        place = number if stage.pipeline_model_parallel > 1 else 0
        found = of_stage(geometry, Trained.by(stage), layout, row, micro, place)
        # Both lie in buffers that are padded, for the data-parallel ranks to share them.
        assert found.weights <= kept.weights <= found.weights + 4096
        assert found.gradients <= kept.gradients <= found.gradients + 4096
        assert found.optimizer == pytest.approx(kept.optimizer, rel=0.05, abs=4096)
        assert found.activations + found.logits == pytest.approx(kept.saved, rel=0.1), name
        whole = kept.weights + kept.gradients + kept.optimizer + kept.saved
        assert found.total == pytest.approx(whole, rel=0.1)


def test_the_process_that_needs_most_is_the_one_that_is_told() -> None:
    geometry = model_of(DEEP).geometry
    layout, row = Layout(pp=4, cuda=False, precision="fp32"), Row(400, 10, 40, 10, 80)
    each = [of_stage(geometry, Trained(), layout, row, 8, number) for number in range(4)]
    assert isinstance(each[0], Memory)
    assert each[0].activations > each[1].activations > each[2].activations
    assert each[3].logits and not any(found.logits for found in each[:3])


LOCAL = Layout(kernels=True, compiled=True)
FP8 = Layout(kernels=True, compiled=True, fp8=True)
ENGINE = replace(FP8, engine=True)


@pytest.mark.parametrize(
    ("shape", "stage", "layout", "gib"),
    [
        ("1.8b", 2, LOCAL, 64.3),
        ("1.8b", 1, LOCAL, 28.3),
        ("1.8b", 2, FP8, 60.9),
        ("1.8b", 1, FP8, 28.3),
        ("1.8b", 2, ENGINE, 63.1),
        ("1.8b", 1, ENGINE, 31.1),
        ("3.7b", 2, LOCAL, 113.3),
    ],
)
def test_the_peaks_that_were_measured_on_a_gpu(
    shape: str, stage: int, layout: Layout, gib: float, tmp_path: Path
) -> None:
    """Those of docs/explanation/performance.md; the longest row of that run, in a step of 7."""
    geometry = Geometry.load(gpu_work.hf_dir(tmp_path, shape))
    row = Row(tokens=16256, samples=24, longest=786, images=24, supervised=1876)
    found = memory(geometry, Trained(False, True, stage == 2), layout, row, 7).total / 2**30
    print(f"{shape}, stage {stage}: {found:.1f} GiB foretold, {gib} measured")
    assert found == pytest.approx(gib, rel=0.05)
