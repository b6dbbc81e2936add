"""Several GPUs, NCCL: the same losses in every layout, with compiled layers and with FP8.

All layouts, in fp32, and the checkpoints that they read of each other: `make layouts` there.
"""

from __future__ import annotations

import sys

import pytest

from tests.e2e.test_loss_parity import COMMON
from tests.helpers.chain import Chain, metrics
from tests.helpers.needs import ENGINE

torch = pytest.importorskip("torch")
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices"),
]
LAYOUTS = {
    "dp": (f"--gpus={min(GPUS, 4)}", "--tp=1", "--dist-optim"),
    "dp compiled": ("--gpus=2", "--tp=1", "--dist-optim", "--packing"),
    "dp compiled overlap": (
        f"--gpus={min(GPUS, 4)}",
        "--tp=1",
        "--dist-optim",
        "--packing",
        "--overlap-grad-reduce",
        "--bucket-size=20000",
    ),
    "dp overlap": ("--gpus=2", "--tp=1", "--dist-optim", "--overlap-grad-reduce"),
    "tp sp": ("--gpus=2", "--tp=2", "--sequence-parallel"),
    "pp compiled": ("--gpus=2", "--tp=1", "--pp=2", "--packing"),
}


DP_OVERLAP = ("--gpus=2", "--tp=1", "--dist-optim", "--overlap-grad-reduce", "--bucket-size=20000")
TE_LAYOUTS = {
    "dp overlap": (*DP_OVERLAP, "--overlap-param-gather"),
    "tp": ("--gpus=2", "--tp=2"),
    "tp sp": ("--gpus=2", "--tp=2", "--sequence-parallel"),
    "pp": ("--gpus=2", "--tp=1", "--pp=2"),
}


def follows(found: list[float], wanted: list[float], bar: float) -> None:
    """Rough losses stay near exact ones, first and on average, and differ."""
    off = [abs(a - b) / b for a, b in zip(found, wanted, strict=True)]
    assert 0 < off[0] < bar / 2 and sum(off) / len(off) < bar, off


@pytest.fixture(scope="module")
def alone(chain: Chain) -> list[float]:
    """Losses of one GPU in fp32."""
    line = (*COMMON, "--stage=2", "--gpus=1", "--tp=1", "--precision=fp32")
    return [row["loss"] for row in metrics(chain.train("gpus_alone", *line))]


@ENGINE
@pytest.mark.parametrize("engine", ["--layer-spec=te", "--fp8"])
@pytest.mark.parametrize("layout", TE_LAYOUTS)
def test_transformer_engine(chain: Chain, alone: list[float], layout: str, engine: str) -> None:
    name = f"gpus_te_{layout}{engine}".replace(" ", "_").replace("=", "_")
    line = (*COMMON, "--stage=2", *TE_LAYOUTS[layout], "--packing", "--precision=bf16", engine)
    found = [row["loss"] for row in metrics(chain.train(name, *line))]
    follows(found, alone, 0.04)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses(chain: Chain, alone: list[float], layout: str, precision: str) -> None:
    name = f"gpus_{layout}_{precision}".replace(" ", "_")
    compiled = ("--compile=layers",) if "compiled" in layout and precision == "bf16" else ()
    line = (*COMMON, "--stage=2", *LAYOUTS[layout], f"--precision={precision}", *compiled)
    found = [row["loss"] for row in metrics(chain.train(name, *line))]
    off = [abs(a - b) / b for a, b in zip(found, alone, strict=True)]
    print(f"{layout} {precision}: {max(off):.1e}", file=sys.stderr)
    if precision == "fp32":
        assert max(off) <= 1e-5
    else:
        follows(found, alone, 0.04)
