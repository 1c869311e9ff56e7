"""Peak speed and memory of GPUs, from their makers' data sheets. The speed is that of dense bfloat16 products, without sparsity."""

from __future__ import annotations

import re
from typing import NamedTuple

MFU = 0.4
"""Assumed share of a device's peak at which training computes. Not measured."""


class Device(NamedTuple):
    name: str
    flops: float
    """Dense bfloat16 FLOP/s of the tensor cores with float32 accumulation."""
    gibibytes: int
    """Memory as it is sold. The A100 and the H100 come in two sizes; this is the larger one."""


# A name comes before a shorter name that it contains, since the first match counts.
DEVICES = (
    Device("B200", 2250e12, 180),
    Device("H200 NVL", 835e12, 141),
    Device("H200", 989e12, 141),
    Device("H100 PCIe", 756e12, 80),
    Device("H100 NVL", 835e12, 94),
    Device("H100", 989e12, 80),
    Device("A100", 312e12, 80),
    Device("L40S", 362e12, 48),
    Device("A6000", 155e12, 48),
    Device("A10G", 70e12, 24),
    Device("A10", 125e12, 24),
    Device("L4", 121e12, 24),
    Device("RTX 4090", 165e12, 24),
    Device("RTX 3090", 71e12, 24),
)


def find_device(name: str) -> Device | None:
    """Return the device that a name means, such as CUDA's ``NVIDIA H100 80GB HBM3``; None if the table has no such device."""
    words = " ".join(re.findall(r"[a-z0-9]+", name.lower()))
    for device in DEVICES:
        if re.search(rf"\b{device.name.lower()}\b", words):
            return device
    return None


def peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a known device in ``bf16``; None for another device or precision.

    Float32 has no single peak: PyTorch's settings decide which units compute it.
    """
    device = find_device(name)
    return device.flops if device and precision == "bf16" else None
