"""Raw images and conversations to tar shards.

    python -m llava_steps.shard_tars --source data/train.json --save-dir results/x/tar_shards

Reads LLaVA JSON or JSONL (`id`, `image`, `conversations`), checks every sample and writes
000000.tar, 000001.tar, ... Samples that cannot be used are listed with their reason in
quarantine.jsonl; above `--quarantine-limit` the step fails. The same input and settings give the
same bytes, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_steps.core.config import TarShards
from llava_steps.core.run import Context, Step, main


def run(ctx: Context, cfg: TarShards) -> Mapping[str, Any]:
    """Write the shards into `ctx.entry`; metrics say how many samples went where."""
    from llava_steps.data import shards, sources

    source = ctx.inputs["source"].path
    settings = shards.Settings(source, ctx.entry, cfg.samples_per_shard, cfg.max_pixels)
    total = sum(len(chunk.records) for chunk in sources.chunks(source, 1000))
    with ctx.progress("sharding", total) as bar:
        metrics = shards.write_shards(settings, cfg.workers, cfg.quarantine_limit, bar.advance)
    for reason, count in metrics["quarantine_reasons"].items():
        ctx.log.warning("quarantined %d x %s", count, reason)
    if metrics["duplicate_ids"]:
        ctx.log.warning(
            "%d ids occur more than once; all their samples are kept, told apart by tar and key",
            metrics["duplicate_ids"],
        )
    ctx.log.info(
        "%d samples: %d written to %d tars, %d quarantined",
        metrics["samples_in"],
        metrics["samples_written"],
        metrics["shards"],
        metrics["samples_quarantined"],
    )
    return metrics


def _source_files(path: Path) -> tuple[Path, Iterable[Path]]:
    from llava_steps.data.rawllava import content_files

    return content_files(path)


STEP = Step(
    name="tar_shards",
    config=TarShards,
    run=run,
    doc=__doc__,
    parts={"source": _source_files},
)

if __name__ == "__main__":
    main(STEP)
