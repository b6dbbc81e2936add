"""What some tests need and few machines have."""

from __future__ import annotations

import importlib.util

import pytest

ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
SENTENCEPIECE = pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None,
    reason="needs sentencepiece, a dependency of the project: run .ci/environment test",
)
