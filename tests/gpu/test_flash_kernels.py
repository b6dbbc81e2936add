"""Flash attention on a GPU: result and gradients against float64, and the same again."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("kernel", ["torch", "fa4"])
def test_flash_attention(kernel: str, groups: int, head_dim: int, request: Any) -> None:
    from llava_steps.model import flash
    from tests.helpers.attention import causal

    if kernel == "fa4" and (missing := flash.missing_for_fa4(head_dim)):
        pytest.skip(f"FlashAttention 4 needs {missing}")
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    lengths = (1, 700, 128, 3, 129, 575)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(
            sum(lengths), heads, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16
        )
        for heads in (8, groups, groups, 8)
    )
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    how = borders, max(lengths), head_dim**-0.5, kernel

    def once() -> tuple[Any, ...]:
        out, lse = flash.attend(q, k, v, *how)
        return out, *flash.attend_backward(grad, q, k, v, out, lse, *how)

    found = once()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = causal(*exact, lengths, head_dim**-0.5)
    wanted = wanted.detach(), *torch.autograd.grad(wanted, exact, grad.double())
    for one, other in zip(found, wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 5e-3
    assert all(map(torch.equal, found, once()))
