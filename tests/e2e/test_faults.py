"""Disturbed on purpose: a few of what `make faults` and `make chaos` do in full."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.benchmarks.chaos import INTERVAL, disturb
from tests.faults.drive import drive
from tests.helpers.chain import Chain


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_fault_in_a_save_leaves_the_old_or_the_new_checkpoint(
    chain: Chain, tmp_path: Path
) -> None:
    operations, counts = drive(chain, tmp_path, every=89, workers=1)
    assert operations > 100
    assert not [text for text in counts if text.startswith("BAD")], counts
    assert counts["old one"] and counts["new one"]


def test_disturbed_trainings_end_as_if_left_alone(chain: Chain) -> None:
    found = disturb(chain, kills=1, signals=1, seed=3)
    assert found["identical"] == 2
    assert int(str(found["lost_steps_max"])) <= INTERVAL
