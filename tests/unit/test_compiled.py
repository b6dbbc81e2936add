"""Compiled layers, tower and head, their graphs run operation by operation, against plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava_steps.model import cpu_shim

cpu_shim.install()

from llava_steps.conversion.rope import rotate  # noqa: E402
from llava_steps.model import compiled, kernels  # noqa: E402
from tests.helpers import fast_model  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shared", [1, 3])
def test_attention_and_its_gradients(shared: int) -> None:
    borders, scale, groups = torch.tensor([0, 3, 10, 11], dtype=torch.int32), 0.3, 2
    mixed = torch.randn(11, groups, shared + 2, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(11, 4, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def plain() -> Tensor:
        q, k, v = mixed.split((shared, 1, 1), 2)
        q, k = (rotate(x, cos[:, None, None], sin[:, None, None]) for x in (q, k))
        scores = torch.einsum("tgsd,ugxd->gstu", q, k) * scale
        sample = torch.searchsorted(borders[1:].long(), torch.arange(11), right=True)
        seen = (sample[:, None] == sample) & torch.ones(11, 11, dtype=torch.bool).tril()
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("gstu,ugxd->tgsd", p, v).flatten(1, 2)

    ours = kernels.attention(mixed, cos, sin, borders, torch.tensor(7), scale, "torch")[0]
    torch.testing.assert_close(ours, plain())
    weight = torch.randn_like(ours)
    (found,) = torch.autograd.grad((ours * weight).sum(), mixed)
    (wanted,) = torch.autograd.grad((plain() * weight).sum(), mixed)
    torch.testing.assert_close(found, wanted)


def test_swiglu_and_its_gradient() -> None:
    x, grad = torch.randn(5, 12, dtype=torch.float64, requires_grad=True), torch.randn(5, 6)
    gate, up = x.chunk(2, -1)
    plain = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(kernels.swiglu(x), plain)
    (found,) = torch.autograd.grad(kernels.swiglu(x), x, grad.double())
    torch.testing.assert_close(found, torch.autograd.grad(plain, x, grad.double())[0])


def test_a_weight_gradient_is_added_to_what_is_there() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    main = torch.ones(4, 3)
    grad = torch.randn(5, 4)
    kernels.linear(x, weight, main).backward(grad)
    torch.testing.assert_close(main, 1 + grad.t() @ x.detach())
    torch.testing.assert_close(x.grad, grad @ weight)
    kernels.linear(x, weight, torch.empty(0)).backward(grad)
    torch.testing.assert_close(x.grad, 2 * grad @ weight)


def test_words_and_features() -> None:
    weight, trained = torch.randn(9, 4, requires_grad=True), torch.empty(0, requires_grad=True)
    features = torch.randn(2, 4, requires_grad=True)
    tokens = torch.tensor([3, 8, 8, 3, 5])
    texts, images = torch.tensor([0, 3, 4]), torch.tensor([1, 2])
    main, grad = torch.zeros(9, 4), torch.randn(5, 4)
    out = kernels.Words.apply(trained, weight.detach(), main, features, tokens, texts, images)
    plain = torch.nn.functional.embedding(tokens, weight).index_copy(0, images, features)
    torch.testing.assert_close(out, plain)
    out.backward(grad)
    wanted = torch.autograd.grad(plain, (weight, features), grad)
    assert weight.grad is None
    torch.testing.assert_close(main, wanted[0])
    torch.testing.assert_close(features.grad, wanted[1])


def test_head_losses_and_gradients_for_any_number_of_positions() -> None:
    before = _graphs()
    weight = torch.randn(11, 6)
    weight.requires_grad_()
    for count in (2, 7, 30):
        hidden, labels = torch.randn(count, 6, requires_grad=True), torch.randint(11, (count,))
        weight.main_grad = torch.zeros(11, 6)
        losses = compiled.losses(hidden, weight, labels)
        plain = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
        torch.testing.assert_close(losses, plain)
        losses.sum().backward()
        wanted = torch.autograd.grad(plain.sum(), (hidden, weight))
        torch.testing.assert_close(hidden.grad, wanted[0])
        torch.testing.assert_close(weight.main_grad, wanted[1])
    assert _graphs() - before == 1, "compiled once"


def test_training_without_main_gradients_is_refused() -> None:
    weight = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        compiled.main_grad(weight)
    with torch.no_grad():
        assert compiled.main_grad(weight).numel() == 0


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def test_a_compiled_model_has_the_gradients_of_transformers(tmp_path: Path) -> None:
    loss, gradient, graphs = fast_model.compare(tmp_path, "fp32", compiled=True)
    assert loss <= 1e-6 and gradient <= 1e-5
    assert graphs == 3, "layers, tower and head, whatever the lengths"


def test_gradients_in_bf16(tmp_path: Path) -> None:
    loss, gradient, _ = fast_model.compare(tmp_path, "bf16", compiled=True, usual=True)
    print(f"bf16: loss {loss:.1e}, gradient {gradient:.1e}")
    assert loss <= 1e-3 and gradient <= 1e-2


def test_the_fused_optimizer_clips_and_updates_as_the_other(tmp_path: Path) -> None:
    fast_model.command("updates", tmp_path)
    plain, fused = (load_file(tmp_path / f"{kind}.safetensors") for kind in ("plain", "fused"))
    start = load_file(tmp_path / "start.safetensors")
    for name in start:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-5, atol=1e-6)
    moved = [float((plain[name] - start[name]).abs().max()) for name in start]
    assert min(moved) > 1e-3, "everything trained has moved"
