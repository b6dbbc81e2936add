"""A sample's loss does not depend on what shares its row."""

from __future__ import annotations

from pathlib import Path

from tests.chain import Chain
from tests.dist_helpers import spawn
from tests.packing_worker import BATCH, LENGTH, STEPS


def test_200_samples_have_the_same_losses_packed_and_alone(chain: Chain, tmp_path: Path) -> None:
    arguments = (chain.hf, chain.dataset, chain.checkpoint)
    ((alone, packed),) = spawn("tests.packing_worker:losses", 1, tmp_path, *arguments)
    (one_by_one, singles, tokens), (together, rows, same_tokens) = alone, packed
    assert singles == len(one_by_one) == STEPS * BATCH == 200 and tokens == same_tokens
    assert [s[:2] for s in one_by_one] == [s[:2] for s in together], "the same samples, in order"
    assert tokens / LENGTH <= rows < singles / 2, "rows really hold several samples"
    worst = max(abs(a[2] - b[2]) for a, b in zip(one_by_one, together, strict=True))
    print(f"{singles} samples in {rows} packed rows: largest difference of a loss {worst:.2e}")
    assert worst <= 1e-5
    assert len({round(s[2], 4) for s in one_by_one}) > 100, "the losses tell samples apart"
