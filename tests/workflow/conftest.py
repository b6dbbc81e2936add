"""Copies of the project with stub steps: fresh, and with the whole chain run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.workflow.project import Project, make_project


def _copy(source: Path, target: Path) -> Project:
    shutil.copytree(source, target, symlinks=True)
    return Project(target)


@pytest.fixture(scope="session")
def _fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project") / "fresh").root


@pytest.fixture(scope="session")
def _finished(_fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = _copy(_fresh, tmp_path_factory.mktemp("project") / "finished")
    project.snakemake("--cores", "2")
    return project.root


@pytest.fixture
def fresh(_fresh: Path, tmp_path: Path) -> Project:
    """A project in which nothing has run."""
    return _copy(_fresh, tmp_path / "project")


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Project:
    """A project in which the whole chain has run; its calls are forgotten."""
    project = _copy(_finished, tmp_path / "project")
    project.forget_calls()
    return project
