"""Transformer Engine's linears: what is refused, what megatron-core is told, and the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llava_steps.core.errors import ConfigError
from llava_steps.geometry import flash4
from llava_steps.geometry.geometry import Geometry
from llava_steps.model import cpu_shim
from llava_steps.settings.stage.stage import Stage

cpu_shim.install()

from llava_steps.launch import gpus, preflight, te_check  # noqa: E402
from llava_steps.model.options import ModelOptions, transformer_config  # noqa: E402
from llava_steps.training import forward  # noqa: E402
from tests.helpers import fast_model  # noqa: E402
from tests.helpers.dist_helpers import spawn  # noqa: E402
from tests.helpers.model_fixtures import config_of  # noqa: E402

GEOMETRY = Geometry.from_hf(config_of(fast_model.WIDE).to_dict())
OWN = {"fp8": True, "layer_spec": "local"}
H200: dict[str, Any] = {"gpus": [[9, 0]], "version": "2.20.2"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": True, "precision": "fp32"}, "fp8 needs precision bf16"),
        ({"layer_spec": "te", "precision": "fp32"}, "layer_spec te needs precision bf16"),
        ({"fp8": True, "recompute": "core_attn"}, "set recompute to none or full"),
        ({"fp8": True, "lora_rank": 4}, "set lora_rank to 0"),
        ({"layer_spec": "te", "recompute": "core_attn"}, "layer_spec te: .* none or full"),
        ({"layer_spec": "te", "lora_rank": 4}, "layer_spec te does not support LoRA"),
        ({"fp8_recipe": "blockwise"}, "fp8_recipe blockwise needs fp8"),
        (OWN | {"compile": "none"}, "needs compile auto or layers; or set layer_spec to te"),
        (OWN | {"fp8_recipe": "blockwise"}, "needs fp8_recipe tensorwise, not blockwise"),
        (OWN | {"gpus": 2, "tensor_model_parallel": 2}, "needs tensor_model_parallel 1, not 2"),
        (OWN | {"lora_rank": 4}, "needs no lora_rank"),
        (OWN | {"precision": "fp32"}, "fp8 needs precision bf16"),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Stage.model_validate({"stage": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "found", "message"),
    [
        ({}, H200 | {"gpus": []}, "fp8 needs a GPU, but torch sees none here; leave fp8 out"),
        ({}, {"gpus": [], "error": "no torch"}, r"sees none here \(no torch\)"),
        ({}, H200 | {"gpus": [[9, 0], [8, 0]]}, "capability 8.9 .*, but one here has 8.0"),
        ({"fp8_recipe": "blockwise"}, H200 | {"gpus": [[8, 9]]}, "capability 9.0"),
        ({}, H200 | {"version": "2.2.1"}, "2.3 or later, but 2.2.1 is installed"),
        ({}, {"gpus": [[9, 0]], "error": "OSError: libcudnn"}, "cannot be imported: OSError: lib"),
    ],
)
def test_what_the_machine_lacks(
    settings: dict[str, Any], found: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        te_check.refuse(Stage(fp8=True, **settings), "fp8", found)
    te_check.refuse(Stage(fp8=True, **settings), "fp8", H200)


def test_fp8_of_torch_needs_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage.model_validate({"stage": 2, **OWN})
    assert not stage.transformer_engine and stage.compiles(cuda=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(te_check, "probe", lambda gpu_ids, engine: {"gpus": [[9, 0]]})
    te_check.check(stage, GEOMETRY)
    with pytest.raises(ConfigError, match=r"not installed: .* or set layer_spec to local"):
        te_check.check(Stage(fp8=True), GEOMETRY)
    monkeypatch.setattr(te_check, "probe", lambda gpu_ids, engine: {"gpus": [[8, 0]]})
    with pytest.raises(ConfigError, match=r"capability 8.9 .*, but one here has 8.0"):
        te_check.check(stage, GEOMETRY)
    monkeypatch.setattr(te_check, "probe", gpus.probe)
    with pytest.raises(ConfigError, match="fp8 needs a GPU, but torch sees none here"):
        te_check.check(stage, GEOMETRY)


def test_the_probe_answers_without_a_gpu() -> None:
    assert gpus.probe("", engine=True) == gpus.probe("") == {"gpus": []}


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "PROBE", "import time; time.sleep(600)  # %(engine)r")
    found = gpus.probe("", limit=0.1)
    with pytest.raises(ConfigError, match=r"torch did not answer within 0.1 seconds\); leave fp8"):
        te_check.refuse(Stage(fp8=True), "fp8", found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"gpus": []}, "fa4 needs a GPU; or set it to auto or torch"),
        ({"gpus": [], "error": "no torch"}, r"fa4 needs a GPU \(no torch\); or set"),
        ({"gpus": [[9, 0], [8, 0]]}, "Blackwell.*, and this GPU has 8.0"),
    ],
)
def test_flash_attention_4_by_name_is_refused_before_any_process_starts(
    found: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: flash4.VERSION)
    monkeypatch.setattr(gpus, "probe", lambda gpu_ids: found)
    asked, able = Stage(flash_attention="fa4"), replace(GEOMETRY, head_dim=64)
    with pytest.raises(ConfigError, match=message):
        preflight.check_flash(asked, able)
    with pytest.raises(ConfigError, match="head_dim of 64 or 128, not 32"):
        preflight.check_flash(asked, replace(GEOMETRY, head_dim=32))
    preflight.check_flash(Stage(), able)
    monkeypatch.setattr(gpus, "probe", lambda gpu_ids: H200)
    preflight.check_flash(asked, able)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"layer_spec te needs .* pip install"):
        te_check.check(Stage(layer_spec="te"), GEOMETRY)
    te_check.check(Stage(), GEOMETRY)


@pytest.mark.parametrize("name", ["hidden", "ffn", "head_dim"])
def test_sizes(name: str) -> None:
    wrong = replace(GEOMETRY, **{name: 1000})
    with pytest.raises(ConfigError, match=r"tensorwise needs multiples of 16.*1000; use no fp8$"):
        te_check.check(Stage(fp8=True), replace(wrong, heads=1, kv_heads=1))
    options = ModelOptions("bf16", spec="te", fp8="blockwise")
    transformer_config(GEOMETRY, options)
    with pytest.raises(ConfigError, match="multiples of 128"):
        transformer_config(wrong, options)


def test_rows() -> None:
    assert forward.row_multiple(Stage(fp8=True)) == 128
    cut = {"gpus": 2, "tensor_model_parallel": 2, "global_batch_size": 2}
    assert forward.row_multiple(Stage(fp8=True, sequence_parallel=True, **cut)) == 256
    assert forward.row_multiple(Stage(precision="fp32")) == 1


def test_the_configuration_of_megatron() -> None:
    def settings(**options: Any) -> tuple[Any, ...]:
        found = transformer_config(GEOMETRY, ModelOptions("bf16", **options))
        return found.fp8, found.disable_parameter_transpose_cache, found.fp8_param

    assert settings() == (None, False, False)
    assert settings(spec="te") == (None, True, False)
    assert settings(spec="te", fp8="tensorwise") == ("hybrid", True, False)
    assert settings(spec="te", fp8="blockwise") == ("e4m3", True, False)
    found = transformer_config(GEOMETRY, ModelOptions("bf16", spec="te", fp8="blockwise"))
    assert found.fp8_recipe == "blockwise"


def test_an_engine_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_steps.model import te_spec

    monkeypatch.setattr(te_spec.extension, "HAVE_TE", False)
    with pytest.raises(ConfigError, match="cannot be imported here"):
        te_spec.linears()


def test_logits_are_those_of_the_local_spec(tmp_path: Path) -> None:
    """With every bias, and with norms of queries and keys. AdamW stays torch's."""
    (found,) = spawn("tests.helpers.te_stand_in:deviations", 1, tmp_path)
    assert max(found.values()) <= 3e-2, found


def test_gradients_and_checkpoint_are_those_of_the_local_spec(tmp_path: Path) -> None:
    """With a stand-in for the linears: names, main_grad, and no extra state in the checkpoint."""
    te = {"spec": "te", "fp8": "tensorwise", "wide": True}
    loss, gradient, graphs = fast_model.compare(tmp_path, "bf16", compiled=True, **te)
    assert loss <= 1e-2 and gradient <= 3e-2
    assert graphs == 2, "tower and head"
    fast_model.command("load", tmp_path)
