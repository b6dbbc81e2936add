"""Several GPUs, NCCL: the same losses in every layout, bf16 with compiled layers among them.

All layouts, in fp32, and the checkpoints that they read of each other: `make layouts` there.
"""

from __future__ import annotations

import sys

import pytest

from tests.chain import Chain, metrics
from tests.e2e.test_loss_parity import COMMON

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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses(chain: Chain, layout: str, precision: str) -> None:
    name = f"gpus_{layout}_{precision}".replace(" ", "_")
    compiled = ("--compile=layers",) if "compiled" in layout and precision == "bf16" else ()
    line = (*COMMON, "--stage=2", *LAYOUTS[layout], f"--precision={precision}", *compiled)
    found = [row["loss"] for row in metrics(chain.train(name, *line))]
    alone = (*COMMON, "--stage=2", "--gpus=1", "--tp=1", "--precision=fp32")
    wanted = [row["loss"] for row in metrics(chain.train("gpus_alone", *alone))]
    off = [abs(a - b) / b for a, b in zip(found, wanted, strict=True)]
    print(f"{layout} {precision}: {max(off):.1e}", file=sys.stderr)
    if precision == "fp32":
        assert max(off) <= 1e-5
    else:
        assert 0 < off[0] < 0.02 and sum(off) / len(off) < 0.04
