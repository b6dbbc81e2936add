"""The weight files of a Hugging Face directory, checked before transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llava_steps.conversion import tensors
from llava_steps.core.errors import ConfigError, InputError, IntegrityError
from llava_steps.geometry.hf_directory import read_object

PICKLE = "pytorch_model.bin"
FORMS = (tensors.SINGLE, tensors.INDEX, PICKLE, f"{PICKLE}.index.json")
"""Names that transformers looks for, in its order."""
PACKED = (torch.int8, torch.uint8, torch.int32)
"""Dtypes of weights of which several share an integer, or that need a scale."""
POINTER = b"version https://git-lfs"


def check_weight_files(directory: Path) -> None:
    """Check that the files which transformers will read are there and whole.

    Raises:
        InputError: there are none, one is missing, or one is a pointer of Git LFS.
        IntegrityError: one is damaged.
        ConfigError: one holds quantized weights.
    """
    first = first_form(directory)
    if not first:
        raise InputError(
            f"{directory} has no weights: none of {', '.join(FORMS)}; download the missing files, "
            "or load the model with transformers and save it with save_pretrained"
        )
    names = _shards(directory, first) if first.endswith(".json") else [first]
    for name in names:
        path = directory / name
        if not path.is_file():
            raise InputError(f"{path} is missing, but {first} names it; download the file again")
        with path.open("rb") as file:
            begin = file.read(len(POINTER))
        if begin == POINTER:
            raise InputError(
                f"{path} is a pointer of Git LFS, not the weights; run git lfs pull there"
            )
        if not begin:
            raise IntegrityError(f"{path} is empty; download the file again")
        if path.suffix == ".safetensors":
            _refuse_packed(path, tensors.read_header(path)[1])


def _refuse_packed(path: Path, slots: Mapping[str, tensors.Slot]) -> None:
    """Quantized weights are integers, whatever config.json says about them."""
    for name, slot in slots.items():
        if "weight" in name.rpartition(".")[2] and slot.dtype in PACKED:
            kind = str(slot.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{path}: the weights are quantized ({name} is {kind}), and only plain weights can "
                "be trained; give the model that it was made from, in bf16, fp16 or fp32"
            )


def first_form(directory: Path) -> str:
    """The file that transformers begins with; empty if no form is found."""
    return next((name for name in FORMS if (directory / name).is_file()), "")


def _shards(directory: Path, index: str) -> list[str]:
    """Files that an index names; it must name files beside it."""
    named = read_object(directory / index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise IntegrityError(f"{directory / index} has no weight_map; download the file again")
    for name in named.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise IntegrityError(
                f"{directory / index}: {name!r} is not the name of a file beside it"
            )
    return sorted(set(named.values()))
