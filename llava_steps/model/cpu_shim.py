"""Patches that let megatron-core run without CUDA; no other module has such patches.

megatron-core assumes a CUDA device in a few places of the ordinary training path. `install()` makes
these places work on CPU; on a machine with CUDA it does nothing. Each entry of `PATCHES` is
one function with the reason in its docstring, and a test for its need.

torch's factory functions (torch.empty, torch.zeros ...) are deliberately not replaced: that would
defeat `with torch.device("meta")`, and transformers would then build CLIP position ids from
uninitialised memory without an error. A `TorchFunctionMode` sits below such contexts instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_installed = False


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class CudaIsCpu(TorchFunctionMode):
    """Maps requests for a CUDA device to the CPU, for the thread that entered the mode.

    * `device="cuda"` literals: schedules.py, clip_grads.py, optimizer.py and others make their
      counters and scales with them.
    * `Tensor.cuda()`: tied embeddings, state that is loaded from a checkpoint.
    * `Tensor.type()` without arguments answers with the CUDA name: the optimizers, clip_grads and
      the float16 wrapper compare it with "torch.cuda.FloatTensor" and skip or refuse anything else.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *(CPU if _is_cuda(arg) else arg for arg in args[1:]))
        if func is torch.Tensor.type:
            if len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.", 1)
            args = tuple(a.replace("torch.cuda.", "torch.") if type(a) is str else a for a in args)
        return func(*args, **kwargs)


def device_mode() -> None:
    """`device="cuda"`, `Tensor.cuda()` and `Tensor.type()`: see CudaIsCpu."""
    CudaIsCpu().__enter__()  # type: ignore[no-untyped-call]


def current_device() -> None:
    """Layers, norms and buffers allocate on `torch.cuda.current_device()`."""
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


def rng_state() -> None:
    """The tensor-parallel RNG tracker saves, seeds and restores the CUDA generator's state."""
    from megatron.core.tensor_parallel import random as tracker

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    def reseed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = reseed
    # The tracker bypasses torch.cuda with its own pair.
    tracker._get_cuda_rng_state = get_state
    tracker._set_cuda_rng_state = set_state


def synchronize() -> None:
    """Checkpoint saving and the timers wait for the device."""
    torch.cuda.synchronize = lambda device=None: None


def import_megatron() -> None:
    """Import megatron-core without torch's compiler, if there is no CUDA; call it first.

    megatron-core wraps its fused functions in torch.compile as it is imported, and the wrapping
    loads the compiler: a third of the start-up time of a process. They stay plain functions here;
    with the options of this project none is called anyway.
    """
    if torch.cuda.is_available():
        return
    wrap = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda other: other)  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.distributed")
    finally:
        torch.compile = wrap


PATCHES: tuple[Callable[[], None], ...] = (device_mode, current_device, rng_state, synchronize)


def install() -> bool:
    """Apply every patch once, if there is no CUDA. True when this process runs on the shim."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        for patch in PATCHES:
            patch()
        _installed = True
    return True
