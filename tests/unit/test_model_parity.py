"""The parallel model against the HF model: logits, losses, gradients and weights, in every layout.

One spawn of four processes runs all models in all layouts. Each layout loads the converted
checkpoint, so the mapping table and the resharding are under test with it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llava_steps.conversion import torch_dist_write
from llava_steps.conversion.convert import dcp_to_hf, hf_to_dcp
from llava_steps.conversion.hf_names import canonical
from llava_steps.conversion.mapping import entries
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.conversion.torch_dist_read import read_metadata
from llava_steps.conversion.tower import tower_shapes
from llava_steps.conversion.transforms import TRANSFORMS
from llava_steps.geometry.geometry import Geometry
from tests.helpers.dist_helpers import spawn
from tests.helpers.model_fixtures import (
    TINY,
    VOCAB,
    Sample,
    hf_model,
    pack_samples,
    reference,
    samples,
    save_hf,
)
from tests.helpers.model_workers import Job, Layout

LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(tp=2, pp=2, sequence_parallel=True),
)
RECOMPUTE = (
    Layout(tp=2, sequence_parallel=True, recompute="full"),
    Layout(pp=2, recompute="core_attn"),
)
STAGE1 = (Layout(tp=2, sequence_parallel=True), Layout(pp=2))


class Case(NamedTuple):
    """A model of TINY, a layout, and whether the language model is frozen (stage 1)."""

    model: str
    layout: Layout
    freeze_lm: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.layout}" + "-stage1" * self.freeze_lm


CASES = (
    *(
        Case(m, layout)
        for m in ("untied-default", "tied-full", "biases-uneven")
        for layout in LAYOUTS
    ),
    *(Case("untied-default", layout) for layout in RECOMPUTE),
    *(Case("tied-full", layout, freeze_lm=True) for layout in STAGE1),
    *(Case("siglip-mha", layout) for layout in (LAYOUTS[0], LAYOUTS[-1])),
    *(Case("qwen3", layout) for layout in (LAYOUTS[0], LAYOUTS[1], LAYOUTS[-1])),
    *(Case(m, LAYOUTS[3]) for m in ("mistral", "qwen2-tied")),
)
BF16 = (
    Case("untied-default", Layout(precision="bf16")),
    Case("tied-full", Layout(tp=2, pp=2, sequence_parallel=True, precision="bf16")),
)
LOGITS = 1e-4
GRADIENTS = 1e-4
LENGTH = 48
"""Tokens of the padded rows: all four samples fit into one."""


class Run(NamedTuple):
    """One model in one layout and what came out."""

    job: Job
    outputs: dict[str, Any]
    hf: Any
    rows: list[Sample]
    logits: list[torch.Tensor]
    losses: list[torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Run]:
    root = tmp_path_factory.mktemp("parity")
    models: dict[str, Any] = {}
    for name, tiny in TINY.items():
        hf_dir, weights = root / name / "hf", root / name / "weights"
        hf = save_hf(tiny, hf_dir)
        geometry = Geometry.load(hf_dir)
        with TensorDirectory(hf_dir) as tensors:
            hf_to_dcp(geometry, tensors, weights)
        rows = samples(geometry.tokens_per_image)
        # A packed row; the same samples in rows of their own, text only among them; no padding.
        alone = len(rows[2].tokens) + len(rows[2].tokens) % 2
        batches = (
            *(pack_samples(rows, chosen, LENGTH) for chosen in ((0, 1, 2, 3), (2,), (1,), (0,))),
            pack_samples(rows, (2,), alone),
        )
        logits, losses = reference(hf, rows)
        sum(losses[i].sum() for batch in batches for i in batch.samples).backward()
        models[name] = (hf, batches, rows, [value.detach() for value in logits], losses)
    jobs = []
    for case in CASES + BF16:
        out = root / str(case)
        out.mkdir()
        folder, freeze_vision = root / case.model, TINY[case.model].freeze_vision or case.freeze_lm
        jobs.append(
            Job(folder / "hf", folder / "weights", case.layout, freeze_vision,
                models[case.model][1], out, case.freeze_lm)
        )  # fmt: skip
    ranks = spawn("tests.helpers.model_workers:layouts", 4, root, jobs)
    found = {}
    for place, (case, job) in enumerate(zip(CASES + BF16, jobs, strict=True)):
        # Rank 3 is on the last pipeline stage and the last tensor-parallel rank of every layout.
        outputs = {**ranks[3][place], "silent": [n for r in ranks for n in r[place]["silent"]]}
        hf, _, rows, logits, losses = models[case.model]
        found[case] = Run(job, outputs, hf, rows, logits, losses)
    return found


@pytest.fixture(params=CASES, ids=str)
def run(request: pytest.FixtureRequest, runs: dict[Case, Run]) -> Run:
    return runs[request.param]


def test_logits_packed_and_alone(run: Run) -> None:
    worst = 0.0
    for batch, logits in zip(run.job.batches, run.outputs["logits"], strict=True):
        assert logits.shape == (batch.tokens.shape[1], VOCAB)
        assert logits.dtype == torch.float32
        start = 0
        for index in batch.samples:
            expected = run.logits[index]
            part = logits[start : start + len(expected)]
            worst = max(worst, (part - expected).abs().max().item())
            start += len(expected)
    print(f"max |logit difference| {worst:.2e}")
    assert worst <= LOGITS


def test_losses_of_the_supervised_positions(run: Run) -> None:
    for batch, losses in zip(run.job.batches, run.outputs["losses"], strict=True):
        expected = torch.cat([run.losses[index] for index in batch.samples]).detach()
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_is_as_near_to_fp32_as_transformers_is(case: Case, runs: dict[Case, Run]) -> None:
    run = runs[case]
    logits, _ = reference(hf_model(TINY[case.model], torch.bfloat16), run.rows)
    packed = torch.cat([run.logits[i] for i in run.job.batches[0].samples])
    theirs = (torch.cat(list(logits)) - packed).abs().mean().item()
    ours = (run.outputs["logits"][0][: len(packed)] - packed).abs().mean().item()
    print(f"mean |logit difference| to fp32: ours {ours:.2e}, transformers {theirs:.2e}")
    assert 0 < ours <= 1.25 * theirs
    assert run.outputs["silent"] == []
    for losses in run.outputs["losses"]:
        assert losses.dtype == torch.float32 and losses.isfinite().all()


def test_gradients(run: Run) -> None:
    """Every gradient, read back through the checkpoint and the mapping table."""
    worst = 0.0
    assert run.outputs["silent"] == []
    geometry = Geometry.load(run.job.hf)
    reader = torch_dist_write.Reader(run.job.out / "grads")
    expected = {canonical(name): p.grad for name, p in run.hf.named_parameters()}
    for entry in entries(geometry, tower_shapes(geometry)):
        split = TRANSFORMS[entry.transform].split
        for name, grad in zip(
            entry.hf, split(reader.read(entry.megatron, entry.layer), geometry), strict=True
        ):
            tower = name.startswith("vision_tower.")
            frozen = run.job.freeze_vision if tower else run.job.freeze_lm
            if name.startswith("multi_modal_projector."):
                frozen = False
            if expected[name] is None or frozen:
                assert not grad.any(), name
                continue
            # A key's bias moves all scores of a query alike: its true gradient is zero.
            scale = max(expected[name].abs().max().item(), 1e-2)
            difference = (grad - expected[name]).abs().max().item() / scale
            worst = max(worst, difference)
            assert difference <= GRADIENTS, name
    print(f"max gradient difference {worst:.2e} of the parameter's largest")


def test_weights_saved_in_this_layout_export_byte_for_byte(run: Run, tmp_path: Path) -> None:
    geometry = Geometry.load(run.job.hf)
    with TensorDirectory(run.job.hf) as template:
        dcp_to_hf(geometry, run.job.out / "weights", template, tmp_path)
    assert sha256(tmp_path / "model.safetensors") == sha256(run.job.hf / "model.safetensors")


def test_what_is_converted_for_this_layout_lies_as_it_saves(run: Run, tmp_path: Path) -> None:
    """The same blocks of the same tensors in the files of the same ranks."""
    geometry, layout = Geometry.load(run.job.hf), run.job.layout
    with TensorDirectory(run.job.hf) as tensors:
        hf_to_dcp(geometry, tensors, tmp_path / "weights", tp=layout.tp, pp=layout.pp)
        (tmp_path / "hf").mkdir()
        dcp_to_hf(geometry, tmp_path / "weights", tensors, tmp_path / "hf")
    converted = blocks(tmp_path / "weights")
    # Four processes: between the pipeline ranks are data parallel ones, which save nothing.
    between = 4 // layout.pp
    moved = {
        block: rank // layout.tp * between + rank % layout.tp for block, rank in converted.items()
    }
    assert moved == blocks(run.job.out / "weights")
    assert sha256(tmp_path / "hf/model.safetensors") == sha256(run.job.hf / "model.safetensors")


def blocks(weights: Path) -> dict[tuple[Any, ...], int]:
    """(tensor, offsets, sizes) of each block of a checkpoint -> rank whose file holds it."""
    metadata = read_metadata(weights / ".metadata")
    return {
        (index.fqn, chunk.offsets, chunk.sizes): int(stored.relative_path.split("_")[2])
        for index, stored in metadata.storage_data.items()
        for chunk in metadata.state_dict_metadata[index.fqn].chunks
        if chunk.offsets == index.offset
    }


def test_equal_weights_are_saved_as_equal_bytes(
    runs: dict[Case, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run, with another order of hashes, another path, and once more from its own save.

    A checkpoint that is cut off is refused by every rank.
    """
    case = Case("tied-full", Layout(tp=2, pp=2, sequence_parallel=True))
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    said = spawn(
        "tests.helpers.model_workers:save_only",
        4,
        tmp_path,
        replace(runs[case].job, out=tmp_path),
    )
    expected = digests(runs[case].job.out / "weights")
    assert all(text.startswith(str(tmp_path / "damaged")) for text in said)
    assert ".metadata" in expected and "__3_0.distcp" in expected
    assert digests(tmp_path / "first") == digests(tmp_path / "second") == expected


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in directory.iterdir()}
