"""The speed benchmark runs whole, in little and without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_runs(tmp_path: Path) -> None:
    line = [
        sys.executable, "-m", "tests.benchmarks.train_gpu", "--tiny", "--device=cpu",
        "--parts=ours,ours-pp2,peer-a", "--set", '{"compile": "none"}', f"--keep={tmp_path}",
    ]  # fmt: skip
    ran = subprocess.run(
        line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    rows = json.loads(ran.stdout.splitlines()[-1])["rows"]
    assert rows["tiny ours"]["compilations"] == 0
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
