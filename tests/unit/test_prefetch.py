"""Batches taken ahead: the same ones, the state of what was given out, errors where they belong."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from llava_steps.training import prefetch  # noqa: E402


class Loader:
    """Counts; the batch `bad` cannot be made."""

    def __init__(self, bad: int = -1) -> None:
        self.given, self.bad = 0, bad

    def __iter__(self) -> Iterator[Any]:
        while self.given != self.bad:
            self.given += 1
            yield [self.given]
        raise ValueError("a broken sample")

    def state(self) -> dict[str, Any]:
        return {"consumed_samples": self.given}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    event = types.SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 3.0
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(prefetch, "_event", lambda: event)
    monkeypatch.setattr(prefetch, "_pinned", lambda row: row)


@pytest.mark.usefixtures("gpu")
def test_the_state_is_that_of_what_was_given_out() -> None:
    loader = Loader()
    batches = prefetch.Prefetch(loader)  # type: ignore[arg-type]
    assert batches.state() == {"consumed_samples": 0}
    assert batches.next()[0] == [1]
    for number in (2, 3):
        batches.fetch()
        batches.fetch()  # a second call takes nothing more
        assert loader.given == number
        assert batches.state() == {"consumed_samples": number - 1}
        batch, lost = batches.next()
        assert batch == [number] and lost == 0.003
        assert batches.state() == {"consumed_samples": number}
    assert batches.next()[0] == [4], "without a fetch it is taken now"


@pytest.mark.usefixtures("gpu")
def test_an_error_comes_when_its_batch_is_wanted() -> None:
    batches = prefetch.Prefetch(Loader(bad=1))  # type: ignore[arg-type]
    batches.next()
    batches.fetch()
    assert batches.state() == {"consumed_samples": 1}
    with pytest.raises(ValueError, match="a broken sample"):
        batches.next()


def test_without_a_gpu_nothing_is_taken_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loader = Loader()
    batches = prefetch.Prefetch(loader)  # type: ignore[arg-type]
    batches.fetch()
    assert loader.given == 0
    assert batches.next()[0] == [1]
