"""What devices can do at most: dense FLOP/s by number format, memory bandwidth and size, from their data sheets."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Peak:
    """Data-sheet values of one device, dense (no structured sparsity).

    Attributes:
        bfloat16: FLOP/s of bfloat16 products with float32 sums.
        float32: FLOP/s of float32 products at jax's default precision (TensorFloat-32 on GPUs, bfloat16 on TPUs).
        bandwidth: bytes/s of the main memory.
        memory: bytes.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float


# Looked up by the first key that occurs in the device kind, so longer names stand before shorter ones.
PEAKS: dict[str, Peak] = {
    "H200": Peak(989e12, 495e12, 4.8e12, 141e9),
    "H100 PCIe": Peak(756e12, 378e12, 2.0e12, 80e9),
    "H100": Peak(989e12, 495e12, 3.35e12, 80e9),
    "A100-SXM4-40GB": Peak(312e12, 156e12, 1.555e12, 40e9),
    "A100-PCIE-40GB": Peak(312e12, 156e12, 1.555e12, 40e9),
    "A100": Peak(312e12, 156e12, 2.039e12, 80e9),
    "L40": Peak(181e12, 90.5e12, 0.864e12, 48e9),
    "L4": Peak(121e12, 60e12, 0.3e12, 24e9),
    "TPU v4": Peak(275e12, 275e12, 1.2288e12, 32 * 2**30),
    "TPU v5 lite": Peak(197e12, 197e12, 0.819e12, 16 * 2**30),
    "TPU v5e": Peak(197e12, 197e12, 0.819e12, 16 * 2**30),
    "TPU v5": Peak(459e12, 459e12, 2.765e12, 95 * 2**30),
    "TPU v6": Peak(918e12, 918e12, 1.64e12, 32 * 2**30),
}


def device_peak(kind: str | None = None) -> Peak | None:
    """Returns the data sheet of a device kind such as "NVIDIA H200", or None for an unknown one (CPUs among them).

    The default is the kind of jax's first device.
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    return next((peak for key, peak in PEAKS.items() if key.lower() in kind.lower()), None)


def peak_flops(kind: str | None = None, dtype: str = "bfloat16") -> float | None:
    """Returns the FLOP/s of one device for products in `dtype` ("bfloat16" or "float32"); None where unknown."""
    peak = device_peak(kind)
    return None if peak is None else {"bfloat16": peak.bfloat16, "float32": peak.float32}[dtype]
