"""The forward check of a conversion: right for every family, and it sees what counting cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_steps import hf_to_megatron, megatron_to_hf
from llava_steps.conversion import convert, torch_dist_write
from llava_steps.conversion.mapping import ROWS, entries
from llava_steps.conversion.selfcheck import TOLERANCE, compare_layers
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.conversion.transforms import TRANSFORMS
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry
from llava_steps.store.run import execute
from tests.helpers.model_fixtures import TINY, save_hf


def check(hf: Path, weights: Path) -> dict[str, float]:
    text = json.loads((hf / "config.json").read_text())["text_config"]
    with TensorDirectory(hf) as tensors:
        return compare_layers(Geometry.load(hf), text, tensors, torch_dist_write.Reader(weights))


def converted(model: str, root: Path) -> tuple[Path, Path]:
    save_hf(TINY[model], root / "hf")
    with TensorDirectory(root / "hf") as tensors:
        convert.hf_to_dcp(Geometry.load(root / "hf"), tensors, root / "weights")
    return root / "hf", root / "weights"


@pytest.mark.parametrize("model", TINY)
def test_every_family_agrees(model: str, tmp_path: Path) -> None:
    found = check(*converted(model, tmp_path))
    assert len(found) == 2 and all(0 <= delta < TOLERANCE / 10 for delta in found.values())


BY_HEADS = replace(TRANSFORMS["qkv"], fuse=lambda parts, geometry: torch.cat(list(parts)))
UP_FIRST = replace(TRANSFORMS["gate_up"], fuse=lambda parts, geometry: torch.cat(parts[::-1]))


@pytest.mark.parametrize(("name", "wrong"), [("qkv", BY_HEADS), ("gate_up", UP_FIRST)])
def test_another_order_within_a_fused_tensor_is_seen(
    name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRANSFORMS, name, wrong)
    hf, weights = converted("untied-default", tmp_path)
    with pytest.raises(IntegrityError, match="decoder layer 0 differs"):
        check(hf, weights)


def test_exchanged_norms_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    first, second = (row for row in ROWS if row.megatron.endswith(norms))
    swapped = {first: replace(first, hf=second.hf), second: replace(second, hf=first.hf)}
    rows = tuple(swapped.get(row, row) for row in ROWS)
    monkeypatch.setattr(convert, "entries", lambda g, tower: entries(g, tower, rows))
    hf, weights = converted("qwen3", tmp_path)
    with pytest.raises(IntegrityError, match="are not the same model"):
        check(hf, weights)


def test_both_manifests_have_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the export rounds: an fp32 checkpoint into the form of a bf16 directory."""
    monkeypatch.chdir(tmp_path)
    save_hf(TINY["biases-uneven"], Path("hf"))
    save_hf(TINY["biases-uneven"], Path("half"), torch.bfloat16, seed=3)
    assert execute(hf_to_megatron.STEP, ["--hf-dir=hf", "--save-dir=megatron"]) == 0
    flags = ["--megatron-dir=megatron", "--tokenizer-dir=half", "--save-dir=export"]
    assert execute(megatron_to_hf.STEP, flags) == 0
    for name in ("megatron", "export"):
        metrics = json.loads(Path(name, "manifest.json").read_bytes())["metrics"]
        assert sorted(metrics["forward"]) == ["layer_0", "layer_2"]
        assert all(0 <= delta < TOLERANCE for delta in metrics["forward"].values())
