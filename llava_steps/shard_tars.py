"""Write raw images and conversations to tar shards.

    llava-steps shard_tars --source data/train.json --save-dir results/x/tar_shards

Reads LLaVA JSON or JSONL, parquet with embedded images, a folder of images with a CSV, TSV or JSONL
of texts, or webdataset tars; `--source-format` names the form if it cannot be detected. Every
sample is checked. Usable ones are written to 000000.tar, 000001.tar, ..., the others are listed
with the reason in quarantine.jsonl; above `--quarantine-limit` the step fails. The same input and
settings give the same bytes for any number of workers.

On several machines, such as a Slurm array of 8 jobs: `--part 1/8 --save-dir parts/1` to
`--part 8/8 --save-dir parts/8`, then once `--parts parts` without `--part`. The bytes are the same.
The workflow does this if `cluster.jobs` is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_steps.core.errors import InputError
from llava_steps.settings.dataset import TarShards
from llava_steps.settings.fields import values
from llava_steps.settings.hub_id import parse_dataset
from llava_steps.store.hub import Hub
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

if TYPE_CHECKING:
    from llava_steps.data.shards import writer
    from llava_steps.data.shards.plan import Part
    from llava_steps.data.sources import Options


def run(ctx: Context, cfg: TarShards) -> Mapping[str, Any]:
    """Write the shards into `ctx.entry`; metrics say how many samples went where."""
    from llava_steps.data import sources
    from llava_steps.data.shards import shares as shardparts
    from llava_steps.data.shards import writer

    source = sources.open_source(ctx.inputs["source"].path, cfg.source_format, _options(cfg))
    ctx.log.info("reading %s as %s", source.path, source.name)
    records = source.count()
    for note in source.notes():
        ctx.log.warning("%s", note)
    settings = writer.Settings(source, ctx.entry, cfg.samples_per_shard)
    if cfg.part:
        size = shardparts.share_size(records, cfg.samples_per_shard, cfg.part)
        with ctx.progress(f"sharding, share {cfg.part}", size) as bar:
            return shardparts.write_share(settings, cfg.part, cfg.workers, bar.advance)
    made = _shares(ctx, cfg, settings) if cfg.parts else None
    with ctx.progress("sharding", records) as bar:
        metrics = writer.write_shards(
            settings, cfg.workers, cfg.quarantine_limit, bar.advance, made
        )
    for reason, count in metrics["quarantine_reasons"].items():
        ctx.log.warning("quarantined %d x %s", count, reason)
    if metrics["duplicate_ids"]:
        ctx.log.warning(
            "%d ids occur more than once; all their samples are kept, distinguished by tar and key",
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


def _shares(ctx: Context, cfg: TarShards, settings: writer.Settings) -> Iterator[Part]:
    from llava_steps.data.shards import shares as shardparts
    from llava_steps.store.code_version import code_version

    folder = Path(cfg.parts)
    if not folder.is_dir():
        raise InputError(
            f"parts: {folder} is not a directory; give the one with the results of all parts"
        )
    # The shares differ only in their number.
    wanted = values(cfg.model_copy(update={"part": "1/1"}))
    del wanted["part"]
    chunks = settings.source.chunks(settings.samples_per_shard)
    code = code_version("llava_steps.shard_tars")
    return shardparts.read_shares(folder, wanted, ctx.inputs["source"].digest, code, chunks)


def _options(cfg: TarShards) -> Options:
    from llava_steps.data.sources import Options

    return Options(cfg.columns, cfg.question, cfg.max_pixels, cfg.other_images, cfg.decode_images)


def local(text: str, hub: Hub) -> Path:
    """The path, or the files of a dataset on the hub, downloaded if they are missing."""
    return hub.dataset(text) if parse_dataset(text) else Path(text)


def _source_files(path: Path, cfg: TarShards) -> tuple[Path, Iterable[Path]]:
    from llava_steps.data.sources import content_files

    return content_files(path, cfg.source_format, _options(cfg))


def _published(cfg: TarShards) -> None:
    if cfg.remove_parts:
        from llava_steps.data.shards.shares import remove_shares

        remove_shares(Path(cfg.parts))


STEP = Step(
    name="tar_shards",
    config=TarShards,
    run=run,
    doc=__doc__,
    resolve={"source": local},
    parts={"source": _source_files},
    published=_published,
)

if __name__ == "__main__":
    main(STEP)
