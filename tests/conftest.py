"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys

import pytest

from tests.helpers import chain as chain_module
from tests.helpers.chain import shared

# Tests start hundreds of processes. Where Python is told, as in many containers, not to keep what
# it compiles, each of them compiles torch and megatron anew: 15 s of a processor.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Several tests run side by side: threads of each would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> chain_module.Chain:
    """The tiny chain; one for all parallel test workers of this session."""
    return chain_module.make(shared(tmp_path_factory) / "chain")
