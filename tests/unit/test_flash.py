"""Which flash attention is taken, and that FlashAttention 4's functions are called as they are.

They are stood in for by plain attention in float64, in functions with their names and arguments:
there is no GPU here. The real ones: tests/gpu/test_flash_kernels.py.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
import types
from typing import Any

import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch")

from llava_steps.core.errors import ConfigError  # noqa: E402
from llava_steps.geometry import flash4  # noqa: E402
from llava_steps.model import flash, kernels  # noqa: E402
from llava_steps.model.attention import dense_kernel, flash_kernel, pack  # noqa: E402
from llava_steps.settings.stage.stage import Stage  # noqa: E402
from tests.helpers.attention import causal  # noqa: E402

LENGTHS = (5, 1, 7)


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(version: str | None) -> None:
        def find(name: str) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", find)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    installed(flash4.VERSION)
    assert flash.choose("auto", 128) == "fa4" and flash.choose("torch", 128) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert flash.choose("auto", 128) == "torch" and flash.choose("fa4", 128) == "fa4"
    assert "capability 9 (Hopper)" in flash.missing_for_fa4(128, "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    # Its gradients for this size are wrong.
    assert flash.choose("auto", 16) == "torch"
    for version, capability, head_dim, wanted in (
        (None, (9, 0), 128, "pip install"),
        ("4.0.0b1", (9, 0), 128, "4.0.0b1 is installed"),
        (flash4.VERSION, (8, 0), 128, "this GPU has 8.0"),
        (flash4.VERSION, (9, 0), 16, "not 16"),
    ):
        installed(version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert flash.choose("auto", head_dim) == "torch"
        with pytest.raises(ConfigError, match=f"flash_attention: fa4 needs .*{wanted}"):
            flash.choose("fa4", head_dim)


def test_it_is_not_asked_for_where_none_is_used() -> None:
    with pytest.raises(ValidationError, match="fa4 needs precision bf16, not fp32; set it to auto"):
        Stage(flash_attention="fa4", precision="fp32")
    Stage(flash_attention="fa4"), Stage(flash_attention="torch", precision="fp32")


def stand_in() -> Any:
    """flash_attn.cute.interface with the two functions that are used."""

    def _flash_attn_fwd(
        q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float, causal: bool, return_lse: bool,
    ) -> Any:  # fmt: skip
        assert causal and return_lse and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        assert cu_seqlens_q is cu_seqlens_k
        out = plain(q, k, v, softmax_scale)
        return out, torch.zeros(q.shape[1], q.shape[0]), None, None, None

    def _flash_attn_bwd(
        q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, softmax_scale: float, causal: bool,
        *, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        deterministic: bool,
    ) -> Any:  # fmt: skip
        assert causal and lse.dtype == torch.float32
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert torch.equal(plain(q, k, v, softmax_scale), out)
        # By hand: autograd does not reach into an operation.
        samples = zip(*(x.split(list(LENGTHS)) for x in (dout, q, k, v)), strict=True)
        parts = [kernels._dense_backward(*sample, softmax_scale) for sample in samples]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def plain(q: Any, k: Any, v: Any, scale: float) -> Any:
        return causal(q, k, v, LENGTHS, scale)

    return types.SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.fixture
def fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = stand_in()
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setattr(flash, "takes", lambda x: True)
    flash._fa4.cache_clear()
    yield
    flash._fa4.cache_clear()


def rows() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return tuple(
        torch.randn(total, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )


@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("deterministic", [False, True])
def test_plain_layers_have_its_gradients(deterministic: bool, request: Any) -> None:
    torch.use_deterministic_algorithms(deterministic)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    q, k, v = (x.requires_grad_() for x in rows())
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    table = torch.ones(len(q), 8, dtype=torch.float64)
    packed = pack(borders, max(LENGTHS), table, table, kernel="fa4")
    assert packed.kernel == "fa4" and packed.to_dense is None
    out = flash_kernel(q, k, v, packed, None)
    grad = torch.randn(out.shape, dtype=torch.float64)
    found = torch.autograd.grad(out, (q, k, v), grad)
    flash.takes = lambda x: False  # type: ignore[assignment]  set back by the fixture
    dense = pack(borders, max(LENGTHS), table, table)
    wanted = dense_kernel(q, k, v, dense, None)
    assert torch.allclose(out, wanted, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.usefixtures("fa4")
def test_compiled_layers_have_its_gradients() -> None:
    q, k, v = rows()
    mixed = torch.cat((q.view(-1, 2, 2, 8), k[:, :, None], v[:, :, None]), 2).requires_grad_()
    borders = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    turned = torch.rand(len(q), 4, dtype=torch.float64)
    cos, sin = (torch.cat((x, x), 1) for x in (turned.cos(), turned.sin()))
    grads = []
    for kernel in ("fa4", "dense"):
        if kernel == "dense":
            flash.takes = lambda x: False  # type: ignore[assignment]  set back by the fixture
        out, *_ = kernels.attention(
            mixed, cos, sin, borders, torch.tensor(max(LENGTHS)), 8**-0.5, "fa4"
        )
        grads.append((out, *torch.autograd.grad(out, mixed, torch.ones_like(out).cumsum(0))))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_the_real_functions_take_these_arguments() -> None:
    interface = pytest.importorskip("flash_attn.cute.interface")
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        wanted = inspect.signature(getattr(stand_in(), name)).parameters
        assert set(wanted) <= set(inspect.signature(getattr(interface, name)).parameters)
