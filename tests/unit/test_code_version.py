"""Which modules count as code of a step."""

from __future__ import annotations

import pytest

from llava_steps.settings.steps import modules
from llava_steps.store.code_version import COMPUTING_SETTINGS, modules_of


@pytest.mark.parametrize("module", modules())
def test_settings_count_by_value_and_not_as_code(module: str) -> None:
    found = {m for m in modules_of(module) if m.startswith("llava_steps.settings.")}
    assert found <= COMPUTING_SETTINGS


def test_what_reads_files_counts_as_code() -> None:
    assert "llava_steps.settings.blend" in modules_of("llava_steps.train")
