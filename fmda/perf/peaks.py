"""Dense FLOP/s of devices by number format (bfloat16, float32), from their data sheets."""

import jax

# Looked up by the first key that occurs in the device kind, so longer names stand before shorter ones.
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989e12, 495e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 495e12),
    "A100-SXM4-40GB": (312e12, 156e12),
    "A100-PCIE-40GB": (312e12, 156e12),
    "A100": (312e12, 156e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 60e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5e": (197e12, 197e12),
    "TPU v5": (459e12, 459e12),
    "TPU v6": (918e12, 918e12),
}


def peak_flops(kind: str | None = None, dtype: str = "bfloat16") -> float | None:
    """Returns the FLOP/s of a device kind such as "NVIDIA H200" (default: jax's first device); None where unknown.

    "bfloat16" is for products with float32 sums, "float32" for jax's default precision of float32 (TensorFloat-32 on
    GPUs, bfloat16 on TPUs).
    """
    kind = jax.devices()[0].device_kind if kind is None else kind
    peaks = next((peaks for key, peaks in PEAKS.items() if key.lower() in kind.lower()), None)
    return None if peaks is None else peaks[dtype == "float32"]
