"""The 27 known mistakes of docs/guarantees.md: each has a row and tests that exist.

The tests of mistakes that fit nowhere else are here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_steps.geometry.geometry import padded
from llava_steps.launch import launch
from llava_steps.launch.group import LauncherGroup
from llava_steps.launch.launcher import Launcher
from llava_steps.settings.stage.stage import Stage
from tests.docs.named_tests import skips
from tests.helpers import reference
from tests.helpers.chain import Chain, metrics, sample_ids

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guarantees.md"


def rows() -> dict[int, str]:
    """Number -> the last cell of its row."""
    found = re.findall(r"^\| .+ \| \*\*(\d+)\*\* .+ \| (.+) \|$", PAGE.read_text(), flags=re.M)
    assert len(found) == len(dict(found)), "a number stands twice"
    return {int(number): cell for number, cell in found}


def test_there_are_27_rows() -> None:
    assert sorted(rows()) == list(range(1, 28))


@pytest.mark.parametrize("number", range(1, 28))
def test_every_mistake_names_tests_that_exist(number: int) -> None:
    """A name belongs to the file before it; the test is really collected (a `test_` function)."""
    for name, skipped in skips(rows()[number]):
        assert not skipped, f"{name} does not run: {skipped}"


@pytest.mark.parametrize(
    ("rows", "multiple", "expected"),
    [(256, 128, 256), (257, 128, 384), (255, 128, 256), (300, 0, 300), (99584, 256, 99584)],
)
def test_the_vocabulary_is_padded_only_if_needed(rows: int, multiple: int, expected: int) -> None:
    assert padded(rows, multiple) == expected


def test_workers_keep_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"PATH": "/my/bin", "HF_HOME": "/my/hub", "WANDB_API_KEY": "k", "HF_HUB_OFFLINE": "0"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    alone = LauncherGroup(Launcher(0, 1, 0, 2))
    environment = launch._environment(Stage(gpus=2, global_batch_size=2), alone, 1, Path("scratch"))
    assert {name: environment[name] for name in mine} == mine
    assert environment["RANK"] == "1" and environment["WORLD_SIZE"] == "2"


def test_dependencies_are_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert "git+" not in (ROOT / "pyproject.toml").read_text()


def test_reported_tokens_are_those_of_the_samples(chain: Chain) -> None:
    """Neither padding nor a fixed length: what the processor makes of the step's samples."""
    from transformers import AutoProcessor

    out = chain.train(
        "tokens", "--stage=2", "--gpus=2", "--global-batch-size=4", "--micro-batch-size=2",
        "--train-steps=2", "--lr=1e-3",
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(chain.hf, backend="pil")
    samples = reference.read_samples(chain.dataset)
    for row, ids in zip(metrics(out), sample_ids(out), strict=True):
        encoded = [reference.encode(processor, *samples[i]) for i in ids]
        assert row["tokens"] == sum(inputs["input_ids"].numel() for inputs, _ in encoded)
        supervised = sum(int((labels[1:] != -100).sum()) for _, labels in encoded)
        assert row["supervised_tokens"] == supervised
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"], rel=0.05)
