"""LoRA: logits in every layout, merged exports, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llava_steps.conversion import torch_dist_write
from llava_steps.conversion.convert import dcp_to_hf, hf_to_dcp
from llava_steps.conversion.lora import FILE, Lora, check_same, open_weights, stored_shapes
from llava_steps.conversion.mapping import check_shapes
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.geometry.geometry import Geometry
from tests.helpers import plain_lora
from tests.helpers.dist_helpers import spawn
from tests.helpers.model_fixtures import TINY, pack_samples, reference, samples, save_hf
from tests.helpers.model_workers import Job, Layout

ALL = Lora(4, 6.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
SOME = Lora(2, 8.0, ("linear_qkv", "linear_fc2"))
CASES = (
    ("untied-default", ALL, Layout()),
    ("untied-default", ALL, Layout(tp=2)),
    ("untied-default", ALL, Layout(tp=2, pp=2, sequence_parallel=True)),
    ("biases-uneven", SOME, Layout(tp=2, pp=2)),
    ("tied-full", ALL, Layout(tp=2, sequence_parallel=True, recompute="full")),
)
LENGTH = 48


def adapted(base: Path, geometry: Geometry, lora: Lora, out: Path) -> None:
    """The checkpoint `base` with random adapters."""
    reader, generator = torch_dist_write.Reader(base), torch.Generator().manual_seed(3)
    values = {name: reader.read(name) for name in reader.shapes()}
    for name, shape in stored_shapes(geometry, lora).items():
        values[name] = 0.2 * torch.randn(shape, generator=generator)
    chunks = [
        torch_dist_write.Chunk(n, tuple(v.shape), (0,) * v.dim(), tuple(v.shape), v.dtype)
        for n, v in values.items()
    ]
    torch_dist_write.write(out, chunks, lambda chunk: values[chunk.name])
    lora.write(out)


class Run(NamedTuple):
    weights: Path
    expected: torch.Tensor
    found: torch.Tensor
    hf: Path
    batch: Any


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("lora")
    jobs, expected = [], []
    for number, (name, lora, layout) in enumerate(CASES):
        room = root / str(number)
        room.mkdir()
        hf = save_hf(TINY[name], room / "hf")
        geometry = Geometry.load(room / "hf")
        with TensorDirectory(room / "hf") as tensors:
            hf_to_dcp(geometry, tensors, room / "base")
        adapted(room / "base", geometry, lora, room / "adapted")
        reader = torch_dist_write.Reader(room / "adapted")
        plain_lora.add(hf, lambda n, r=reader: r.read(f"lora.{n}"), lora.targets, lora.scale)
        rows = samples(geometry.tokens_per_image)
        batch = pack_samples(rows, (0, 1, 2, 3), LENGTH)
        expected.append(torch.cat([logits.detach() for logits in reference(hf, rows)[0]]))
        jobs.append(
            Job(room / "hf", room / "adapted", layout, True, (batch,), room / "out", lora=lora)
        )
        (room / "out").mkdir()
    last = spawn("tests.helpers.model_workers:layouts", 4, root, jobs, timeout=300)[3]
    return [
        Run(job.weights, theirs, ours["logits"][0][: len(theirs)], job.hf, job.batches[0])
        for job, theirs, ours in zip(jobs, expected, last, strict=True)
    ]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{CASES[n][2]}")
def test_logits_are_those_of_plain_lora_and_of_the_merged_export(
    runs: list[Run], number: int, tmp_path: Path
) -> None:
    from transformers import LlavaForConditionalGeneration

    run, geometry = runs[number], Geometry.load(runs[number].hf)
    delta = (run.found - run.expected).abs().max().item()
    with TensorDirectory(run.hf) as template:
        dcp_to_hf(geometry, run.weights, template, tmp_path)
    (tmp_path / "config.json").write_bytes((run.hf / "config.json").read_bytes())
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    rows = samples(geometry.tokens_per_image)
    exported = torch.cat([logits.detach() for logits in reference(merged, rows)[0]])
    off = (exported - run.found).abs().max().item()
    base = LlavaForConditionalGeneration.from_pretrained(run.hf)
    without = torch.cat([logits.detach() for logits in reference(base, rows)[0]])
    print(f"max |logit difference| to plain LoRA {delta:.1e}, of the merged export {off:.1e}")
    assert delta <= 1e-4 and off <= 1e-4
    assert (without - run.found).abs().max() > 0.1, "the adapters do something"


def test_saved_again_in_another_layout_they_are_the_same(runs: list[Run]) -> None:
    """`layouts` saves what it loaded; case 2 is tensor, pipeline and sequence parallel."""
    for run in runs[:3]:
        before, after = (
            torch_dist_write.Reader(run.weights),
            torch_dist_write.Reader(run.weights.parent / "out/weights"),
        )
        assert before.shapes() == after.shapes()
        for name in before.shapes():
            assert torch.equal(before.read(name), after.read(name)), name
        assert Lora.read(run.weights.parent / "out/weights") == ALL


def test_only_adapters_have_gradients(runs: list[Run]) -> None:
    """`layouts` leaves the gradients as a checkpoint, those of frozen weights being zero."""
    for (_, lora, _), run in zip(CASES, runs, strict=True):
        grads = torch_dist_write.Reader(run.weights.parent / "out/grads")
        for name in grads.shapes():
            frozen = name.startswith(("language_model.", "vision_tower."))
            assert bool(grads.read(name).any()) != frozen, name
        assert {n for n in grads.shapes() if n.startswith("lora.")} == {
            f"lora.{target}.{k}" for target in lora.targets for k in "ab"
        }


def test_who_does_not_know_of_adapters_refuses_them(runs: list[Run]) -> None:
    run = runs[0]
    with pytest.raises(InputError, match="merge them"):
        check_same(None, run.weights)
    with pytest.raises(InputError, match=r"lora_alpha 7\.0"):
        check_same(Lora(4, 7.0, ALL.targets), run.weights)
    assert not check_same(ALL, run.weights.parent / "base")
    shapes = open_weights(run.weights).shapes()
    assert not [name for name in shapes if name.startswith("lora.")]
    (run.weights / FILE).rename(run.weights / "away")
    with pytest.raises(IntegrityError, match="is unknown"):
        check_shapes(shapes, open_weights(run.weights).shapes(), "here", "the table")
    (run.weights / FILE).write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        open_weights(run.weights)
    (run.weights / "away").rename(run.weights / FILE)
