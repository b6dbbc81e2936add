"""FP8 products of compiled layers, without a GPU: torch has scaled products for a CPU as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_steps.model import fp8
from tests.helpers import fast_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def as_rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as FP8 with one scale holds it, by float64 arithmetic of its own."""
    x = x.double()
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).double() * scale


@pytest.mark.parametrize("trained", [True, False])
def test_a_product_and_its_gradients(trained: bool) -> None:
    x, weight, grad = bf16(32, 48).requires_grad_(), bf16(64, 48), bf16(32, 64)
    main = torch.ones(64, 48) if trained else torch.empty(0)
    out = fp8.linear(x, weight, main)
    out.backward(grad)
    of_x, of_weight = (as_rounded(t.detach(), torch.float8_e4m3fn) for t in (x, weight))
    of_grad = as_rounded(grad, torch.float8_e5m2)
    assert out.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), of_x @ of_weight.t(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.grad.double(), of_grad @ of_weight, rtol=1e-2, atol=1e-2)
    if trained:
        torch.testing.assert_close(main.double(), 1 + of_grad.t() @ of_x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("peak", [0.0, 1e-38, 1e-6, 3e38])
def test_any_magnitude(peak: float) -> None:
    x = (torch.tensor([[1.0, -0.5], [0.0, 0.25], [0.5, 0.1]]) * peak).bfloat16()
    scale = fp8.scale_of(x, torch.float8_e4m3fn)
    straight, across = fp8.fp8_round(x, scale, torch.float8_e4m3fn, straight=True, across=True)
    assert straight.shape == (3, 2) and across.is_contiguous()
    torch.testing.assert_close(straight.float(), across.t().float())
    torch.testing.assert_close(straight.float() * scale, x.float(), rtol=0.1, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x, weight = bf16(16, 16), bf16(16, 16)
    x[3, 5] = bad
    assert not torch.isfinite(fp8.linear(x, weight, torch.empty(0))).any()
    x[3, 5], main = 1, torch.zeros(16, 16)
    grad = bf16(16, 16)
    grad[0, 0] = bad
    fp8.linear(x.requires_grad_(), weight, main).backward(grad)
    assert not torch.isfinite(x.grad).any() and not torch.isfinite(main).any()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_of_compiled_layers(tmp_path: Path, recompute: str) -> None:
    how = {"fp8": "tensorwise", "wide": True, "recompute": recompute}
    loss, gradient, graphs = fast_model.compare(tmp_path, "bf16", compiled=True, **how)
    print(f"recompute {recompute}: loss {loss:.2e}, gradient {gradient:.2e}")
    assert loss <= 0.03 and 0.05 < gradient <= 0.25
    assert graphs == (3 if recompute == "none" else 4), "layer, tower and head"
