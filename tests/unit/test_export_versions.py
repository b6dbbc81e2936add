"""Exports answer the same in every transformers that they are made for.

Older versions are installed from the package index into pytest's cache, each in a directory of its
own that goes before the installed one; everything else (torch, numpy, Pillow) is shared.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_steps import build_hf, hf_to_megatron, megatron_to_hf
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.core.errors import ConfigError
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.conversion import HfExport, HfModel, MegatronCheckpoint
from tests.helpers.chain import ROOT, environment
from tests.helpers.data_fixtures import fake_context
from tests.helpers.hf_fixtures import make_siglip, make_text, make_tokenizer, make_tower

VERSIONS = {
    "4.45.2": ("tokenizers==0.20.3", "huggingface_hub==0.36.0"),
    "4.57.1": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 777.0}
MODELS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    # name: (siglip?, text model, build_hf)
    "clip-llama": (False, {"rope_parameters": LLAMA3}, {}),
    "siglip-qwen2-tied": (
        True,
        {"family": "qwen2", "rope_parameters": THETA, "tie_word_embeddings": True},
        {"vision_feature_select_strategy": "full"},
    ),
}


def export(root: Path, hf: Path, name: str) -> Path:
    """The step megatron_to_hf in format `name`."""
    out = root / name
    out.mkdir()
    context = fake_context(out, megatron_dir=root / "megatron", tokenizer_dir=hf)
    megatron_to_hf.run(context, HfExport.model_validate({"export_format": name}))
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Format -> an export of each model."""
    found: dict[str, list[Path]] = {"transformers-5": [], "transformers-4": []}
    for name, (siglip, text_settings, settings) in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        tower = (make_siglip if siglip else make_tower)(root / "tower")
        text = make_text(root / "text", make_tokenizer(), **text_settings)
        hf = root / "hf"
        for directory in (hf, root / "megatron"):
            directory.mkdir()
        cfg = HfModel(vision_tower=str(tower), text_model=str(text), **settings)
        build_hf.run(fake_context(hf, vision_tower=tower, text_model=text), cfg)
        hf_to_megatron.run(fake_context(root / "megatron", hf_dir=hf), MegatronCheckpoint())
        for form, paths in found.items():
            paths.append(export(root, hf, form))
    return found


def installed(version: str, cache: Path) -> Path:
    """A directory with this transformers and what it needs in other versions than ours."""
    target = cache / f"transformers-{version}"
    with open(cache / f"{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "done").exists():
            line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
            packages = (f"transformers=={version}", *VERSIONS[version])
            line += ["--disable-pip-version-check", "--upgrade", "--target", str(target), *packages]
            subprocess.run(line, check=True, capture_output=True, text=True)
            (target / "done").touch()
    return target


def ask(paths: list[Path], out: Path, before: Path | None = None) -> dict[str, np.ndarray]:
    """tests/helpers/answers.py, with the packages in `before` instead of the installed ones."""
    env = environment()
    if before is not None:
        env["PYTHONPATH"] = os.pathsep.join((str(before), env["PYTHONPATH"]))
    line = [sys.executable, str(ROOT / "tests/helpers/answers.py"), str(out), *map(str, paths)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


@pytest.fixture(scope="module")
def expected(
    exports: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """What the installed transformers makes of the default format."""
    return ask(exports["transformers-5"], tmp_path_factory.mktemp("answers") / "five.npz")


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"version"}:
        if key.endswith(("logits", "pixels")):
            limit = 1e-4 if key.endswith("logits") else 1e-6
            assert np.abs(found[key] - expected[key]).max() <= limit, key
        else:
            assert np.array_equal(found[key], expected[key]), key


@pytest.mark.parametrize("version", VERSIONS)
def test_older_versions_answer_the_same(
    version: str,
    exports: dict[str, list[Path]],
    expected: dict[str, np.ndarray],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    target = installed(version, request.config.cache.mkdir("transformers"))
    found = ask(exports["transformers-4"], tmp_path / "out.npz", target)
    assert str(found["version"]) == version
    same(found, expected)


def test_the_newest_version_reads_both_formats(
    exports: dict[str, list[Path]], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    found = ask(exports["transformers-4"], tmp_path / "out.npz")
    assert int(str(found["version"]).split(".")[0]) >= 5
    same(found, expected)
    assert expected["0.logits"].std() > 0.1, "the models say something"


def test_the_keys_are_those_of_the_time(exports: dict[str, list[Path]]) -> None:
    for new, old in zip(exports["transformers-5"], exports["transformers-4"], strict=True):
        with TensorDirectory(new) as theirs, TensorDirectory(old) as ours:
            towers = {n for n in theirs.slots if n.startswith("vision_tower.")}
            inner = {n.replace("vision_tower.", "vision_tower.vision_model.", 1) for n in towers}
            assert ours.slots.keys() == inner | (theirs.slots.keys() - towers)
            assert any(n.startswith("language_model.model.layers.1.") for n in ours.slots)
            for name in theirs.slots:
                older = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
                assert theirs.read(name).equal(ours.read(older))


def test_what_older_versions_cannot_count_is_refused(
    exports: dict[str, list[Path]], tmp_path: Path
) -> None:
    """A SigLIP whose first patch is dropped: 4.45 has no number for it."""
    from llava_steps.conversion.export_format import rewrite_companions

    source = exports["transformers-5"][1]
    geometry = Geometry.load(source)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text().replace('_strategy": "full"', '_strategy": "default"')
            (tmp_path / path.name).write_text(text)
    geometry = Geometry.load(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot count 8 image tokens for 9 patches"):
        rewrite_companions(tmp_path, geometry)
