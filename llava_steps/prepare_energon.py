"""Index tar shards as a megatron-energon dataset, without prompts.

    llava-steps prepare_energon --tar-dir results/x/tar_shards \\
        --save-dir results/x/energon_dataset

Checks every tar (size, sha256, headers, end of archive, number of samples), links it into the
dataset and writes what `energon prepare` would: `.tar.idx` files and `.nv-meta/`. Other tars work
too: without a shards.json beside them every sample in them is read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.settings.dataset import EnergonDataset
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step


def run(ctx: Context, cfg: EnergonDataset) -> Mapping[str, Any]:
    """Make `ctx.entry` an energon dataset; metrics give samples and tars of each split."""
    from llava_steps.data.energon import prepare as energon

    tar_dir = ctx.inputs["tar_dir"].path
    with ctx.progress("indexing tars", len(energon.find_tars(tar_dir))) as bar:
        metrics = energon.prepare(
            tar_dir,
            ctx.entry,
            list(cfg.split),
            cfg.sample_type,
            dict(cfg.field_map),
            cfg.workers,
            bar.advance,
        )
    for part, samples in metrics["samples"].items():
        ctx.log.info("%s: %d samples in %d tars", part, samples, metrics["shards"][part])
    for name, count in metrics.get("parts_left_out", {}).items():
        ctx.log.warning("%d parts %r are in the tars, but in no field of the samples", count, name)
    return metrics


STEP = Step(name="energon_dataset", config=EnergonDataset, run=run, doc=__doc__)

if __name__ == "__main__":
    main(STEP)
