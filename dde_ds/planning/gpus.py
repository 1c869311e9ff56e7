"""What GPUs can do at most, from their makers' data sheets: dense bfloat16 products, without sparsity, and memory."""

from __future__ import annotations

import re
from typing import NamedTuple

MFU = 0.4
"""Assumed share of the device's peak that training computes at. Not measured."""


class Device(NamedTuple):
    name: str
    flops: float
    """Dense bfloat16 FLOP/s of the tensor cores with float32 accumulation."""
    gibibytes: int
    """Memory as it is sold; an A100 and an H100 come in two sizes, of which this is the larger."""


# A more special name stands before the one that it contains.
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
    """The device that a name means, such as CUDA's ``NVIDIA H100 80GB HBM3``; None where the table has none."""
    words = " ".join(re.findall(r"[a-z0-9]+", name.lower()))
    for device in DEVICES:
        if re.search(rf"\b{device.name.lower()}\b", words):
            return device
    return None


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s at most, for ``bf16`` on a known device; None elsewhere. Float32 has no one peak: PyTorch's settings decide which units
    compute it."""
    device = find_device(name)
    return device.flops if device and precision == "bf16" else None
