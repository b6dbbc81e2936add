"""Twenty steps against plain PyTorch on mixed data: a SigLIP tower, a tied head, Llama and Qwen3.

The samples have no, one, two or three images and one to three turns with answers of one to sixteen
words; the microbatches of a global batch hold very different numbers of supervised tokens, so that
a mean of microbatch means would be off by far more than is allowed here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import reference
from tests.helpers.chain import Chain, alone, make, metrics, sample_ids, shared
from tests.helpers.hf_fixtures import make_siglip, make_text, make_tokenizer

STEPS, BATCH = 20, 8
SETTINGS = {"lr": 3e-4, "warmup": 3, "weight_decay": 0.05, "clip": 0.5}
COMMON = (
    "--stage=2", f"--train-steps={STEPS}", f"--global-batch-size={BATCH}", "--lr=3e-4",
    "--warmup-steps=3", "--weight-decay=0.05", "--clip-grad=0.5",
)  # fmt: skip
LAYOUTS = {
    "one by one": ("--gpus=1", "--micro-batch-size=1"),
    "pairs on two ranks": ("--gpus=2", "--micro-batch-size=2"),
    "tp2sp": ("--gpus=2", "--tp=2", "--sequence-parallel", "--micro-batch-size=2"),
    "pp2": ("--gpus=2", "--pp=2", "--micro-batch-size=1"),
}  # fmt: skip
FAMILIES = ("llama", "qwen3")


MIXED = (
    ("shard_tars", "--source=raw/train.json", "--save-dir=results/tar_shards"),
    ("prepare_energon", "--tar-dir=results/tar_shards", "--split=1,0,0",
     "--save-dir=results/energon_dataset"),
    ("build_hf", "--vision-tower=tower", "--text-model=text", "--save-dir=results/hf_model",
     "--vision-feature-select-strategy=full"),
    ("hf_to_megatron", "--hf-dir=results/hf_model", "--save-dir=results/megatron_checkpoint"),
)  # fmt: skip


def write_data(raw: Path) -> None:
    """Forty samples, ragged in every respect, as a LLaVA JSON."""
    rng = random.Random(5)
    words = [
        "the",
        "digit",
        "is",
        "seven",
        "three",
        "two",
        "zero",
        "left",
        "right",
        "above",
        "below",
    ]
    (raw / "images").mkdir(parents=True)
    samples = []
    for number in range(40):
        images = []
        for place in range((0, 1, 2, 3, 1)[number % 5]):
            name = f"images/{number}_{place}.jpg"
            size = (rng.randrange(12, 60), rng.randrange(12, 60))
            Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(raw / name)
            images.append(name)
        turns = []
        for turn in range(1 + number % 3):
            marks = "<image>\n" * len(images) if turn == 0 else ""
            answer = " ".join(rng.choices(words, k=rng.choice((1, 2, 5, 16))))
            turns.append({"from": "human", "value": marks + " ".join(rng.choices(words, k=4))})
            turns.append({"from": "gpt", "value": answer})
        sample = {"id": f"mixed-{number}", "conversations": turns}
        if images:
            sample["image"] = images
        samples.append(sample)
    (raw / "train.json").write_text(json.dumps(samples))


@pytest.fixture(scope="module", params=FAMILIES)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = shared(tmp_path_factory) / request.param
    root.mkdir(exist_ok=True)
    with alone(root, "sources"):
        if not (root / "text").exists():
            write_data(root / "raw")
            make_siglip(root / "tower")
            family = {"family": request.param, "tie_word_embeddings": True}
            make_text(root / "new", make_tokenizer(), **family).rename(root / "text")
    return make(root, MIXED)


@pytest.fixture(scope="module")
def expected(mixed: Chain) -> tuple[list[list[str]], list[float]]:
    """Sample ids of the steps, and the losses that the reference has on them."""
    ids = sample_ids(mixed.train("first", *COMMON, *LAYOUTS["one by one"]))
    losses = reference.train(
        mixed.hf, mixed.dataset, ids, trained=("multi_modal_projector", "language_model"),
        steps=STEPS, **SETTINGS,
    )  # fmt: skip
    return ids, losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_agree_on_mixed_data(mixed: Chain, expected, layout: str) -> None:
    ids, losses = expected
    out = mixed.train(layout.replace(" ", "_"), *COMMON, *LAYOUTS[layout])
    assert sample_ids(out) == ids, "the same samples in the same global batches"
    assert len({i for batch in ids for i in batch}) == 40
    rows = metrics(out)
    deviations = [abs(r["loss"] - e) / e for r, e in zip(rows, losses, strict=True)]
    print(f"{mixed.root.name} {layout}: largest relative deviation {max(deviations):.2e}")
    assert max(deviations) <= 1e-5, deviations
    assert losses[-1] < losses[0], "the reference learns"
