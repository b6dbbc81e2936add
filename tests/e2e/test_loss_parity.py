"""Twenty steps of the parallel trainer against a plain PyTorch loop over the HF model, in fp32."""

from __future__ import annotations

import json

import pytest

from tests.helpers import reference
from tests.helpers.chain import Chain, metrics, sample_ids

STEPS, BATCH = 20, 8
LR, WARMUP, DECAY, CLIP = 1e-3, 3, 0.05, 0.5
COMMON = (
    f"--train-steps={STEPS}", f"--global-batch-size={BATCH}", f"--lr={LR}",
    f"--warmup-steps={WARMUP}", f"--weight-decay={DECAY}", f"--clip-grad={CLIP}",
)  # fmt: skip
LAYOUTS = {
    "dp1": ("--gpus=1", "--micro-batch-size=4"),
    "dp2": ("--gpus=2", "--micro-batch-size=2"),
    "tp2": ("--gpus=2", "--tp=2", "--micro-batch-size=4"),
    "tp2sp": ("--gpus=2", "--tp=2", "--sequence-parallel", "--micro-batch-size=8"),
    "pp2": ("--gpus=2", "--pp=2", "--micro-batch-size=2"),
    "dp2 packed": ("--gpus=2", "--packing", "--num-workers=1"),
    "dp1 packed compiled": ("--gpus=1", "--packing", "--compile=layers"),
    "tp2 packed": ("--gpus=2", "--tp=2", "--packing"),
    "pp2 packed": ("--gpus=2", "--pp=2", "--packing", "--pad-to=budget"),
}  # fmt: skip
TOWER = "vision_tower"
STAGES = {
    1: (("--freeze-lm",), ("multi_modal_projector",)),
    2: ((), ("multi_modal_projector", "language_model", "lm_head")),
}


@pytest.fixture(scope="module")
def expected(chain: Chain) -> dict[int, tuple[list[list[str]], list[float]]]:
    """Per stage: sample ids of the steps, and the losses that the reference has on them."""
    found = {}
    for stage, (flags, trained) in STAGES.items():
        line = (f"--stage={stage}", *COMMON, *flags, *LAYOUTS["dp1"])
        out = chain.train(f"parity{stage}_dp1", *line)
        ids = sample_ids(out)
        assert len(ids) == STEPS and all(len(batch) == BATCH for batch in ids)
        losses = reference.train(
            chain.hf, chain.dataset, ids, trained=trained, steps=STEPS, lr=LR, warmup=WARMUP,
            weight_decay=DECAY, clip=CLIP,
        )  # fmt: skip
        found[stage] = (ids, losses)
    return found


@pytest.mark.parametrize(
    ("stage", "layout"), [(2, name) for name in LAYOUTS] + [(1, "dp1"), (1, "tp2"), (1, "pp2")]
)
def test_losses_agree(chain: Chain, expected, stage: int, layout: str) -> None:
    ids, losses = expected[stage]
    flags = (f"--stage={stage}", *COMMON, *STAGES[stage][0], *LAYOUTS[layout])
    out = chain.train(f"parity{stage}_{layout.replace(' ', '_')}", *flags)
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert sample_ids(out) == ids, "the same samples in the same global batches"
    computed = json.loads((out / "manifest.json").read_bytes())["metrics"]["computed"]
    assert computed["compiled"] == ("compiled" in layout) and computed["layer_spec"] == "local"
    deviations = [abs(r["loss"] - e) / e for r, e in zip(rows, losses, strict=True)]
    print(f"stage {stage} {layout}: largest relative deviation {max(deviations):.2e}")
    assert max(deviations) <= 1e-5, deviations
    assert losses[-1] < losses[0], "the reference learns"
