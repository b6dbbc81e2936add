"""The GPUs of this machine, as torch sees them, from a separate process.

The launcher of a training never loads torch and never uses a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

LIMIT = 300
"""Seconds; loading torch and Transformer Engine over a network takes time."""
PROBE = """
import json, torch
report = {"gpus": [torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())]}
if report["gpus"] and %(engine)r:
    try:
        import transformer_engine.pytorch
        from importlib.metadata import version
        report["version"] = version("transformer_engine")
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(report))
"""


def probe(gpu_ids: str, engine: bool = False, limit: float = LIMIT) -> dict[str, Any]:
    """`gpus`: the compute capability of each of `gpu_ids`, or of all visible ones.

    With `engine` also the `version` of Transformer Engine. `error` is the reason for missing
    values, such as no answer within `limit` seconds.
    """
    chosen = {"CUDA_VISIBLE_DEVICES": gpu_ids} if gpu_ids else {}
    line = [sys.executable, "-c", PROBE % {"engine": engine}]
    try:
        ran = subprocess.run(
            line, env=os.environ | chosen, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"gpus": [], "error": f"torch did not answer within {limit:g} seconds"}
    if ran.returncode:
        last = (ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()[-1]
        return {"gpus": [], "error": last}
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report
