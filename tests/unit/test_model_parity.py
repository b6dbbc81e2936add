"""The parallel model against the HF model: logits, losses, gradients and weights, in every layout.

One spawn of four processes runs all models in all layouts. Each layout loads the converted
checkpoint, so the mapping table and the resharding are under test with it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llava_steps.core.geometry import Geometry
from llava_steps.model import dcp
from llava_steps.model.convert import dcp_to_hf, hf_to_dcp
from llava_steps.model.hf_names import canonical
from llava_steps.model.mapping import entries
from llava_steps.model.tensors import TensorDirectory
from llava_steps.model.transforms import TRANSFORMS
from llava_steps.model.vision import tower_shapes
from tests.dist_helpers import spawn
from tests.model_fixtures import TINY, VOCAB, pack_samples, reference, samples, save_hf
from tests.model_workers import Job, Layout

LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(tp=2, pp=2, sequence_parallel=True),
    Layout(tp=2, sequence_parallel=True, recompute="full"),
    Layout(pp=2, recompute="core_attn"),
)
CASES = [(model, layout) for model in TINY for layout in LAYOUTS]
LOGITS = 1e-4
LENGTH = 48
"""Tokens of every packed row: all four samples fit into one, with padding."""


class Run(NamedTuple):
    """One model in one layout and what came out."""

    job: Job
    outputs: dict[str, Any]
    hf: Any
    logits: list[torch.Tensor]
    losses: list[torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Run]:
    root = tmp_path_factory.mktemp("parity")
    jobs: dict[tuple[str, Layout], Job] = {}
    expected: dict[str, Any] = {}
    for name, tiny in TINY.items():
        hf_dir, weights = root / name / "hf", root / name / "weights"
        hf = save_hf(tiny, hf_dir)
        geometry = Geometry.load(hf_dir)
        with TensorDirectory(hf_dir) as tensors:
            hf_to_dcp(geometry, tensors, weights)
        rows = samples(geometry.tokens_per_image)
        # A packed row; the same samples in rows of their own; a row of text only.
        batches = tuple(
            pack_samples(rows, chosen, LENGTH) for chosen in ((0, 1, 2, 3), (2,), (1,), (0,))
        )
        logits, losses = reference(hf, rows)
        sum(losses[i].sum() for batch in batches for i in batch.samples).backward()
        expected[name] = (hf, [value.detach() for value in logits], losses)
        for layout in LAYOUTS:
            out = root / name / str(layout)
            out.mkdir()
            jobs[name, layout] = Job(hf_dir, weights, layout, tiny.freeze_vision, batches, out)
    ranks = spawn("tests.model_workers:layouts", 4, root, list(jobs.values()))
    found = {}
    for index, (key, job) in enumerate(jobs.items()):
        # Rank 3 is on the last pipeline stage and the last tensor-parallel rank of every layout.
        outputs = {**ranks[3][index], "silent": [n for r in ranks for n in r[index]["silent"]]}
        found[key] = Run(job, outputs, *expected[key[0]])
    return found


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def run(request: pytest.FixtureRequest, runs: dict[tuple[str, Layout], Run]) -> Run:
    return runs[request.param]


def test_logits_packed_and_alone(run: Run) -> None:
    worst = 0.0
    for batch, logits in zip(run.job.batches, run.outputs["logits"], strict=True):
        assert logits.shape == (LENGTH, VOCAB)
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


def test_gradients(run: Run) -> None:
    """Every gradient, read back through the checkpoint and the mapping table."""
    assert run.outputs["silent"] == []
    geometry = Geometry.load(run.job.hf)
    reader = dcp.Reader(run.job.out / "grads")
    expected = {canonical(name): p.grad for name, p in run.hf.named_parameters()}
    for entry in entries(geometry, tower_shapes(geometry)):
        split = TRANSFORMS[entry.transform].split
        for name, grad in zip(
            entry.hf, split(reader.read(entry.megatron, entry.layer), geometry), strict=True
        ):
            frozen = name.startswith("vision_tower.") and run.job.freeze_vision
            if expected[name] is None or frozen:
                assert not grad.any(), name
                continue
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * max(scale, 1))


def test_weights_saved_in_this_layout_export_byte_for_byte(run: Run, tmp_path: Path) -> None:
    geometry = Geometry.load(run.job.hf)
    with TensorDirectory(run.job.hf) as template:
        dcp_to_hf(geometry, run.job.out / "weights", template, tmp_path)
    for file in ("model.safetensors",):
        ours, theirs = (
            hashlib.sha256((directory / file).read_bytes()).hexdigest()
            for directory in (tmp_path, run.job.hf)
        )
        assert ours == theirs
