"""The attempts to compute a value: their logs, and the time of those that did not finish it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def begin(logs: Path) -> tuple[int, Path]:
    """The number and the log file of a new attempt; notes that it begins now."""
    number = 1 + len(list(logs.glob("attempt-*.log")))
    log = _log(logs, number)
    logs.mkdir(parents=True, exist_ok=True)
    log.with_suffix(".begun").touch()
    return number, log


def earlier_s(logs: Path, number: int) -> float:
    """Seconds that the attempts before `number` took, each until its last message.

    An attempt of a version that did not note the beginning counts for nothing.
    """
    total = 0.0
    for earlier in range(1, number):
        log = _log(logs, earlier)
        begun = log.with_suffix(".begun")
        if log.exists() and begun.exists():
            # Both are times of the file system, whatever the clocks of the machines say.
            total += max(0.0, log.stat().st_mtime - begun.stat().st_mtime)
    return round(total, 3)


def whole_s(manifest: Mapping[str, Any]) -> float:
    """Seconds that a value took over all of its attempts."""
    return float(manifest.get("wall_s", 0.0)) + float(manifest.get("earlier_s", 0.0))


def _log(logs: Path, number: int) -> Path:
    return logs / f"attempt-{number:04d}.log"
