"""Layouts of the trainer beyond those of test_loss_parity.py, in one set of four processes.

`make layouts` has the whole table and every pair, against one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_steps.conversion.torch_dist_write import Reader
from tests.benchmarks.layouts import BAR, COMMON, LAYOUTS, Row, compare
from tests.helpers import plain_lora, reference
from tests.helpers.chain import Chain, metrics, sample_ids
from tests.helpers.dist_helpers import spawn
from tests.helpers.layout_workers import Room, Training, deep_model

STEPS = 6
NAMES = (
    "dp4", "dp4 compiled overlap", "pp2 dp2 interleaved overlap", "pp2 dp2 uneven",
    "tp2 sp pp2 interleaved", "lora tp2 pp2", "lora tp2 sp pp2 interleaved",
)  # fmt: skip
PAIRS = (
    ("dp4", "tp2 sp pp2 interleaved"),
    ("tp2 sp pp2 interleaved", "pp2 dp2 uneven"),
    ("pp2 dp2 uneven", "pp2 dp2 interleaved overlap"),
    ("pp2 dp2 interleaved overlap", "dp4"),
    ("lora tp2 sp pp2 interleaved", "lora tp2 pp2"),
)


@pytest.fixture(scope="module")
def room(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Room:
    root = tmp_path_factory.mktemp("layouts")
    hf, _ = deep_model(chain, root)
    return Room(hf, chain.dataset.resolve(), root)


@pytest.fixture(scope="module")
def tables(chain: Chain, room: Room) -> tuple[list[Row], list[Row]]:
    _, start = deep_model(chain, room.root)
    return compare(room, start, NAMES, PAIRS, STEPS)


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda n: NAMES[n])
def test_every_layout_has_the_same_losses(tables: tuple[list[Row], list[Row]], number: int) -> None:
    name, apart = tables[0][number]
    assert name == NAMES[number] and apart <= BAR, apart


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: " -> ".join(PAIRS[n]))
def test_each_goes_on_from_the_other(tables: tuple[list[Row], list[Row]], number: int) -> None:
    name, apart = tables[1][number]
    assert name == " -> ".join(PAIRS[number]) and apart <= BAR, apart


@pytest.mark.parametrize("compile", ["none", "layers"])
def test_overlap_reduces_while_the_backward_pass_goes_on(
    chain: Chain, room: Room, tmp_path: Path, compile: str
) -> None:
    _, start = deep_model(chain, room.root)
    settings = {**COMMON, **LAYOUTS["dp4 compiled overlap"].settings, "compile": compile}
    training = Training(f"reductions {compile}", {**settings, "train_steps": 3}, start)
    for events in spawn("tests.helpers.layout_workers:reductions", 2, tmp_path, room, training):
        buckets = events.count("finish") // 3
        assert buckets > 3
        # In the first step megatron-core only learns which gradients to wait for.
        assert events[2 * buckets :] == (["start"] * buckets + ["finish"] * buckets) * 2


def test_fp8_of_torch_is_the_same_in_each_layout(chain: Chain, room: Room) -> None:
    """Its scales are those of microbatches, which no layout changes; fp32 is near."""
    _, start = deep_model(chain, room.root)
    plain = {**COMMON, "train_steps": 3, "freeze_vision": True, "vision_lr": None}
    own = {"precision": "bf16", "fp8": True, "layer_spec": "local", "compile": "layers"}
    overlap = {"overlap_grad_reduce": True, "bucket_size": 20_000}

    def losses(ranks: int, **ways: dict[str, object]) -> list[list[float]]:
        made = [Training(name, {**plain, **settings}, start) for name, settings in ways.items()]
        found: list[list[float]] = spawn(
            "tests.helpers.layout_workers:train", ranks, room.root, room, made
        )[0]
        return found

    exact, alone = losses(1, exact={}, fp8=own)
    far = [abs(a - b) / b for a, b in zip(alone, exact, strict=True)]
    assert 1e-5 < far[0] < 0.02 and max(far) < 0.04, far
    for found in losses(2, dp2=own | overlap, pp2={**own, "pipeline_model_parallel": 2}):
        assert found[0] == alone[0] and found == pytest.approx(alone, rel=1e-3)


def test_lora_trains_as_in_plain_pytorch(tables: tuple[list[Row], list[Row]], room: Room) -> None:
    entry = room.entry("whole lora tp2 pp2")
    losses = [row["loss"] for row in metrics(entry)]
    targets = list(plain_lora.FUSED)
    trained = Reader(next(entry.glob("iter_*/weights")))

    def first_values(name: str) -> torch.Tensor:
        """A is uniform within 1 / sqrt(in), by seed 1234, layer and target; B is 0."""
        shape, (target, part) = trained.shapes()[f"lora.{name}"], name.split(".")
        if part == "b":
            return torch.zeros(shape)
        seeds = [(1234 * 100003 + layer) * 8 + targets.index(target) for layer in range(shape[0])]
        drawn = [
            torch.empty(shape[1:]).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return torch.stack(drawn) / shape[-1] ** 0.5

    def prepare(model: object) -> None:
        plain_lora.add(model, first_values, tuple(targets), 8.0 / 4)

    expected = reference.train(
        room.hf, room.dataset, sample_ids(entry), trained=("multi_modal_projector", "lora_"),
        steps=STEPS, lr=COMMON["lr"], warmup=0, weight_decay=0.1, clip=1.0, prepare=prepare,
        constant=True, factors={"multi_modal_projector": 2.0, "lora_": 3.0},
    )  # fmt: skip
    apart = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"largest relative deviation {apart:.1e}")
    assert apart <= BAR
    assert losses[-1] < losses[0]
