"""Copies of the project with stub steps: fresh, and with the whole chain run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.workflow.project import MODULES, ROOT, STEP, STUB, Project


def _copy(source: Path, target: Path) -> Project:
    shutil.copytree(source, target, symlinks=True)
    return Project(target)


@pytest.fixture(scope="session")
def _fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project") / "fresh"
    package = root / "llava_steps"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llava_steps/core", package / "core", ignore=skip)
    shutil.copytree(ROOT / "llava_steps/planning", package / "planning", ignore=skip)
    for name in ("__init__.py", "plan.py"):
        shutil.copy(ROOT / "llava_steps" / name, package)
    (package / "stub.py").write_text(STUB)
    for module, (config, name) in MODULES.items():
        (package / f"{module}.py").write_text(STEP.format(config=config, name=name))
    for folder in ("workflow", "config"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skip)
    for link in ("slurm", "local"):
        (root / link).symlink_to((ROOT / link).readlink())
    return root


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
