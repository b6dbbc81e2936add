"""THE table: every HF tensor has one place, every Megatron tensor one source, values only move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_steps.conversion import convert
from llava_steps.conversion.hf_names import by_canonical_name, canonical
from llava_steps.conversion.mapping import ROWS, Row, entries, stored_shapes
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.conversion.tower import tower_shapes
from llava_steps.conversion.transforms import TRANSFORMS, fuse_gate_up, fuse_qkv, split_qkv
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry
from tests.helpers.model_fixtures import TINY, config_of, save_hf


def geometry_of(name: str) -> Geometry:
    return Geometry.from_hf(config_of(TINY[name]).to_dict())


@pytest.mark.parametrize("name", TINY)
def test_each_hf_tensor_is_read_once_and_each_megatron_tensor_written_once(
    name: str, tmp_path: Path
) -> None:
    """Against what transformers really saves, not against a list of ours."""
    save_hf(TINY[name], tmp_path)
    geometry = Geometry.load(tmp_path)
    items = entries(geometry, tower_shapes(geometry))
    with TensorDirectory(tmp_path) as hf:
        saved = Counter(canonical(key) for key in hf.slots)
        shapes = {canonical(key): slot.shape for key, slot in hf.slots.items()}
    assert Counter(key for item in items for key in item.hf) == saved
    assert all(count == 1 for count in saved.values())
    assert all(count == 1 for count in Counter((i.megatron, i.layer) for i in items).values())
    for item in items:
        assert item.hf_shapes == tuple(shapes[key] for key in item.hf)
    stacked = stored_shapes(items)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(torch.Size(shape).numel() for shape in stacked.values()) == total
    for item in items:
        if item.layer is not None:
            assert stacked[item.megatron] == (geometry.layers, *item.shape)


def test_the_rows_are_sound() -> None:
    assert len({row.megatron for row in ROWS}) == len(ROWS)
    sources = [key for row in ROWS for key in row.hf]
    assert len(set(sources)) == len(sources)
    flags = {row.when for row in ROWS} - {"", "untied"}
    assert flags <= set(Geometry.__dataclass_fields__)
    assert {row.transform for row in ROWS} == set(TRANSFORMS)
    for row in ROWS:
        assert len(row.hf) == len(row.shapes)
        assert len({("{i}" in key) for key in row.hf}) == 1


NORM = "language_model.decoder.final_layernorm.weight"
TABLES: dict[str, tuple[tuple[Row, ...], str]] = {
    "a row is missing": (
        tuple(row for row in ROWS if row.megatron != NORM),
        "'language_model.model.norm.weight' is unknown",
    ),
    "a row too many": (
        (*ROWS, Row("more.weight", ("more.weight",), ("hidden",))),
        "'more.weight' is missing",
    ),
    "one HF tensor in two rows": (
        (*ROWS, Row("more.weight", ("language_model.model.norm.weight",), ("hidden",))),
        "'language_model.model.norm.weight' was read 2 times",
    ),
    "one HF tensor twice in a row": (
        tuple(
            replace(row, hf=(row.hf[0], row.hf[0])) if row.transform == "gate_up" else row
            for row in ROWS
        ),
        "up_proj.*is unknown",
    ),
    "a wrong shape": (
        tuple(replace(r, shapes=("vocab",)) if r.megatron == NORM else r for r in ROWS),
        "'language_model.model.norm.weight' has shape",
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_wrong_table_certifies_nothing(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, message = TABLES[table]
    save_hf(TINY["untied-default"], tmp_path / "hf")
    geometry = Geometry.load(tmp_path / "hf")
    monkeypatch.setattr(convert, "entries", lambda g, tower: entries(g, tower, rows))
    with TensorDirectory(tmp_path / "hf") as hf, pytest.raises(IntegrityError, match=message):
        convert.hf_to_dcp(geometry, hf, tmp_path / "weights")


def test_one_megatron_tensor_from_two_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two equal shapes, one place: the second would overwrite the first."""
    rows = tuple(
        replace(row, megatron="language_model.decoder.layers.input_layernorm.weight")
        if row.megatron.endswith("pre_mlp_layernorm.weight")
        else row
        for row in ROWS
    )
    save_hf(TINY["untied-default"], tmp_path / "hf")
    geometry = Geometry.load(tmp_path / "hf")
    monkeypatch.setattr(convert, "entries", lambda g, tower: entries(g, tower, rows))
    with TensorDirectory(tmp_path / "hf") as hf, pytest.raises(IntegrityError):
        convert.hf_to_dcp(geometry, hf, tmp_path / "weights")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "order"),
    [
        (4, 2, "q0 q1 k0 v0 q2 q3 k1 v1"),
        (4, 1, "q0 q1 q2 q3 k0 v0"),
        (3, 3, "q0 k0 v0 q1 k1 v1 q2 k2 v2"),
        (6, 2, "q0 q1 q2 k0 v0 q3 q4 q5 k1 v1"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_query_key_and_value_are_fused_by_query_group(
    heads: int, kv_heads: int, order: str, bias: bool
) -> None:
    geometry = replace(
        geometry_of("untied-default"), heads=heads, kv_heads=kv_heads, head_dim=2, hidden=3
    )
    rest = () if bias else (3,)
    blocks = {
        f"{kind}{head}": torch.randn(2, *rest)
        for kind, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        for head in range(count)
    }
    parts = [torch.cat([b for name, b in blocks.items() if name[0] == kind]) for kind in "qkv"]
    fused = fuse_qkv(parts, geometry)
    assert torch.equal(fused, torch.cat([blocks[name] for name in order.split()]))
    for part, back in zip(parts, split_qkv(fused, geometry), strict=True):
        assert torch.equal(part, back)


def test_gate_stands_before_up() -> None:
    gate, up = torch.zeros(80, 2), torch.ones(80, 2)
    fused = fuse_gate_up([gate, up], geometry_of("untied-default"))
    assert torch.equal(fused, torch.cat([gate, up]))


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        (
            "model.vision_tower.vision_model.embeddings.class_embedding",
            "vision_tower.embeddings.class_embedding",
        ),
        ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("vision_tower.post_layernorm.bias",) * 2,
        ("something.else",) * 2,
    ],
)
def test_names_of_all_transformers_versions_become_one(spelled: str, name: str) -> None:
    assert canonical(spelled) == name
    assert canonical(name) == name
    assert by_canonical_name([spelled], "x") == {name: spelled}
