"""Write the blend file of a stage that reads several datasets.

    llava-steps blend --datasets captions=results/x/captions_energon_dataset \\
        --datasets docs=/shared/docs --weights captions=3 --weights docs=1 \\
        --save-dir results/x/stage2_blend

The file, blend.yaml, has the form of megatron-energon's MetadatasetV2. It has a validation split of
the datasets that have one. A result of this project is named relative to the file, so that the
store can be moved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError
from llava_steps.settings.blend_file import BlendFile
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step
from llava_steps.store.store import Input


def run(ctx: Context, cfg: BlendFile) -> Mapping[str, Any]:
    """Write the blend; metrics give the samples of each dataset that it trains on.

    Raises:
        ConfigError: an option names a dataset that is not given, or one without a weight.
        InputError: a dataset cannot be read.
    """
    import yaml

    from llava_steps.data.energon.metadata import read_metadata, split_shards
    from llava_steps.data.energon.reader import SampleReader

    _check_names(cfg)
    splits: dict[str, Any] = {}
    for split in ("train", "val"):
        rows = []
        for name in cfg.datasets:
            data = ctx.inputs[f"datasets.{name}"]
            if split == "train" or split_shards(read_metadata(data.path), split):
                rows.append(_row(ctx, cfg, name, data))
        if rows:
            splits[split] = {"blend" if cfg.weights else "blend_epochized": rows}
    table = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
    filesystem.write_bytes(ctx.entry / BlendFile.NAME, text.encode())
    sizes = {
        name: len(SampleReader(ctx.inputs[f"datasets.{name}"].path, "train"))
        for name in cfg.datasets
    }
    for name, size in sizes.items():
        ctx.log.info("%s: %d samples", name, size)
    return {"samples": sizes}


def _check_names(cfg: BlendFile) -> None:
    options: dict[str, Mapping[str, Any]] = {
        "weights": cfg.weights,
        "repetitions": cfg.repetitions,
        "max_turns": cfg.max_turns,
        "chat_templates": cfg.chat_templates,
    }
    for option, names in options.items():
        if unknown := sorted({*names} - {*cfg.datasets}):
            raise ConfigError(f"--{option.replace('_', '-')} {unknown[0]}: not one of --datasets")
    if cfg.weights and (missing := sorted({*cfg.datasets} - {*cfg.weights})):
        raise ConfigError(f"--weights: {missing[0]} has none; give each dataset one")


def _row(ctx: Context, cfg: BlendFile, name: str, data: Input) -> dict[str, Any]:
    options: dict[str, Any] = {"name": name}
    if name in cfg.max_turns:
        options["max_turns"] = cfg.max_turns[name]
    if template := ctx.inputs.get(f"chat_templates.{name}"):
        options["chat_template"] = str(template.path.resolve())
    if cfg.weights:
        share: dict[str, Any] = {"weight": cfg.weights[name]}
    else:
        share = {"repetitions": cfg.repetitions.get(name, 1)}
    return {"path": _named(ctx.entry, data), **share, "subflavors": options}


def _named(entry: Path, data: Input) -> str:
    """The dataset as the file names it: an entry of the store from the file on."""
    path = data.path.resolve()
    return os.path.relpath(path, entry) if data.entry is not None else str(path)


STEP = Step(name="blend", config=BlendFile, run=run, doc=__doc__)

if __name__ == "__main__":
    main(STEP)
