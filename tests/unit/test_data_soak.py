"""`make soak-data` with few stops, and once with a loader that loses its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steps.data.loader import loader as loader_module
from tests.benchmarks.soak_data import make_blend, soak
from tests.helpers.data_fixtures import make_hf_dir


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soak")
    make_blend(root)
    make_hf_dir(root / "hf")
    return root


@pytest.mark.parametrize("packing", [True, False])
def test_stops_in_changing_layouts_change_nothing(root: Path, packing: bool) -> None:
    assert soak(root, 4, 3, packing) == 4


def test_the_soak_notices_a_lost_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that goes on one sample late after a stop, with and without workers."""
    feed, serial = loader_module.Feed, loader_module.serial
    late = lambda make: lambda a, b, first: make(a, b, first + (first > 0))  # noqa: E731
    monkeypatch.setattr(loader_module, "Feed", late(feed))
    monkeypatch.setattr(loader_module, "serial", late(serial))
    assert soak(root, 3, 3, False) == 0
