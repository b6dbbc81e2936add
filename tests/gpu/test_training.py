"""The same code on a GPU: exact in fp32, close in bf16, resumed to the same bits."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.e2e.test_loss_parity import BATCH, CLIP, COMMON, DECAY, LR, STAGES, STEPS, WARMUP
from tests.e2e.test_train_step import stopped, value
from tests.helpers import reference
from tests.helpers.chain import Chain, metrics, sample_ids
from tests.helpers.needs import ENGINE

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ONE = ("--gpus=1", "--tp=1", "--micro-batch-size=4")


@pytest.mark.parametrize("stage", [1, 2])
def test_fp32_losses_agree_with_plain_pytorch(chain: Chain, stage: int) -> None:
    flags, trained = STAGES[stage]
    out = chain.train(f"gpu_parity{stage}", f"--stage={stage}", *COMMON, *flags, *ONE)
    ids = sample_ids(out)
    assert len(ids) == STEPS and all(len(batch) == BATCH for batch in ids)
    losses = reference.train(
        chain.hf, chain.dataset, ids, trained=trained, steps=STEPS, lr=LR, warmup=WARMUP,
        weight_decay=DECAY, clip=CLIP,
    )  # fmt: skip
    deviations = [abs(r["loss"] - e) / e for r, e in zip(metrics(out), losses, strict=True)]
    print(f"GPU stage {stage}: largest relative deviation {max(deviations):.2e}", file=sys.stderr)
    assert max(deviations) <= 1e-5, deviations


def test_bf16_follows_fp32(chain: Chain) -> None:
    line = (*COMMON, "--stage=2", *ONE)
    exact = [row["loss"] for row in metrics(chain.train("gpu_fp32", *line))]
    rough = [row["loss"] for row in metrics(chain.train("gpu_bf16", *line, "--precision=bf16"))]
    deviations = [abs(a - b) / b for a, b in zip(rough, exact, strict=True)]
    assert 0 < deviations[0] < 0.02 and sum(deviations) / len(deviations) < 0.04, deviations


WAYS = {
    "fp32": (*ONE, "--precision=fp32"),
    "bf16": (*ONE, "--precision=bf16"),
    "compiled": (*ONE[:2], "--precision=bf16", "--packing", "--compile=layers"),
    "fp8": (*ONE[:2], "--precision=bf16", "--packing", "--fp8", "--layer-spec=local"),
    "fp8 te": (*ONE[:2], "--precision=bf16", "--packing", "--fp8"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=ENGINE if "te" in way else ()) for way in WAYS]
)
def test_a_stop_is_resumed_bit_for_bit(chain: Chain, way: str) -> None:
    """200 steps, as a stop has to come before the last; a GPU needs a second for them."""
    flags = (*WAYS[way], "--seed=5", "--num-workers=2", "--train-steps=200")
    name = f"gpu_stop_{way.replace(' ', '_')}"
    line = (
        "--stage=2", "--warmup-steps=3", "--lr=1e-3", "--global-batch-size=8",
        "--save-interval=1000", *flags,
    )  # fmt: skip
    out = chain.train(name, *line)
    whole = value(out)
    shutil.rmtree((out / "samples").resolve().parent)
    shutil.rmtree(out)
    stopped(chain, name, *line)
    assert value(chain.train(name, *line)) == whole
