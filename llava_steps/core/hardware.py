"""What a GPU can do at most, by the name that its driver gives it."""

from __future__ import annotations

BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}
"""Dense bf16 matrix products in 10^12 operations a second, as NVIDIA's data sheets say. The first
name that the GPU's own contains counts."""


def peak_tflops(name: str, precision: str) -> float:
    """Peak of a GPU, 0 where none is known: other GPUs, and fp32, for which we set no TF32."""
    if precision != "bf16":
        return 0.0
    return next((peak for known, peak in BF16_TFLOPS.items() if known in name), 0.0)
