"""docs/how-to/migration.md: the steps accept its commands, and no former command is missing."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from llava_steps.settings import cli
from llava_steps.store.run import parser

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/migration.md").read_text(encoding="utf-8")
LINES = re.findall(r"^python -m (llava_steps\.\w+) (.+)$", PAGE, flags=re.M)


@pytest.mark.parametrize(("module", "flags"), LINES, ids=lambda v: v[:40])
def test_a_command_is_accepted(module: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are parsed and the settings checked, as the step does it before it reads anything."""
    step = importlib.import_module(module).STEP
    given = vars(parser(step, module).parse_args(shlex.split(flags)))
    # The page names what the scripts left to their code; a global batch must suit 8 GPUs.
    if module == "llava_steps.train":
        given["global_batch_size"] = 8
    settings = cli.settings(step.config, given)
    assert given["save_dir"]
    for name in re.findall(r"--(name|stage|tp|data-path|text-model) (\S+)", flags):
        trained = {"tp": "tensor_model_parallel"} if module == "llava_steps.train" else {}
        key = trained.get(name[0], name[0].replace("-", "_"))
        assert str(getattr(settings, key)) == name[1]


def test_each_script_of_the_former_project_has_its_place() -> None:
    options = (ROOT / "docs/reference/options.md").read_text(encoding="utf-8")
    for script in re.findall(r"`(scripts/[\w/]+\.py)`", options):
        assert script in PAGE, script
    assert "energon prepare" in PAGE and "singularity build" in PAGE
    assert len(LINES) == 7
