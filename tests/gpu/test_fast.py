"""Compiled layers on a GPU: gradients against float64, and no more compilations than promised."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 1e-5), ("bf16", 0.0)])
def test_gradients(tmp_path: Path, precision: str, bar: float) -> None:
    """In bf16 the bar is what its rounding costs transformers itself."""
    from tests.helpers import fast_model

    found = {}
    if precision == "bf16":
        rounding = fast_model.transformers_alone(fast_model.SMALL, torch.bfloat16)
        print(f"transformers in bf16, on a CPU: gradient {rounding:.2e}")
        bar = 1.1 * rounding
    for compiled in (False, True):
        (directory := tmp_path / str(compiled)).mkdir()
        loss, gradient, graphs = fast_model.compare(directory, precision, compiled)
        print(f"{precision} {compiled}: loss {loss:.2e}, gradient {gradient:.2e}, {graphs} graphs")
        assert loss <= bar and gradient <= bar
        assert graphs == (3 if compiled else 0)
        found[compiled] = gradient
    assert found[True] <= 1.2 * found[False], "compiled layers are as near as the others"


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_in_bf16_with_usual_weights(tmp_path: Path, compiled: bool) -> None:
    from tests.helpers import fast_model

    loss, gradient, _ = fast_model.compare(tmp_path, "bf16", compiled, usual=True)
    print(f"bf16 {compiled}: loss {loss:.2e}, gradient {gradient:.2e}")
    assert loss <= 1e-3 and gradient <= 1e-2
