"""Peak figures of GPUs: by the name that the driver reports, and by name for a plan."""

from __future__ import annotations

from dataclasses import dataclass

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
name that the GPU's name contains applies."""


def peak_tflops(name: str, precision: str) -> float:
    """Peak of a GPU, 0 if unknown: other GPUs, and fp32, which does not use TF32 here."""
    if precision != "bf16":
        return 0.0
    return next((peak for known, peak in BF16_TFLOPS.items() if known in name), 0.0)


GIB = 2**30
SET_ASIDE = 0.08
"""Share of a GPU's memory reserved for the CUDA context, communication and fragmentation."""


@dataclass(frozen=True)
class Gpu:
    """gib: usable memory; bf16, fp32: peak operations a second of dense matrix products, fp32
    without TF32; link, net: bytes a second and direction to a GPU of the same and another node.
    """

    name: str
    gib: float
    bf16: float
    fp32: float
    link: float
    net: float = 50e9

    def peak(self, precision: str) -> float:
        """Operations a second in `precision`, bf16 or fp32."""
        return self.bf16 if precision == "bf16" else self.fp32


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 39.4, BF16_TFLOPS["A100"] * 1e12, 19.5e12, 300e9, 25e9),
        Gpu("A100", 79.1, BF16_TFLOPS["A100"] * 1e12, 19.5e12, 300e9, 25e9),
        Gpu("H100", 79.1, BF16_TFLOPS["H100"] * 1e12, 67e12, 450e9),
        Gpu("H200", 139.8, BF16_TFLOPS["H200"] * 1e12, 67e12, 450e9),
        Gpu("B200", 178.0, BF16_TFLOPS["B200"] * 1e12, 80e12, 900e9),
        Gpu("L40S", 44.5, BF16_TFLOPS["L40S"] * 1e12, 91.6e12, 32e9),
    )
}
"""NVIDIA's data sheets (A100, H100 and H200 SXM, B200, L40S), tensor cores without sparsity."""
