"""make test-cluster where no cluster can be made: it says so, and ends well."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster import drive, machine


def test_without_root_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["drive"])
    with pytest.raises(SystemExit) as ended:
        drive.main()
    assert not ended.value.code
    out, told = capsys.readouterr()
    assert "root" in json.loads(out.splitlines()[-1])["skipped"]
    assert told.startswith("test-cluster is skipped: not root")


def test_what_else_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "fedora"})
    assert "not Debian" in machine.missing(tmp_path)
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian"})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no apt-get" in machine.missing(tmp_path)
