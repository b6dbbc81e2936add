"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chain as chain_module


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> chain_module.Chain:
    """The tiny chain; one for all parallel test workers of this session."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    return chain_module.make(Path(shared) / "chain")
