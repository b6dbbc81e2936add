"""Weights between Hugging Face safetensors and a Megatron checkpoint, one tensor at a time.

Both directions follow the table of mapping.py, and each certifies itself: every HF tensor is read
or written exactly once, every Megatron tensor exactly once, with the shapes that config.json
implies. Neither needs a GPU, a process group or a model instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from shutil import copyfile

import torch
from torch import Tensor

from llava_steps.conversion import torch_dist_write
from llava_steps.conversion.cuts import Cuts, Part
from llava_steps.conversion.hf_names import by_canonical_name
from llava_steps.conversion.lora import open_weights
from llava_steps.conversion.mapping import Entry, check_hf, check_shapes, entries, stored_shapes
from llava_steps.conversion.tensors import INDEX, LikeWriter, TensorDirectory
from llava_steps.conversion.tower import tower_shapes
from llava_steps.conversion.transforms import TRANSFORMS
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry

Tick = Callable[[int], None]
WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt", ".onnx")
)
"""Files of a template that hold weights in any format; they are not copied."""


def _no_tick(_: int) -> None: ...


def count_entries(geometry: Geometry) -> int:
    """Tensors that a conversion moves: the total of its progress bar."""
    return len(entries(geometry, tower_shapes(geometry)))


def _plan(geometry: Geometry, hf: TensorDirectory) -> tuple[list[Entry], dict[str, str]]:
    """The entries of the model and canonical -> spelled HF names, checked against `hf`."""
    items = entries(geometry, tower_shapes(geometry))
    spelled = by_canonical_name(hf.slots, str(hf.directory))
    present = {name: hf.slots[own].shape for name, own in spelled.items()}
    check_hf(items, present, str(hf.directory))
    return items, spelled


def hf_to_dcp(
    geometry: Geometry,
    hf: TensorDirectory,
    weights: Path,
    tick: Tick = _no_tick,
    tp: int = 1,
    pp: int = 1,
) -> dict[str, int]:
    """Write the weights of `hf` as a torch_dist checkpoint; returns the certificate.

    Every tensor keeps its dtype. The files are those that a training with tensor parallel size
    `tp` and pipeline parallel size `pp` writes. IntegrityError names a tensor and file that do not
    fit; ConfigError if the model cannot be split for tp and pp.
    """
    items, spelled = _plan(geometry, hf)
    dtypes = _stored_dtypes(items, spelled, hf)
    consumed: Counter[str] = Counter()
    written: Counter[torch_dist_write.Chunk] = Counter()
    cuts = Cuts(geometry, tp, pp)
    planned: dict[torch_dist_write.Chunk, tuple[Entry, Part]] = {}
    for entry in items:
        for part in cuts.parts(entry):
            planned[_chunk(entry, part, geometry.layers, dtypes[entry.megatron])] = entry, part
    chunks = list(planned)
    current: list[tuple[Entry, Tensor]] = []  # the chunks of a tensor are consecutive

    def resolve(chunk: torch_dist_write.Chunk) -> Tensor:
        entry, part = planned[chunk]
        written[chunk] += 1
        if not current or current[0][0] is not entry:
            current.clear()
            current.append((entry, fuse(entry)))
        value = current[0][1]
        for axis, (offset, length) in enumerate(zip(part.offsets, part.shape, strict=True)):
            value = value.narrow(axis, offset, length)
        return value

    def fuse(entry: Entry) -> Tensor:
        parts = [hf.read(spelled[name]) for name in entry.hf]
        consumed.update(entry.hf)
        fused = TRANSFORMS[entry.transform].fuse(parts, geometry)
        if tuple(fused.shape) != entry.shape:
            raise IntegrityError(
                f"{hf.directory}: {entry.megatron!r} from {entry.hf} has shape "
                f"{list(fused.shape)}, expected {list(entry.shape)}"
            )
        tick(1)
        return fused

    torch_dist_write.write(weights, chunks, resolve)
    once(consumed, spelled, f"{hf.directory}", "read")
    if written != Counter(chunks):
        raise IntegrityError(f"{weights}: not every Megatron tensor was written exactly once")
    # Compare the plan with the written metadata.
    check_shapes(
        stored_shapes(items),
        torch_dist_write.Reader(weights).shapes(),
        str(weights),
        "the mapping table",
    )
    return {
        "hf_tensors": len(spelled),
        "megatron_tensors": len(dtypes),
        "chunks": len(chunks),
        "bytes": torch_dist_write.total(chunks),
    }


def _chunk(entry: Entry, part: Part, layers: int, dtype: torch.dtype) -> torch_dist_write.Chunk:
    """A part of an entry as a block of the stored tensor, which is stacked if it has layers."""
    whole, offsets, shape = entry.shape, part.offsets, part.shape
    if entry.layer is not None:
        whole, offsets, shape = (layers, *whole), (entry.layer, *offsets), (1, *shape)
    return torch_dist_write.Chunk(entry.megatron, whole, offsets, shape, dtype, part.rank)


def _stored_dtypes(
    items: list[Entry], spelled: dict[str, str], hf: TensorDirectory
) -> dict[str, torch.dtype]:
    """Megatron name -> dtype; IntegrityError where the parts of one tensor differ in dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for entry in items:
        for name in entry.hf:
            slot = hf.slots[spelled[name]]
            first = dtypes.setdefault(entry.megatron, slot.dtype)
            if slot.dtype != first:
                raise IntegrityError(
                    f"{slot.file}: {spelled[name]!r} is {slot.dtype}, but other parts of "
                    f"{entry.megatron!r} are {first}; save the model in one dtype"
                )
    return dtypes


def dcp_to_hf(
    geometry: Geometry,
    weights: Path,
    template: TensorDirectory,
    directory: Path,
    tick: Tick = _no_tick,
) -> dict[str, int]:
    """Write the checkpoint as safetensors in the layout of `template`; returns the certificate.

    Files, shards, headers, names and dtypes are the template's; only values come from `weights`,
    LoRA adapters merged.
    """
    items, spelled = _plan(geometry, template)
    reader = open_weights(weights)
    check_shapes(stored_shapes(items), reader.shapes(), str(weights), "the mapping table")
    produced: Counter[str] = Counter()
    with LikeWriter(template, directory) as put:
        for entry in items:
            fused = reader.read(entry.megatron, entry.layer)
            parts = TRANSFORMS[entry.transform].split(fused, geometry)
            for name, part in zip(entry.hf, parts, strict=True):
                put(spelled[name], part)
                produced[name] += 1
            tick(1)
    once(produced, spelled, str(directory), "written")
    return {
        "hf_tensors": len(produced),
        "megatron_tensors": len(reader.tensors),
        "bytes": sum(slot.size for slot in template.slots.values()),
    }


def copy_companions(template: TensorDirectory, directory: Path) -> list[str]:
    """Copy everything beside the weights (config, tokenizer, processor, templates); their names."""
    own = {INDEX, "manifest.json"}
    copied = []
    for path in sorted(template.directory.rglob("*")):
        name = path.relative_to(template.directory)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or str(name) in own or path.suffix in WEIGHT_SUFFIXES:
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(path, directory / name)
        copied.append(name.as_posix())
    return copied


def once(counts: Counter[str], expected: Iterable[str], where: str, verb: str) -> None:
    """IntegrityError unless exactly the `expected` names were counted, each once."""
    names = set(expected)
    for name in sorted(names | counts.keys()):
        if counts[name] != 1 or name not in names:
            raise IntegrityError(f"{where}: {name!r} was {verb} {counts[name]} times, not once")
