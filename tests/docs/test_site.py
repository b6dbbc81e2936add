"""The documentation site: built strictly, it refuses what is broken and loads nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from packaging.version import Version

from llava_steps import __version__

ROOT = Path(__file__).parents[2]


def build(root: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` without make, into `to`."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(to)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    result = build(ROOT, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"([^\"]+)\"", text)
        assert not [url for url in loaded if url.startswith(("http", "//"))], page


def test_broken_links_anchors_and_unlisted_pages_fail(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    page = tmp_path / "docs/index.md"
    broken = ("nowhere.md", "../tests/nothing.py", "guarantees.md#nothing")
    links = "".join(f"\n[link]({target})\n" for target in broken)
    page.write_text(page.read_text(encoding="utf-8") + links, encoding="utf-8")
    (tmp_path / "docs/stray.md").write_text("# Stray\n", encoding="utf-8")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    for what in ("nowhere.md", "tests/nothing.py", "#nothing", "stray.md"):
        assert what in result.stderr, what


def test_files_for_other_services_say_what_they_should() -> None:
    read = {
        name: yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        for name in ("CITATION.cff", ".pre-commit-config.yaml", ".snakemake-workflow-catalog.yml")
    }
    citation = read["CITATION.cff"]
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    hooks = [h for repo in read[".pre-commit-config.yaml"]["repos"] for h in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert set(read[".snakemake-workflow-catalog.yml"]) == {"usage"}


def test_versions_agree() -> None:
    """The newest release is the one to cite; what is not released yet has a version after it."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## \[(.+)\](?: - (\d{4}-\d\d-\d\d))?$", text, flags=re.M)
    assert titles[0] == ("Unreleased", "") and all(day for _, day in titles[1:])
    released, day = titles[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == (released, day)
    unreleased = text.partition("## [Unreleased]\n")[2].partition("\n## ")[0].strip()
    if unreleased:
        assert Version(__version__) > Version(released) and Version(__version__).is_devrelease
    else:
        assert __version__ == released
