"""Validation and sample answers against transformers, in several layouts, with uneven shares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.loader.spec import LoaderSpec
from llava_steps.data.loader.validation_set import ValidationSet
from tests.helpers import reference
from tests.helpers.chain import Chain, metrics
from tests.helpers.dist_helpers import spawn

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor_model_parallel": 2, "sequence_parallel": True},
    {"pipeline_model_parallel": 2},
]


def held_out(chain: Chain, samples: int, **options: Any) -> ValidationSet:
    given = {"split": "val", "seq_length": 256, "seed": 1234} | options
    spec = LoaderSpec(
        chain.dataset, hf_dir=chain.hf, global_batch_size=1, micro_batch_size=1,
        need_pixels=False, **given,
    )  # fmt: skip
    return ValidationSet(spec, samples)


def expected(chain: Chain) -> tuple[dict[str, float], list[str], list[str]]:
    """(figures of 13 samples, ids, greedy answers to the first two) by transformers alone."""
    processor = AutoProcessor.from_pretrained(chain.hf, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(chain.hf, dtype=torch.float32).eval()
    samples = reference.read_samples(chain.dataset)
    ids = [row.sample_ids[0] for (row,) in held_out(chain, 13).groups(1, 1)]
    loss, right, count, answers = 0.0, 0, 0, []
    with torch.no_grad():
        for number, name in enumerate(ids):
            inputs, labels = reference.encode(processor, *samples[name])
            logits = model(**inputs).logits[0, :-1]
            wanted = labels[1:] != -100
            loss += float(
                torch.nn.functional.cross_entropy(
                    logits[wanted], labels[1:][wanted], reduction="sum"
                )
            )
            right += int((logits[wanted].argmax(-1) == labels[1:][wanted]).sum())
            count += int(wanted.sum())
            if number < 2:
                start = int((labels != -100).nonzero()[0])
                prompt = {k: v[:, :start] if v.dim() == 2 else v for k, v in inputs.items()}
                out = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, start:]
                ends = model.generation_config.eos_token_id
                ends = ends if isinstance(ends, list) else [ends]
                kept = [t for t in out.tolist() if t not in ends]
                answers.append(processor.tokenizer.decode(kept, skip_special_tokens=False))
    return {"val_loss": loss / count, "val_accuracy": right / count}, ids, answers


def test_every_layout_says_what_transformers_says(chain: Chain, tmp_path: Path) -> None:
    figures, ids, answers = expected(chain)
    paths = {
        "entry": tmp_path, "checkpoint": chain.checkpoint.resolve(), "hf": chain.hf.resolve(),
        "dataset": chain.dataset.resolve(),
    }  # fmt: skip
    ranks = spawn("tests.helpers.validation_workers:look", 2, tmp_path, paths, LAYOUTS)
    shares = set()
    for found in ranks:
        for layout, (own, rows, count, replica) in zip(LAYOUTS, found, strict=True):
            assert own["val_loss"] == pytest.approx(figures["val_loss"], rel=1e-5), layout
            assert own["val_accuracy"] == figures["val_accuracy"], layout
            assert [row["answer"] for row in rows] == (answers if replica == 0 else []), layout
            assert all(row["id"] == i for row, i in zip(rows, ids, strict=False))
            shares.add((str(layout), replica, count))
    assert {count for layout, _, count in shares if layout == "{}"} == {3, 4}, "uneven on purpose"


def test_questions_are_told_without_repeated_image_tokens(chain: Chain) -> None:
    (row,) = next(held_out(chain, 1).groups(1, 1))
    assert row.num_images == 1 and row.keys[0].startswith("000012.tar/"), "the val split"


def test_what_cannot_be_looked_at_is_told_at_once(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than seq_length 20"):
        held_out(chain, 4, seq_length=20, seed=1)
    with pytest.raises((ConfigError, InputError), match="test"):
        held_out(chain, 4, split="test", seed=1)


def test_training_does_not_notice_that_it_is_looked_at(chain: Chain) -> None:
    common = (
        "--stage=2", "--gpus=1", "--global-batch-size=4", "--micro-batch-size=2", "--lr=1e-3",
        "--train-steps=5", "--save-interval=2", "--seed=31",
    )  # fmt: skip

    def value(out: Path) -> tuple[list[str], dict[str, bytes]]:
        files = {p.name: p.read_bytes() for p in out.glob("iter_*/**/*") if p.is_file()}
        return [row["loss_hex"] for row in metrics(out)], files

    # Looking is a quiet setting: the same value, so the first one has to go.
    out = chain.train("unseen", *common)
    alone = value(out)
    shutil.rmtree((out / "samples").resolve().parent)
    out = chain.train(
        "seen", *common, "--eval-interval=2", "--eval-samples=5", "--eval-answers=2",
        "--eval-new-tokens=3",
    )  # fmt: skip
    assert value(out) == alone
    rows = metrics(out)
    assert [row["step"] for row in rows if "val_loss" in row] == [1, 3, 4], "and at the end"
    assert all(0 <= row["val_accuracy"] <= 1 for row in rows if "val_loss" in row)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answers] == [1, 3, 4]
    samples = reference.read_samples(chain.dataset)
    for row in answers:
        assert len(row["answers"]) == 2
        for answer in row["answers"]:
            images = samples[answer["id"]][1]
            assert answer["reference"] and answer["question"].count("<image>") == len(images)
