"""A small count of `make fuzz-data`, and that it notices what it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steps.data.samples import decode
from llava_steps.data.shards import writer
from llava_steps.data.sources import record
from tests.benchmarks import fuzz_data


def test_nothing_is_lost_and_nothing_breaks(tmp_path: Path) -> None:
    assert fuzz_data.fuzz(100, 1, tmp_path) == []


def cut_image(root: Path) -> str:
    data = fuzz_data.pictures()["jpeg"]
    return fuzz_data.attempt("cut", fuzz_data.with_image(data[:1500], "refuse"), root)


def test_an_image_that_is_accepted_unseen_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cut_image(tmp_path) == ""
    monkeypatch.setattr(record, "check_image", lambda *_: None)
    assert "cannot be decoded" in cut_image(tmp_path)


def test_a_sample_that_gets_lost_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.Plan, "add", lambda *_: [])
    monkeypatch.setattr(writer.Plan, "check", lambda *_: None)
    assert "lost" in cut_image(tmp_path)


def test_an_error_of_another_kind_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(decode.jpeg, "simple", fail)
    assert "uncaught KeyError" in cut_image(tmp_path)
